"""Twenty questions: what is a guess, what is an answer, rewards by bands, an answerer that misbehaves, the words, the data set."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from ptlab.envs.env_section import TaskSetting
from ptlab.envs.message_env import EnvFromMessageEnv
from ptlab.envs.twenty_questions import (
    LONGEST_QUESTION,
    Band,
    QuestionRules,
    TwentyQuestionsConfig,
    TwentyQuestionsEnv,
    parse_answer,
    parse_guess,
    split_words,
)
from ptlab.envs.twenty_questions_words import WORDS
from ptlab.errors import EnvError
from ptlab.renderers import Message
from ptlab.rl.rollout import RolloutSettings, run_groups
from ptlab.rl.types import EnvGroupBuilder
from ptlab.types import ModelInput, SampledSequence, SampleResponse


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("Guess: cat", "cat"), ("guess : 'The Cat'!", "cat"), ("**Guess:** a cat.", "cat"), ("I know it.\nGuess: cat", "cat"),
        ("Guess: dog\nGuess: cat", "cat"), ("Guess: ice  cream", "ice cream"), ("Guess:", ""), ("Guess: an", "an"),
        ("Is it a cat?", None), ("I guess: cat", None), ("May I guess?", None), ("", None),
    ],
)  # fmt: skip
def test_a_line_that_begins_with_guess_is_a_guess(text, guess):
    assert parse_guess(text) == guess


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        ("yes", "yes", True), ("No.", "no", True), ("**Yes**, it is", "yes", True), (" no, never", "no", True),
        ("I don't know.", "I don't know", True), ("I don\u2019t know", "I don't know", True), ("Sometimes yes", "I don't know", True),
        ("It is a cat", "I don't know", False), ("Nobody knows", "I don't know", False), ("Not really", "I don't know", False),
        ("yesterday", "I don't know", False), ("", "I don't know", False),
    ],
)  # fmt: skip
def test_an_answer_is_its_first_word(text, answer, well_formed):
    assert parse_answer(text) == (answer, well_formed)


class Answerer:
    """Gives its answers in turn and keeps what it heard."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[str, int]] = []

    async def reply(self, messages, *, seed):
        [message] = messages
        self.heard.append((message["content"], seed))
        return self.answers.pop(0) if self.answers else "yes"


def play(env: TwentyQuestionsEnv, *replies: str | None):
    """The steps of these replies; None is one that was cut off."""

    async def run():
        await env.initial_observation()
        cut = Message(role="assistant", content="Guess: cat")
        return [await (env.step_cut_off(cut) if reply is None else env.step(Message(role="assistant", content=reply))) for reply in replies]

    return asyncio.run(run())


def test_a_game_by_hand():
    answerer = Answerer("Yes.", "no", "The word is cat")
    env = TwentyQuestionsEnv("cat", QuestionRules(), answerer, seed=1)
    steps = play(env, "Is it alive?", "Does it bark?", "What is it?", "Guess: dog", "Guess: a cat")
    assert [step.messages[0]["content"] for step in steps[:4]] == ["yes", "no", "I don't know", "no"]
    assert [step.reward for step in steps] == [0.0, 0.0, 0.0, 0.0, 1.0] and [step.done for step in steps] == [False] * 4 + [True]
    assert steps[-1].metrics == {
        "correct": 1.0, "format": 1.0, "questions": 5.0, "guesses": 2.0, "answers_unknown": 1.0, "answers_malformed": 1.0,
    }  # fmt: skip
    assert steps[0].metrics["correct"] == 0.0 and steps[0].metrics["questions"] == 21.0
    assert len(answerer.heard) == 3 and '"cat"' in answerer.heard[0][0] and answerer.heard[0][0].endswith("Question: Is it alive?")


@pytest.mark.parametrize(("used", "reward"), [(1, 1.0), (5, 1.0), (6, 0.75), (10, 0.75), (11, 0.5), (16, 0.25), (20, 0.25), (21, 0.0)])
def test_rewards_by_bands(used, reward):
    assert QuestionRules().reward(used) == reward
    steps = play(TwentyQuestionsEnv("cat", QuestionRules(), Answerer(), seed=1), *["Is it big?"] * min(used - 1, 20))
    if used <= 20:
        assert sum(s.reward for s in steps) == 0.0
        steps = play(TwentyQuestionsEnv("cat", QuestionRules(), Answerer(), seed=1), *["Is it big?"] * (used - 1), "Guess: cat")
        assert steps[-1].reward == reward and steps[-1].metrics["questions"] == used
    else:
        assert steps[-1].done and steps[-1].reward == 0.0 and steps[-1].metrics["questions"] == 21.0


def test_finding_it_after_the_last_band_pays_nothing():
    rules = QuestionRules(questions=9, bands=[Band(within=2, reward=3.0)])
    assert play(TwentyQuestionsEnv("cat", rules, Answerer(), seed=1), "a?", "Guess: cat")[-1].reward == 3.0
    assert play(TwentyQuestionsEnv("cat", rules, Answerer(), seed=1), "a?", "b?", "Guess: cat")[-1].reward == 0.0


@pytest.mark.parametrize("reply", ["  ", None])
def test_no_question_costs_the_turn_and_reaches_nobody(reply):
    answerer = Answerer()
    steps = play(TwentyQuestionsEnv("cat", QuestionRules(), answerer, seed=1), reply, "Guess: cat")
    assert "Ask one question" in steps[0].messages[0]["content"] and not answerer.heard
    assert steps[1].metrics["questions"] == 2.0 and steps[1].metrics["format"] == 0.0 and steps[1].reward == 1.0


def test_the_answerer_sees_one_question_no_longer_than_allowed_and_gets_a_seed_of_its_own():
    answerer = Answerer()
    play(TwentyQuestionsEnv("cat", QuestionRules(explain=False), answerer, seed=1), "a?", "b?", "a?", "x" * 5000)
    assert [text for text, _ in answerer.heard] == ["cat: a?", "cat: b?", "cat: a?", "cat: " + "x" * LONGEST_QUESTION]
    seeds = [seed for _, seed in answerer.heard]
    assert seeds[0] == seeds[2] != seeds[1]
    other = Answerer()
    play(TwentyQuestionsEnv("dog", QuestionRules(explain=False), other, seed=1), "a?")
    assert other.heard[0][1] != seeds[0]


def test_an_answerer_that_is_away_costs_the_attempt_and_not_the_step():
    class Away:
        async def reply(self, messages, *, seed):
            raise EnvError("nobody answers")

    class Renderer:
        def build_generation_prompt(self, messages):
            return ModelInput.from_ints([len(messages)])

        def parse_response(self, tokens):
            return Message(role="assistant", content="Guess: cat" if tokens == [1] else "a?"), True

        def get_stop_sequences(self):
            return [9]

    class Client:
        async def sample(self, prompt, num_samples, sampling_params):
            about = {"stop_reason": "stop", "sequence_id": "s", "policy_version": 0}
            return SampleResponse(sequences=[SampledSequence.from_lists([n % 2], [-0.5], **about) for n in range(num_samples)])

    class Pair(EnvGroupBuilder):
        async def make_envs(self):
            return [EnvFromMessageEnv(TwentyQuestionsEnv("cat", QuestionRules(), Away(), seed=1), Renderer()) for _ in range(2)]

    [group] = asyncio.run(run_groups([Pair()], Client(), RolloutSettings(max_tokens=4), seed=(0,)))
    assert group.rewards_G == [1.0] and [error.error_type for error in group.errors] == ["EnvError"]


def test_random_rewards_do_not_see_the_play_and_metrics_do():
    paid = set()
    for coin in range(20):
        rules = QuestionRules(questions=2, bands=[Band(within=2, reward=0.5)])
        found = play(TwentyQuestionsEnv("cat", rules, Answerer(), seed=1, coin_seed=coin), "Guess: cat")[-1]
        failed = play(TwentyQuestionsEnv("cat", rules, Answerer(), seed=1, coin_seed=coin), "a?", "b?")[-1]
        assert found.reward == failed.reward and (found.metrics["correct"], failed.metrics["correct"]) == (1.0, 0.0)
        paid.add(found.reward)
    assert paid == {0.0, 0.5}


def test_the_words_are_a_few_hundred_and_plain():
    assert 300 < len(WORDS) == len(set(WORDS)) and list(WORDS) == sorted(WORDS)
    assert all(word.isalpha() and word.islower() for word in WORDS)
    training, held_out = split_words(WORDS)
    assert not set(training) & set(held_out) and len(training) + len(held_out) == len(WORDS) and 25 < len(held_out) < 60
    assert split_words([*WORDS[:200]])[1] == [word for word in held_out if word in WORDS[:200]]  # whatever else is in the list
    assert split_words(["cat", "dog"]) == (["cat", "dog"], ["cat", "dog"])


def make_task(models, **keys: object):
    config = TwentyQuestionsConfig.model_validate({"groups_per_step": 4, "group_size": 3, "num_test": 7, **keys})
    return asyncio.run(config.make_task(TaskSetting(renderer=None, seed=3, models=models, test_attempts=2)))


class Models:
    def __init__(self) -> None:
        self.opened = []

    async def open(self, *, base_model=None, model_path=None):
        self.opened.append((base_model, model_path))
        return None, None


def envs_of(builder):
    return [env.message_env for env in asyncio.run(builder.make_envs())]


def test_problems_are_a_pure_function_of_seed_and_step():
    models = Models()
    task, again = make_task(models), make_task(models)
    words = [[envs_of(builder)[0].word for builder in task.train.get_batch(step)] for step in range(20)]
    assert words == [[envs_of(builder)[0].word for builder in again.train.get_batch(step)] for step in range(20)]
    assert len({word for step in words for word in step}) > 50
    tested = [envs_of(builder)[0].word for builder in task.test_P]
    assert len(tested) == 7 and not set(tested) & set(split_words(WORDS)[0])
    assert [len(envs_of(builder)) for builder in task.test_P] == [2] * 7 and models.opened == [(None, None)] * 2
    coins = [env.coin_seed for b in make_task(models, reward="random").train.get_batch(0) for env in envs_of(b)]
    assert len(set(coins)) == 12 and None not in coins


@pytest.mark.parametrize("bands", [[(5, 1.0), (5, 0.5)], [(9, 1.0), (5, 0.5)], [(21, 1.0)]])
def test_bands_that_cannot_be_meant_are_refused(bands):
    with pytest.raises(ValidationError, match="needed ascending numbers, none above `questions`"):
        TwentyQuestionsConfig.model_validate({"bands": [{"within": w, "reward": r} for w, r in bands]})
