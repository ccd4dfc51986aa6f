"""The six config files load and mean what they say; settings that contradict each other are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ptlab.config import RlConfig, load_config
from ptlab.config.preference import DpoConfig, RewardModelConfig
from ptlab.envs.preference import PreferenceConfig
from ptlab.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("folder", [CONFIGS, CONFIGS / "smoke"])
def test_rlhf_reads_the_run_that_the_reward_model_writes(folder):
    reward_model, rlhf = (load_config(folder / f"{name}.yaml") for name in ("reward_model", "rlhf"))
    assert isinstance(reward_model, RewardModelConfig) and isinstance(rlhf, RlConfig) and isinstance(rlhf.env, PreferenceConfig)
    assert Path(rlhf.env.judge.path) == reward_model.directory
    assert rlhf.model == reward_model.model and rlhf.env.data.kind == reward_model.data.kind
    assert rlhf.env.start_max_tokens == rlhf.rollout.max_tokens
    assert rlhf.lora.rank >= reward_model.lora.rank  # the sampler serves adapters of the run's rank and below


@pytest.mark.parametrize("folder", [CONFIGS, CONFIGS / "smoke"])
def test_dpo_configs(folder):
    config = load_config(folder / "dpo.yaml")
    assert isinstance(config, DpoConfig) and (config.beta, config.form) == (0.1, "logistic")


def test_a_missing_file_of_comparisons_is_named_before_anything_is_loaded():
    overrides = ["data={kind: rows, path: nowhere.jsonl}"]
    with pytest.raises(ConfigError, match=r"data\.path.*nowhere\.jsonl"):
        load_config(CONFIGS / "smoke" / "dpo.yaml", overrides)
    with pytest.raises(ConfigError, match=r"env\.data\.path.*nowhere\.jsonl"):
        load_config(CONFIGS / "smoke" / "rlhf.yaml", [f"env.{override}" for override in overrides])


def test_squared_has_no_smoothing():
    with pytest.raises(ValidationError, match=r"label_smoothing is 0\.1, form is 'squared'"):
        DpoConfig(name="x", form="squared", label_smoothing=0.1)


def test_a_rubric_is_a_judge_of_the_same_environment():
    judge = 'env.judge={kind: rubric, rubric: "Is brief.", speaker: {kind: openai, url: "http://localhost:8000/v1", model: m}}'
    config = load_config(CONFIGS / "smoke" / "rlhf.yaml", [judge, "env.compare=tournament"])
    assert (config.env.judge.kind, config.env.judge.speaker.kind, config.env.compare) == ("rubric", "openai", "tournament")
