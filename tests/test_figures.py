"""The pictures of the documentation: curves are those of the formulas, data are kept as they were, labels do not touch."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from ptlab.config import RlConfig
from ptlab.errors import ConfigError
from ptlab.figures import group, losses, paper, records, runs, table
from ptlab.losses import LOSSES

DATA = Path(__file__).parents[1] / "docs" / "data"


@pytest.mark.parametrize(
    ("name", "advantage", "expected"),  # (loss, gradient by log p) at ratios 0.5, 1, 1.5 by hand, with q = 0.15
    [
        ("importance_sampling", 1.0, [(-0.5, -0.5), (-1.0, -1.0), (-1.5, -1.5)]),
        ("ppo", 1.0, [(-0.5, -0.5), (-1.0, -1.0), (-1.2, 0.0)]),
        ("ppo", -1.0, [(0.8, 0.0), (1.0, 1.0), (1.5, 1.5)]),
        ("gspo", 1.0, [(-0.5, -0.5), (-1.0, -1.0), (-1.2, 0.0)]),
        ("cispo", -1.0, [(-1.295134, 0.5), (-1.897120, 1.0), (-2.237482, 1.5)]),  # r ln(0.15 r)
        ("dro", 1.0, [(2.710378, -1.346574), (1.897120, -1.0), (1.532755, -0.797267)]),  # -ln p + (ln r)^2 / 4; -(1 - ln r / 2)
    ],
)
def test_the_curve_of_a_loss_is_its_formula(name: str, advantage: float, expected: list[tuple[float, float]]) -> None:
    values, gradients = losses.token_curve(name, torch.tensor([0.5, 1.0, 1.5]), advantage)
    torch.testing.assert_close(torch.stack([values, gradients], dim=1), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_picture_shows_every_policy_loss_of_the_api_but_our_own() -> None:
    assert set(losses.SHOWN_CONFIG) == {name for name, loss in LOSSES.items() if "advantages" in loss.inputs} - {"stable_reinforce"}


def test_labels_that_would_touch_move_apart_and_the_others_stay() -> None:
    assert paper.spread([0.5, 0.1, 0.9], 0.2, highest=1.0) == [0.5, 0.1, 0.9]
    moved = paper.spread([0.9, 0.95, 0.1, 0.94], 0.1, highest=1.1)
    assert moved == pytest.approx([0.83, 1.03, 0.1, 0.93])  # three around their mean 0.93, in their order
    moved = paper.spread([0.9, 0.95, 0.1, 0.94], 0.1, highest=1.0)
    assert moved == pytest.approx([0.8, 1.0, 0.1, 0.9])  # a label outside the axes would not be drawn
    moved = paper.spread([0.02, 0.15, 0.155], 0.1, highest=1.0)
    assert moved == pytest.approx([0.00833, 0.10833, 0.20833], abs=1e-4)  # two that move apart push into a third
    assert paper.spread([], 1.0, highest=1.0) == []


def test_only_what_is_shown_is_kept_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "docs-x"
    run.mkdir()
    config = RlConfig.model_validate({"name": "docs-x", "seed": 3, "env": {"kind": "addition", "group_size": 4}})
    (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    rows = [{"step": 0, "reward/mean": 0.123456789, "eval/accuracy": None, "time/sample_s": 1.0}, {"step": 1, "eval/accuracy": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps({"run": "docs-older", "config": {}, "rows": []}) + "\n", encoding="utf-8")
    records.keep_runs([run], file)
    kept = records.read_runs(file)
    assert list(kept) == ["docs-older", "docs-x"]
    assert kept["docs-x"].rows == [{"step": 0, "reward/mean": 0.12346}, {"step": 1, "eval/accuracy": 0.5}]
    assert kept["docs-x"].config["env.group_size"] == 4 and kept["docs-x"].config["seed"] == 3
    assert kept["docs-x"].points("eval/accuracy") == ([1], [0.5])
    before = file.read_bytes()
    records.keep_runs([run], file)
    assert file.read_bytes() == before


def test_the_group_on_file_is_a_group_as_the_code_makes_them() -> None:
    kept: dict[str, Any] = json.loads((DATA / table.GROUP_FILE).read_text(encoding="utf-8"))
    rewards = [attempt["reward"] for attempt in kept["attempts"]]
    for attempt in kept["attempts"]:
        assert attempt["advantage"] == attempt["reward"] - sum(rewards) / len(rewards)
        datum, num_prompt = attempt["datum"], len(kept["prompt"]) - 1
        assert datum["target_tokens"] == kept["prompt"][1:] + attempt["tokens"]
        assert datum["logprobs"] == [0.0] * num_prompt + attempt["logprobs"]
        assert datum["advantages"] == [0.0] * num_prompt + [attempt["advantage"]] * len(attempt["tokens"])
    shown = kept["attempts"][table.SHOWN_ATTEMPT]
    assert shown["reward"] == 1.0 and "Ones" in shown["pieces"]  # what the page says of it
    assert group.question_of(kept) == "Compute 492+464."


def test_another_recipe_has_no_groups(tmp_path: Path) -> None:
    from ptlab.config import SftConfig

    with pytest.raises(ConfigError, match="recipe is 'sft'; a group of attempts"):
        asyncio.run(records.record_group(SftConfig(name="x"), None, 0))  # type: ignore[arg-type]


def test_the_runs_that_are_drawn_are_on_file_and_are_what_their_names_say() -> None:
    kept = records.read_runs(DATA / table.RUNS_FILE)
    assert [kept[name].config["optim.learning_rate"] for name in runs.LEARNING_RATES] == [3e-4, 1e-3, 3e-3, 1e-2]
    assert [kept[name].config["env.group_size"] for name in runs.GROUP_SIZES] == [4, 8, 16]
    assert kept[runs.CONTROL].config["env.reward"] == "random"
    for name in {*runs.LEARNING_RATES, *runs.GROUP_SIZES, runs.CONTROL}:
        config = kept[name].config
        assert config["seed"] == 0 and config["env.group_size"] * config["env.groups_per_step"] == 128
        assert config["env.reward"] == ("random" if name == runs.CONTROL else "correct")
    assert max(path.stat().st_size for path in DATA.iterdir()) < 200_000


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    paths = table.draw_all(DATA, tmp_path)
    assert [path.name for path in paths] == list(table.PICTURES)
    for path in paths:
        pixels = imread(path)
        assert 700 <= pixels.shape[1] <= 1400, path.name
        assert len({tuple(pixel) for pixel in pixels[::3, ::3, :3].reshape(-1, 3).round(1)}) >= 4, path.name  # more than black on white
    assert {path.name for path in tmp_path.iterdir()} == set(table.PICTURES)
    again = table.draw_all(DATA, tmp_path / "again", ["clip_shapes.png"])
    assert again[0].read_bytes() == (tmp_path / "clip_shapes.png").read_bytes()  # a picture changes only with its data


def test_an_unknown_picture_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no picture is called clips\.png; there are pipeline\.png, learning\.png"):
        table.draw_all(DATA, DATA, ["clips.png"])


def test_text_is_cut_in_the_middle_and_tokens_stay_readable() -> None:
    assert group.shortened("abcdefghij", 10) == "abcdefghij"
    assert group.shortened("abcdefghijk", 10) == "abcd...ijk" and len(group.shortened("x" * 99, 58)) == 58
    assert [group.visible(piece) for piece in ("<|im_end|>", ". ", "\n")] == ["im_end", "._", "\\n"]
