"""Engines in processes of their own: beside another base model in one server, and after the server was killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (extras: cpu, vllm)", exc_type=ImportError)

import psutil

from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.engines.vllm_sampler import VllmSampler
from ptlab.types import ModelInput, SampleResponse, SamplingParams

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
FEW_SECONDS = 10.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def calls(adapter: AdapterRef) -> list[SampleCall]:
    return [
        SampleCall(
            prompt=ModelInput.from_ints([5 + i, 17, 300, 8]),
            num_samples=2,
            params=SamplingParams(max_tokens=30, seed=i, stop=[], temperature=[1.0, 0.0, 0.7][i % 3]),
            adapter=adapter if i % 2 else None,
        )
        for i in range(8)
    ]


async def sample(sampler: VllmSampler, adapter: AdapterRef) -> list[list[list[int]]]:
    responses: list[SampleResponse] = await asyncio.gather(*(sampler.sample(call) for call in calls(adapter)))
    return [[sequence.tokens for sequence in response.sequences] for response in responses]


@pytest.fixture(scope="module")
def models(tiny_qwen3_dir: Path, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory, write_adapter: Any) -> list[Any]:
    """(directory, an adapter) of two base models."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        (base, AdapterRef(name=base.name, version=1, path=write_adapter(base, root / base.name, targets=LINEAR, seed=seed)))
        for seed, base in enumerate((tiny_qwen3_dir, tiny_llama_dir))
    ]


async def opened(directory: Path, adapter: AdapterRef) -> VllmSampler:
    sampler = VllmSampler(str(directory), mode="inproc")
    await sampler.load_adapter(adapter)
    return sampler


@pytest.fixture(scope="module")
def want(models: list[Any]) -> list[Any]:
    """The answers of each model alone in the process."""

    async def one(directory: Path, adapter: AdapterRef) -> Any:
        sampler = await opened(directory, adapter)
        answers = await sample(sampler, adapter)
        await sampler.close()
        return answers

    answers = [asyncio.run(one(*model)) for model in models]
    assert answers[0] != answers[1]
    return answers


def test_two_base_models_in_one_process_do_not_touch_each_other(
    models: list[Any], want: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, first_adapter), (second, second_adapter) = models

    async def scenario() -> None:
        a, b = await opened(first, first_adapter), await opened(second, second_adapter)
        assert await asyncio.gather(sample(a, first_adapter), sample(b, second_adapter)) == want
        running = asyncio.create_task(sample(b, second_adapter))
        with monkeypatch.context() as patch:  # one breaks and starts again while the other samples

            def broken() -> None:
                raise RuntimeError("planted")

            patch.setattr(a._engine._engine, "step", broken)
            with pytest.raises(Exception, match="planted"):
                await a.sample(calls(first_adapter)[0])
        assert await running == want[1]
        assert await asyncio.gather(sample(a, first_adapter), sample(b, second_adapter)) == want
        assert (a.num_restarts, b.num_restarts) == (1, 0)
        await a.close()
        assert await sample(b, second_adapter) == want[1]
        a = await opened(first, first_adapter)
        await b.close()
        assert await sample(a, first_adapter) == want[0]
        await a.close()

    asyncio.run(scenario())


SERVER = """
import asyncio, json, sys, time
from pathlib import Path
import psutil
from ptlab.engines.protocols import AdapterRef
from ptlab.engines.vllm_sampler import VllmSampler
sys.path.insert(0, sys.argv[1])
from test_vllm_child import sample

print("main runs")   # once: the engine's processes must not import a script that has no main guard

async def main():
    adapters = [AdapterRef(name=Path(path).name, version=1, path=Path(path)) for path in sys.argv[3::2]]
    samplers = [VllmSampler(sys.argv[2], mode="inproc")]
    await samplers[0].load_adapter(adapters[0])
    begun, waits = time.monotonic(), []
    starting = asyncio.create_task(asyncio.to_thread(VllmSampler, sys.argv[4], mode="process"))
    while not starting.done():   # the first model answers while the second starts
        asked = time.monotonic()
        await sample(samplers[0], adapters[0])
        waits.append(time.monotonic() - asked)
    took = time.monotonic() - begun
    samplers.append(await starting)
    await samplers[1].load_adapter(adapters[1])
    answers = await asyncio.gather(*(sample(s, a) for s, a in zip(samplers, adapters)))
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    print("RESULT " + json.dumps({"answers": answers, "children": children, "longest_wait": max(waits) / took}), flush=True)
    while True:   # killed in the middle of this
        await asyncio.gather(*(sample(s, a) for s, a in zip(samplers, adapters)))

asyncio.run(main())
"""


def running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_two_models_in_two_processes_and_kill_9_leaves_no_orphans(models: list[Any], want: list[Any], tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    paths = [str(path) for directory, adapter in models for path in (directory, adapter.path)]
    server = subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent), *paths],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert server.stdout is not None
        output = ""
        while "RESULT " not in output:
            line = server.stdout.readline()
            assert line, f"the server ended early: {output}"
            output += line
        assert output.count("main runs") == 1
        result = json.loads(output.split("RESULT ")[1])
        assert result["answers"] == want
        assert result["longest_wait"] < 0.5, "a share of the start of the second model"
        children = [psutil.Process(pid) for pid in result["children"]]
        assert len(children) >= 2, "the engine of the second model runs elsewhere"
    finally:
        server.kill()  # -9: nothing of the server's own can run any more
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    deadline = time.monotonic() + FEW_SECONDS
    while any(map(running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [str(child) for child in children if running(child)] == []


def test_the_child_follows_its_parent(tmp_path: Path) -> None:
    """The module alone, without vLLM: a child whose parent is killed ends at once, one whose parent lives goes on."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)
    assert running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + FEW_SECONDS
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)


PARENT = """
import multiprocessing, time
from ptlab.engines.vllm_child import main_module_replaced

if __name__ == "__main__":
    with main_module_replaced():
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name="EngineCore_0")
        child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""
