"""One SQLite file, one owning process, one writer thread with group commit.

Writes are queued to the thread, which takes whatever waits into one transaction, commits it with a sync to the disk, and only then
answers the callers; each write runs in a savepoint of its own, so that a bad one does not fail its neighbours. Reads use a second
connection in a second thread and see every write that was answered. In memory there is one connection and one thread.

The file's owner holds a lock (flock on <path>.lock) until it ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ptlab.errors import ConfigError, InvalidRequestError, PtlabError, StoreError

T = TypeVar("T")
Migrations = Sequence[Sequence[str]]

BATCH_WRITES = 256
"""Writes per transaction at most."""
BATCH_BYTES = 16 * 2**20
"""A transaction takes no further write once it holds this much, so that a small write does not wait for many large ones."""
BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process's short write (`ptlab keys`)."""
WAL_PAGES = 8192
"""The write-ahead log (4 KiB a page) is folded into the file at this length. SQLite's 1000 would do so after every 5 MB body."""
WAL_KEEP_BYTES = 64 * 2**20
"""The write-ahead log is cut back to this once its content is in the file."""


@dataclass(slots=True)
class _Job:
    """A piece of work for a thread, and the caller's future, which belongs to the caller's loop."""

    operation: str
    work: Callable[[sqlite3.Connection], Any]
    size_bytes: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = field(default=None)
    error: Exception | None = None


class Database:
    """Runs functions on a connection in a thread. Made by `open`; nothing here knows the tables.

    A function given to `write` must only use its connection: it is run again if the transaction it shared with others was lost.
    """

    def __init__(self, name: str, writer: sqlite3.Connection, reader: sqlite3.Connection | None, lock: int | None) -> None:
        self._name = name
        self._lock = lock
        self._writer = _Thread(writer, name, self._run_writes, most=BATCH_WRITES)
        self._reader = _Thread(reader, name, self._run_read, most=1) if reader is not None else self._writer

    @classmethod
    def open(cls, path: Path | None, migrations: Migrations, *, beside_owner: bool = False, lock_wait_s: float = 3.0) -> Database:
        """The database in `path` with every migration applied; None = in memory.

        Args:
            migrations: statements that lead from schema version n to n + 1, for n = 0, 1, ...
            beside_owner: also open a file that another process owns, if its schema is the same.
            lock_wait_s: how long to wait for an owner that is just ending.
        Raises: ConfigError if another live process owns the file, its schema is newer, or it cannot be used.
        """
        if path is None:
            memory = _connect(":memory:")
            _migrate(memory, migrations, "the store in memory")
            return cls("the store in memory", memory, None, None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path)
            lock = _take_lock(path, 0.0 if beside_owner else lock_wait_s)
        except OSError as err:
            raise ConfigError(f"{path}: cannot be opened as the store ({err}); choose a data directory that can be written") from err
        if lock is None and not beside_owner:
            raise ConfigError(f"{path}: {_owner(path)}; stop it, or use another data directory")
        connections: list[sqlite3.Connection] = []
        try:
            writer = _connect(str(path))
            connections.append(writer)
            _set_durable(writer, path)
            if lock is None:
                _check_same(writer, migrations, path)
            else:
                _migrate(writer, migrations, str(path))
            _sync_directory(path.parent)
            reader = _connect(str(path))
            connections.append(reader)
            reader.execute("PRAGMA query_only = ON")
            return cls(str(path), writer, reader, lock)
        except BaseException as err:
            for connection in connections:
                connection.close()
            _release_lock(lock)
            if isinstance(err, sqlite3.Error):
                raise ConfigError(
                    f"{path}: cannot be used as the store ({err}); if the file is damaged, move it away with its -wal and restore a copy"
                ) from err
            raise

    async def write(self, operation: str, work: Callable[[sqlite3.Connection], T], *, size_bytes: int = 0) -> T:
        """What `work` returns, once it is committed. A caller that is cancelled does not take its write back.

        Args: operation: for the error message. size_bytes: roughly what it writes.
        Raises: what `work` raises; StoreError if it could not be written.
        """
        return await self._writer.submit(operation, work, size_bytes)

    async def read(self, operation: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns. Raises: what `work` raises; StoreError."""
        return await self._reader.submit(operation, work, 0)

    def close(self) -> None:
        """Finish what is queued, join the threads, close the file, release the lock. Blocking; a second call does nothing."""
        self._reader.close()
        self._writer.close()  # last: the last connection to close folds the write-ahead log into the file
        _release_lock(self._lock)
        self._lock = None

    def _run_read(self, connection: sqlite3.Connection, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            try:
                job.result = job.work(connection)
            except Exception as err:
                job.error = self._explain(job, err)

    def _run_writes(self, connection: sqlite3.Connection, jobs: Sequence[_Job]) -> None:
        """Run the jobs in one transaction. If that is lost as a whole, each in its own: only those that cannot be written fail."""
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as err:
            for job in jobs:
                job.error = self._explain(job, err)
            return
        lost: Exception | None = None
        for job in jobs:
            lost = _run_in_savepoint(connection, job)
            if lost is not None:
                break
        if lost is None:
            lost = _commit(connection)
        if lost is None:
            for job in jobs:
                job.error = self._explain(job, job.error) if job.error is not None else None
        elif len(jobs) == 1:
            jobs[0].error = self._explain(jobs[0], lost)
        else:
            for job in jobs:
                job.result = job.error = None
                self._run_writes(connection, [job])

    def _explain(self, job: _Job, err: Exception) -> Exception:
        """The error for the caller: SQLite's own become a StoreError, what it cannot hold an InvalidRequestError, others pass through."""
        error: PtlabError
        if isinstance(err, sqlite3.Error):
            error = StoreError(f"{self._name}: {job.operation} failed, nothing of it was written: {err}")
        elif isinstance(err, UnicodeEncodeError | OverflowError):
            error = InvalidRequestError(
                f"{job.operation}: a value cannot be stored ({err}); text must be valid Unicode, numbers must fit 64 bits"
            )
        else:
            return err
        error.__cause__ = err
        return error


_Run = Callable[[sqlite3.Connection, Sequence[_Job]], None]


class _Thread:
    """Owns a connection and runs the jobs that coroutines hand it, in their order, as many at once as wait.

    Args:
        run: runs jobs on the connection and sets `result` or `error` of each; raises nothing.
        most: jobs it gets at once.
    """

    def __init__(
        self, connection: sqlite3.Connection, name: str, run: Callable[[sqlite3.Connection, Sequence[_Job]], None], *, most: int
    ) -> None:
        self._connection = connection
        self._name = name
        self._run = run
        self._most = most
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: no job comes after it
        self._closing = threading.Lock()  # so that no job is queued behind the None
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=f"store {name}", daemon=True)  # daemon: a forgotten close() hangs nothing
        self._thread.start()

    async def submit(self, operation: str, work: Callable[[sqlite3.Connection], T], size_bytes: int) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._closing:
            if self._closed:
                raise StoreError(f"{self._name}: {operation} after the store was closed")
            self._jobs.put(_Job(operation, work, size_bytes, loop, future))
        return await future

    def close(self) -> None:
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        more = True
        while more:
            batch, more = self._take()
            if batch:
                self._run(self._connection, batch)
                _answer(batch)
        self._connection.close()

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for a job, then take what else waits, up to the bounds; False = no job will come any more."""
        batch: list[_Job] = []
        size_bytes = 0
        while len(batch) < self._most and size_bytes < BATCH_BYTES:
            try:
                job = self._jobs.get(block=not batch)
            except queue.Empty:
                break
            if job is None:
                return batch, False
            batch.append(job)
            size_bytes += job.size_bytes
        return batch, True


def _answer(batch: Sequence[_Job]) -> None:
    """Give the callers their results, each loop in one call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in batch:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, jobs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, jobs)
        except RuntimeError:  # the loop is closed: its callers are gone; what they wrote stays written
            continue


def _resolve(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        if job.future.done():  # cancelled
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.result)


def _run_in_savepoint(connection: sqlite3.Connection, job: _Job) -> Exception | None:
    """Run one job; its own failure is undone and kept in the job. Returns the error if the whole transaction was lost with it."""
    try:
        connection.execute("SAVEPOINT job")
        job.result = job.work(connection)
        connection.execute("RELEASE job")
    except Exception as err:
        if not connection.in_transaction:  # a full disk or an I/O error makes SQLite roll everything back
            return err
        try:
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
        except sqlite3.Error as lost:
            _roll_back(connection)
            return lost
        job.error = err
    return None


def _commit(connection: sqlite3.Connection) -> Exception | None:
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as err:
        _roll_back(connection)
        return err
    return None


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _connect(target: str) -> sqlite3.Connection:
    """A connection that begins no transaction by itself; opened here, used by one thread at a time."""
    connection = sqlite3.connect(target, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _set_durable(connection: sqlite3.Connection, path: Path) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise ConfigError(f"{path}: SQLite cannot keep a write-ahead log there (journal mode {mode}); use a local disk, not a network one")
    connection.execute("PRAGMA synchronous = FULL")  # a commit that was answered survives a power cut
    connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_KEEP_BYTES}")


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def _migrate(connection: sqlite3.Connection, migrations: Migrations, name: str) -> None:
    """Bring the schema to the newest version, whole or not at all. Raises: ConfigError if it is newer than that."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)
        if version > len(migrations):
            raise ConfigError(f"{name}: schema version {version}, this ptlab knows versions up to {len(migrations)}; use a newer ptlab")
        for statement in (statement for migration in migrations[version:] for statement in migration):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise


def _check_same(connection: sqlite3.Connection, migrations: Migrations, path: Path) -> None:
    version = _version(connection)
    if version != len(migrations):
        raise ConfigError(
            f"{path}: schema version {version}, this ptlab has version {len(migrations)} and {_owner(path)}; use that process's ptlab"
        )


def _create(path: Path) -> None:
    """An empty file that only its owner may read (it holds prompts), if there is none; SQLite gives -wal and -shm the same mode.

    A file that exists must not be opened and closed here: in POSIX that ends every lock this process's SQLite holds on it.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _take_lock(path: Path, wait_s: float) -> int | None:
    """A handle that holds the lock, with our process id written into it; None if another process keeps it for `wait_s`."""
    handle = os.open(_lock_file(path), os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                return None
            time.sleep(0.05)
            continue
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return handle


def _release_lock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)  # the file stays: removing it would let two processes lock two files of one name


def _owner(path: Path) -> str:
    """Who holds the lock, in words."""
    pid = _lock_file(path).read_text().strip()
    if pid and not Path(f"/proc/{pid}").exists():
        return f"process {pid}, which opened it, has ended but a child of it still runs and holds the lock (`fuser {_lock_file(path)}`)"
    return f"process {pid or '(not named yet)'} is using it"


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
