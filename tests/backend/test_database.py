from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ptlab.backend import database
from ptlab.backend.database import Database
from ptlab.errors import ConfigError, InvalidRequestError, NotFoundError, StoreError

MIGRATIONS = (("CREATE TABLE items (name TEXT PRIMARY KEY, data BLOB)",),)
ROOT = Path(__file__).parents[2]


@contextmanager
def opened(path: Path | None, **options: Any) -> Iterator[Database]:
    opened_database = Database.open(path, MIGRATIONS, **options)
    try:
        yield opened_database
    finally:
        opened_database.close()


def insert(name: str, size: int = 1) -> Callable[[sqlite3.Connection], str]:
    def work(connection: sqlite3.Connection) -> str:
        connection.execute("INSERT INTO items VALUES (?, ?)", [name, name[:1].encode() * size])
        return name

    return work


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM items ORDER BY rowid")]


def names_in(path: Path) -> list[str]:
    with opened(path) as reopened:
        return asyncio.run(reopened.read("names", names))


def blocking(entered: threading.Event, go_on: threading.Event) -> Callable[[sqlite3.Connection], None]:
    """Work that keeps the writer busy, so that what comes next waits together."""

    def work(connection: sqlite3.Connection) -> None:
        entered.set()
        assert go_on.wait(20)

    return work


async def queued_together(used: Database, *works: Callable[[sqlite3.Connection], Any]) -> list[Any]:
    """Run the works as the writer finds them after a busy time: all waiting. Results and exceptions."""
    entered, go_on = threading.Event(), threading.Event()
    first = asyncio.create_task(used.write("busy", blocking(entered, go_on)))
    await asyncio.to_thread(entered.wait, 20)
    tasks = [asyncio.create_task(used.write("insert", work)) for work in works]
    await asyncio.sleep(0)  # each has started, and so queued its write
    go_on.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def run_python(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_write_is_read_back_and_survives_reopening(tmp_path: Path, in_memory: bool) -> None:
    path = None if in_memory else tmp_path / "deep" / "d.sqlite"

    async def use(used: Database) -> None:
        assert await used.write("insert", insert("a")) == "a"
        assert await used.read("names", names) == ["a"]

    with opened(path) as used:
        asyncio.run(use(used))
    if path is not None:
        assert names_in(path) == ["a"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_commits_are_synced_and_the_log_is_wal(tmp_path: Path) -> None:
    async def pragmas(used: Database) -> list[Any]:
        wanted = ["PRAGMA synchronous", "PRAGMA journal_mode"]
        return await used.write("pragmas", lambda connection: [connection.execute(pragma).fetchone()[0] for pragma in wanted])

    with opened(tmp_path / "d.sqlite") as used:
        assert asyncio.run(pragmas(used)) == [2, "wal"]  # 2 = FULL


def test_writes_that_wait_together_share_a_transaction_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"

    def seen_from_outside(_: sqlite3.Connection) -> int:
        other = sqlite3.connect(path)  # sees what is committed
        count: int = other.execute("SELECT COUNT(*) FROM items").fetchone()[0]
        other.close()
        return count

    async def use(used: Database) -> None:
        *inserted, seen = await queued_together(used, *(insert(f"n{i}") for i in range(20)), seen_from_outside)
        assert inserted == await used.read("names", names) == [f"n{i}" for i in range(20)]
        assert seen == 0

    with opened(path) as used:
        asyncio.run(use(used))


def test_a_failing_write_fails_alone(tmp_path: Path) -> None:
    def half(connection: sqlite3.Connection) -> None:
        insert("half")(connection)
        raise NotFoundError("no such thing")

    async def use(used: Database) -> None:
        a, duplicate, missing, unholdable, b = await queued_together(used, insert("a"), insert("a"), half, insert("\ud800"), insert("b"))
        assert (a, b) == ("a", "b")
        assert isinstance(duplicate, StoreError) and "insert failed, nothing of it was written: UNIQUE constraint" in duplicate.message
        assert isinstance(duplicate.__cause__, sqlite3.IntegrityError)
        assert isinstance(missing, NotFoundError)
        assert isinstance(unholdable, InvalidRequestError) and "valid Unicode" in unholdable.message
        assert await used.read("names", names) == ["a", "b"]

    with opened(tmp_path / "d.sqlite") as used:
        asyncio.run(use(used))


def test_a_write_too_large_for_the_disk_fails_alone_and_later_ones_work(tmp_path: Path) -> None:
    """SQLITE_FULL takes the whole transaction with it: the neighbours must be written nevertheless."""

    async def use(used: Database) -> None:
        def set_pages(count: int) -> Callable[[sqlite3.Connection], Any]:
            return lambda connection: connection.execute(f"PRAGMA max_page_count = {count}").fetchone()

        await used.write("limit", set_pages(64))  # 256 KB
        before, large, after = await queued_together(used, insert("before"), insert("large", 10**6), insert("after"))
        assert (before, after) == ("before", "after")
        assert isinstance(large, StoreError) and "full" in large.message
        assert await used.read("names", names) == ["before", "after"]
        await used.write("limit", set_pages(10**6))
        await used.write("insert", insert("large", 10**6))
        assert await used.read("names", names) == ["before", "after", "large"]

    with opened(tmp_path / "d.sqlite") as used:
        asyncio.run(use(used))


FAILING_DISK = """
import asyncio, resource, sys
from pathlib import Path
from ptlab.backend.database import Database
sys.path.insert(0, sys.argv[2])
from test_database import MIGRATIONS, insert, names, queued_together

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def use(used):
    await used.write("insert", insert("first"))
    allow(200_000)                                         # a write beyond fails with EFBIG
    works = [insert("before"), insert("large", 10**6), insert("large"), insert("after")]    # the commit fails, with a duplicate in it
    before, large, small, after = await queued_together(used, *works)
    print(before, type(large).__name__, small, after, await used.read("names", names))
    allow(8192)                                            # the log is longer already
    print([type(error).__name__ for error in await queued_together(used, insert("x"), insert("y"))])
    allow(resource.RLIM_INFINITY)
    await used.write("insert", insert("last", 10**6))
    print(await used.read("names", names))

used = Database.open(Path(sys.argv[1]), MIGRATIONS)
asyncio.run(use(used))
used.close()
"""


def test_io_errors_reach_the_writes_they_hit_and_later_ones_work(tmp_path: Path) -> None:
    child = run_python(FAILING_DISK, str(tmp_path / "d.sqlite"), str(Path(__file__).parent))
    output = child.communicate(timeout=60)[0].decode().splitlines()
    assert child.returncode == 0
    assert output == [
        "before StoreError large after ['first', 'before', 'large', 'after']",
        "['StoreError', 'StoreError']",
        "['first', 'before', 'large', 'after', 'last']",
    ]
    assert names_in(tmp_path / "d.sqlite") == ["first", "before", "large", "after", "last"]


def test_a_cancelled_caller_does_not_take_its_write_back(tmp_path: Path) -> None:
    async def use(used: Database) -> None:
        entered, go_on = threading.Event(), threading.Event()
        first = asyncio.create_task(used.write("busy", blocking(entered, go_on)))
        await asyncio.to_thread(entered.wait, 20)
        cancelled = asyncio.create_task(used.write("insert", insert("cancelled")))
        failing = asyncio.create_task(used.write("insert", insert("cancelled")))  # a duplicate: its error has nobody to go to
        kept = asyncio.create_task(used.write("insert", insert("kept")))
        await asyncio.sleep(0)
        assert cancelled.cancel() and failing.cancel()
        go_on.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await kept == "kept"
        assert await used.read("names", names) == ["cancelled", "kept"]

    with opened(tmp_path / "d.sqlite") as used:
        asyncio.run(use(used))


def test_a_loop_that_ends_with_writes_queued_leaves_them_written_and_the_next_loop_works(tmp_path: Path) -> None:
    go_on = threading.Event()

    async def leave(used: Database) -> None:
        entered = threading.Event()
        tasks = [
            asyncio.create_task(used.write("busy", blocking(entered, go_on))),
            asyncio.create_task(used.write("insert", insert("left"))),
        ]
        await asyncio.to_thread(entered.wait, 20)
        assert not any(task.done() for task in tasks)

    with opened(tmp_path / "d.sqlite") as used:
        asyncio.run(leave(used))  # cancels both and closes the loop
        go_on.set()
        assert asyncio.run(used.read("names", names)) in ([], ["left"])  # reads do not wait for writes
        assert asyncio.run(used.write("insert", insert("next"))) == "next"
        assert asyncio.run(used.read("names", names)) == ["left", "next"]


def test_close_writes_what_is_queued_and_may_be_called_twice(tmp_path: Path) -> None:
    threads_before = threading.active_count()
    used = Database.open(tmp_path / "d.sqlite", MIGRATIONS)

    async def use() -> None:
        tasks = [asyncio.create_task(used.write("insert", insert(f"n{i}"))) for i in range(50)]
        await asyncio.sleep(0)
        used.close()  # blocks the loop, so no task can have been answered
        assert await asyncio.gather(*tasks) == [f"n{i}" for i in range(50)]
        with pytest.raises(StoreError, match="insert after the store was closed"):
            await used.write("insert", insert("late"))
        with pytest.raises(StoreError, match="closed"):
            await used.read("names", names)

    asyncio.run(use())
    used.close()
    assert not (tmp_path / "d.sqlite-wal").exists()  # folded into the file
    assert len(names_in(tmp_path / "d.sqlite")) == 50
    assert threading.active_count() <= threads_before + 1  # asyncio's executor may have left one


def test_a_transaction_takes_no_more_than_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BATCH_BYTES", 100)

    async def use(used: Database) -> list[int]:
        sizes: list[int] = []
        run = used._writer._run

        def counted(connection: sqlite3.Connection, jobs: Sequence[Any]) -> None:
            sizes.append(len(jobs))
            run(connection, jobs)

        monkeypatch.setattr(used._writer, "_run", counted)
        entered, go_on = threading.Event(), threading.Event()
        first = asyncio.create_task(used.write("busy", blocking(entered, go_on)))
        await asyncio.to_thread(entered.wait, 20)
        tasks = [asyncio.create_task(used.write("insert", insert(f"n{i}"), size_bytes=40)) for i in range(7)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, *tasks)
        return sizes

    with opened(tmp_path / "d.sqlite") as used:
        assert asyncio.run(use(used)) == [1, 3, 3, 1]  # 3 x 40 bytes reach 100


HOLDER = """
import sys
from pathlib import Path
from ptlab.backend.database import Database
used = Database.open(Path(sys.argv[1]), (("CREATE TABLE items (name TEXT PRIMARY KEY, data BLOB)",),))
print("open", flush=True)
sys.stdin.readline()
used.close()
"""


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    holder = run_python(HOLDER, str(path))
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match=rf"d\.sqlite: process {holder.pid} is using it; stop it, or use another data directory"):
            Database.open(path, MIGRATIONS, lock_wait_s=0.1)
        with opened(path, beside_owner=True) as guest:  # short writes beside it
            asyncio.run(guest.write("insert", insert("guest")))
        with pytest.raises(ConfigError, match="schema version 1, this ptlab has version 2"):
            Database.open(path, (*MIGRATIONS, ("CREATE TABLE more (x)",)), beside_owner=True)
        ending = threading.Timer(0.3, lambda: holder.communicate(b"\n"))
        ending.start()
        with opened(path, lock_wait_s=20) as successor:  # waits until the first has ended
            assert asyncio.run(successor.read("names", names)) == ["guest"]
        ending.join()  # it reads from pipes that are closed below
    finally:
        holder.kill()
        holder.wait()
        for pipe in (holder.stdin, holder.stdout):
            assert pipe is not None
            pipe.close()


TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)   # the bytes that SQLite locks as long as it has the file open
    except BlockingIOError:
        print("held")
"""


def test_the_same_process_is_refused_too_and_the_first_keeps_its_locks(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    with opened(path) as used:
        asyncio.run(used.write("insert", insert("a")))
        with pytest.raises(ConfigError, match=f"process {os.getpid()} is using it"):
            Database.open(path, MIGRATIONS, lock_wait_s=0)
        assert run_python(TRY_LOCK, str(path)).communicate(timeout=60)[0] == b"held\n"
    assert run_python(TRY_LOCK, str(path)).communicate(timeout=60)[0] == b""


def test_a_newer_schema_is_refused_and_the_lock_released(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    Database.open(path, (*MIGRATIONS, ("CREATE TABLE more (x)",))).close()
    for _ in range(2):
        with pytest.raises(ConfigError, match="schema version 2, this ptlab knows versions up to 1; use a newer ptlab"):
            Database.open(path, MIGRATIONS, lock_wait_s=0)


def test_an_older_schema_is_brought_up_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    with opened(path) as used:
        asyncio.run(used.write("insert", insert("old")))
    with pytest.raises(ConfigError, match="syntax error"):
        Database.open(path, (*MIGRATIONS, ("ALTER TABLE items ADD COLUMN more TEXT", "NOT SQL")))
    Database.open(path, (*MIGRATIONS, ("ALTER TABLE items ADD COLUMN more TEXT",))).close()
    with sqlite3.connect(path) as plain:
        assert plain.execute("SELECT name, more FROM items").fetchall() == [("old", None)]
        assert plain.execute("PRAGMA user_version").fetchone() == (2,)
    plain.close()


def test_a_file_that_is_no_database_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "d.sqlite").write_text("this is not a database, however long it may be\n" * 100)
    with pytest.raises(ConfigError, match="cannot be used as the store"):
        Database.open(tmp_path / "d.sqlite", MIGRATIONS)
    with pytest.raises(ConfigError, match="cannot be opened as the store"):
        Database.open(tmp_path / "d.sqlite" / "below_a_file", MIGRATIONS)


KILLED_INSIDE = """
import asyncio, sys, time
from pathlib import Path
from ptlab.backend.database import Database
used = Database.open(Path(sys.argv[1]), (("CREATE TABLE items (name TEXT PRIMARY KEY, data BLOB)",),))

def inside(connection):
    for i in range(200):                                   # more than the page cache holds: part of it is in the log already
        connection.execute("INSERT INTO items VALUES (?, ?)", [f"torn{i}", bytes(50_000)])
    print("inside", flush=True)
    time.sleep(60)

async def use():
    await used.write("insert", lambda connection: connection.execute("INSERT INTO items VALUES ('whole', x'00')"))
    await used.write("inside", inside)

asyncio.run(use())
"""


def test_killed_inside_a_transaction_nothing_of_it_is_there_and_all_before_it_is(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    child = run_python(KILLED_INSIDE, str(path))
    assert child.stdin is not None and child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"inside\n"
        assert (tmp_path / "d.sqlite-wal").stat().st_size > 10**6  # torn rows did reach the disk
        child.send_signal(signal.SIGKILL)
        child.wait()
    began = time.monotonic()
    assert names_in(path) == ["whole"]
    assert time.monotonic() - began < 2  # the dead process's lock is gone
