"""Guess the number: find a hidden whole number by "higher" and "lower". The smallest task of several turns.

Reward: reward_scale x (tries + 1 - turns used) for finding it, so with ten tries 10 for the first guess down to 1 for the last; else 0.
A reply without a number costs the turn and is answered with the expected form. The last whole number of a reply is the guess.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from ptlab.envs.attempts import Attempts, MadeDataset
from ptlab.envs.env_section import EnvSection, TaskSetting
from ptlab.envs.message_env import MessageEnv, MessageStep
from ptlab.errors import InvalidRequestError
from ptlab.renderers import Message, text_of
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import EnvGroupBuilder, Logs, Task

LARGEST = 10**8
"""Largest number of a range; what is longer than nine digits is no guess."""
_WHOLE_NUMBER = re.compile(r"(?<![0-9.])(?:(?<![\w)])-)?[0-9]{1,9}(?![0-9]|\.[0-9])")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

Player = Literal["bisection", "consistent", "blind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessRules:
    """What is the same for every target."""

    low: int = 1
    high: int = 100
    """Both ends are possible targets."""
    tries: int = 10
    """Replies, with a number or without."""
    reward_scale: float = 1.0
    explain: bool = True
    """Whether the first message states the rules."""

    @property
    def size(self) -> int:
        """How many targets there are."""
        return self.high - self.low + 1

    def reward(self, turn: int) -> float:
        """For finding the target in reply number `turn`, counted from 1."""
        return self.reward_scale * (self.tries + 1 - turn)

    def opening(self) -> str:
        if not self.explain:
            return f"{self.low} to {self.high}"
        return (
            f"I have chosen a whole number from {self.low} to {self.high}. Find it in at most {self.tries} guesses; fewer are better. "
            'Reply with your guess as one number, the last in your reply. I answer "higher" if my number is higher than your guess and '
            '"lower" if it is lower.'
        )

    def expected_form(self) -> str:
        return f"Give one whole number from {self.low} to {self.high}."


def parse_guess(text: str) -> int | None:
    """The last whole number in the text; None if it holds none. "3.5" and numbers of ten digits and more are none."""
    numbers = _WHOLE_NUMBER.findall(_THOUSANDS.sub("", text))
    return int(numbers[-1]) if numbers else None


class GuessNumberEnv(MessageEnv):
    """One attempt at one target.

    Ends: the target was said, or `tries` replies were made. Metrics: correct (found), guesses (turns used, tries + 1 if not found), waste
    (guesses that the hints had already excluded), format (1 if every reply held a number).

    Args:
        coin_seed: pay 0 or the highest reward at the end by a toss of this seed instead (the negative control); metrics stay true.
    """

    def __init__(self, target: int, rules: GuessRules, *, coin_seed: int | None = None) -> None:
        self.target = target
        self.rules = rules
        self.coin_seed = coin_seed
        self.num_turns = 0
        self.num_waste = 0
        self.num_without_number = 0
        self.possible = (rules.low, rules.high)
        """What the hints leave, both ends included."""

    async def initial_observation(self) -> list[Message]:
        return [Message(role="user", content=self.rules.opening())]

    async def step(self, reply: Message) -> MessageStep:
        return self.judge(parse_guess(text_of(reply)), text_of(reply))

    async def step_cut_off(self, reply: Message) -> MessageStep:
        """A reply that did not come to its end says no number: the one it holds may be the half of one."""
        return self.judge(None, text_of(reply))

    def judge(self, guess: int | None, said: str) -> MessageStep:
        """What a reply earns that guesses so; None: it guesses nothing."""
        self.num_turns += 1
        found = guess == self.target
        done = found or self.num_turns >= self.rules.tries
        answer = self._answer(guess)
        metrics = {
            "correct": float(found),
            "format": float(self.num_without_number == 0),
            "guesses": float(self.num_turns if found else self.rules.tries + 1),
            "waste": float(self.num_waste),
        }
        logs: Logs = {"target": self.target, "reply": said, "answer": "found" if found else answer}
        return MessageStep(
            reward=self._reward(found) if done else 0.0,
            done=done,
            messages=[Message(role="user", content=answer)],
            metrics=metrics,
            logs=logs,
        )

    def _answer(self, guess: int | None) -> str:
        """Notes what the guess was worth and what its hint leaves."""
        if guess is None:
            self.num_without_number += 1
            return self.rules.expected_form()
        low, high = self.possible
        self.num_waste += not low <= guess <= high
        if guess < self.target:
            self.possible = (max(low, guess + 1), high)
            return "higher"
        self.possible = (low, min(high, guess - 1))
        return "lower"

    def _reward(self, found: bool) -> float:
        if self.coin_seed is not None:
            return self.rules.reward(1) * float(random.Random(self.coin_seed).random() < 0.5)
        return self.rules.reward(self.num_turns) if found else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedPlay:
    """What a player comes to on average over all targets."""

    guesses: float
    """Turns used; tries + 1 for a target that was not found."""
    solved: float
    """Share of the targets that was found."""
    reward: float
    """With a reward scale of 1."""


def expected_play(player: Player, *, size: int, tries: int) -> ExpectedPlay:
    """Exact averages of a player that never says anything but numbers of the range.

    Args:
        player: "bisection" halves what is possible (no player needs fewer guesses on average); "consistent" guesses at random among what
            the hints leave; "blind" guesses at random in the whole range and may repeat itself.
        size: numbers in the range.

    Raises: InvalidRequestError if size or tries is below 1.
    """
    if size < 1 or tries < 1:
        raise InvalidRequestError(f"expected_play: size is {size}, tries is {tries}; both must be at least 1")
    match player:
        case "bisection":  # guess d finds 2^(d-1) targets, until none is left
            found_d = [max(0, min(2**d, size - (2**d - 1))) / size for d in range(tries)]
        case "consistent":
            found_d = _consistent_finds(size, tries)
        case "blind":
            found_d = [(1 - 1 / size) ** d / size for d in range(tries)]
    solved = sum(found_d)
    guesses = sum(share * (d + 1) for d, share in enumerate(found_d)) + (1 - solved) * (tries + 1)
    return ExpectedPlay(guesses=guesses, solved=solved, reward=sum(share * (tries - d) for d, share in enumerate(found_d)))


def _consistent_finds(size: int, tries: int) -> list[float]:
    """Probability that guess d = 1, 2, ... finds the target.

    Of n numbers each is guessed with 1/n; if that leaves j on one side, the target is there with j/n. Both sides alike:
    p_n(1) = 1/n, p_n(d) = 2/n^2 x sum over j < n of j p_j(d - 1).
    """
    p_n = [0.0] + [1 / n for n in range(1, size + 1)]
    found = [p_n[size]]
    for _ in range(tries - 1):
        below, total = [0.0], 0.0
        for n in range(1, size + 1):
            total += (n - 1) * p_n[n - 1]
            below.append(2 / n**2 * total)
        p_n = below
        found.append(p_n[size])
    return found


class GuessNumberConfig(EnvSection):
    kind: Literal["guess_number"] = "guess_number"
    """Find a hidden number by "higher" and "lower"; made from the seed, nothing to download."""
    low: int = Field(default=1, ge=0, le=LARGEST)
    """Smallest number of the range."""
    high: int = Field(default=100, ge=1, le=LARGEST)
    """Largest number of the range."""
    tries: int = Field(default=10, ge=1)
    """Replies per attempt; the reward for the first guess is this number x reward_scale, for the last reward_scale."""
    reward_scale: float = Field(default=1.0, gt=0)
    """1.0 pays 10, 9, ... 1 with ten tries; 0.1 makes the highest reward 1.0."""
    explain: bool = True
    """State the rules in the first message; false = only the range, for a model that knows the game."""
    reward: Literal["guesses", "random"] = "guesses"
    """"random" pays 0 or the highest reward by coin toss: the negative control, which must not learn."""

    @model_validator(mode="after")
    def _something_to_guess(self) -> GuessNumberConfig:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, high is {self.high}; low must be below high")
        return self

    async def make_task(self, setting: TaskSetting) -> Task:
        """Training targets are drawn at random. The test asks every target of the range once where `num_test` allows, else that many
        spread evenly: targets are hidden, so there is nothing that training could have memorised of them."""
        rules = GuessRules(low=self.low, high=self.high, tries=self.tries, reward_scale=self.reward_scale, explain=self.explain)

        def builder(target: int, group_size: int, *coin: int | str) -> EnvGroupBuilder:
            def attempt(index: int) -> MessageEnv:
                return GuessNumberEnv(target, rules, coin_seed=stable_seed(*coin, index) if coin else None)

            return Attempts(make=attempt, group_size=group_size, renderer=setting.renderer, tag="guess_number")

        def builders_at(step: int) -> Sequence[EnvGroupBuilder]:
            return [
                builder(self._target(setting.seed, step, p), self.group_size, *self._coin(setting.seed, step, p)) for p in self._groups()
            ]

        tests = [builder(target, setting.test_attempts) for target in targets_to_test(rules, self.num_test)]
        train = MadeDataset(builders_at=builders_at, num_batches=-(-rules.size // self.groups_per_step))
        return Task(train=train, test_P=tests)

    def _groups(self) -> range:
        return range(self.groups_per_step)

    def _target(self, seed: int, step: int, index: int) -> int:
        return random.Random(stable_seed(seed, "guess_number", step, index)).randint(self.low, self.high)

    def _coin(self, seed: int, step: int, index: int) -> tuple[int | str, ...]:
        return (seed, "coin", step, index) if self.reward == "random" else ()


def targets_to_test(rules: GuessRules, num: int) -> list[int]:
    """Every target once where there are at most `num`, else `num` of them spread evenly over the range."""
    num = min(num, rules.size)
    return [rules.low + (2 * index + 1) * rules.size // (2 * num) for index in range(num)]
