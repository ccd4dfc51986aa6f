"""Datums by hand: the shift by one, what is trained on, and when turns become one datum."""

from __future__ import annotations

import numpy as np
import pytest

from ptlab.errors import InvalidRequestError
from ptlab.losses import LOSSES, check_datum, resolve_loss
from ptlab.rl.datums import group_to_datums, trajectory_to_datums
from ptlab.rl.types import Trajectory, TrajectoryGroup, Transition
from ptlab.types import Datum, EncodedTextChunk, ImageChunk, ModelInput


def turn(observation: list[int] | ModelInput, action: list[int], logprobs: list[float]) -> Transition:
    prompt = observation if isinstance(observation, ModelInput) else ModelInput.from_ints(observation)
    return Transition(
        observation=prompt, action=action, sampling_logprobs_T=logprobs, policy_version=0, stop_reason="stop", reward=0.0, episode_done=True
    )


def attempt(*turns: Transition) -> Trajectory:
    return Trajectory(transitions=list(turns), stop_reason="done")


def group(*trajectories: Trajectory) -> TrajectoryGroup:
    n = len(trajectories)
    return TrajectoryGroup(trajectories_G=list(trajectories), final_rewards_G=[0.0] * n, metrics_G=[{}] * n)


def arrays(datum: Datum) -> dict[str, list[float]]:
    return {name: tensor.to_numpy().tolist() for name, tensor in datum.loss_fn_inputs.items()}


def test_every_array_speaks_of_the_token_after():
    [datum] = trajectory_to_datums(attempt(turn([5, 6, 7], [8, 9], [-0.5, -0.25])), 2.0)
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    assert arrays(datum) == {
        "target_tokens": [6, 7, 8, 9],
        "logprobs": [0.0, 0.0, -0.5, -0.25],
        "advantages": [0.0, 0.0, 2.0, 2.0],
    }


def test_dtypes_are_those_of_the_wire():
    [datum] = trajectory_to_datums(attempt(turn([5], [8], [-0.5])), 1)
    assert {name: tensor.dtype for name, tensor in datum.loss_fn_inputs.items()} == {
        "target_tokens": "int64",
        "logprobs": "float32",
        "advantages": "float32",
    }


def test_turns_that_extend_each_other_become_one_datum():
    first, second = turn([1, 2], [3, 4], [-0.1, -0.2]), turn([1, 2, 3, 4, 5, 6], [7], [-0.3])
    [datum] = trajectory_to_datums(attempt(first, second), -1.0)
    assert datum.model_input.to_ints() == [1, 2, 3, 4, 5, 6]
    got = arrays(datum)
    assert got["target_tokens"] == [2, 3, 4, 5, 6, 7]
    assert got["advantages"] == [0.0, -1.0, -1.0, 0.0, 0.0, -1.0]  # 5 and 6 were given, not sampled
    np.testing.assert_allclose(got["logprobs"], [0.0, -0.1, -0.2, 0.0, 0.0, -0.3], rtol=1e-6)


def test_a_turn_that_rewrites_the_past_starts_a_new_datum():
    first, second = turn([1, 2], [3, 4], [-0.1, -0.2]), turn([1, 2, 4, 5], [7], [-0.3])  # the renderer dropped token 3
    one, two = trajectory_to_datums(attempt(first, second), 1.0)
    assert one.model_input.to_ints() == [1, 2, 3]
    assert two.model_input.to_ints() == [1, 2, 4, 5]
    assert arrays(two)["advantages"] == [0.0, 0.0, 0.0, 1.0]


def test_how_a_prompt_is_cut_into_chunks_does_not_matter():
    cut = ModelInput(chunks=[EncodedTextChunk(tokens=[1, 2, 3]), EncodedTextChunk(tokens=[4, 5])])
    data = trajectory_to_datums(attempt(turn([1, 2], [3, 4], [-0.1, -0.2]), turn(cut, [7], [-0.3])), 1.0)
    assert [datum.model_input.to_ints() for datum in data] == [[1, 2, 3, 4, 5]]


def test_an_image_takes_its_positions_and_is_no_target():
    image = ImageChunk(data=b"x", format="png", expected_tokens=3)
    prompt = ModelInput(chunks=[EncodedTextChunk(tokens=[1]), image, EncodedTextChunk(tokens=[2])])
    [datum] = trajectory_to_datums(attempt(turn(prompt, [8, 9], [-0.5, -0.25])), 1.0)
    assert datum.model_input.length == 6
    assert [chunk.type for chunk in datum.model_input.chunks] == ["encoded_text", "image", "encoded_text"]
    assert arrays(datum)["target_tokens"] == [0, 0, 0, 2, 8, 9]
    assert arrays(datum)["advantages"] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("loss", [name for name, spec in LOSSES.items() if "advantages" in spec.inputs])
def test_the_backend_takes_the_datums_of_every_policy_loss(loss):
    trajectories = [attempt(turn([1, 2], [3, 4], [-0.1, -0.2])), attempt(turn([1, 2], [5], [-0.1]))]
    data = group_to_datums(group(*trajectories), [0.5, -0.5], loss=loss)
    for index, datum in enumerate(data):
        check_datum(datum, resolve_loss(loss), index=index, vocab_size=10, max_tokens=8)
        assert {len(values) for values in arrays(datum).values()} == {datum.model_input.length}
    assert len(data) == 2


def test_gspo_marks_the_sampled_tokens_and_dro_weighs_them():
    one = attempt(turn([1, 2], [3, 4], [-0.1, -0.2]))
    assert arrays(trajectory_to_datums(one, 1.0, loss="gspo")[0])["sequence_ratio_mask"] == [0.0, 1.0, 1.0]
    assert arrays(trajectory_to_datums(one, 1.0, loss="dro")[0])["weights"] == [0.0, 1.0, 1.0]
    assert "weights" not in trajectory_to_datums(one, 1.0, loss="ppo")[0].loss_fn_inputs


def test_groups_that_agree_yield_nothing():
    attempts = [attempt(turn([1, 2], [3], [-0.1]))] * 3
    assert group_to_datums(group(*attempts), [0.0, 0.0, 0.0], loss="dro") == []


def test_a_zero_advantage_in_a_group_that_differs_trains_under_dro_only():
    attempts = [attempt(turn([1, 2], [token], [-0.1])) for token in (3, 4, 5)]
    assert len(group_to_datums(group(*attempts), [1.0, 0.0, -1.0])) == 2
    assert len(group_to_datums(group(*attempts), [1.0, 0.0, -1.0], loss="dro")) == 3


def test_nothing_sampled_or_nothing_before_it_gives_no_datum():
    assert trajectory_to_datums(Trajectory(transitions=[], stop_reason="timeout"), 1.0) == []
    assert trajectory_to_datums(attempt(turn([1, 2], [], [])), 1.0) == []
    assert trajectory_to_datums(attempt(turn([], [3], [-0.1])), 1.0) == []  # no token that predicts it


def test_refusals_name_the_fault():
    one = attempt(turn([1, 2], [3], [-0.1]))
    with pytest.raises(InvalidRequestError, match="reads no advantages"):
        trajectory_to_datums(one, 1.0, loss="cross_entropy")
    with pytest.raises(InvalidRequestError, match="did you mean 'ppo'"):
        trajectory_to_datums(one, 1.0, loss="pp0")
    with pytest.raises(InvalidRequestError, match="2 sampled tokens with 1 logprobs"):
        trajectory_to_datums(attempt(turn([1], [3, 4], [-0.1])), 1.0)
    with pytest.raises(InvalidRequestError, match="1 advantages for 2 trajectories"):
        group_to_datums(group(one, one), [1.0])
