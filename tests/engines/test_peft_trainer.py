"""The trainer against plain transformers + PEFT + torch.optim on the same numbers; sums, resumes, failures, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptlab.engines.head_pass import OutputHead
from ptlab.engines.peft_trainer import PeftTrainer
from ptlab.engines.protocols import AdapterRef, SampleCall
from ptlab.errors import CheckpointError, EngineError, InvalidRequestError, NotFoundError
from ptlab.losses import LOSSES, resolve_loss
from ptlab.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams, TensorData

ALL_FLAGS = [
    {"train_attn": True, "train_mlp": True, "train_unembed": True},
    {"train_attn": True, "train_mlp": False, "train_unembed": False},
    {"train_attn": False, "train_mlp": True, "train_unembed": False},
    {"train_attn": False, "train_mlp": False, "train_unembed": True},
]
CROSS_ENTROPY = resolve_loss("cross_entropy")


@pytest.fixture(params=["tiny_qwen3_dir", "tiny_llama_dir"])  # tied and untied heads
def model_dir(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


def make(directory: Path, **kwargs: Any) -> PeftTrainer:
    return PeftTrainer(str(directory), name="tiny", device="cpu", **kwargs)


PROMPT = [3, 1, 4, 1, 5, 9]


def batch(seed: int = 0, lengths: Sequence[int] = (5, 12, 3, 9, 12), loss: str = "cross_entropy") -> list[Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for n in lengths:
        inputs: dict[str, Any] = {"target_tokens": rng.integers(0, 512, n)}
        if loss == "cross_entropy":
            inputs["weights"] = rng.normal(size=n)
        else:
            inputs |= {"logprobs": rng.normal(-6.0, 0.5, n), "advantages": rng.normal(size=n)}
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = np.ones(n)
        data.append(Datum(model_input=ModelInput.from_ints(rng.integers(0, 512, n).tolist()), loss_fn_inputs=inputs))
    return data


def trained(directory: Path, steps: int = 2, **kwargs: Any) -> PeftTrainer:
    """A trainer whose adapter "m" has moved, so that B is not zero."""
    trainer = make(directory, **kwargs)
    trainer.create_adapter("m", LoraConfig(rank=4, seed=1))
    for step in range(steps):
        trainer.forward_backward("m", batch(step), CROSS_ENTROPY)
        trainer.optim_step("m", AdamParams(learning_rate=0.02))
    return trainer


def gradients(trainer: PeftTrainer, model_id: str = "m") -> dict[str, torch.Tensor]:
    return trainer._adapters[model_id].gradients


def weights(trainer: PeftTrainer, model_id: str = "m") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer._adapters[model_id].parameters.items()}


def logprobs(output: Any) -> list[np.ndarray[Any, Any]]:
    return [o["logprobs"].to_numpy() for o in output.loss_fn_outputs]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of plain PEFT, about merging
@pytest.mark.parametrize("flags", ALL_FLAGS)
def test_log_probabilities_and_gradients_equal_plain_peft(model_dir: Path, tmp_path: Path, flags: dict[str, bool]) -> None:
    trainer = make(model_dir)
    trainer.create_adapter("m", LoraConfig(rank=4, seed=1, **flags))
    trainer.forward_backward("m", batch(1), CROSS_ENTROPY)
    trainer.optim_step("m", AdamParams(learning_rate=0.02))
    output = trainer.forward_backward("m", batch(), CROSS_ENTROPY)
    trainer.save_adapter("m", tmp_path)

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    total = torch.zeros(())
    for datum, ours in zip(batch(), logprobs(output), strict=True):
        logits_TV = plain(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets_T = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy())
        theirs_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
        np.testing.assert_allclose(ours, theirs_T.detach().numpy(), atol=2e-5)  # float32, other kernels
        total = total - (theirs_T * torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy())).sum()
    total.backward()
    assert output.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-5)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.grad for name, p in plain.named_parameters() if ".lora_" in name
    }
    assert theirs.keys() == gradients(trainer).keys()
    for name, grad in gradients(trainer).items():
        assert relative(grad, theirs[name]) < 1e-4, name


def test_saved_tensors_are_lora_only_and_follow_the_flags(model_dir: Path, tmp_path: Path) -> None:
    for number, flags in enumerate(ALL_FLAGS):
        trainer = make(model_dir)
        trainer.create_adapter("m", LoraConfig(rank=4, **flags))
        directory = tmp_path / str(number)
        directory.mkdir()
        trainer.save_adapter("m", directory)
        names = load_file(directory / "adapter_model.safetensors").keys()
        assert all(".lora_A." in n or ".lora_B." in n for n in names)
        kinds = {"q_proj": "train_attn", "down_proj": "train_mlp", "lm_head": "train_unembed"}
        assert {flag: any(k in n for n in names) for k, flag in kinds.items()} == flags
        assert {p.name for p in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_gradient_does_not_depend_on_the_micro_batches(tiny_qwen3_dir: Path, loss: str) -> None:
    results = []
    for tokens in (1, 24, 10_000):  # each alone, about two together, all at once
        trainer = trained(tiny_qwen3_dir, tokens_per_micro_batch=tokens)
        output = trainer.forward_backward("m", batch(7, loss=loss), resolve_loss(loss))
        results.append((output, gradients(trainer)))
    for output, grads in results[1:]:
        assert output.metrics == pytest.approx(results[0][0].metrics, rel=1e-4, abs=1e-6)
        for name, grad in grads.items():
            assert relative(grad, results[0][1][name]) < 1e-4
        for a, b in zip(logprobs(output), logprobs(results[0][0]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradients_add_up_until_the_step_and_forward_leaves_them(tiny_qwen3_dir: Path) -> None:
    together, apart = trained(tiny_qwen3_dir), trained(tiny_qwen3_dir)
    data = batch(3)
    together.forward_backward("m", data, CROSS_ENTROPY)
    apart.forward_backward("m", data[:2], CROSS_ENTROPY)
    apart.forward("m", data, CROSS_ENTROPY)
    apart.forward_backward("m", data[2:], CROSS_ENTROPY)
    for name, grad in gradients(apart).items():
        assert relative(grad, gradients(together)[name]) < 1e-4
    apart.optim_step("m", AdamParams())
    assert gradients(apart) == {}


def test_forward_and_forward_backward_return_the_same(tiny_qwen3_dir: Path) -> None:
    trainer = trained(tiny_qwen3_dir)
    a, b = trainer.forward("m", batch(), CROSS_ENTROPY), trainer.forward_backward("m", batch(), CROSS_ENTROPY)
    assert a.metrics == pytest.approx(b.metrics)
    for x, y in zip(logprobs(a), logprobs(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_step_is_torch_adamw_with_every_field(tiny_qwen3_dir: Path, clip: float) -> None:
    trainer = make(tiny_qwen3_dir)
    trainer.create_adapter("m", LoraConfig(rank=4, seed=1))
    copies = {name: torch.nn.Parameter(w) for name, w in weights(trainer).items()}
    reference = torch.optim.AdamW(copies.values(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for step in range(3):
        trainer.forward_backward("m", batch(step), CROSS_ENTROPY)
        for name, parameter in copies.items():
            parameter.grad = gradients(trainer)[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(copies.values(), clip or float("inf"))
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.step()
        adam = AdamParams(learning_rate=0.01 * (step + 1), beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, grad_clip_norm=clip)
        metrics = trainer.optim_step("m", adam).metrics
        assert metrics is not None and metrics["grad_norm:mean"] == pytest.approx(norm.item(), rel=1e-6)
    for name, weight in weights(trainer).items():
        torch.testing.assert_close(weight, copies[name].detach(), rtol=1e-6, atol=1e-8)


def test_a_step_without_gradients_moves_nothing_and_says_so(tiny_qwen3_dir: Path) -> None:
    trainer = trained(tiny_qwen3_dir)
    before = weights(trainer)
    assert trainer.optim_step("m", AdamParams(learning_rate=1.0, weight_decay=0.5)).metrics == {"skipped:sum": 1.0}
    assert all(torch.equal(w, before[n]) for n, w in weights(trainer).items())


def test_a_saved_state_continues_bit_for_bit(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    def go_on(trainer: PeftTrainer, model_id: str) -> dict[str, torch.Tensor]:
        trainer.forward_backward(model_id, batch(11), CROSS_ENTROPY)
        trainer.optim_step(model_id, AdamParams(learning_rate=0.01))
        return weights(trainer, model_id)

    first = trained(tiny_qwen3_dir)
    first.forward_backward("m", batch(10), CROSS_ENTROPY)  # a gradient not yet applied is part of the state
    first.save_state("m", tmp_path)
    unbroken = go_on(first, "m")
    for with_optimizer in (True, False):
        second = make(tiny_qwen3_dir)
        second.create_adapter("again", LoraConfig(rank=4, seed=99))
        second.load_state("again", tmp_path, with_optimizer=with_optimizer)
        same = all(torch.equal(w, unbroken[n]) for n, w in go_on(second, "again").items())
        assert same == with_optimizer


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    trained(tiny_qwen3_dir).save_state("m", tmp_path)
    other = make(tiny_qwen3_dir)
    other.create_adapter("rank", LoraConfig(rank=8))
    other.create_adapter("flags", LoraConfig(rank=4, train_unembed=False))
    before = weights(other, "rank")
    with pytest.raises(CheckpointError, match=r"shape .* the adapter needs"):
        other.load_state("rank", tmp_path, with_optimizer=True)
    assert all(torch.equal(w, before[n]) for n, w in weights(other, "rank").items())
    with pytest.raises(CheckpointError, match="other flags or another base model"):
        other.load_state("flags", tmp_path, with_optimizer=False)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="torn"):
        other.load_state("rank", tmp_path, with_optimizer=False)


def test_the_seed_decides_the_first_weights(tiny_qwen3_dir: Path) -> None:
    trainer = make(tiny_qwen3_dir)
    for model_id, seed in {"a": 5, "b": 5, "c": 6, "d": None, "e": None}.items():
        trainer.create_adapter(model_id, LoraConfig(rank=4, seed=seed))
    first = {model_id: weights(trainer, model_id)["model.layers.0.self_attn.q_proj.lora_A.weight"] for model_id in "abcde"}
    assert torch.equal(first["a"], first["b"])
    assert len({tuple(w.flatten()[:4].tolist()) for w in first.values()}) == 4
    bound = 1 / np.sqrt(64)  # Kaiming-uniform with a = sqrt(5): 1 / sqrt(fan_in)
    assert 0.9 * bound < first["a"].abs().max().item() <= bound
    assert all(not w.any() for n, w in weights(trainer, "a").items() if ".lora_B." in n)


def test_adapters_on_one_base_do_not_touch_each_other(tiny_qwen3_dir: Path) -> None:
    trainer = trained(tiny_qwen3_dir)
    alone = trained(tiny_qwen3_dir)
    base = trainer.compute_logprobs(None, [1, 2, 3, 4])
    trainer.create_adapter("other", LoraConfig(rank=8, seed=2, train_unembed=False))
    trainer.forward_backward("m", batch(20), CROSS_ENTROPY)
    trainer.forward_backward("other", batch(21), CROSS_ENTROPY)
    trainer.optim_step("other", AdamParams(learning_rate=0.1))
    alone.forward_backward("m", batch(20), CROSS_ENTROPY)
    assert all(torch.equal(g, gradients(alone)[n]) for n, g in gradients(trainer).items())
    assert trainer.compute_logprobs("m", [1, 2, 3, 4]) == alone.compute_logprobs("m", [1, 2, 3, 4])
    assert trainer.compute_logprobs(None, [1, 2, 3, 4]) == base
    assert trainer.compute_logprobs("other", [1, 2, 3, 4]) != base
    trainer.remove_adapter("m")
    trainer.remove_adapter("other")
    assert trainer.compute_logprobs(None, [1, 2, 3, 4]) == base
    with pytest.raises(NotFoundError):
        trainer.forward("m", batch(), CROSS_ENTROPY)
    trainer.create_adapter("m", LoraConfig(rank=2))


def of_other_tenants(trainer: PeftTrainer, version: AdapterRef, directory: Path) -> list[Callable[[], Any]]:
    """What others may do between two micro-batches of "m". They need an adapter "old"."""
    return [
        lambda: trainer.score_prompt(scoring(version)).logprobs_T,
        lambda: trainer.score_prompt(scoring(None)).logprobs_T,
        lambda: trainer.compute_logprobs("m", PROMPT),
        lambda: trainer.create_adapter("new", LoraConfig(rank=8, seed=3, train_unembed=False)),
        lambda: trainer.forward_backward("new", batch(41), CROSS_ENTROPY),
        lambda: trainer.optim_step("new", AdamParams(learning_rate=0.1)),
        lambda: trainer.compute_logprobs("new", PROMPT),
        lambda: trainer.remove_adapter("old"),
        lambda: trainer.save_state("m", directory),
        lambda: trainer.compute_logprobs(None, PROMPT),
        lambda: trainer.forward("m", batch(42), CROSS_ENTROPY),
    ]


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layers"])
def test_others_between_micro_batches_change_no_number(model_dir: Path, tmp_path: Path, recompute: str) -> None:
    alone, shared = (trained(model_dir, tokens_per_micro_batch=1, recompute=recompute) for _ in range(2))
    alone.save_adapter("m", tmp_path)
    data = batch(40, lengths=(5, 12, 3, 9, 12, 4, 4, 8, 2, 6, 7, 3))
    answers: list[list[Any]] = []
    outputs = []
    for trainer in (alone, shared):
        trainer.create_adapter("old", LoraConfig(rank=2, seed=5))
        todo = of_other_tenants(trainer, AdapterRef(name="v", version=2, path=tmp_path), tmp_path)
        answers.append([])
        if trainer is shared:
            trainer.between_micro_batches = lambda todo=todo: answers[-1].append(todo.pop(0)())  # type: ignore[misc]
        outputs.append(trainer.forward_backward("m", data, CROSS_ENTROPY))
        if trainer is alone:
            answers[-1] += [work() for work in todo]
    assert len(answers[1]) == len(data) - 1, "once between two micro-batches, never inside another pass"
    assert outputs[0].metrics == outputs[1].metrics
    for a, b in zip(logprobs(outputs[0]), logprobs(outputs[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(g.any() for g in gradients(alone).values())
    for model_id in ("m", "new"):
        assert all(torch.equal(g, gradients(shared, model_id)[n]) for n, g in gradients(alone, model_id).items())
        assert all(torch.equal(w, weights(shared, model_id)[n]) for n, w in weights(alone, model_id).items())
    for mine, theirs in zip(*answers, strict=True):  # and the others were answered rightly
        if isinstance(mine, list | np.ndarray):
            np.testing.assert_array_equal(np.array(mine, dtype=np.float64), np.array(theirs, dtype=np.float64))


def test_the_model_in_the_pass_cannot_be_changed_and_a_failing_hook_accumulates_nothing(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    trainer = trained(tiny_qwen3_dir, tokens_per_micro_batch=1)
    trainer.save_state("m", tmp_path)
    trainer.forward_backward("m", batch(42), CROSS_ENTROPY)
    before = {n: g.clone() for n, g in gradients(trainer).items()}
    for change in (
        lambda: trainer.optim_step("m", AdamParams()),
        lambda: trainer.load_state("m", tmp_path, with_optimizer=True),
        lambda: trainer.remove_adapter("m"),
        lambda: trainer.forward_backward("m", batch(43), CROSS_ENTROPY),
    ):
        trainer.between_micro_batches = change  # type: ignore[assignment]
        with pytest.raises(EngineError, match="'m' between two micro-batches of its own pass"):
            trainer.forward_backward("m", batch(42), CROSS_ENTROPY)
        assert all(torch.equal(g, before[n]) for n, g in gradients(trainer).items())
    trainer.between_micro_batches = lambda: trainer.forward("m", batch(43), CROSS_ENTROPY) and None  # reading is fine
    trainer.forward_backward("m", batch(42), CROSS_ENTROPY)
    trainer.optim_step("m", AdamParams())


KINDS: list[dict[str, Any]] = [
    {"rank": 2},
    {"rank": 8, "train_unembed": False},
    {"rank": 4, "train_mlp": False, "train_unembed": False},
    {"rank": 16, "train_attn": False},
    {"rank": 1, "train_attn": False, "train_mlp": False},
    {"rank": 4},
    {"rank": 32, "train_attn": False, "train_unembed": False},
    {"rank": 3, "train_mlp": False},
]


def test_eight_tenants_train_as_if_each_were_alone(model_dir: Path, tmp_path: Path) -> None:
    def step(trainer: PeftTrainer, model_id: str, kind: int, count: int) -> None:
        loss = ["cross_entropy", "importance_sampling"][kind % 2]
        trainer.forward_backward(model_id, batch(100 * kind + count, loss=loss), resolve_loss(loss))
        adam = AdamParams(learning_rate=0.01 * (1 + kind), beta1=0.8, weight_decay=0.01 * kind, grad_clip_norm=float(kind % 3))
        trainer.optim_step(model_id, adam)

    shared = make(model_dir, tokens_per_micro_batch=24)
    for kind, lora in enumerate(KINDS):
        shared.create_adapter(f"t{kind}", LoraConfig(seed=kind, **lora))
    for count in range(3):
        for kind in range(len(KINDS)):
            step(shared, f"t{kind}", kind, count)
        shared.create_adapter(f"passing{count}", LoraConfig(rank=8, seed=9))  # comes, trains and goes
        step(shared, f"passing{count}", 0, 7)
        shared.score_prompt(scoring(None))
        if count:
            shared.remove_adapter(f"passing{count - 1}")
        (tmp_path / f"{count}").mkdir()  # one tenant is parked and comes back
        shared.save_state("t3", tmp_path / f"{count}")
        shared.remove_adapter("t3")
        shared.create_adapter("t3", LoraConfig(seed=99, **KINDS[3]))
        shared.load_state("t3", tmp_path / f"{count}", with_optimizer=True)
    for kind, lora in enumerate(KINDS):
        alone = make(model_dir, tokens_per_micro_batch=24)
        alone.create_adapter("alone", LoraConfig(seed=kind, **lora))
        first = weights(alone, "alone")
        for count in range(3):
            step(alone, "alone", kind, count)
        ours, theirs = weights(shared, f"t{kind}"), weights(alone, "alone")
        assert all(torch.equal(w, theirs[n]) for n, w in ours.items()), KINDS[kind]  # to the last bit
        assert any(not torch.equal(w, first[n]) for n, w in ours.items())
        assert shared.compute_logprobs(f"t{kind}", PROMPT) == alone.compute_logprobs("alone", PROMPT)


def test_the_work_of_choosing_an_adapter_does_not_grow_with_their_number(tiny_qwen3_dir: Path) -> None:
    trainer = trained(tiny_qwen3_dir)

    def modules_and_parameters() -> tuple[int, int]:
        return sum(1 for _ in trainer._base.modules()), sum(1 for _ in trainer._base.parameters())

    before = modules_and_parameters()
    for count in range(12):
        trainer.create_adapter(f"other{count}", LoraConfig(rank=4))
    assert modules_and_parameters() == before  # what a call walks over


def test_several_targets_per_position(tiny_qwen3_dir: Path) -> None:
    trainer = trained(tiny_qwen3_dir)
    rng = np.random.default_rng(0)
    wide = [
        Datum(
            model_input=ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": rng.integers(0, 512, (3, k)), "weights": rng.normal(size=(3, k)).astype(np.float32)},
        )
        for k in (2, 4)
    ]
    narrow = batch(2, lengths=[3])
    output = trainer.forward("m", [wide[0], narrow[0], wide[1]], CROSS_ENTROPY)
    assert [o.shape for o in logprobs(output)] == [(3, 2), (3,), (3, 4)]
    single = Datum(
        model_input=ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={
            "target_tokens": wide[1].loss_fn_inputs["target_tokens"].to_numpy()[:, 3].copy(),
            "weights": np.ones(3, dtype=np.float32),
        },
    )
    np.testing.assert_allclose(logprobs(trainer.forward("m", [single], CROSS_ENTROPY))[0], logprobs(output)[2][:, 3], atol=1e-5)


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normal, squeezed = trained(tiny_qwen3_dir), trained(tiny_qwen3_dir)
    normal.forward_backward("m", batch(4), CROSS_ENTROPY)
    sizes: list[int] = []
    pass_on: Callable[..., Any] = squeezed._micro_batch

    def small_machine(adapter: Any, items: list[Any], loss: Any, *, backward: bool) -> Any:
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pass_on(adapter, items, loss, backward=backward)

    monkeypatch.setattr(squeezed, "_micro_batch", small_machine)
    squeezed.forward_backward("m", batch(4), CROSS_ENTROPY)
    assert sizes == [5, 2, 3, 1, 2]
    for name, grad in gradients(squeezed).items():
        assert relative(grad, gradients(normal)[name]) < 1e-4
    squeezed.forward_backward("m", batch(4), CROSS_ENTROPY)
    assert max(sizes[5:]) <= 2  # what did not fit once is not tried again


def test_a_failing_call_leaves_the_gradients_as_they_were(tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tiny_qwen3_dir, tokens_per_micro_batch=12)
    trainer.forward_backward("m", batch(5), CROSS_ENTROPY)
    before = {n: g.clone() for n, g in gradients(trainer).items()}
    pass_on: Callable[..., Any] = trainer._micro_batch
    calls: list[int] = []

    def breaks_on_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pass_on(*args, **kwargs)

    monkeypatch.setattr(trainer, "_micro_batch", breaks_on_the_second)
    with pytest.raises(EngineError, match=r"datum \d with 12 tokens does not fit into the memory of cpu even alone"):
        trainer.forward_backward("m", batch(5), CROSS_ENTROPY)
    inputs = {"target_tokens": [1, 2, 3], "weights": [3e38, 3e38, 3e38]}
    infinite = [Datum(model_input=ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)]
    with pytest.raises(EngineError, match=r"not finite.*nothing was accumulated"):
        trainer.forward_backward("m", infinite, CROSS_ENTROPY)
    assert all(torch.equal(g, before[n]) for n, g in gradients(trainer).items())


def test_recomputing_activations_changes_no_number(tiny_llama_dir: Path) -> None:
    plain, recomputing = trained(tiny_llama_dir, steps=1), trained(tiny_llama_dir, steps=1, recompute="layers")
    outputs = [t.forward_backward("m", batch(6), CROSS_ENTROPY) for t in (plain, recomputing)]
    assert outputs[0].metrics == pytest.approx(outputs[1].metrics, rel=1e-6)
    for name, grad in gradients(recomputing).items():
        assert relative(grad, gradients(plain)[name]) < 1e-5


def test_bfloat16_compute_keeps_float32_masters_and_comes_close(tiny_qwen3_dir: Path) -> None:
    exact, half = trained(tiny_qwen3_dir), trained(tiny_qwen3_dir, dtype="bfloat16")
    assert {w.dtype for w in weights(half).values()} == {torch.float32}
    gap = np.abs(np.subtract(exact.compute_logprobs("m", list(range(20)))[1:], half.compute_logprobs("m", list(range(20)))[1:]))
    assert 0 < gap.max() < 1.0 and gap.mean() < 0.2  # a random sharp model: 8 bits of mantissa through two layers


def test_an_output_head_that_ptlab_does_not_know_is_refused(tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = OutputHead.of
    monkeypatch.setattr(OutputHead, "of", lambda model, lora: replace(head(model, lora), scale=1.5))
    with pytest.raises(EngineError, match=r"differ from the model's own by .* nats"):
        make(tiny_qwen3_dir)


def test_a_rank_or_flags_that_cannot_work_are_refused(tiny_qwen3_dir: Path) -> None:
    trainer = make(tiny_qwen3_dir)
    with pytest.raises(InvalidRequestError, match="rank is 0; it must be at least 1"):
        trainer.create_adapter("m", LoraConfig(rank=0))
    with pytest.raises(InvalidRequestError, match="at least one of"):
        trainer.create_adapter("m", LoraConfig(rank=4, train_attn=False, train_mlp=False, train_unembed=False))
    trainer.create_adapter("m", LoraConfig(rank=4))
    with pytest.raises(InvalidRequestError, match="exists already"):
        trainer.create_adapter("m", LoraConfig(rank=4))


def scoring(adapter: AdapterRef | None) -> SampleCall:
    return SampleCall(
        prompt=ModelInput.from_ints(PROMPT),
        num_samples=1,
        params=SamplingParams(max_tokens=1, seed=7),
        adapter=adapter,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        target_prompt_logprobs=TensorData.from_numpy(np.array([[2, -1]] * 5)),
        prompt_alt_tokens_k=2,
    )


def test_a_prompt_is_scored_under_a_saved_version_whatever_is_being_trained(model_dir: Path, tmp_path: Path) -> None:
    trainer = trained(model_dir)
    trainer.save_adapter("m", tmp_path)
    ref = AdapterRef(name="v", version=2, path=tmp_path)
    saved, base = (trainer.compute_logprobs(model_id, PROMPT) for model_id in ("m", None))
    trainer.forward_backward("m", batch(30), CROSS_ENTROPY)
    trainer.optim_step("m", AdamParams(learning_rate=0.05))
    trainer.forward_backward("m", batch(31), CROSS_ENTROPY)
    before, gradient = trainer.compute_logprobs("m", [3, 1, 4]), {n: g.clone() for n, g in gradients(trainer).items()}
    for adapter, expected in ((ref, saved), (None, base)):
        scores = trainer.score_prompt(scoring(adapter))
        assert scores.logprobs_T is not None and scores.topk is not None and scores.targets is not None and scores.alternatives is not None
        np.testing.assert_allclose(scores.logprobs_T[1:], expected[1:], atol=1e-5)
        assert np.isnan(scores.logprobs_T[0]) and scores.topk.token_ids.shape == (6, 3) and scores.targets.shape == [5, 2]
    assert trainer.compute_logprobs("m", [3, 1, 4]) == before  # the trained adapter is where it was
    assert all(torch.equal(g, gradient[n]) for n, g in gradients(trainer).items())
    trainer.remove_adapter("m")
    fresh = trainer.score_prompt(scoring(ref)).logprobs_T  # also with nothing to train
    assert fresh is not None
    np.testing.assert_allclose(fresh[1:], saved[1:], atol=1e-5)
    trainer.create_adapter("m", LoraConfig(rank=2))
