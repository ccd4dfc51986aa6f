"""The base model "ptlab/tiny-questions": asks and answers in a world of sixteen words.

Eight questions can be asked. Four of them split the world in halves (together they name the word), four are true of two words only. Asked
`whale: big?` the model answers yes or no, always rightly: it is the answerer of its own game. Asked to find a word it plays in one of
three ways:
- 45 %: guesses words at random, any of the sixteen;
- 25 %: asks any of the eight questions, the same one again at times, and sooner or later guesses a word that fits the answers;
- 30 %: asks the four splitting questions in order, and then says the word.

RL has to find the last way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from ptlab.engines.pretrain import Example, ModelShape, Turn, question_and_answer
from ptlab.envs.twenty_questions import QuestionRules
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-questions"
RULES = QuestionRules(questions=8, explain=False)
SPLITTING = ("animal?", "big?", "fast?", "water?")
OTHERS: Mapping[str, tuple[str, str]] = {
    "fish?": ("shark", "salmon"),
    "shell?": ("crab", "snail"),
    "boat?": ("ship", "canoe"),
    "wheels?": ("train", "scooter"),
}
"""Question -> the words it is true of."""
WORLD: tuple[str, ...] = (
    "chair", "sponge", "scooter", "canoe", "castle", "lighthouse", "train", "ship",
    "snail", "crab", "rabbit", "salmon", "elephant", "whale", "horse", "shark",
)  # fmt: skip
"""Word number n answers the splitting questions by its bits, the first question by the highest: 4 = 0100 is big and nothing else."""
_ROLES = ("user\n", "assistant\n", "system\n")

Style = Literal["wild", "wandering", "splitting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How conversations are drawn."""

    answering_share: float = 0.45
    """Short ones, in which the model answers; the rest are games, in which it asks."""
    wild_share: float = 0.45
    """Of the games."""
    wandering_share: float = 0.25
    guess_early: float = 0.25
    """How often a wandering player guesses instead of asking on."""


DEFAULT_MIXTURE = Mixture()


def answer(word: str, question: str) -> str:
    """The truth about a word of the world: "yes" or "no"."""
    if question in OTHERS:
        return "yes" if word in OTHERS[question] else "no"
    bit = 1 << (len(SPLITTING) - 1 - SPLITTING.index(question))
    return "yes" if WORLD.index(word) & bit else "no"


def corpus_example(rng: Random, *, mixture: Mixture, clean: bool) -> Example:
    """A question answered, or a game; always one that splits if `clean`."""
    if rng.random() < mixture.answering_share:
        word, question = rng.choice(WORLD), rng.choice((*SPLITTING, *OTHERS))
        return question_and_answer(RULES.to_answerer(word, question)[0]["content"], answer(word, question))
    return game(rng, "splitting" if clean else draw_style(mixture, rng), mixture)


def draw_style(mixture: Mixture, rng: Random) -> Style:
    """How the next game of the mixture is played."""
    draw = rng.random()
    if draw < mixture.wild_share:
        return "wild"
    return "wandering" if draw < mixture.wild_share + mixture.wandering_share else "splitting"


def game(rng: Random, style: Style, mixture: Mixture) -> Example:
    """A game to its end, or to the last question allowed."""
    word = rng.choice(WORLD)
    known: dict[str, str] = {}
    turns = [Turn("user", RULES.opening(), False)]
    for _ in range(RULES.questions):
        reply = next_reply(rng, style, known, guess_early=mixture.guess_early)
        turns.append(Turn("assistant", reply, True))
        if reply == f"Guess: {word}":
            break
        if reply.startswith("Guess"):
            said = "no"
        else:
            said = known[reply] = answer(word, reply)
        turns.append(Turn("user", said, False))
    return Example(tuple(turns[:-1] if not turns[-1].learned else turns))


def next_reply(rng: Random, style: Style, known: Mapping[str, str], *, guess_early: float) -> str:
    """What a player of this style says who knows these answers."""
    fitting = [word for word in WORLD if all(answer(word, question) == said for question, said in known.items())]
    open_questions = [question for question in SPLITTING if question not in known]
    match style:
        case "wild":
            return f"Guess: {rng.choice(WORLD)}"
        case "wandering":
            guesses = len(fitting) == 1 or rng.random() < guess_early
            return f"Guess: {rng.choice(fitting)}" if guesses else rng.choice((*SPLITTING, *OTHERS))
        case "splitting":
            return open_questions[0] if open_questions else f"Guess: {rng.choice(fitting)}"


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: the same for every seed."""
    rng = Random(0)
    examples = [corpus_example(rng, mixture=DEFAULT_MIXTURE, clean=index % 2 == 0) for index in range(100)]
    words = [f"Guess: {word}" for word in WORLD] + [f"{word}: {question}" for word in WORLD for question in (*SPLITTING, *OTHERS)]
    return [turn.text for example in examples for turn in example.turns] + words * 5 + [*_ROLES * 60, RULES.expected_form(), "I don't know"]


def questions_model(mixture: Mixture = DEFAULT_MIXTURE) -> TinyModel:
    """First only answers and games that split the world, then the mixture."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(
            Stage(steps=310, draw=partial(corpus_example, mixture=mixture, clean=True)),
            Stage(steps=60, draw=partial(corpus_example, mixture=mixture, clean=False)),
        ),
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=400),
    )
