"""What is written is read back, a kill costs at most the group under way, and a file that is not whole is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ptlab.errors import ConfigError, InvalidRequestError
from ptlab.rl.datums import group_to_datums
from ptlab.rl.rollout_file import RolloutHeader, RolloutWriter, read_rollouts
from ptlab.rl.types import RolloutError, Trajectory, TrajectoryGroup, Transition
from ptlab.types import EncodedTextChunk, ImageAssetPointerChunk, ModelInput


def header(**changes) -> RolloutHeader:
    values = {"model": "m", "weights": None, "renderer": None, "env": {"kind": "addition"}, "rollout": {}, "seed": 0, "num_groups": 3}
    return RolloutHeader(**(values | changes))


def turn(observation: list[int], action: list[int], **changes) -> Transition:
    logprobs = [float(np.float32(-0.1 * (token + 1))) for token in action]
    values = {"policy_version": 4, "stop_reason": "stop", "reward": 0.25, "episode_done": False, "metrics": {"correct": 1}}
    fields = {"observation": ModelInput.from_ints(observation), "action": action, "sampling_logprobs_T": logprobs} | values | changes
    return Transition(**fields)


def group(seed: int = 0, *, size: int = 2) -> TrajectoryGroup:
    """Attempts of two turns: the second attempt's later observation does not extend the first."""
    attempts = [
        [turn([1, 2, seed], [3, 4]), turn([1, 2, seed, 3, 4, 9], [5], episode_done=True, reward=1.0)],
        [turn([1, 2, seed], [7]), turn([8], [6, 6], stop_reason="length", policy_version=None)],
    ]
    return TrajectoryGroup(
        trajectories_G=[Trajectory(transitions=attempts[i % 2], stop_reason=("done", "max_turns")[i % 2]) for i in range(size)],
        final_rewards_G=[0.5 * i for i in range(size)],
        metrics_G=[{"won": i} for i in range(size)],
        tags=["addition"],
    )


def write(path, groups, **changes):
    with RolloutWriter(path, header(), **changes) as writer:
        writer.append(groups)
        writer.finish()


def arrays(item: TrajectoryGroup) -> list[list[object]]:
    """What would be trained on."""
    data = group_to_datums(item, [1.0, -1.0, 0.5][: len(item.rewards_G)], loss="dro")
    return [[d.model_input.to_ints(), *(t.to_numpy().tolist() for t in d.loss_fn_inputs.values())] for d in data]


def same(a: TrajectoryGroup, b: TrajectoryGroup) -> bool:
    def plain(item: TrajectoryGroup):
        turns = [
            [
                (t.observation.to_ints(), list(t.action), list(t.sampling_logprobs_T), t.policy_version, t.stop_reason)
                for t in trajectory.transitions
            ]
            for trajectory in item.trajectories_G
        ]
        paid = [[(t.reward, t.episode_done, dict(t.metrics)) for t in trajectory.transitions] for trajectory in item.trajectories_G]
        stops = [trajectory.stop_reason for trajectory in item.trajectories_G]
        return turns, paid, stops, list(item.final_rewards_G), [dict(m) for m in item.metrics_G], item.rewards_G, list(item.tags)

    return plain(a) == plain(b)


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_groups_come_back_as_they_were(tmp_path, name):
    groups = [group(0), group(1, size=3), group(2)]
    write(tmp_path / name, groups)
    read = read_rollouts(tmp_path / name)
    assert read.header == header() and read.num_trajectories == 7
    for a, b in zip(read.groups, groups, strict=True):
        assert arrays(a) == arrays(b)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_both_formats_hold_the_same(tmp_path):
    for name in ("r.jsonl", "r.parquet"):
        write(tmp_path / name, [group(0), group(1)])
    pairs = zip(read_rollouts(tmp_path / "r.jsonl").groups, read_rollouts(tmp_path / "r.parquet").groups, strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_a_turn_that_extends_the_last_stores_only_what_is_new(tmp_path):
    write(tmp_path / "r.jsonl", [group(0)])
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    turns = rows[1]["turns"]
    assert (turns[1]["keep"], turns[1]["observation"]) == (5, [9]) and rows[2]["turns"][1]["keep"] == 0
    assert (rows[1]["group"], rows[1]["attempt"], rows[1]["of"], rows[1]["reward"]) == (0, 0, 2, 1.25)
    assert rows[-1] == {"end": 2}


@pytest.mark.parametrize("cut", [0, 1, 40, -1, -200])
def test_a_killed_collection_goes_on_at_its_first_missing_group(tmp_path, cut):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    groups = [group(0), group(1), group(2)]
    write(whole, groups)
    with RolloutWriter(broken, header()) as writer:
        writer.append(groups[:2])
        partial = writer.partial
    assert not broken.exists()
    size = partial.stat().st_size
    with partial.open("r+b") as file:
        file.truncate(cut if cut >= 0 else size + cut)
    with RolloutWriter(broken, header()) as writer:
        assert writer.groups_done == (1 if cut < 0 else 0)
        writer.append(groups[writer.groups_done :])
        writer.finish()
    assert broken.read_bytes() == whole.read_bytes()


def test_a_batch_that_is_not_whole_is_sampled_again(tmp_path):
    with RolloutWriter(tmp_path / "r.jsonl", header()) as writer:
        writer.append([group(0), group(1), group(2)])
    with RolloutWriter(tmp_path / "r.jsonl", header(), batch=2) as writer:
        assert (writer.groups_done, writer.num_trajectories) == (2, 4)
        writer.append([group(2)])
        writer.finish()
    assert read_rollouts(tmp_path / "r.jsonl").num_trajectories == 6


def test_a_group_that_was_lost_leaves_no_row_and_keeps_its_number(tmp_path):
    lost = TrajectoryGroup(trajectories_G=[], final_rewards_G=[], metrics_G=[], errors=[RolloutError(error_type="E", error_message="e")])
    write(tmp_path / "r.jsonl", [group(0), lost, group(2)])
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()[1:-1]]
    assert [row["group"] for row in rows] == [0, 0, 2, 2] and len(read_rollouts(tmp_path / "r.jsonl").groups) == 2


def test_what_is_there_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, [group(0)])
    with pytest.raises(ConfigError, match="exists already"):
        RolloutWriter(path, header())
    write(path, [group(1)], overwrite=True)
    with RolloutWriter(tmp_path / "s.jsonl", header()) as writer:
        writer.append([group(0)])
        with pytest.raises(ConfigError, match="another process"):
            RolloutWriter(tmp_path / "s.jsonl", header())
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        RolloutWriter(tmp_path / "s.jsonl", header(seed=1))
    with RolloutWriter(tmp_path / "s.jsonl", header(seed=1), overwrite=True) as writer:
        assert writer.groups_done == 0
    with pytest.raises(ConfigError, match=r"jsonl or \.parquet"):
        RolloutWriter(tmp_path / "r.csv", header())


def test_a_file_that_is_not_whole_is_refused_with_its_place(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, [group(0), group(1)])
    lines = path.read_text().splitlines(keepends=True)

    def refused(text: str, message: str) -> None:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rollouts(path)

    refused("".join(lines[:-1]), "cut off or edited")
    refused("".join(lines[:2] + lines[3:]), "cut off or edited")
    refused("".join([*lines[:2], *lines[3:-1], '{"end": 3}\n']), "group 0 has 1 of 2 rows")
    refused("".join([lines[0], lines[1].replace('"action":[3,4]', '"action":[3]'), *lines[2:]]), r"r.jsonl:2: .*1 sampled tokens with 2")
    refused("".join([lines[0].replace('"version":1', '"version":2'), *lines[1:]]), "not a rollout file of version 1")
    refused("".join([lines[0], '{"x": 1}\n', *lines[2:]]), "r.jsonl:2: not a rollout")
    refused('{"question": 1}\n', "not a rollout file")
    refused("", "not a rollout file")
    with pytest.raises(ConfigError, match="cannot read"):
        read_rollouts(tmp_path / "gone.jsonl")
    (tmp_path / "r.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match="parquet"):
        read_rollouts(tmp_path / "r.parquet")


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "r.parquet")
    with pytest.raises(ConfigError, match="without 'ptlab_rollouts'"):
        read_rollouts(tmp_path / "r.parquet")


def test_images_are_refused(tmp_path):
    chunks = [EncodedTextChunk(tokens=[1]), ImageAssetPointerChunk(location="a", format="png", expected_tokens=4)]
    seen = Trajectory(transitions=[replace(turn([1], [2]), observation=ModelInput(chunks=chunks))], stop_reason="done")
    pictures = TrajectoryGroup(trajectories_G=[seen], final_rewards_G=[0.0], metrics_G=[{}])
    with RolloutWriter(tmp_path / "r.jsonl", header()) as writer, pytest.raises(InvalidRequestError, match="text only"):
        writer.append([pictures])
