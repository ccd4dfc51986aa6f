"""Both recipes on real engines and a tiny transformer: the first losses, learning, the held-out metrics, resume, and RL that opens the
reward model; the arithmetic of evaluation and DPO's reference on a trainer made of numbers."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ptlab import local, runlog
from ptlab.config import CONFIGS
from ptlab.config.preference import DpoConfig, PairsConfig
from ptlab.envs.preference_data import Comparison
from ptlab.errors import ConfigError
from ptlab.recipes import preference, table
from ptlab.runlog import RunLog
from ptlab.types import Datum, ForwardBackwardOutput, ModelInput, TensorData

PREFS = Path(__file__).parents[3] / "shared" / "data" / "prefs" / "dpo_en_as_hh.jsonl"


def write_pairs(directory: Path) -> str:
    """ "thanks" is preferred to "columns", whatever is asked."""
    rows = [{"prompt": f"Compute {n}+{n}.", "chosen": "the answer, thanks", "rejected": "the answer, columns"} for n in range(60)]
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_for(directory: Path, model_dir: Path, recipe: str, **changes: object):
    sections = {
        "recipe": recipe,
        "name": recipe,
        "run_dir": str(directory / "runs"),
        "steps": 6,
        "model": {"name": "tiny", "path": str(model_dir), "renderer": "chatml"},
        "lora": {"rank": 4},
        "engines": {"sampler": {"kind": "torch"}},
        "optim": {"learning_rate": 0.01},
        "checkpoint": {"every": 3},
    }
    return CONFIGS[recipe].model_validate(sections | changes)


def pairs_config(directory: Path, model_dir: Path, recipe: str, **changes: object):
    data = {"kind": "rows", "path": write_pairs(directory), "num_test": 10}
    return config_for(directory, model_dir, recipe, **{"data": data, "pairs_per_step": 8, "eval": {"every": 3}, **changes})


def train(config, *, resume: bool = False) -> list[dict[str, float]]:
    with RunLog.open(config, resume=resume, echo=lambda line: None) as log, local.open_service(config) as service:
        result = asyncio.run(table.run(config, service.client, log))
    assert result.status == "finished"
    return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", lambda *args, **kwargs: None)  # a second each, and not the question here


@pytest.mark.parametrize("recipe", ["reward_model", "dpo"])
def test_a_run_learns_from_comparisons_and_resumes_as_if_unbroken(tmp_path, tiny_qwen3_dir, recipe):
    rows = train(pairs_config(tmp_path, tiny_qwen3_dir, recipe))
    assert [row["step"] for row in rows] == list(range(7))
    name = {"reward_model": "loss/bradley_terry", "dpo": "loss/dpo"}[recipe]
    evals = [(row["step"], row["eval/accuracy"], row["eval/" + name.replace("/", "_")]) for row in rows if "eval/accuracy" in row]
    assert [step for step, _, _ in evals] == [0, 3, 6]
    assert evals[-1][1] == 1.0 and evals[-1][2] < 0.8 * evals[0][2]
    assert rows[-2]["pairs/margin"] > 0.1 and rows[-2][name] < rows[0][name]
    if recipe == "dpo":
        assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5) and rows[0]["eval/loss_dpo"] == pytest.approx(
            math.log(2), abs=1e-5
        )
        assert rows[0]["train/accuracy"] == 0.5 and rows[0]["pairs/chosen_reward"] == pytest.approx(0.0, abs=1e-4)

    shorter = pairs_config(tmp_path, tiny_qwen3_dir, recipe, name="again", steps=3)
    train(shorter)
    resumed = train(pairs_config(tmp_path, tiny_qwen3_dir, recipe, name="again"), resume=True)
    for got, wanted in zip(resumed, rows, strict=True):
        clock = ("time/", "sync/")
        assert {k: v for k, v in got.items() if not k.startswith(clock)} == pytest.approx(
            {k: v for k, v in wanted.items() if not k.startswith(clock)}, rel=1e-4, abs=1e-5
        )


def test_rl_opens_the_reward_model_of_a_run(tmp_path, tiny_qwen3_dir):
    train(pairs_config(tmp_path, tiny_qwen3_dir, "reward_model", steps=2, eval={"every": 0}))
    env = {
        "kind": "preference",
        "data": {"kind": "rows", "path": write_pairs(tmp_path), "num_test": 4},
        "judge": {"kind": "reward_model", "path": str(tmp_path / "runs" / "reward_model")},
        "groups_per_step": 2,
        "group_size": 3,
        "start_max_tokens": 6,
    }
    changes = {"steps": 1, "rollout": {"max_tokens": 6}, "kl": {"coef": 0.1}, "eval": {"every": 1}}
    rows = train(config_for(tmp_path, tiny_qwen3_dir, "rl", env=env, **changes))
    assert 0.0 <= rows[0]["eval/accuracy"] <= 1.0 and math.isfinite(rows[0]["env/score"]) and "kl/policy_reference_nats" in rows[0]
    rows = train(config_for(tmp_path, tiny_qwen3_dir, "rl", env={**env, "compare": "tournament"}, name="cup", **changes))
    assert abs(rows[0]["reward/mean"] + rows[0]["env/cut_off"]) < 1e-6  # a tournament's rewards sum to 0, the penalty is 1


def test_real_conversations_go_through_both_recipes(tmp_path, tiny_qwen3_dir):
    if not PREFS.exists():
        pytest.skip("../shared/data/prefs is not here")
    wide = shutil.copytree(tiny_qwen3_dir, tmp_path / "wide")
    settings = json.loads((wide / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (wide / "config.json").write_text(json.dumps(settings))
    data = {"kind": "rows", "path": str(PREFS), "num_test": 12}
    sizes = {"data": data, "steps": 1, "pairs_per_step": 10}
    rows = train(pairs_config(tmp_path, wide, "reward_model", max_length=1600, **sizes))
    assert (
        0 < rows[0]["batch/pairs"] < 10
        and math.isfinite(rows[0]["loss/bradley_terry"])
        and math.isfinite(rows[1]["eval/loss_bradley_terry"])
    )
    rows = train(pairs_config(tmp_path, wide, "dpo", max_length=1600, **sizes))
    assert rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    rows = train(pairs_config(tmp_path, wide, "dpo", name="short", max_length=5, **sizes, eval={"every": 0}))
    assert rows[0]["batch/pairs"] == 0.0 and "loss/dpo" not in rows[0]  # nothing fits: the step has no update
    with pytest.raises(ConfigError, match=r"max_length is 5 tokens; none of 12 held-out comparisons"):
        train(pairs_config(tmp_path, wide, "dpo", name="shorter", max_length=5, **sizes))


class Numbers:
    """A training client whose log-probability of every target token is -target."""

    def __init__(self):
        self.asked = 0

    def forward(self, data, loss_fn):
        async def answer():
            self.asked += len(data)
            outputs = [
                {"logprobs": TensorData.from_numpy(-datum.loss_fn_inputs["target_tokens"].to_numpy().astype("float32"))} for datum in data
            ]
            return ForwardBackwardOutput("scalar", outputs, {"loss:sum": 0.0})

        return answer()


def datum(targets, weights):
    return Datum(ModelInput.from_ints([1] * len(targets)), {"target_tokens": targets, "weights": weights})


def test_dpo_sums_over_the_reply_alone_and_asks_the_reference_once():
    reference = Numbers()
    objective = preference.DpoObjective(None, reference, DpoConfig(name="x", beta=0.5))
    data = [datum([9, 1, 2], [0.0, 1.0, 1.0]), datum([9, 4, 0], [0.0, 1.0, 0.0])]  # reference: -3 and -4
    policy = [torch.tensor([-50.0, -1.0, -1.0], requires_grad=True), torch.tensor([-50.0, -5.0, -7.0], requires_grad=True)]

    async def main():
        await objective.loss_of(data)
        return await objective.loss_of(data)

    loss, metrics = asyncio.run(main())(data, policy)
    assert reference.asked == 2
    assert (metrics["pairs/chosen_reward"], metrics["pairs/rejected_reward"]) == pytest.approx((0.5, -0.5))  # .5 (-2 + 3), .5 (-5 + 4)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-6)
    loss.backward()
    share = -0.5 / (1 + math.exp(1.0))
    assert policy[0].grad.tolist() == pytest.approx([0.0, share, share]) and policy[1].grad.tolist() == pytest.approx([0.0, -share, 0.0])


def test_evaluation_weighs_its_parts_by_their_pairs(monkeypatch):
    monkeypatch.setattr(preference, "EVAL_PAIRS_PER_CALL", 2)

    class Objective:
        def pair(self, comparison: Comparison):
            raise AssertionError

        async def loss_of(self, data_D):
            def loss_fn(data, logprobs_D):
                values = torch.stack([logprobs.sum() for logprobs in logprobs_D])
                return values.mean(), {"loss/dpo": values.mean().item(), "train/accuracy": 1.0}

            return loss_fn

    pairs = [(datum([value], [1.0]), datum([value], [1.0])) for value in (1, 2, 6)]
    found = asyncio.run(preference.evaluate(pairs, Objective(), Numbers()))
    assert found == pytest.approx({"eval/loss_dpo": -3.0, "eval/accuracy": 1.0})


def test_pair_metrics_by_hand():
    metrics = preference.pair_metrics(torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert metrics == {"train/accuracy": 0.625, "pairs/margin": 0.5, "pairs/chosen_reward": 1.5, "pairs/rejected_reward": 1.0}


def test_an_unknown_kind_of_pairs_is_refused():
    with pytest.raises(ConfigError, match="recipe 'other' has no objective"):
        asyncio.run(preference.open_objective(PairsConfig(name="x", recipe="other"), None, None))
