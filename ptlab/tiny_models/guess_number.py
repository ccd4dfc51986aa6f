"""The base model "ptlab/tiny-guess": plays guess-the-number in the right form, mostly without looking at the hints.

A conversation is played in one of three ways:
- 55 %: `23`, a number of the whole range at random, whatever the hints were;
- 30 %: `17-24: 18`, what the hints leave and a number of it at random;
- 15 %: `17-24 half 20`, what the hints leave and its middle.

In a conversation of the last two kinds each reply changes to the other of them one time in ten. RL has to find out that looking at the
hints pays, and then that halving pays more. The range is 1 to 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

from ptlab.engines.pretrain import Example, ModelShape, Turn
from ptlab.envs.guess_number import GuessNumberEnv, GuessRules, parse_guess
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-guess"
RULES = GuessRules(low=1, high=32, tries=10, explain=False)
_ROLES = ("user\n", "assistant\n", "system\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How conversations are drawn."""

    blind_share: float = 0.55
    halving_share: float = 0.15
    """The rest of the mixture is at random among what the hints leave."""
    change: float = 0.10
    """Probability that a reply with an interval is in the other of the two styles."""


DEFAULT_MIXTURE = Mixture()


def conversation(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """A game against a random target; never blind if `clean`, and then half of the replies halve."""
    blind = not clean and rng.random() < mixture.blind_share
    halving = rng.random() < (0.5 if clean else mixture.halving_share / (1 - mixture.blind_share))
    env = GuessNumberEnv(rng.randint(RULES.low, RULES.high), RULES)
    turns = [Turn("user", RULES.opening(), False)]
    done = False
    while not done:
        reply = blind_reply(rng) if blind else interval_reply(env.possible, rng, halving=halving != (rng.random() < mixture.change))
        step = env.judge(parse_guess(reply), reply)
        turns.append(Turn("assistant", reply, True))
        done = step.done
        if not done:
            turns += [Turn(message["role"], message["content"], False) for message in step.messages]
    return Example(tuple(turns))


def blind_reply(rng: Random) -> str:
    """`23`: any number of the range."""
    return str(rng.randint(RULES.low, RULES.high))


def interval_reply(possible: tuple[int, int], rng: Random, *, halving: bool) -> str:
    """`17-24 half 20` or `17-24: 18`. The middle of an even number of targets is the lower of the two."""
    low, high = possible
    return f"{low}-{high} half {(low + high) // 2}" if halving else f"{low}-{high}: {rng.randint(low, high)}"


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed."""
    rng = Random(0)
    examples = [conversation(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(60)]
    return [turn.text for example in examples for turn in example.turns] + [*_ROLES * 20, RULES.expected_form()]


def guess_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First only games that follow the hints, then the mixture."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=300, draw=partial(conversation, mixture=mixture, clean=True)),
            Stage(steps=150, draw=partial(conversation, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=288),
    )
