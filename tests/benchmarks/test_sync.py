from __future__ import annotations

import asyncio
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptlab.benchmarks.sync import PARTS, SyncTiming, as_rows, sync_table, time_syncs
from ptlab.config import EnginesConfig
from ptlab.local import open_engines

KINDS = ["torch", pytest.param("vllm", marks=pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_sync_is_timed(kind: str, tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    config = EnginesConfig.model_validate({"sampler": {"kind": kind}})
    engines = partial(open_engines, path=str(tiny_qwen3_dir), config=config, max_lora_rank=8)
    said: list[str] = []
    timings = asyncio.run(time_syncs("tiny", tiny_qwen3_dir, engines, kind, [4, 8], 2, tmp_path / "run", said.append))
    assert [(t.rank, t.sampler) for t in timings] == [(4, kind), (8, kind)]
    assert len(said) == 2
    for t in timings:
        assert t.parts_ms.keys() == set(PARTS)
        assert min(t.parts_ms.values()) > 0
        assert max(t.parts_ms.values()) == t.parts_ms["latency"]
        assert t.cpu_ms > 0
        assert 0 < t.verify_gap_nats < 1e-3
        # rank x (in + out) of q, k, v, o, gate, up, down in two layers, and of the head; 4 bytes, and a header
        widths = 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 128)) + 64 + 512
        assert 4 * t.rank * widths < t.adapter_bytes < 4 * t.rank * widths + 8192
    assert not (tmp_path / "run" / "scratch").exists()


def test_the_table_shows_what_is_in_no_part() -> None:
    parts = dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0, 2.5, 12.5), strict=True))
    timing = SyncTiming(
        model="m", num_parameters=4_200_000, rank=8, adapter_bytes=1_500_000, sampler="vllm", parts_ms=parts, cpu_ms=9.0,
        verify_gap_nats=3e-6,
    )  # fmt: skip
    assert sync_table([timing]).splitlines()[2] == "| m | 4.20 M | 8 | 1.50 | vllm | 1 | 2 | 3 | 4 | 2.5 | 12.5 | 9 | 3.0e-06 |"
    assert as_rows([timing]) == [
        {"model": "m", "num_parameters": 4_200_000, "rank": 8, "adapter_bytes": 1_500_000, "sampler": "vllm", "cpu_ms": 9.0,
         "verify_gap_nats": 3e-6, "capture_ms": 1.0, "write_ms": 2.0, "load_ms": 3.0, "verify_ms": 4.0, "other_ms": 2.5, "latency_ms": 12.5}
    ]  # fmt: skip
