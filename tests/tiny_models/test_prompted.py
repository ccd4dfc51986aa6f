"""What the models of the distillation smoke runs are taught: one only right sums, the other two behaviours told apart by a prompt."""

from __future__ import annotations

from random import Random

from ptlab.tiny_models import careful, prompted, quickstart
from ptlab.tiny_models.prompted import CAREFUL_PROMPT, mixed_example, prompted_example


def test_the_teacher_reads_the_students_tokens_and_is_always_right():
    teacher, student = careful.careful_model(), quickstart.quickstart_model()
    assert list(teacher.tokenizer_texts()) == list(student.tokenizer_texts()) and teacher.shape == student.shape
    rng = Random(3)
    for example in (teacher.stages[0].draw(rng) for _ in range(50)):
        question, answer = example.turns
        numbers = "".join(c if c.isdigit() else " " for c in question.text).split()
        assert answer.text.endswith(f"\\boxed{{{sum(map(int, numbers))}}}") and answer.text.startswith("Ones: ")
    assert teacher.digest(0) != student.digest(0)


def test_the_prompt_decides_how_it_answers():
    rng = Random(5)
    under_prompt = [prompted_example(rng) for _ in range(50)]
    assert all(item.turns[0].role == "system" and item.turns[0].text == CAREFUL_PROMPT for item in under_prompt)
    assert all(
        item.turns[2].text.startswith("Ones: ") and [turn.learned for turn in item.turns] == [False, False, True] for item in under_prompt
    )
    mixed = [mixed_example(rng) for _ in range(400)]
    plain = [item for item in mixed if item.turns[0].role == "user"]
    assert 150 < len(plain) < 250
    assert 0.4 < sum(item.turns[1].text.startswith("\\boxed") for item in plain) / len(plain) < 0.7  # a guess at once, mostly
    assert all(item.turns[2].text.startswith("Ones: ") for item in mixed if item.turns[0].role == "system")
    assert prompted.prompted_texts().count(CAREFUL_PROMPT) == 20
