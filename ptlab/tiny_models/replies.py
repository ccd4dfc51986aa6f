"""The base model of the preference recipes, "ptlab/tiny-replies": answers small questions in every manner, mostly a bad one.

It writes kind, plain and rude openings, evades, and pads (envs/made_preferences.py says how often). One example in ten is a verdict, Yes
or No by coin toss: the model knows the form in which a reward model is asked; what is good it has to learn from preferences.
Held-out questions are in none of its examples.
"""

from __future__ import annotations

from random import Random

from ptlab.engines.pretrain import Example, ModelShape, PretrainSettings, Turn, question_and_answer
from ptlab.envs.made_preferences import ANIMALS, EVASIVE, FOODS, KIND, NAMES, PADDING, RUDE, all_questions, draw_reply
from ptlab.rl.verdict import NO, QUESTION, YES
from ptlab.tiny_models.maker import Stage, TinyModel

MODEL_NAME = "ptlab/tiny-replies"
VERDICT_SHARE = 0.1
_QUESTIONS = [question for question in all_questions() if not question.is_held_out]


def corpus_example(rng: Random) -> Example:
    """A question that is not held out and a reply; or a verdict on the reply, which alone is then learned."""
    question = rng.choice(_QUESTIONS)
    reply = draw_reply(question, rng)
    if rng.random() >= VERDICT_SHARE:
        return question_and_answer(question.text, reply)
    turns = (("user", question.text), ("assistant", reply), ("user", QUESTION))
    return Example((*(Turn(role, text, False) for role, text in turns), Turn("assistant", rng.choice((YES, NO)), True)))


def tokenizer_texts() -> list[str]:
    """Every word many times over, so that most are one token."""
    rng = Random(0)
    examples = [corpus_example(rng) for _ in range(400)]
    words = [f" {word}" for word in (*NAMES, *ANIMALS, *FOODS)] * 20
    texts = [turn.text for example in examples for turn in example.turns]
    return [*texts, *words, *(PADDING + KIND + RUDE + EVASIVE) * 20, *[QUESTION, YES, NO, "user\n", "assistant\n", "system\n"] * 40]


def replies_model() -> TinyModel:
    """About 20 seconds of one CPU core."""
    return TinyModel(
        name=MODEL_NAME,
        stages=(Stage(steps=300, draw=corpus_example),),  # to copy a name and an animal is all the skill it takes
        tokenizer_texts=tokenizer_texts,
        shape=ModelShape(vocab_size=448, max_context_length=256),
        training=PretrainSettings(batch_size=32),
    )
