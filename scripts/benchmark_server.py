#!/usr/bin/env python3
"""A server under load, and what HTTP costs: `python scripts/benchmark_server.py load | overhead [--out benchmarks]`.

load      training clients and concurrent samples through the official SDK for a fixed time: errors, whether every client's losses are those
          of the same client alone (so nothing was reordered or mixed up), fairness, sampling latency with and without training.
overhead  the quickstart through scripts/train.py, in one process and over HTTP in turns: time per step and where the difference goes.

Starts `ptlab serve` unless --url names one. Both write a table and JSON lines. Needs the package tinker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on busy cores spin at their barriers
os.environ.setdefault("TINKER_API_KEY", "tml-benchmark")

import numpy as np
import tinker

from ptlab.benchmarks.tables import markdown_table, write_jsonl
from ptlab.cli import guarded
from ptlab.errors import ConfigError
from ptlab.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
TOKENS = range(3, 64)
"""Ids that every model has."""
TOLERANCE = 2e-4
"""Of losses, relative: other requests in the same process move the last bits of float32."""
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo")
RANKS = (1, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    process_id: int | None
    trace: Path | None


@contextmanager
def served(args: argparse.Namespace, root: Path) -> Iterator[Served]:
    """The server of --url, or one of its own in a process of its own. Raises: ConfigError if it does not start."""
    if args.url is not None:
        yield Served(args.url, args.pid, args.trace)
        return
    trace = root / "trace.jsonl"
    command = [sys.executable, "-m", "ptlab.cli", "serve", "--model", args.model, "--data-dir", str(root / "data"), "--port", "0"]
    command += ["--sampler", args.sampler, "--trace", str(trace)]
    with (root / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            printed = iter(process.stdout.readline, "")
            url = next((found[1] for line in printed if (found := re.search(r"TINKER_BASE_URL=(\S+)", line))), None)
            if url is None:
                raise ConfigError(f"the server did not start: {(root / 'server.log').read_text()[-2000:]}")
            yield Served(url, process.pid, trace)
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()
            process.wait()


def cpu_s(process_id: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- load


@dataclass(frozen=True, slots=True)
class Trainee:
    """One training client: everything about it follows from its number."""

    number: int

    @property
    def loss(self) -> str:
        return LOSSES[self.number % len(LOSSES)]

    @property
    def lora(self) -> dict[str, Any]:
        return {"rank": RANKS[self.number % len(RANKS)], "seed": self.number, "train_unembed": False, "train_attn": self.number % 3 != 2}

    def data(self, step: int, num_datums: int = 8, length: int = 48) -> list[tinker.Datum]:
        """Other tokens every step, the same ones in every run."""
        random = np.random.default_rng((self.number, step))
        made = []
        for _ in range(num_datums):
            tokens = random.integers(TOKENS.start, TOKENS.stop, length + 1)
            inputs: dict[str, Any] = {"target_tokens": tokens[1:].astype(np.int64)}
            if self.loss == "cross_entropy":
                inputs["weights"] = np.ones(length, np.float32)
            else:
                inputs |= {"logprobs": np.full(length, -4.0, np.float32), "advantages": random.normal(size=length).astype(np.float32)}
            tensors = {name: tinker.TensorData.from_numpy(values) for name, values in inputs.items()}
            made.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=tensors))
        return made

    async def train(self, client: Any, *, until: float = math.inf, most_steps: int | None = None) -> list[float]:
        """The loss of every step. Two steps are on their way at a time, as in a pipelined loop."""
        losses: list[float] = []
        waiting: list[tuple[Any, Any]] = []
        step = 0
        while waiting or (time.monotonic() < until and step != most_steps):
            while len(waiting) < 2 and time.monotonic() < until and step != most_steps:
                passed = client.forward_backward(self.data(step), self.loss)
                waiting.append((passed, client.optim_step(tinker.AdamParams(learning_rate=3e-3))))
                step += 1
            if not waiting:
                break
            passed, stepped = waiting.pop(0)
            losses.append(float((await passed).metrics["loss:sum"]))
            await stepped
        return losses

    async def client(self, url: str, model: str) -> Any:
        """A training client of a service client of its own."""
        service = tinker.ServiceClient(base_url=url)
        return await service.create_lora_training_client(base_model=model, **self.lora)


@dataclass(slots=True)
class Drawn:
    """What happened to the samples of one phase."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan

    def row(self, phase: str) -> list[object]:
        times = [self.percentile(share) for share in (0.5, 0.9, 0.99, 1.0)]
        return [phase, len(self.seconds), sum(self.errors.values()), *times, self.tokens / self.wall_s]


async def draw(samplers: Sequence[Any], at_once: int, seconds: float, max_tokens: int) -> Drawn:
    """`at_once` samples in flight for some seconds; each that ends is followed by another."""
    drawn, began = Drawn(), time.monotonic()

    async def one_after_the_other(index: int) -> None:
        turn = 0
        while time.monotonic() < began + seconds:
            random = np.random.default_rng((index, turn))
            prompt = tinker.ModelInput.from_ints(random.integers(TOKENS.start, TOKENS.stop, 12).tolist())
            params = tinker.SamplingParams(max_tokens=max_tokens, seed=index * 1000 + turn)
            asked, turn = time.monotonic(), turn + 1
            try:
                (sequence,) = (await samplers[index % len(samplers)].sample(prompt, 1, params)).sequences
            except tinker.TinkerError as err:
                drawn.errors[f"{type(err).__name__}: {str(err)[:150]}"] += 1
                continue
            if not 0 < len(sequence.tokens) <= max_tokens or not all(map(math.isfinite, sequence.logprobs)):
                drawn.errors["an answer without tokens, with too many, or with a log-probability that is no number"] += 1
            drawn.seconds.append(time.monotonic() - asked)
            drawn.tokens += len(sequence.tokens)

    await asyncio.gather(*(one_after_the_other(index) for index in range(at_once)))
    drawn.wall_s = time.monotonic() - began
    return drawn


async def load(url: str, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(numbers, tables). Phases: sampling alone; training and sampling; every client again, alone."""
    trainees = [Trainee(number) for number in range(args.clients)]
    service = tinker.ServiceClient(base_url=url)
    first = await service.create_lora_training_client(base_model=args.model, rank=8, train_unembed=False)
    samplers = [await service.create_sampling_client(base_model=args.model)]
    for step in range(2):  # two versions besides the base model
        first.forward_backward(trainees[0].data(step), "cross_entropy")
        await first.optim_step(tinker.AdamParams(learning_rate=1e-2))
        samplers.append(await first.save_weights_and_get_sampling_client())
    clients = [await trainee.client(url, args.model) for trainee in trainees]

    alone = await draw(samplers, args.samples, args.seconds / 2, args.max_tokens)
    print(f"sampling alone: {len(alone.seconds)} answers", flush=True)
    until = time.monotonic() + args.seconds
    sampling = asyncio.create_task(draw(samplers, args.samples, args.seconds, args.max_tokens))
    outcomes = await asyncio.gather(
        *(trainee.train(client, until=until) for trainee, client in zip(trainees, clients, strict=True)), return_exceptions=True
    )
    together = await sampling
    print(f"training and sampling: {len(together.seconds)} answers", flush=True)
    broken = [f"client {n}: {type(o).__name__}: {o}" for n, o in enumerate(outcomes) if isinstance(o, BaseException)]
    together_losses = [outcome if isinstance(outcome, list) else [] for outcome in outcomes]

    rows, gaps = [], []
    for trainee, losses in zip(trainees, together_losses, strict=True):
        most = min(len(losses), args.check_steps)
        again = await trainee.train(await trainee.client(url, args.model), most_steps=most) if most else []
        gaps.append(max((abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, again, strict=False)), default=math.nan))
        rows.append([trainee.number, trainee.lora["rank"], trainee.loss, len(losses), most, gaps[-1]])
    steps = [len(losses) for losses in together_losses]
    fairness = max(steps) / min(steps) if min(steps) else math.inf
    verdict = {
        "errors": sum(alone.errors.values()) + sum(together.errors.values()) + len(broken),
        "same_losses_as_alone": bool(all(gap <= TOLERANCE for gap in gaps)),
        "largest_relative_gap": max(gaps),
        "steps_max_over_min": fairness,
        "sampling_p50_ratio": together.percentile(0.5) / alone.percentile(0.5),
    }
    head = ["sampling", "answers", "errors", "p50 s", "p90 s", "p99 s", "max s", "tokens/s"]
    tables = [
        markdown_table(head, [alone.row("alone"), together.row(f"while {args.clients} clients train")]),
        markdown_table(["client", "rank", "loss", "steps", "checked", "largest gap to alone"], rows),
        markdown_table(list(verdict), [list(verdict.values())]),
        *broken,
        *(f"{times} x {error}" for error, times in (alone.errors + together.errors).items()),
    ]
    numbers = {"verdict": verdict, "steps": steps, "gaps": gaps, "alone": asdict(alone), "together": asdict(together), "broken": broken}
    return numbers, "\n\n".join(tables)


# -- overhead


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of scripts/train.py: the time/* metrics of every step but the first, and CPU seconds per step of both processes."""

    over_http: bool
    rows: list[dict[str, float]]
    client_cpu_s: float
    server_cpu_s: float

    def median(self, key: str) -> float:
        return statistics.median(row[key] for row in self.rows)


def train(args: argparse.Namespace, root: Path, server: Served, name: str, *, over_http: bool) -> Run:
    """Raises: ConfigError if the run fails."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(ROOT / "configs" / "quickstart.yaml"), "--name", name]
    changes = [f"steps={args.steps}", "eval.every=0", "checkpoint.every=0", f"run_dir={root}", f"engines.sampler.kind={args.sampler}"]
    command += [part for change in changes for part in ("--set", change)] + (["--base-url", server.url] if over_http else [])
    metrics = root / name / "metrics.jsonl"
    with (root / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        used: dict[int, tuple[float, float]] = {}  # rows written -> CPU of the client, of the server
        while process.poll() is None:
            num_rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if num_rows in (1, args.steps) and num_rows not in used:
                used[num_rows] = (cpu_s(process.pid), cpu_s(server.process_id) if server.process_id else math.nan)
            time.sleep(0.02)
    if process.returncode != 0:
        raise ConfigError(f"{' '.join(command)} failed: {(root / f'{name}.log').read_text()[-2000:]}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    client, in_server = (
        (last - first) / (args.steps - 1)
        for first, last in zip(used.get(1, (math.nan,) * 2), used.get(args.steps, (math.nan,) * 2), strict=True)
    )
    times = [{key: value for key, value in row.items() if key.startswith("time/")} for row in rows[1 : args.steps]]
    return Run(over_http=over_http, rows=times, client_cpu_s=client, server_cpu_s=in_server)


def overhead(args: argparse.Namespace, root: Path, server: Served) -> tuple[dict[str, Any], str]:
    """(numbers, tables) of runs in turns, so that what else the machine does falls on both."""
    runs: list[Run] = []
    for repeat in range(args.repeats):
        for over_http in (False, True) if repeat % 2 == 0 else (True, False):
            run = train(args, root, server, f"{'http' if over_http else 'local'}-{repeat}", over_http=over_http)
            print(f"{'over HTTP' if over_http else 'in process'}: {run.median('time/step_s'):.3f} s a step", flush=True)
            runs.append(run)
    kinds = {kind: [run for run in runs if run.over_http == kind] for kind in (False, True)}
    table: list[list[object]] = []
    for key in ("time/step_s", "time/sample_s", "time/train_s", "time/sync_s"):
        ours, theirs = ([row[key] for run in kinds[kind] for row in run.rows] for kind in (False, True))
        pairs = [b.median(key) / a.median(key) for a, b in zip(kinds[False], kinds[True], strict=True)]
        middle, quick = (statistics.median(theirs) / statistics.median(ours), _low(theirs) / _low(ours))
        table.append([key, statistics.median(ours), statistics.median(theirs), middle, quick, f"{min(pairs):.2f} to {max(pairs):.2f}"])
    ours_cpu, client_cpu, server_cpu = (
        statistics.median(values)
        for values in (
            [run.client_cpu_s for run in kinds[False]],
            [run.client_cpu_s for run in kinds[True]],
            [run.server_cpu_s for run in kinds[True]],
        )
    )
    cpu: list[list[object]] = [
        ["CPU s a step", ours_cpu, client_cpu + server_cpu, (client_cpu + server_cpu) / ours_cpu, "", f"server {server_cpu:.3f}"]
    ]
    head = ["median", "in process", "over HTTP", "ratio", "ratio of the quickest tenths", "pairs of runs"]
    num_steps = args.repeats * args.steps
    tables = [markdown_table(head, table + cpu)] + ([] if server.trace is None else [_requests(server.trace, num_steps)])
    return {"steps": table, "cpu": cpu, "runs": [asdict(run) for run in runs]}, "\n\n".join(tables)


def _low(values: Sequence[float]) -> float:
    """The first tenth: on a busy machine the quickest steps are the ones it left alone."""
    return sorted(values)[len(values) // 10]


def _requests(trace: Path, num_steps: int) -> str:
    """What was asked of the server, per step."""
    by_kind: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in trace.read_text().splitlines():
        told = json.loads(line)
        by_kind[told["path"].rpartition("/")[2], told["sdk_method"]].append(told)
    rows = [
        [
            path,
            method,
            len(asked) / num_steps,
            statistics.median(one["ms"] for one in asked),
            statistics.median(one["request_bytes"] for one in asked),
            statistics.median(one["response_bytes"] for one in asked),
        ]
        for (path, method), asked in sorted(by_kind.items(), key=lambda item: -len(item[1]))
        if len(asked) >= num_steps // 2
    ]
    return markdown_table(["request", "by", "a step", "ms", "bytes sent", "bytes back"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    for name in ("load", "overhead"):
        one = what.add_parser(name)
        one.add_argument("--url", help="a running server, instead of one of its own")
        one.add_argument("--pid", type=int, help="its process id, for its CPU time")
        one.add_argument("--trace", type=Path, help="what it writes with --trace")
        one.add_argument("--model", default="ptlab/quickstart")
        one.add_argument("--sampler", choices=["torch", "vllm"], default="torch")
        one.add_argument("--out", type=Path, help="directory for the results (default: only printed)")
        if name == "load":
            one.add_argument("--seconds", type=float, default=60.0, help="of training and sampling; half as long without training")
            one.add_argument("--clients", type=int, default=8)
            one.add_argument("--samples", type=int, default=200, help="in flight at a time")
            one.add_argument("--max-tokens", type=int, default=32)
            one.add_argument("--check-steps", type=int, default=20, help="steps of each client that are compared with those of it alone")
        else:
            one.add_argument("--steps", type=int, default=8)
            one.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    def run() -> int:
        with tempfile.TemporaryDirectory() as directory, served(args, root := Path(directory)) as server:
            numbers, tables = asyncio.run(load(server.url, args)) if args.what == "load" else overhead(args, root, server)
        print(tables)
        if args.out is not None:
            write_jsonl(args.out / f"server_{args.what}.jsonl", provenance(), [numbers])
            (args.out / f"server_{args.what}.md").write_text(tables + "\n", encoding="utf-8")
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
