#!/usr/bin/env python3
"""Run every configs/smoke/*.yaml and check what each claims: `python scripts/smoke.py [--only NAME ...] [--run-dir DIR]`.

Each recipe must learn something on this machine, in minutes, with models that ptlab makes on first use. Exit code 1 if a run fails or
does not reach its claim. The negative controls are in docs/LOG.md; `--control` runs them too, and checks that they do not reach it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab.smoke import CLAIMS, Claim, verdict

ROOT = Path(__file__).resolve().parent.parent


def run(claim: Claim, run_dir: Path, *, control: bool) -> tuple[bool, str]:
    """(whether all is as claimed, the row of the table)."""
    name = f"{claim.config}_smoke" + ("_control" if control else "")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", f"configs/smoke/{claim.config}.yaml", "--overwrite"]
    command += ["--name", name, "--set", f"run_dir={run_dir}"]
    command += [f"--set={claim.control}"] if control else []
    command += [f"--set={key}={run_dir / value}" for key, value in claim.needs.items()]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        return False, f"{name:<28} failed after {seconds:.0f} s: {done.stderr.strip() or done.stdout.strip()[-500:]}"
    rows = [json.loads(line) for line in (run_dir / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    good, said = verdict(claim, rows, control=control)
    return good, f"{name:<28} {seconds:5.0f} s  {'ok  ' if good else 'NOT '} {said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[claim.config for claim in CLAIMS], help="default: all, in an order that works")
    parser.add_argument("--control", action="store_true", help="run the negative controls as well")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    all_good = True
    for claim in CLAIMS:
        if args.only and claim.config not in args.only:
            continue
        for control in (False, True) if args.control and claim.control else (False,):
            good, line = run(claim, args.run_dir, control=control)
            print(line, flush=True)
            all_good &= good
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
