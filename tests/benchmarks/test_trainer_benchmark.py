from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks.worker_process import WorkerFailed, WorkerProcess
from ptlab.benchmarks.against import Measurement, absolute_table, check_parity, ratio_table
from ptlab.benchmarks.models import count_parameters
from ptlab.benchmarks.work_items import VARIANTS, Sequences, make_sequences, read_sequences, write_work_item
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.errors import EngineError
from ptlab.losses import resolve_loss
from ptlab.types import LoraConfig

ROOT = Path(__file__).parents[2]


def measurement(system: str, cpu_s: list[float], **changes: object) -> Measurement:
    plain = Measurement(
        variant="small", dtype="float32", system=system, num_tokens=12_000, cpu_s=cpu_s, loss=-750.0, grad_norm=2000.0,
        peak_mb=1000.0, rest_mb=400.0,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ work items


def test_a_work_item_is_what_the_performance_notes_describe() -> None:
    small = make_sequences(VARIANTS["small"])
    assert len(small.prompts) == len(small.completions) == len(small.rewards) == 64
    assert len({tuple(prompt) for prompt in small.prompts}) == 8
    assert all(small.prompts[i] == small.prompts[i - i % 8] for i in range(64))  # the samples of a prompt lie beside each other
    assert len({tuple(completion) for completion in small.completions}) == 64
    assert all(40 <= len(prompt) <= 120 for prompt in small.prompts)
    assert all(20 <= len(completion) <= 200 for completion in small.completions)
    assert len({len(completion) for completion in small.completions}) > 30  # ragged
    assert max(max(tokens) for tokens in small.completions) > 4000
    assert small.num_tokens == sum(len(tokens) for tokens in small.prompts + small.completions)

    unshared = make_sequences(VARIANTS["unshared"])
    assert len({tuple(prompt) for prompt in unshared.prompts}) == len(unshared.prompts) == 64
    long = make_sequences(VARIANTS["long"])
    assert [len(prompt) for prompt in long.prompts] == [6144, 6144] and long.prompts[0] == long.prompts[1]
    assert 7900 < max(map(len, (p + c for p, c in zip(long.prompts, long.completions, strict=True)))) <= 8192
    rows = make_sequences(VARIANTS["vocab150k"])
    assert {len(prompt) + len(completion) for prompt, completion in zip(rows.prompts, rows.completions, strict=True)} == {256}
    assert rows.num_tokens == 8192
    assert min(map(len, rows.prompts)) < 50 and max(map(len, rows.prompts)) > 110  # equal completions would cancel in a centred loss


def test_a_work_item_is_seeded() -> None:
    assert make_sequences(VARIANTS["small"]) == make_sequences(VARIANTS["small"])
    assert make_sequences(VARIANTS["small"], seed=1) != make_sequences(VARIANTS["small"])


def test_models_have_the_sizes_they_are_called_by(tmp_path: Path) -> None:
    def body(name: str) -> int:
        shape = VARIANTS[name].shape
        attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
        return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)

    assert {name: round(body(name) / 1e6, 1) for name in ("small", "unshared", "vocab", "long", "vocab150k", "medium")} == {
        "small": 4.7, "unshared": 4.7, "vocab": 4.7, "long": 4.7, "vocab150k": 4.7, "medium": 25.2,
    }  # fmt: skip
    assert [VARIANTS[name].shape.vocab_size for name in ("small", "vocab", "medium", "vocab150k")] == [4096, 32768, 8192, 151936]
    item = write_work_item(VARIANTS["tiny"], tmp_path)
    norms = 2 * (2 * 64 + 2 * 16) + 64
    assert count_parameters(item.model) == body("tiny") + norms + 512 * 64


def test_the_sampler_differs_from_the_trainer_by_a_little_noise(tmp_path: Path) -> None:
    item = write_work_item(VARIANTS["tiny"], tmp_path)
    b_norms = [tensor.norm().item() for name, tensor in load_file(item.adapter / "adapter_model.safetensors").items() if ".lora_B." in name]
    assert len(b_norms) == 2 * 7 and min(b_norms) > 0  # all linear layers of two layers, and not the head
    sequences = read_sequences(item.sequences)
    trainer = PeftTrainer(str(item.model), name="tiny", dtype="float32", device="cpu")
    trainer.create_adapter("adapter", LoraConfig(rank=32, seed=0, train_unembed=False))
    trainer.load_state("adapter", item.adapter, with_optimizer=False)
    gaps = []
    for prompt, completion, sampled in zip(sequences.prompts, sequences.completions, sequences.sampling_logprobs, strict=True):
        exact = trainer.compute_logprobs("adapter", prompt + completion)[len(prompt) :]
        gaps += [ours - theirs for ours, theirs in zip(exact, sampled, strict=True) if ours is not None]
    assert np.std(gaps) == pytest.approx(0.1, rel=0.3)

    metrics = trainer.forward("adapter", sequences.datums(), resolve_loss("importance_sampling")).metrics
    lengths = [len(completion) for completion in sequences.completions]
    expected = -sum(np.exp(gaps) * np.repeat(sequences.advantages, lengths))  # -exp(p - q) A, summed over the sampled tokens alone
    assert metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)


def test_advantages_are_centred_in_their_groups() -> None:
    sequences = Sequences([[1]] * 4, [[2]] * 4, [1.0, 3.0, 10.0, 20.0], group_size=2)
    assert sequences.advantages == [-1.0, 1.0, -5.0, 5.0]


def test_a_datum_counts_its_completion_only() -> None:
    datum = Sequences([[5, 6, 7]] * 2, [[8, 9], [4]], [3.0, 1.0], 2, [[-0.5, -0.25], [-1.0]]).datums()[0]
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    values = {name: tensor.to_numpy().tolist() for name, tensor in datum.loss_fn_inputs.items()}
    assert values == {"target_tokens": [6, 7, 8, 9], "logprobs": [0, 0, -0.5, -0.25], "advantages": [0, 0, 1, 1]}


# ---------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("dtype", "loss", "grad_norm", "refused"),
    [
        ("float32", -750.005, 2000.15, None),  # 7e-6 and 7.5e-5
        ("float32", -750.010, 2000.15, "loss of TRL is -750.01, of ptlab .* they differ by 1.3e-05 where 1e-05"),
        ("float32", -750.005, 2000.26, "grad_norm .* 1.3e-04 where 1e-04"),
        ("float32", float("nan"), 2000.0, "loss"),
        ("bfloat16", -740.0, 2010.0, None),
        ("bfloat16", -700.0, 2010.0, "no time is quoted"),
        ("bfloat16", -740.0, 2100.0, "grad_norm"),
    ],
)
def test_without_equal_loss_and_gradient_norm_there_is_no_result(dtype: str, loss: float, grad_norm: float, refused: str | None) -> None:
    measured = measurement("TRL", [8.0], dtype=dtype, loss=loss, grad_norm=grad_norm)
    if refused is None:
        check_parity(measured, measurement("ptlab", [2.0]))
        return
    with pytest.raises(EngineError, match=refused):
        check_parity(measured, measurement("ptlab", [2.0]))


# ---------------------------------------------------------------------------------------------------------------- tables


def test_the_ratios_are_of_medians_and_of_the_worse_memory() -> None:
    measured = [
        measurement("ptlab", [2.0, 9.0, 1.0]),
        measurement("TRL", [8.0, 7.0, 30.0], peak_mb=1500.0),
        measurement("ptlab", [1.0], dtype="bfloat16"),
        measurement("TRL", [6.5], dtype="bfloat16", peak_mb=1250.0),
        measurement("ptlab", [1.0], variant="long"),
        measurement("TRL", [3.0], variant="long", peak_mb=900.0),
    ]
    assert ratio_table(measured).splitlines() == [
        "| variant | fp32 | bf16 | memory |",
        "| --- | --- | --- | --- |",
        "| small | 4.00x | 6.50x | 1.25x |",
        "| long | 3.00x | - | 0.90x |",
    ]
    other = measurement("TRL, second forward", [10.0], peak_mb=2000.0)
    assert ratio_table([*measured[:2], other]).splitlines()[2:] == [
        "| small, TRL | 4.00x | - | 1.50x |",
        "| small, TRL, second forward | 5.00x | - | 2.00x |",
    ]


def test_the_absolute_numbers_say_how_far_bf16_is_off() -> None:
    ours = measurement("ptlab", [2.0, 4.0, 3.0])
    rounded = measurement("TRL", [6.0], dtype="bfloat16", loss=-742.5, grad_norm=2002.0)
    lines = absolute_table([ours, rounded], {"small": ours}).splitlines()[2:]
    assert lines == [
        "| small | fp32 | ptlab | 3.00 | 2.00-4.00 | 3 | 4,000 | 1000 | 600 | -750.0000 (0e+00) | 2000.000 (0e+00) |",
        "| small | bf16 | TRL | 6.00 | 6.00-6.00 | 1 | 2,000 | 1000 | 600 | -742.5000 (1e-02) | 2002.000 (1e-03) |",
    ]


# --------------------------------------------------------------------------------------------------------------- workers


def test_a_worker_measures_its_own_step(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.worker_process import Channel, Meter, resident_mb\n"
        "channel, meter = Channel(), Meter()\n"
        "print('this library prints')\n"
        "channel.answer({'rest_mb': resident_mb()})\n"
        "for command in channel.commands():\n"
        "    if command == 'die': raise SystemExit('no more')\n"
        "    meter.start(); block = bytearray(int(command) << 20); sum(range(3_000_000)); del block\n"
        "    channel.answer(meter.stop())\n",
        encoding="utf-8",
    )
    with WorkerProcess([sys.executable, str(script)]) as worker:
        large, small = worker.ask("200"), worker.ask("1")
        assert 200 < large["peak_mb"] - worker.about["rest_mb"] < 240
        assert small["peak_mb"] - worker.about["rest_mb"] < 20  # each step has a peak of its own
        assert 0 < small["cpu_s"] < 5
        with pytest.raises(WorkerFailed, match=r"(?s)status 1 before it answered.*this library prints.*no more"):
            worker.ask("die")


def test_our_worker_trains_on_a_work_item(tmp_path: Path) -> None:
    item = write_work_item(VARIANTS["tiny"], tmp_path)
    assert asdict(read_sequences(item.sequences)) == json.loads(item.sequences.read_text(encoding="utf-8"))
    command = [sys.executable, ROOT / "benchmarks" / "ptlab_worker.py", item.model, item.adapter, item.sequences, "--dtype", "float32"]
    with WorkerProcess([str(part) for part in command]) as worker:
        first, second = worker.ask("step"), worker.ask("step")
    assert first["peak_mb"] >= worker.about["rest_mb"] > 0
    assert second["loss"] < first["loss"]  # the step was taken
