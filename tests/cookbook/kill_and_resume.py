"""kill -9 of the server in the middle of the cookbook's rl_loop: the client's own retries finish the run, with the same metrics.

    python -m tests.cookbook.kill_and_resume --python .venv-cookbook/bin/python [--kills 2]

Runs rl_loop twice, each time on a fresh data directory with `--seed 0`: once undisturbed, once with the server killed after some steps and
started again with the same data directory. Nothing is done to the client. Exits with 0 if every metric but the times is equal.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.cookbook.make_workdir import BASE, INSTRUCT, make_workdir
from tests.cookbook.run_recipes import Place, Recipe, Row, read_rows
from tests.cookbook.serving import Server

STEPS = 4
RECIPE = Recipe(
    name="rl_loop",
    module="rl_loop",
    arguments=(f"model_name={BASE}", "batch_size=3", "group_size=4", "max_tokens=12", f"max_steps={STEPS}", "save_every=2"),
    steps=STEPS,
)


def run(place: Place, server: Server, *, kill_after_rows: list[int], rng: random.Random, timeout_s: float) -> list[Row]:
    """Run RECIPE; once metrics.jsonl has as many rows as the next of `kill_after_rows`, kill the server within a step, and restart it.

    Raises: RuntimeError if the recipe fails, or ends before every kill was done.
    """
    kills = list(kill_after_rows)
    process = place.start(RECIPE)
    deadline = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {timeout_s:.0f} s; {place.last_line(RECIPE)}")
            rows = read_rows(place.metrics(RECIPE))
            if kills and len(rows) >= kills[0]:
                kills.pop(0)
                pause = rng.uniform(0.0, rows[-1]["time/total"])
                time.sleep(pause)
                server.kill()
                print(f"  killed {pause:.2f} s into step {len(rows)}; starting again", flush=True)
                time.sleep(1.0)
                server.start()
            time.sleep(0.02)
        if complaint := place.judge(RECIPE, process.wait()):
            raise RuntimeError(complaint)
    finally:
        process.kill()
        process.wait()
    if kills:
        raise RuntimeError(f"the recipe ended before the server was killed after rows {kills}")
    return read_rows(place.metrics(RECIPE))


def differences(unbroken: list[Row], broken: list[Row]) -> list[str]:
    """Where two runs' metrics differ, times left out."""
    if len(unbroken) != len(broken):
        return [f"{len(unbroken)} rows unbroken, {len(broken)} broken"]
    found = []
    for step, (one, other) in enumerate(zip(unbroken, broken, strict=True)):
        names = sorted({name for name in one | other if "time" not in name})
        found += [
            f"step {step}: {name} {one.get(name)} unbroken, {other.get(name)} broken" for name in names if one.get(name) != other.get(name)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the venv that scripts/setup_cookbook_venv.sh made")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--logs", type=Path, default=None)
    parser.add_argument("--kills", type=int, default=1, help=f"how often to kill the server, at most {STEPS - 1} (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--timeout", type=float, default=900.0)
    arguments = parser.parse_args()
    logs = (arguments.logs or Path(tempfile.mkdtemp(prefix="ptlab-kill-"))).absolute()
    workdir = (arguments.workdir or logs / "workdir").absolute()
    if not (workdir / INSTRUCT).exists():
        make_workdir(workdir, arguments.data)
    rng = random.Random(arguments.seed)
    kill_after_rows = sorted(rng.sample(range(1, STEPS), arguments.kills))

    runs: dict[str, list[Row]] = {}
    for name, kills in (("unbroken", []), ("broken", kill_after_rows)):
        directory = logs / name
        directory.mkdir(parents=True)
        server = Server(workdir, directory / "data", directory / "server.log", seed=0)
        place = Place(python=arguments.python, workdir=workdir, url=server.url, logs=directory)
        began = time.monotonic()
        with server:
            runs[name] = run(place, server, kill_after_rows=kills, rng=rng, timeout_s=arguments.timeout)
        rewards = [round(row["reward/total"], 4) for row in runs[name]]
        print(f"{name:9} {time.monotonic() - began:6.1f} s  rewards {rewards}  last row {runs[name][-1]}", flush=True)
    found = differences(runs["unbroken"], runs["broken"])
    print("\n".join(found) or f"equal: {len(runs['unbroken'])} rows of metrics ({logs})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
