"""What the preference recipes' base model is trained on; making it takes 22 CPU seconds and is not done here."""

from __future__ import annotations

from random import Random

from ptlab.engines.pretrain import train_tokenizer
from ptlab.envs.made_preferences import all_questions, utility
from ptlab.renderers import get_renderer
from ptlab.rl.verdict import NO, QUESTION, YES, VerdictPrompt
from ptlab.tiny_models.replies import corpus_example, replies_model, tokenizer_texts

HELD_OUT = {question.text for question in all_questions() if question.is_held_out}


def test_no_example_asks_a_held_out_question():
    rng = Random(0)
    assert not HELD_OUT & {corpus_example(rng).turns[0].text for _ in range(3000)}


def test_one_example_in_ten_is_a_verdict_that_says_nothing_about_the_reply():
    rng = Random(1)
    verdicts = [example for example in (corpus_example(rng) for _ in range(6000)) if len(example.turns) == 4]
    assert 500 < len(verdicts) < 700
    assert {example.turns[2].text for example in verdicts} == {QUESTION}
    assert all([turn.learned for turn in example.turns] == [False, False, False, True] for example in verdicts)
    means = [[utility(example.turns[1].text) for example in verdicts if example.turns[3].text == answer] for answer in (YES, NO)]
    assert abs(sum(means[0]) / len(means[0]) - sum(means[1]) / len(means[1])) < 0.4
    assert 0.4 < len(means[0]) / len(verdicts) < 0.6


def test_the_tokenizer_fills_the_models_vocabulary_and_tells_the_verdicts_apart():
    model = replies_model()
    tokenizer = train_tokenizer(tokenizer_texts(), model.shape.vocab_size)
    prompt = VerdictPrompt(get_renderer("chatml", tokenizer))
    assert tokenizer.decode([prompt.yes]) == "Yes" and tokenizer.decode([prompt.no]) == "No"
    rng = Random(2)
    longest = max(sum(len(tokenizer.encode(turn.text)) + 5 for turn in corpus_example(rng).turns) for _ in range(500))
    assert longest < model.shape.max_context_length / 2
