"""docs/tutorials/your_first_env.md: its file is taken out of the page, found by the page's config, and played by a scripted model."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args

import pytest
from pydantic import Field, create_model

from ptlab.config import RlConfig, parse_yaml
from ptlab.engines.pretrain import train_tokenizer
from ptlab.envs.env_section import TaskSetting
from ptlab.envs.table import EnvConfig
from ptlab.renderers import Renderer, get_renderer
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.rl.types import Task
from ptlab.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

PAGE = Path(__file__).parents[2] / "docs/tutorials/your_first_env.md"
FENCES = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
[FILE] = [text for language, text in FENCES if language == "python"]
[CONFIG] = [text for language, text in FENCES if language == "yaml"]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    path = tmp_path_factory.mktemp("envs") / "reverse.py"
    path.write_text(FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ptlab.envs.reverse", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptlab.envs.reverse"] = module  # pydantic looks the annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ptlab.envs.reverse"]


@pytest.fixture(scope="module")
def config(module: ModuleType) -> Any:
    """The page's config, read with the page's line in the table of environments."""
    kinds = get_args(get_args(EnvConfig)[0])

    union: Any = kinds[0]
    for kind in (*kinds[1:], module.ReverseConfig):
        union = union | kind
    with_the_line: Any = create_model("WithTheLine", __base__=RlConfig, env=(Annotated[union, Field(discriminator="kind")], ...))
    return with_the_line.model_validate(parse_yaml(CONFIG, str(PAGE)))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return get_renderer("chatml", train_tokenizer(["user\nassistant\nSpell backwards. Answer with the letters only."], 262))


def task_of(config: Any, renderer: Renderer, *, seed: int = 0, attempts: int = 1) -> Task:
    setting = TaskSetting(renderer=renderer, seed=seed, models=None, test_attempts=attempts)  # type: ignore[arg-type]  # no other model
    return asyncio.run(config.env.make_task(setting))


def words_of(task: Task, step: int) -> list[str]:
    return [builder.make(0).word for builder in task.train.get_batch(step)]


class ScriptedClient:
    """Reads the word out of the prompt; even draws spell it backwards, odd ones as it is."""

    def __init__(self, renderer: Renderer) -> None:
        self.codec, [self.stop] = renderer.codec, renderer.get_stop_sequences()

    async def sample(self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams) -> SampleResponse:
        match = re.search(r"Spell (\w+) backwards", self.codec.decode(prompt.to_ints()))
        assert match is not None
        replies = [match[1] if index % 2 else match[1][::-1].upper() for index in range(num_samples)]
        drawn = [[*self.codec.encode(reply), self.stop] for reply in replies]
        about = {"stop_reason": "stop", "sequence_id": "s", "policy_version": 0}
        return SampleResponse(sequences=[SampledSequence.from_lists(tokens, [-0.5] * len(tokens), **about) for tokens in drawn])


def test_the_file_is_short() -> None:
    assert len(FILE.rstrip("\n").split("\n")) < 60
    assert max(len(line) for line in FILE.split("\n")) <= 140


def test_the_config_finds_the_environment(config: Any, module: ModuleType) -> None:
    assert isinstance(config.env, module.ReverseConfig)
    assert (config.env.longest, config.env.group_size, config.env.num_test) == (5, 8, 100)


def test_a_step_of_it_pays_right_replies_and_no_others(config: Any, renderer: Renderer) -> None:
    task = task_of(config, renderer)
    groups = asyncio.run(
        run_groups(task.train.get_batch(0), ScriptedClient(renderer), RolloutSettings(max_tokens=16), seed=(0, "train", 0))
    )
    assert len(groups) == 16 and not any(group.errors for group in groups)
    for group, word in zip(groups, words_of(task, 0), strict=True):
        palindrome = word == word[::-1]
        assert group.rewards_G == [1.0, float(palindrome)] * 4
        assert group.trajectories_G[0].transitions[0].metrics["correct"] == 1.0


def test_words_follow_from_seed_and_step_and_the_test_asks_none_of_them(config: Any, renderer: Renderer) -> None:
    task = task_of(config, renderer, attempts=3)
    assert words_of(task, 7) == words_of(task_of(config, renderer), 7)
    assert words_of(task, 7) != words_of(task, 8) and words_of(task, 7) != words_of(task_of(config, renderer, seed=1), 7)
    asked = {builder.make(0).word for builder in task.test_P}
    met = {word for step in range(100) for word in words_of(task, step)}
    assert len(task.test_P) == 100 and task.test_P[0].group_size == 3
    assert not asked & met and {len(word) for word in met} == {2, 3, 4, 5}
