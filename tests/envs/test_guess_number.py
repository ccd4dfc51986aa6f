"""Guess the number: what counts as a guess, rewards and metrics by hand, expected play against all targets played out, the data set."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from pydantic import ValidationError

from ptlab.envs.env_section import TaskSetting
from ptlab.envs.guess_number import GuessNumberConfig, GuessNumberEnv, GuessRules, expected_play, parse_guess, targets_to_test
from ptlab.errors import InvalidRequestError
from ptlab.renderers import Message

RULES = GuessRules(low=1, high=100, tries=10)


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("50", 50), ("I guess 7!", 7), ("between 1 and 100, so 50.", 50), ("9-16: 12", 12), ("9-16", 16), ("**42**", 42), ("x = -4", -4),
        ("it is 1,000", 1000), ("1,00", 0), ("3.5", None), ("50 (not 3.5)", 50), ("", None), ("fifty", None),
        ("9" * 5000, None), ("٣", None),
    ],
)  # fmt: skip
def test_the_last_whole_number_is_the_guess(text, guess):
    assert parse_guess(text) == guess


def play(env: GuessNumberEnv, *replies: str | int | None):
    """The steps of these replies; None is one that was cut off."""

    async def run():
        opening = await env.initial_observation()
        steps = []
        for reply in replies:
            message = Message(role="assistant", content="13" if reply is None else str(reply))
            steps.append(await (env.step_cut_off(message) if reply is None else env.step(message)))
        return opening, steps

    return asyncio.run(run())


def test_a_game_by_hand():
    opening, steps = play(GuessNumberEnv(37, RULES), 50, "well, 25?", 60, 37)
    assert "from 1 to 100" in opening[0]["content"] and "at most 10 guesses" in opening[0]["content"]
    assert [step.messages[0]["content"] for step in steps[:3]] == ["lower", "higher", "lower"]
    assert [step.reward for step in steps] == [0.0, 0.0, 0.0, 7.0] and [step.done for step in steps] == [False] * 3 + [True]
    assert steps[-1].metrics == {"correct": 1.0, "format": 1.0, "guesses": 4.0, "waste": 1.0}  # 60 was above 50
    assert steps[0].metrics == {"correct": 0.0, "format": 1.0, "guesses": 11.0, "waste": 0.0}  # what stands if a limit cuts it off here


@pytest.mark.parametrize(("turn", "reward"), [(1, 10.0), (2, 9.0), (10, 1.0)])
def test_the_reward_falls_from_ten_to_one(turn, reward):
    _, steps = play(GuessNumberEnv(5, RULES), *[99] * (turn - 1), 5)
    assert sum(step.reward for step in steps) == reward and steps[-1].done
    scaled = GuessNumberEnv(5, GuessRules(reward_scale=0.1))
    assert sum(step.reward for step in play(scaled, *[99] * (turn - 1), 5)[1]) == pytest.approx(reward / 10)


def test_failure_ends_after_the_last_try_and_pays_nothing():
    _, steps = play(GuessNumberEnv(5, RULES), *[99] * 10)
    assert [step.done for step in steps] == [False] * 9 + [True] and sum(step.reward for step in steps) == 0.0
    assert steps[-1].metrics == {"correct": 0.0, "format": 1.0, "guesses": 11.0, "waste": 9.0}


@pytest.mark.parametrize("reply", ["no idea", None])
def test_a_reply_without_a_number_costs_the_turn_and_is_told_the_form(reply):
    _, steps = play(GuessNumberEnv(13, RULES), reply, 13)
    assert steps[0].messages[0]["content"] == "Give one whole number from 1 to 100." and not steps[0].done
    assert steps[1].reward == 9.0 and steps[1].metrics == {"correct": 1.0, "format": 0.0, "guesses": 2.0, "waste": 0.0}


def test_guesses_the_hints_had_excluded_are_waste():
    _, steps = play(GuessNumberEnv(37, RULES), 50, 50, 101, 30, 30, 0, 31)
    assert [step.metrics["waste"] for step in steps] == [0, 1, 2, 2, 3, 4, 4]


def test_random_rewards_do_not_see_the_play_and_metrics_do():
    paid = set()
    for coin in range(20):
        found = play(GuessNumberEnv(5, RULES, coin_seed=coin), 5)[1][-1]
        failed = play(GuessNumberEnv(5, RULES, coin_seed=coin), *[9] * 10)[1]
        assert found.reward == sum(step.reward for step in failed)
        assert (found.metrics["correct"], failed[-1].metrics["correct"]) == (1.0, 0.0)
        paid.add(found.reward)
    assert paid == {0.0, 10.0}


def played_out(player: str, size: int, tries: int) -> tuple[float, float, float]:
    """Guesses, solved and reward by enumerating bisection, or by 20,000 games of a random player."""
    rng = random.Random(0)
    rules = GuessRules(low=1, high=size, tries=tries)
    games = range(1, size + 1) if player == "bisection" else [rng.randint(1, size) for _ in range(20_000)]
    results = []
    for target in games:
        env = GuessNumberEnv(target, rules)
        while True:
            low, high = env.possible
            guess = {"bisection": (low + high) // 2, "consistent": rng.randint(low, high), "blind": rng.randint(1, size)}[player]
            step = env.judge(guess, "")
            if step.done:
                results.append((step.metrics["guesses"], step.metrics["correct"], step.reward))
                break
    return tuple(sum(column) / len(results) for column in zip(*results, strict=True))


@pytest.mark.parametrize("player", ["bisection", "consistent", "blind"])
@pytest.mark.parametrize(("size", "tries"), [(1, 3), (20, 10), (32, 4)])
def test_expected_play_is_what_playing_comes_to(player, size, tries):
    expected = expected_play(player, size=size, tries=tries)
    tolerance = 1e-12 if player == "bisection" else 0.06  # four standard errors of 20,000 games
    assert played_out(player, size, tries) == pytest.approx((expected.guesses, expected.solved, expected.reward), abs=tolerance)


def test_expected_play_by_hand():
    assert expected_play("bisection", size=100, tries=10).guesses == pytest.approx(5.8)  # (1 + 2*2 + 4*3 + 8*4 + 16*5 + 32*6 + 37*7) / 100
    assert expected_play("consistent", size=2, tries=10).guesses == pytest.approx(1.5)
    assert expected_play("consistent", size=3, tries=10).guesses == pytest.approx(17 / 9)  # middle first 5/3, else 2
    assert expected_play("blind", size=2, tries=2).solved == pytest.approx(0.75)
    with pytest.raises(InvalidRequestError, match="size is 0"):
        expected_play("blind", size=0, tries=1)


def test_every_target_is_tested_once_where_the_range_is_small():
    assert targets_to_test(GuessRules(low=5, high=36), 100) == list(range(5, 37))
    spread = targets_to_test(GuessRules(low=1, high=1000), 10)
    assert spread == [51, 151, 251, 351, 451, 551, 651, 751, 851, 951]


class NoRenderer:
    pass


def make_task(**keys: object):
    config = GuessNumberConfig.model_validate({"groups_per_step": 4, "group_size": 3, "num_test": 7, **keys})
    return asyncio.run(config.make_task(TaskSetting(renderer=NoRenderer(), seed=3, models=None, test_attempts=2)))


def envs_of(builder):
    return [env.message_env for env in asyncio.run(builder.make_envs())]


def test_problems_are_a_pure_function_of_seed_and_step():
    task, again = make_task(), make_task()
    targets = [[envs_of(builder)[0].target for builder in task.train.get_batch(step)] for step in range(30)]
    assert targets == [[envs_of(builder)[0].target for builder in again.train.get_batch(step)] for step in range(30)]
    drawn = set(itertools.chain(*targets))
    assert len(drawn) > 60 and min(drawn) >= 1 and max(drawn) <= 100
    assert [len(envs_of(builder)) for builder in task.train.get_batch(0)] == [3] * 4 and len(task.train) == 25
    assert [len(envs_of(builder)) for builder in task.test_P] == [2] * 7 and task.test_P[0].logging_tags() == ["guess_number"]
    assert len({env.target for env in envs_of(task.train.get_batch(0)[0])}) == 1


def test_the_control_tosses_a_coin_for_each_attempt_and_never_in_the_test():
    task = make_task(reward="random")
    coins = [env.coin_seed for step in (0, 1) for builder in task.train.get_batch(step) for env in envs_of(builder)]
    assert len(set(coins)) == 24 and None not in coins
    assert {env.coin_seed for builder in task.test_P for env in envs_of(builder)} == {None}


def test_a_range_without_a_choice_is_refused():
    with pytest.raises(ValidationError, match="low is 7, high is 7; low must be below high"):
        GuessNumberConfig(low=7, high=7)
