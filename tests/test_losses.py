"""The checks of a datum, the sum over datums, and the metrics. The formulas: test_loss_formulas.py; `custom`: test_losses_custom.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptlab.errors import InvalidRequestError
from ptlab.losses import LOSSES, LossCall, check_datum, loss_inputs, loss_metrics, loss_sum, resolve_loss
from ptlab.types import Datum, EncodedTextChunk, ImageChunk, ModelInput, TensorData

INF, NAN = math.inf, math.nan
REDUCTIONS = {"mean", "sum", "min", "max"}

# A legal datum of four tokens for each loss; tests change one thing in it.
FIELDS: dict[str, list[Any]] = {
    "target_tokens": [0, 0, 7, 9],
    "weights": [0.0, 0.0, 1.0, 1.0],
    "logprobs": [0.0, 0.0, -0.5, -0.25],
    "advantages": [0.0, 0.0, 1.0, -1.0],
    "sequence_ratio_mask": [0.0, 0.0, 1.0, 1.0],
}


def make_datum(loss: str, tokens: list[int] | None = None, **changes: Any) -> Datum:
    fields = {name: FIELDS[name] for name in LOSSES[loss].inputs} | changes
    return Datum(ModelInput.from_ints([3, 4, 5, 6] if tokens is None else tokens), {k: v for k, v in fields.items() if v is not None})


def check(loss: str, datum: Datum, **config: float) -> None:
    check_datum(datum, resolve_loss(loss, config), index=3, vocab_size=10, max_tokens=6)


# ------------------------------------------------------------------------------------------------------------ check_datum


@pytest.mark.parametrize("loss", LOSSES)
def test_a_legal_datum_passes(loss: str) -> None:
    check(loss, make_datum(loss))


SPARSE_BUT_SHORT = TensorData([7, 9], "int64", [2, 3], [0, 1, 2], [0, 1])
HUGE_CLAIM = TensorData([7], "int64", [4, 10**13], [0, 1, 1, 1, 1], [0])


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        ("ppo", {"logprobs": None}, r"datum 3: input 'logprobs' is missing; loss 'ppo' needs target_tokens, logprobs, advant.*given: t"),
        ("ppo", {"target_tokens": None}, r"datum 3: input 'target_tokens' is missing"),
        ("gspo", {"sequence_ratio_mask": None}, r"datum 3: input 'sequence_ratio_mask' is missing"),
        ("cross_entropy", {"weights": None}, r"datum 3: input 'weights' is missing; loss 'cross_entropy' needs target_tokens, weights;"),
        ("ppo", {"mask": np.ones(4)}, r"datum 3: unknown input 'mask'.*advantages and takes weights, clip_low_threshold, c"),
        ("ppo", {"advantage": np.ones(4)}, r"unknown input 'advantage' \(did you mean 'advantages'\?\)"),
        ("cross_entropy", {"advantages": [0.0] * 4}, r"unknown input 'advantages'"),
        ("gspo", {"clip_low_threshold": [0.9] * 4}, r"unknown input 'clip_low_threshold'"),
        # lengths
        (
            "ppo",
            {"advantages": [1.0, -1.0]},
            r"^datum 3: 'advantages' has 2 values, model_input has 4 tokens; loss 'ppo' needs one per token \(0\.0 on the prompt\)$",
        ),
        ("ppo", {"logprobs": [0.0] * 5}, r"'logprobs' has 5 values, model_input has 4 tokens.*drop the first.*sliced \[1:\]"),
        ("dro", {"target_tokens": [7]}, r"'target_tokens' has 1 values, model_input has 4 tokens.*\(any id, e\.g\. 0, on the prompt\)"),
        ("ppo", {"weights": []}, r"'weights' has 0 values, model_input has 4 tokens"),
        ("ppo", {"target_tokens": [[7], [7], [7], [7]]}, r"'target_tokens' has shape \[4, 1\]; loss 'ppo' needs \[4\]"),
        ("ppo", {"clip_high_threshold": TensorData([1.2], "float32", [])}, r"'clip_high_threshold' has shape \[\]; loss 'ppo' needs \[4\]"),
        ("cross_entropy", {"target_tokens": [[7, 8]] * 4}, r"'weights' has shape \[4\]; .* needs \[4, 2\], as 'target_tokens'"),
        ("cross_entropy", {"weights": [[1.0, 0.0]] * 4}, r"'weights' has shape \[4, 2\]; .* needs \[4\], as 'target_tokens'"),
        ("cross_entropy", {"target_tokens": SPARSE_BUT_SHORT}, r"'target_tokens' has shape \[2, 3\]; .* needs \[4\] or \[4, K\]"),
        ("cross_entropy", {"target_tokens": HUGE_CLAIM}, r"'target_tokens' has shape \[4, 10000000000000\]"),
        ("cross_entropy", {"target_tokens": TensorData([], "int64", [4, 0])}, r"'target_tokens' has shape \[4, 0\]"),
        # token ids
        ("ppo", {"tokens": [3, 4, 10, 6]}, r"datum 3: model_input has the token id 10 at position 2; the model has 0\.\.9"),
        ("ppo", {"tokens": [-1, 4, 5, 6]}, r"model_input has the token id -1 at position 0"),
        ("ppo", {"tokens": [3, 4, 5, 2**70]}, r"model_input has the token id 1180591620717411303424 at position 3"),
        ("ppo", {"target_tokens": [0, 0, 7, 10]}, r"'target_tokens' is 10 at position 3; the model has 0\.\.9"),
        ("cross_entropy", {"target_tokens": [-100, 0, 7, 9]}, r"'target_tokens' is -100 at position 0; .*any id will do, e\.g\. 0, with"),
        ("ppo", {"target_tokens": np.array([0, 0, 7.5, 9])}, r"'target_tokens' is 7\.5 at position 2; token ids are whole numbers"),
        (
            "cross_entropy",
            {"target_tokens": [[1, 2]] * 3 + [[1, 99]], "weights": [[1.0, 1.0]] * 4},
            r"'target_tokens' is 99 at position \[3, 1\]",
        ),
        # model_input
        ("ppo", {"tokens": []}, r"datum 3: model_input is empty"),
        ("ppo", {"tokens": [1] * 7}, r"datum 3: model_input has 7 tokens, the model takes at most 6"),
        # numbers
        ("ppo", {"advantages": [0.0, NAN, 1.0, 1.0]}, r"'advantages' is nan at position 1"),
        ("ppo", {"advantages": [0.0, 0.0, INF, 1.0]}, r"'advantages' is inf at position 2; its size must be at most 1e\+09"),
        ("cross_entropy", {"weights": [0.0, 0.0, -INF, 1.0]}, r"'weights' is -inf at position 2"),
        ("cross_entropy", {"weights": np.array([0, 0, 0, -(2**63)])}, r"'weights' is -9223372036854775808 at position 3"),
        ("gspo", {"sequence_ratio_mask": [0.0, NAN, 1.0, 1.0]}, r"'sequence_ratio_mask' is nan"),
        ("ppo", {"clip_low_threshold": [0.8, NAN, 0.8, 0.8]}, r"'clip_low_threshold' is nan at position 1"),
        ("ppo", {"logprobs": [NAN, 0.0, -0.5, -0.25]}, r"'logprobs' is nan at position 0; it must be a log-probability"),
        ("ppo", {"logprobs": [INF, 0.0, -0.5, -0.25]}, r"'logprobs' is inf at position 0"),
        ("ppo", {"logprobs": [0.0, 0.0, -INF, -0.25]}, r"'logprobs' is -inf at position 2; where a token counts.*\(advantage 0\.0 le"),
        ("dro", {"logprobs": [0.0, 0.0, -INF, -0.25]}, r"'logprobs' is -inf at position 2.*\(weight 0\.0 leaves it out\)"),
        ("dro", {"logprobs": [-1e30, 0.0, -0.5, -0.25]}, r"'logprobs' is -1.*e\+30 at position 0"),
        ("gspo", {"logprobs": [0.0, 0.0, -INF, -0.25], "advantages": [0.0, 0.0, 0.0, 1.0]}, r"'logprobs' is -inf.*ratio_mask 0\.0"),
        ("gspo", {"sequence_ratio_mask": [0.0] * 4}, r"'sequence_ratio_mask' is 0 everywhere, but there are advantages"),
        ("ppo", {"clip_high_threshold": [0.0, 0.0, 1.2, 0.5]}, r"clip_low_threshold 0\.8 is above clip_high_threshold 0\.5 at position 3"),
    ],
)
def test_check_refuses_by_name(loss: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check(loss, make_datum(loss, **changes))


def test_check_refuses_an_image_with_its_place() -> None:
    model_input = ModelInput(chunks=[EncodedTextChunk(tokens=[1, 2]), ImageChunk(data=b"x", format="png", expected_tokens=2)])
    with pytest.raises(InvalidRequestError, match=r"datum 3: model_input chunk 1 is of type 'image'"):
        check("ppo", Datum(model_input, make_datum("ppo").loss_fn_inputs))


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("ppo", {"logprobs": [-INF, -1e30, -0.5, -0.25]}),  # prompt positions: not looked at
        ("ppo", {"logprobs": [0.0, 0.0, -INF, -0.25], "weights": [0.0, 0.0, 0.0, 1.0]}),
        ("dro", {"logprobs": [-INF, 0.0, -0.5, -0.25]}),
        ("dro", {"logprobs": [-1e30, 0.0, -0.5, -0.25], "weights": [0.0, 1.0, 1.0, 1.0]}),
        ("gspo", {"sequence_ratio_mask": [0.0] * 4, "advantages": [0.0] * 4}),  # nothing to learn, nothing wrong
        ("gspo", {"logprobs": [0.0, 0.0, -INF, -0.25], "advantages": [0.0] * 4}),
        ("cross_entropy", {"weights": [0.5, -2.0, 0.0, 1e4]}),
        ("ppo", {"clip_high_threshold": [0.0, 0.0, 1.2, 2.0]}),  # padded with 0.0 below the config's low bound
        ("ppo", {"tokens": [1, 2, 3, 4, 5, 6], **{k: [*v, v[-1], v[-1]] for k, v in FIELDS.items() if k in LOSSES["ppo"].inputs}}),
    ],
)
def test_check_accepts(loss: str, changes: dict[str, Any]) -> None:
    check(loss, make_datum(loss, **changes))


def test_model_input_of_several_text_chunks_counts_all_of_them() -> None:
    model_input = ModelInput(chunks=[EncodedTextChunk(tokens=[1, 2, 3]), EncodedTextChunk(tokens=[4])])
    check("ppo", Datum(model_input, make_datum("ppo").loss_fn_inputs))


# ------------------------------------------------------------------------------------------------------------ loss_inputs


def test_inputs_are_dense_with_the_dtype_of_their_name() -> None:
    advantages, weights, targets = np.array([0, 0, 1, -1]), torch.tensor([0, 0, 1, 1]), np.array([0.0, 0, 7, 9])
    drifted = make_datum("ppo", advantages=advantages, weights=weights, target_tokens=targets)
    check("ppo", drifted)
    inputs = loss_inputs(drifted, resolve_loss("ppo"))
    assert {name: tensor.dtype for name, tensor in inputs.items()} == {
        "target_tokens": torch.int64,
        "logprobs": torch.float32,
        "advantages": torch.float32,
        "weights": torch.float32,
    }
    assert inputs["advantages"].tolist() == [0.0, 0.0, 1.0, -1.0]
    assert inputs["target_tokens"].tolist() == [0, 0, 7, 9]


def test_sparse_targets_and_weights_are_padded_with_zero() -> None:
    targets = torch.zeros(4, 5, dtype=torch.int64)
    targets[2, 1], targets[3, 0] = 7, 9
    weights = torch.zeros(4, 5)
    weights[2, 1], weights[3, 0] = 0.25, 0.75
    datum = make_datum("cross_entropy", target_tokens=targets, weights=weights)
    assert datum.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    check("cross_entropy", datum)
    inputs = loss_inputs(datum, resolve_loss("cross_entropy"))
    assert torch.equal(inputs["target_tokens"], targets)
    assert torch.equal(inputs["weights"], weights)


# --------------------------------------------------------------------------------------------------------------- loss_sum


def sum_and_gradient(loss: LossCall, logprobs: list[Tensor], inputs: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    leaves = [lp.clone().requires_grad_() for lp in logprobs]
    total = loss_sum(loss, leaves, inputs)
    return total.detach(), list(torch.autograd.grad(total, leaves))


def test_the_sum_is_over_tokens_and_datums_without_any_division() -> None:
    # ln 2 per trained token: 2 tokens in one datum, 2 x 2 in another of another shape
    loss = resolve_loss("cross_entropy")
    half = math.log(0.5)
    logprobs = [torch.full((4,), half), torch.full((4, 2), half)]
    inputs = [{"weights": torch.tensor([0.0, 0.0, 1.0, 1.0])}, {"weights": torch.tensor([[0.0, 0.0]] * 2 + [[1.0, 1.0]] * 2)}]
    assert loss_sum(loss, logprobs, inputs).item() == pytest.approx(6 * math.log(2), rel=1e-6)
    assert loss_metrics(loss, logprobs, inputs) == pytest.approx(
        {"loss:sum": 6 * math.log(2), "tokens:sum": 4.0, "weights:sum": 6.0, "nll:mean": math.log(2)}, rel=1e-6
    )


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"])
def test_weights_multiply_the_loss_and_zero_removes_a_token(loss: str) -> None:
    call = resolve_loss(loss)
    lp = torch.tensor([-3.0, -1.0, -0.6, -0.2])
    plain = loss_inputs(make_datum(loss), call)
    doubled = loss_inputs(make_datum(loss, weights=[2.0] * 4), call)
    removed = loss_inputs(make_datum(loss, weights=[0.0, 0.0, 0.0, 1.0]), call)
    value, gradient = sum_and_gradient(call, [lp], [plain])
    assert sum_and_gradient(call, [lp], [doubled])[0].item() == pytest.approx(2 * value.item(), rel=1e-6)
    _, left = sum_and_gradient(call, [lp], [removed])
    assert left[0][:3].tolist() == [0.0, 0.0, 0.0]
    assert left[0][3] == gradient[0][3]  # gspo: the removed token still takes part in the sequence's ratio


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"])
@pytest.mark.parametrize(("target", "sampling"), [(-INF, -INF), (-INF, 0.0), (-1.0, -1e30), (-1e30, 0.0)])
def test_a_token_of_weight_zero_is_exactly_zero_whatever_its_advantage(loss: str, target: float, sampling: float) -> None:
    call = resolve_loss(loss)
    datum = make_datum(loss, logprobs=[sampling, 0.0, -0.5, -0.25], advantages=[1.0, 0.0, 1.0, 0.0], weights=[0.0, 1.0, 1.0, 1.0])
    check(loss, datum)
    total, [gradient] = sum_and_gradient(call, [torch.tensor([target, 0.0, -0.5, -0.25])], [loss_inputs(datum, call)])
    on_policy = 0.5 if loss in ("cispo", "dro", "stable_reinforce") else -1.0  # -(lp * A) with lp = -0.5, or -(ratio * A) with ratio 1
    assert total.item() == pytest.approx(on_policy, rel=1e-6)
    assert gradient.tolist() == pytest.approx([0.0, 0.0, -1.0, 0.0], rel=1e-6)


def test_weights_stop_dro_from_training_on_the_padded_prompt() -> None:
    call = resolve_loss("dro")
    lp = torch.tensor([-3.0, -INF, -0.6, -0.2])
    _, without = sum_and_gradient(call, [lp], [loss_inputs(make_datum("dro"), call)])
    total, with_weights = sum_and_gradient(call, [lp], [loss_inputs(make_datum("dro", weights=[0.0, 0.0, 1.0, 1.0]), call)])
    assert without[0][0].item() == pytest.approx(0.05 * -3.0)  # pulled up towards 0
    assert with_weights[0].tolist() == [0.0, 0.0, *without[0][2:].tolist()]
    assert math.isfinite(total.item())


def test_gspo_takes_the_ratio_of_its_own_datum_only() -> None:
    call = resolve_loss("gspo", {"clip_low_threshold": 0.1, "clip_high_threshold": 10.0})
    inputs = loss_inputs(make_datum("gspo", logprobs=[0.0, 0.0, -1.0, -1.0], advantages=[0.0, 0.0, 1.0, 1.0]), call)
    up, down = torch.tensor([0.0, 0.0, -1 + math.log(2), -1.0 + math.log(2)]), torch.tensor([0.0, 0.0, -1 - math.log(2), -1 - math.log(2)])
    total, gradients = sum_and_gradient(call, [up, down], [inputs, inputs])
    assert total.item() == pytest.approx(-2 * 2 - 2 * 0.5, rel=1e-6)  # a common ratio would give -4
    assert gradients[0].tolist() == pytest.approx([0, 0, -2, -2], rel=1e-6)
    assert gradients[1].tolist() == pytest.approx([0, 0, -0.5, -0.5], rel=1e-6)


def test_target_logprobs_of_another_length_are_refused_not_shifted() -> None:
    # two datums whose lengths are swapped have the right total: concatenating blindly would mix them up
    call = resolve_loss("importance_sampling")
    inputs = [{"logprobs": torch.zeros(n), "advantages": torch.ones(n)} for n in (2, 3)]
    with pytest.raises(ValueError, match=r"target_logprobs has shape \[3\], logprobs \[2\]"):
        loss_sum(call, [torch.zeros(3), torch.zeros(2)], inputs)
    with pytest.raises(ValueError, match="1 target_logprobs for the inputs of 2 datums"):
        loss_sum(call, [torch.zeros(2)], inputs)


# ------------------------------------------------------------------------------------------------------- over random datums


@st.composite
def legal_datums(draw: st.DrawFn) -> tuple[LossCall, list[Datum], list[Tensor]]:
    """Datums check_datum lets pass, at the edges of what is legal, with log-probabilities a trainer may give."""
    name = draw(st.sampled_from(list(LOSSES)))
    call = resolve_loss(name)
    numbers = st.sampled_from([0.0, 1.0, -1.0, 0.3, 1e9, -1e9, 1e-30])
    sampling = st.sampled_from([0.0, -0.1, -3.0, -500.0, -99999.0, -1e9, 1e9, -1e30, -INF])
    masks, bounds = st.sampled_from([0.0, 1.0]), st.sampled_from([-1e9, 0.0, 1.0, 2.0, 1e9])
    draws = {"logprobs": sampling, "sequence_ratio_mask": masks, "clip_low_threshold": bounds, "clip_high_threshold": bounds}
    data: list[Datum] = []
    logprobs: list[Tensor] = []
    for index in range(draw(st.integers(1, 4))):
        num_tokens = draw(st.integers(1, 5))
        names = [*LOSSES[name].inputs[1:], *(key for key in LOSSES[name].optional if draw(st.booleans()))]
        fields = {key: draw(st.lists(draws.get(key, numbers), min_size=num_tokens, max_size=num_tokens)) for key in names}
        datum = Datum(ModelInput.from_ints([1] * num_tokens), {"target_tokens": [1] * num_tokens, **fields})
        try:
            check_datum(datum, call, index=index, vocab_size=2, max_tokens=5)
        except InvalidRequestError:
            continue
        data.append(datum)
        # cross_entropy of an impossible target is truly infinite; the policy losses must bear it
        values = st.sampled_from([0.0, -1e-3, -1.0, -80.0, *([] if name == "cross_entropy" else [-INF])])
        logprobs.append(torch.tensor(draw(st.lists(values, min_size=num_tokens, max_size=num_tokens))))
    return call, data, logprobs


def impossible_token_with_a_floor(call: LossCall, fields: dict[str, Tensor], lp: Tensor) -> bool:
    """cispo with a low bound > 0 gives a token of probability 0 a weight: its loss is truly infinite."""
    return call.name == "cispo" and bool(torch.isinf(lp).any()) and bool((fields.get("clip_low_threshold", torch.zeros(1)) != 0).any())


@settings(max_examples=400, deadline=None)
@given(legal_datums())
def test_whatever_passes_the_check_has_a_finite_loss_gradient_and_metrics(drawn: tuple[LossCall, list[Datum], list[Tensor]]) -> None:
    call, data, logprobs = drawn
    inputs = [loss_inputs(datum, call) for datum in data]
    kept = [index for index in range(len(data)) if not impossible_token_with_a_floor(call, inputs[index], logprobs[index])]
    inputs, logprobs = [inputs[index] for index in kept], [logprobs[index] for index in kept]
    if not kept:
        return
    total, gradients = sum_and_gradient(call, logprobs, inputs)
    metrics = loss_metrics(call, logprobs, inputs)
    assert math.isfinite(total.item())
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert all(key.count(":") == 1 and key.split(":")[1] in REDUCTIONS for key in metrics)  # else the SDK refuses the whole result


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(list(LOSSES)), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_grouping_of_datums_changes_neither_value_nor_gradient(name: str, lengths: list[int], seed: int) -> None:
    call = resolve_loss(name)
    generator = torch.Generator().manual_seed(seed)
    logprobs = [-torch.rand(n, generator=generator) for n in lengths]
    inputs = [{key: torch.randn(n, generator=generator) for key in LOSSES[name].inputs[1:]} for n in lengths]
    together, gradients = sum_and_gradient(call, logprobs, inputs)
    singles = [sum_and_gradient(call, [lp], [fields]) for lp, fields in zip(logprobs, inputs, strict=True)]
    magnitude = sum(gradient.abs().sum().item() for gradient in gradients) + 1.0
    assert together.item() == pytest.approx(sum(value.item() for value, _ in singles), abs=1e-5 * magnitude)
    for gradient, (_, [single]) in zip(gradients, singles, strict=True):
        assert torch.equal(gradient, single)


# ---------------------------------------------------------------------------------------------------------------- metrics


def test_ppo_metrics_by_hand() -> None:
    # ratios 1.5 and 0.5, both A = 1: one of two is clipped; the prompt does not count
    call = resolve_loss("ppo")
    q = [0.0, 0.0, math.log(0.5), math.log(0.5)]
    lp = torch.tensor([-9.0, -INF, math.log(0.75), math.log(0.25)])
    metrics = loss_metrics(call, [lp], [loss_inputs(make_datum("ppo", logprobs=q, advantages=[0.0, 0.0, 1.0, 1.0]), call)])
    gaps = [math.log(1 / 1.5), math.log(2)]
    assert metrics == pytest.approx(
        {
            "loss:sum": -1.7,
            "tokens:sum": 2.0,
            "ratio:mean": 1.0,
            "ratio:max": 1.5,
            "ratio:min": 0.5,
            "clip_fraction:mean": 0.5,
            "kl_sample_train_v1:mean": sum(gaps) / 2,
            "kl_sample_train_v2:mean": 0.5 * sum(gap**2 for gap in gaps) / 2,
        },
        rel=1e-6,
    )


def test_stable_reinforce_metrics_by_hand() -> None:
    # A = 1: ratios 1.5 (trained), 3 (masked, so not truncated), 0.25 (trained); A = -1: ratio 4 (truncated); the prompt does not count
    call = resolve_loss("stable_reinforce", {"max_logprob_gap": math.log(1.6), "kl_coeff": 0.0})
    q, p = [0.5, 0.25, 0.5, 0.125], [0.75, 0.75, 0.125, 0.5]
    inputs = {"logprobs": torch.tensor([0.0, *map(math.log, q)]), "advantages": torch.tensor([0.0, 1.0, 1.0, 1.0, -1.0])}
    metrics = loss_metrics(call, [torch.tensor([-9.0, *map(math.log, p)])], [inputs])
    gaps = [math.log(a / b) for a, b in zip(q, p, strict=True)]
    assert metrics == pytest.approx(
        {
            "loss:sum": -1.5 * math.log(0.75) - 0.25 * math.log(0.125) + 2 * math.log(0.5),
            "tokens:sum": 4.0,
            "ratio:mean": (1.5 + 3 + 0.25 + 4) / 4,
            "ratio:max": 4.0,
            "ratio:min": 0.25,
            "masked_fraction:mean": 0.25,
            "truncated_fraction:mean": 0.25,
            "kl_sample_train_v1:mean": sum(gaps) / 4,
            "kl_sample_train_v2:mean": 0.5 * sum(gap**2 for gap in gaps) / 4,
        },
        rel=1e-5,
    )


def test_gspo_metrics_speak_of_sequence_ratios_and_compare_the_masked_tokens() -> None:
    # masked token ratios 2, 4 and 1 -> sequence ratio 2; A = 0 does not count, A = +1 is clipped at 1.0004, A = -1 is not
    call = resolve_loss("gspo")
    q = [0.0, math.log(1 / 8), math.log(1 / 8), math.log(1 / 4)]
    lp = torch.tensor([-INF, math.log(1 / 4), math.log(1 / 2), math.log(1 / 4)])
    datum = make_datum("gspo", logprobs=q, sequence_ratio_mask=[0.0, 1.0, 1.0, 1.0])
    metrics = loss_metrics(call, [lp], [loss_inputs(datum, call)])
    assert metrics == pytest.approx(
        {
            "loss:sum": 2 - 1.0004,
            "tokens:sum": 2.0,
            "ratio:mean": 2.0,
            "ratio:max": 2.0,
            "ratio:min": 2.0,
            "clip_fraction:mean": 0.5,
            "kl_sample_train_v1:mean": -math.log(2),
            "kl_sample_train_v2:mean": 0.5 * (math.log(4) ** 2 + math.log(2) ** 2) / 3,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_without_tokens_that_count_only_the_sums_are_reported(loss: str) -> None:
    call = resolve_loss(loss)
    nothing = {"weights": [0.0] * 4} if loss in ("cross_entropy", "dro") else {"advantages": [0.0] * 4}
    if loss == "gspo":
        nothing["sequence_ratio_mask"] = [0.0] * 4
    metrics = loss_metrics(call, [torch.full((4,), -1.0)], [loss_inputs(make_datum(loss, **nothing), call)])
    assert metrics == {"loss:sum": 0.0, "tokens:sum": 0.0} | ({"weights:sum": 0.0} if loss == "cross_entropy" else {})


def test_metrics_do_not_touch_the_graph() -> None:
    call = resolve_loss("ppo")
    lp = torch.tensor([-3.0, -1.0, -0.6, -0.2], requires_grad=True)
    loss_metrics(call, [lp], [loss_inputs(make_datum("ppo"), call)])
    assert lp.grad is None
