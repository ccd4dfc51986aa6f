"""Preferences that the project makes itself: short questions, replies in several manners, and a rater with a rule of its own.

    Ann here. Tell me what the fox likes at night.
    Good question, Ann! The fox likes fish at night. I am sure.      kind, an answer, one sentence of padding
    Who cares? Nobody can tell.                                      rude, no answer

The rater's hidden rule: +1 for a kind opening, -1.5 for a rude one, +1.5 for an answer, and +0.3 for every sentence of padding, as real
raters like length. A reply is preferred with probability sigmoid(SHARPNESS x difference), so one label in six is "wrong" by the rule.

Pure: no randomness but the Random it is given. A hashed fifth of all questions is held out of everything that trains.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from random import Random

NAMES = ("Ann", "Ben", "Eva", "Kim", "Leo", "Mia", "Sam", "Tom")
ANIMALS = ("fox", "cow", "dog", "cat", "owl", "bee", "pig", "hen", "ant", "bat", "elk", "emu")
TIMES = ("today", "at night", "in spring")
FOODS = ("fish", "corn", "rain", "sun", "milk", "snow")
QUESTIONS = (
    "I am {name}. What does the {animal} like {time}?",
    "{name} here. Tell me what the {animal} likes {time}.",
    "Do you know what the {animal} likes {time}? Thanks, {name}.",
)
KIND = ("Good question, {name}! ", "Happy to help, {name}! ")
RUDE = ("Who cares? ", "Go away. ")
EVASIVE = ("Nobody can tell.", "I have no idea.")
PADDING = (" I am sure.", " It really does.", " That is all I know.")
SHARPNESS = 1.5
MAX_PADDING = 3


@dataclass(frozen=True, slots=True)
class Question:
    name: str
    animal: str
    time: str
    form: int

    @property
    def text(self) -> str:
        return QUESTIONS[self.form].format(name=self.name, animal=self.animal, time=self.time)

    @property
    def is_held_out(self) -> bool:
        return _hash64(self.text) % 5 == 0


def all_questions() -> list[Question]:
    """In a fixed, mixed order."""
    found = [Question(*parts) for parts in itertools.product(NAMES, ANIMALS, TIMES, range(len(QUESTIONS)))]
    return sorted(found, key=lambda question: _hash64("order", question.text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """How often a reply is what."""

    kind: float = 0.15
    rude: float = 0.40
    evasive: float = 0.35
    padding: float = 0.4
    """Probability of each further sentence of padding, up to MAX_PADDING."""


DEFAULT_MANNERS = Manners()


def draw_reply(question: Question, rng: Random, manners: Manners = DEFAULT_MANNERS) -> str:
    """A reply in a manner drawn at random."""
    draw = rng.random()
    opening = ""
    if draw < manners.kind:
        opening = rng.choice(KIND).format(name=question.name)
    elif draw < manners.kind + manners.rude:
        opening = rng.choice(RUDE)
    answer = f"The {question.animal} likes {rng.choice(FOODS)} {question.time}."
    if rng.random() < manners.evasive:
        answer = rng.choice(EVASIVE)
    count = 0
    while count < MAX_PADDING and rng.random() < manners.padding:
        count += 1
    return opening + answer + "".join(PADDING[:count])


def utility(reply: str) -> float:
    """The hidden rule, of any text: what the rater thinks of the reply before chance comes in."""
    kind = any(opening.split(",")[0] in reply for opening in KIND)
    rude = any(opening.strip() in reply for opening in RUDE)
    padding = min(MAX_PADDING, sum(reply.count(sentence.strip()) for sentence in PADDING))
    return 1.0 * kind - 1.5 * rude + 1.5 * (" likes " in reply) + 0.3 * padding


def draw_pair(question: Question, rng: Random) -> tuple[str, str]:
    """(chosen, rejected): two different replies, and the rater's noisy choice."""
    first = second = draw_reply(question, rng)
    while second == first:
        second = draw_reply(question, rng)
    margin = SHARPNESS * (utility(first) - utility(second))
    return (first, second) if rng.random() < 1.0 / (1.0 + math.exp(-margin)) else (second, first)


def _hash64(*key: str) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(key).encode(), digest_size=8).digest(), "big")
