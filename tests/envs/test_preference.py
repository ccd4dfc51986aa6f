"""What a reply earns: by score, by tournament, by chance; ties, cut-off replies, and the whole task from a config."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from transformers import AutoTokenizer

from ptlab.envs.env_section import TaskSetting
from ptlab.envs.judges import RewardModelJudgeConfig
from ptlab.envs.message_env import EnvFromMessageEnv
from ptlab.envs.preference import Judging, PreferenceConfig, PreferenceEnv, PreferenceGroupBuilder
from ptlab.envs.preference_data import MadePreferencesConfig
from ptlab.errors import ConfigError, EnvError
from ptlab.renderers import get_renderer, text_of
from ptlab.rl.types import Trajectory
from ptlab.types import SampledSequence, SampleResponse

PROMPT = [{"role": "user", "content": "Hi"}]


def reply(text):
    return {"role": "assistant", "content": text}


class LengthJudge:
    """Scores a reply by its letters."""

    async def score(self, conversation, reply):
        return float(len(text_of(reply)))

    async def win_matrix(self, conversation, replies_G):
        lengths = [len(text_of(reply)) for reply in replies_G]
        return [[0.5 if a == b else float(a > b) for b in lengths] for a in lengths]


def paid(env, text, *, cut_off=False):
    step = env.step_cut_off if cut_off else env.step
    return asyncio.run(step(reply(text)))


def test_a_score_is_the_reward_and_a_cut_off_reply_pays_the_penalty():
    judging = Judging(judge=LengthJudge(), cut_off_penalty=2.0, truth=lambda prompt, reply: 0.25)
    result = paid(PreferenceEnv(PROMPT, judging), "abc")
    assert (result.reward, result.done) == (3.0, True)
    assert result.metrics == {"format": 1.0, "score": 3.0, "truth": 0.25}
    cut = paid(PreferenceEnv(PROMPT, judging), "abc", cut_off=True)
    assert cut.reward == 1.0 and cut.metrics["format"] == 0.0 and cut.metrics["score"] == 3.0


@pytest.mark.parametrize(("text", "wanted"), [("abc", 1.0), ("a", 0.0)])
def test_correct_is_a_win_against_the_start(text, wanted):
    env = PreferenceEnv(PROMPT, Judging(judge=LengthJudge()), opponent=reply("ab"))
    assert paid(env, text).metrics["correct"] == wanted


def test_a_tie_is_a_fixed_coin_that_is_fair_over_prompts():
    prompts = [[{"role": "user", "content": f"Hi {index}"}] for index in range(400)]
    judging = Judging(judge=LengthJudge())
    wins = [paid(PreferenceEnv(prompt, judging, opponent=reply("ab")), "cd").metrics["correct"] for prompt in prompts]
    assert set(wins) == {0.0, 1.0} and 160 < sum(wins) < 240
    assert wins[0] == paid(PreferenceEnv(prompts[0], judging, opponent=reply("ab")), "cd").metrics["correct"]


def test_the_control_pays_by_coin_and_reports_the_truth():
    judging = Judging(judge=LengthJudge())
    results = [paid(PreferenceEnv(PROMPT, judging, coin_seed=seed), "abc") for seed in range(50)]
    assert {result.reward for result in results} == {0.0, 1.0}
    assert all(result.metrics["score"] == 3.0 for result in results)


def tournament(texts, *, coin_seed=None):
    judging = Judging(judge=LengthJudge(), compare="tournament")
    builder = PreferenceGroupBuilder(prompt=PROMPT, judging=judging, renderer=None, group_size=len(texts), coin_seed=coin_seed)

    async def main():
        envs = await builder.make_envs()
        for env, text in zip(envs, texts, strict=True):
            if text is not None:
                assert (await env.message_env.step(reply(text))).reward in ((0.0,) if coin_seed is None else (0.0, 1.0))
        trajectories = [Trajectory(transitions=[], stop_reason="done") for _ in texts]
        return await builder.compute_group_rewards(trajectories, envs)

    return asyncio.run(main())


def test_a_tournament_pays_the_share_of_wins_centred():
    rewards = tournament(["a", "abc", "ab", "xy"])
    assert [reward for reward, _ in rewards] == pytest.approx([-0.5, 0.5, 0.0, 0.0])  # ab and xy tie: (1 + 0 + .5) / 3 - .5
    assert [metrics["win_share"] for _, metrics in rewards] == pytest.approx([0.0, 1.0, 0.5, 0.5])
    assert sum(reward for reward, _ in tournament(["a", "bb", "cc", "dddd", "e"])) == pytest.approx(0.0)


def test_an_attempt_without_a_reply_loses_to_all_that_replied():
    assert [reward for reward, _ in tournament([None, "", "a"])] == pytest.approx([-0.5, 0.0, 0.5])
    assert [reward for reward, _ in tournament([None, None])] == [0.0, 0.0]


def test_the_control_and_a_lone_attempt_have_no_tournament():
    assert tournament(["a", "abc"], coin_seed=3) == [(0.0, {}), (0.0, {})]
    assert tournament(["a"]) == [(0.0, {})]


def test_a_tournament_among_other_environments_is_refused():
    class Other:
        pass

    builder = PreferenceGroupBuilder(prompt=PROMPT, judging=Judging(judge=LengthJudge(), compare="tournament"), renderer=None, group_size=2)
    with pytest.raises(EnvError, match="found Other"):
        asyncio.run(builder.compute_group_rewards([], [Other(), Other()]))


class OnePolicy:
    """Replies with one fixed text; every prompt token has log-probability -1 except the last, whose value is its id / 1000."""

    def __init__(self, renderer):
        self.renderer = renderer
        self.seeds = []

    def sample(self, prompt, num_samples, sampling_params):
        self.seeds.append(sampling_params.seed)

        async def answer():
            tokens = [*self.renderer.codec.encode("The sum"), *self.renderer.get_stop_sequences()]
            drawn = {"tokens_np": np.asarray(tokens), "logprobs_np": np.full(len(tokens), -1.0)}
            return SampleResponse(sequences=[SampledSequence(stop_reason="stop", sequence_id="s", **drawn)])

        return answer()

    def compute_logprobs(self, prompt):
        async def answer():
            tokens = prompt.to_ints()
            return [None, *[-1.0] * (len(tokens) - 2), tokens[-1] / 1000]

        return answer()


class Models:
    def __init__(self, renderer):
        self.client, self.renderer = OnePolicy(renderer), renderer
        self.opened = []

    async def open(self, *, base_model=None, model_path=None):
        self.opened.append(model_path)
        return self.client, self.renderer


@pytest.fixture(scope="module")
def renderer(tiny_qwen3_dir):
    return get_renderer("chatml", AutoTokenizer.from_pretrained(tiny_qwen3_dir))


def make_task(renderer, tmp_path, **changes):
    section = PreferenceConfig(
        data=MadePreferencesConfig(num_train=60, num_test=30),
        judge=RewardModelJudgeConfig(path=str(tmp_path)),
        groups_per_step=4,
        group_size=3,
        num_test=5,
        **changes,
    )
    models = Models(renderer)
    setting = TaskSetting(renderer=renderer, seed=7, models=models, test_attempts=2)
    return asyncio.run(section.make_task(setting)), models


def test_the_task_of_a_config(renderer, tmp_path):
    task, models = make_task(renderer, tmp_path)
    assert models.opened == [str(tmp_path), None] and len(set(models.client.seeds)) == 5
    batch = task.train.get_batch(3)
    assert len(batch) == 4 and batch == task.train.get_batch(3) and batch != task.train.get_batch(2)
    assert [builder.group_size for builder in task.test_P] == [2] * 5
    train_prompts = {text_of(prompt[-1]) for prompt in task.train.prompts}
    assert not train_prompts & {text_of(builder.prompt[-1]) for builder in task.test_P}
    assert all(text_of(builder.opponent) == "The sum" for builder in task.test_P)

    async def one_attempt():
        [env, _] = await task.test_P[0].make_envs()
        assert isinstance(env, EnvFromMessageEnv)
        _, stop = await env.initial_observation()
        return await env.step([*renderer.codec.encode("The sum"), *stop], extra={"stop_reason": "stop"})

    result = asyncio.run(one_attempt())
    assert result.episode_done and result.metrics["correct"] in (0.0, 1.0) and result.metrics["cut_off"] == 0.0


def test_random_rewards_have_a_coin_per_attempt(renderer, tmp_path):
    task, _ = make_task(renderer, tmp_path, reward="random")
    envs = [env for builder in task.train.get_batch(0) for env in asyncio.run(builder.make_envs())]
    assert len({env.message_env.coin_seed for env in envs}) == 12


def test_a_reward_model_that_is_not_there_names_the_command(renderer, tmp_path):
    with pytest.raises(ConfigError, match=r"env\.judge\.path: there is no .*nothing.*train one first: .*reward_model\.yaml"):
        make_task(renderer, tmp_path / "nothing")
