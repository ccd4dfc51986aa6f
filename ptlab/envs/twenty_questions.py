"""Twenty questions: find out a secret word by questions that somebody else, the answerer, answers with yes or no.

A reply is a guess if one of its lines begins with "Guess:"; the last such line counts, and the guess is right if its words are the secret
word (an article, capitals, quotes and punctuation do not matter). Every other reply is a question, and its text goes to the answerer. Both
count as one of the `questions`. The answerer's reply counts as yes or no if that is its first word, else as "I don't know" (its text never
reaches the player, so it cannot give the word away).

Reward: that of the first band that the number of questions fits in, the right guess included; 0 if the word was not found.
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
from ptlab.envs.speakers import ModelSpeakerConfig, RememberingSpeaker, Speaker, SpeakerConfig, open_speaker
from ptlab.envs.twenty_questions_words import WORDS
from ptlab.renderers import Message, text_of
from ptlab.rl.seeds import stable_seed
from ptlab.rl.types import EnvGroupBuilder, Logs, Task
from ptlab.section import Section

Answer = Literal["yes", "no", "I don't know"]

LONGEST_QUESTION = 500
"""Characters of a question that the answerer gets to see."""
SMALL_LIST = 50
"""A list of fewer words is tested on all of its words; of a longer one a tenth is held out."""
_GUESS = re.compile(r"^\W*guess\W*:(.*)$", re.IGNORECASE | re.MULTILINE)
_ARTICLE = re.compile(r"^(an?|the)\s+")
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_DOUBT = re.compile(r"\W*(i\s+do\s+not|i\s+don.t|unknown|unsure|maybe|sometimes|it\s+depends)\b", re.IGNORECASE)


def parse_guess(text: str) -> str | None:
    """The guessed word in lower case; None if the text is a question."""
    guesses = _GUESS.findall(text)
    return plain(guesses[-1]) if guesses else None


def plain(word: str) -> str:
    """Lower case, single spaces, without an article and punctuation around it."""
    bare = re.sub(r"^\W+|\W+$", "", " ".join(word.lower().split()))
    return _ARTICLE.sub("", bare)


def parse_answer(text: str) -> tuple[Answer, bool]:
    """The answer, and whether it has the form that was asked for; what is neither yes, no nor a doubt becomes "I don't know"."""
    said = _YES_NO.match(text)
    if said is not None:
        return ("yes" if said[1].lower() == "yes" else "no"), True
    return "I don't know", _DOUBT.match(text) is not None


class Band(Section):
    """What finding the word within so many questions pays."""

    within: int = Field(ge=1)
    """Questions, the right guess included."""
    reward: float
    """For that and less, down to the band before."""


USUAL_BANDS = (
    Band(within=5, reward=1.0),
    Band(within=10, reward=0.75),
    Band(within=15, reward=0.5),
    Band(within=20, reward=0.25),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRules:
    """What is the same for every word."""

    questions: int = 20
    bands: Sequence[Band] = USUAL_BANDS
    """Ascending."""
    explain: bool = True
    """Whether both sides are told the rules."""

    def reward(self, used: int) -> float:
        """For the right guess as question number `used`, counted from 1."""
        return next((band.reward for band in self.bands if used <= band.within), 0.0)

    def opening(self) -> str:
        if not self.explain:
            return "Find my word."
        return (
            f"I am thinking of something; the word for it is a common noun. Find it out with at most {self.questions} questions, the fewer "
            "the better. Ask one question per reply, one that can be answered with yes or no. When you know the word, or want to try one, "
            'reply "Guess: " and the word instead; that counts as a question, too.'
        )

    def expected_form(self) -> str:
        return 'Ask one question that can be answered with yes or no, or say "Guess: " and the word.'

    def to_answerer(self, word: str, question: str) -> list[Message]:
        """All that the answerer reads: it knows nothing of the questions before."""
        if not self.explain:
            return [Message(role="user", content=f"{word}: {question}")]
        asked = (
            f'We play twenty questions, and the secret word is "{word}". The other player, who does not know it, asks the question below. '
            "Answer it truthfully for the usual meaning of the word with exactly one of: yes, no, I don't know. Write nothing else.\n\n"
            f"Question: {question}"
        )
        return [Message(role="user", content=asked)]


class TwentyQuestionsEnv(MessageEnv):
    """One attempt at one word.

    Ends: the right guess, or `questions` replies. Metrics: correct (found), questions (used; one more than allowed if not found), guesses,
    answers_unknown and answers_malformed (of the answerer), format (1 if every reply was a question or a guess).

    Args:
        seed: of the answerer's replies; the same question about the same word gets the same seed.
        coin_seed: pay 0 or the best band at the end by a toss of this seed instead (the negative control); metrics stay true.
    """

    def __init__(self, word: str, rules: QuestionRules, answerer: Speaker, *, seed: int, coin_seed: int | None = None) -> None:
        self.word = word
        self.rules = rules
        self.answerer = answerer
        self.seed = seed
        self.coin_seed = coin_seed
        self.num_used = 0
        self.num_guesses = 0
        self.num_unknown = 0
        self.num_malformed = 0
        self.num_empty = 0

    async def initial_observation(self) -> list[Message]:
        return [Message(role="user", content=self.rules.opening())]

    async def step(self, reply: Message) -> MessageStep:
        said = text_of(reply).strip()
        self.num_used += 1
        if not said:
            return self._after_no_question(said)
        guess = parse_guess(said)
        if guess is None:
            return self._result(said, found=False, answer=await self._ask(said))
        self.num_guesses += 1
        found = guess == plain(self.word)
        return self._result(said, found=found, answer="yes" if found else "no")

    async def step_cut_off(self, reply: Message) -> MessageStep:
        """A question without its end costs the turn and reaches nobody."""
        self.num_used += 1
        return self._after_no_question(text_of(reply))

    def _after_no_question(self, said: str) -> MessageStep:
        self.num_empty += 1
        return self._result(said, found=False, answer=self.rules.expected_form())

    async def _ask(self, question: str) -> Answer:
        asked = self.rules.to_answerer(self.word, question[:LONGEST_QUESTION])
        said = await self.answerer.reply(asked, seed=stable_seed(self.seed, self.word, question))
        answer, well_formed = parse_answer(said)
        self.num_malformed += not well_formed
        self.num_unknown += answer == "I don't know"
        return answer

    def _result(self, said: str, *, found: bool, answer: str) -> MessageStep:
        done = found or self.num_used >= self.rules.questions
        logs: Logs = {"word": self.word, "reply": said, "answer": answer}
        metrics = {
            "correct": float(found),
            "format": float(self.num_empty == 0),
            "questions": float(self.num_used if found else self.rules.questions + 1),
            "guesses": float(self.num_guesses),
            "answers_unknown": float(self.num_unknown),
            "answers_malformed": float(self.num_malformed),
        }
        reward = self._reward(found) if done else 0.0
        return MessageStep(reward=reward, done=done, messages=[Message(role="user", content=answer)], metrics=metrics, logs=logs)

    def _reward(self, found: bool) -> float:
        if self.coin_seed is not None:
            return self.rules.reward(1) * float(random.Random(self.coin_seed).random() < 0.5)
        return self.rules.reward(self.num_used) if found else 0.0


class TwentyQuestionsConfig(EnvSection):
    kind: Literal["twenty_questions"] = "twenty_questions"
    """Find out a secret word; the words come with ptlab."""
    answerer: SpeakerConfig = ModelSpeakerConfig()
    """Who answers: {kind: model} is the run's base model, {kind: model, path: "tinker://..."} a checkpoint, {kind: openai, url, model} any
    server with OpenAI's chat API."""
    questions: int = Field(default=20, ge=1)
    """Questions and guesses per attempt."""
    bands: list[Band] = Field(default=list(USUAL_BANDS), min_length=1)
    """Rewards by the number of questions; beyond the last band finding the word pays 0."""
    words: list[str] | None = Field(default=None, min_length=1)
    """Secret words; None = ptlab's list of a few hundred common nouns. A tenth is held out for the test if there are 50 or more."""
    explain: bool = True
    """Tell the player and the answerer the rules; false = for models that know the game."""
    reward: Literal["bands", "random"] = "bands"
    """"random" pays 0 or the best band by coin toss: the negative control, which must not learn."""

    @model_validator(mode="after")
    def _bands_ascend(self) -> TwentyQuestionsConfig:
        limits = [band.within for band in self.bands]
        if limits != sorted(set(limits)) or limits[-1] > self.questions:
            raise ValueError(f"bands are within {limits} of {self.questions} questions; needed ascending numbers, none above `questions`")
        return self

    async def make_task(self, setting: TaskSetting) -> Task:
        rules = QuestionRules(questions=self.questions, bands=self.bands, explain=self.explain)
        answerer = RememberingSpeaker(await open_speaker(self.answerer, setting.models))  # a question has one answer, whoever asks it
        training, held_out = split_words(WORDS if self.words is None else self.words)
        seed = stable_seed(setting.seed, "twenty_questions")

        def builder(word: str, group_size: int, *coin: int | str) -> EnvGroupBuilder:
            def attempt(index: int) -> MessageEnv:
                coin_seed = stable_seed(*coin, index) if coin else None
                return TwentyQuestionsEnv(word, rules, answerer, seed=seed, coin_seed=coin_seed)

            return Attempts(make=attempt, group_size=group_size, renderer=setting.renderer, tag="twenty_questions")

        def builders_at(step: int) -> Sequence[EnvGroupBuilder]:
            keys = [(setting.seed, "twenty_questions", step, index) for index in range(self.groups_per_step)]
            words = [random.Random(stable_seed(*key)).choice(training) for key in keys]
            coins: list[tuple[int | str, ...]] = [(*key, "coin") if self.reward == "random" else () for key in keys]
            return [builder(word, self.group_size, *coin) for word, coin in zip(words, coins, strict=True)]

        train = MadeDataset(builders_at=builders_at, num_batches=-(-len(training) // self.groups_per_step))
        return Task(train=train, test_P=[builder(word, setting.test_attempts) for word in held_out[: self.num_test]])


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words to train on, words to test on: a tenth is held out by hash, whatever else stands in the list; of fewer than SMALL_LIST words
    all are both, and the test then shows how the words that were trained on are played."""
    if len(words) < SMALL_LIST:
        return list(words), list(words)
    held_out = {word for word in words if stable_seed("twenty_questions held out", word) % 10 == 0}
    return [word for word in words if word not in held_out], [word for word in words if word in held_out]
