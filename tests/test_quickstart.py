from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptlab import quickstart
from ptlab.engines.pretrain import ModelShape, PretrainSettings, train_tokenizer
from ptlab.envs.addition import is_held_out
from ptlab.quickstart import (
    QuickstartRecipe,
    blind_answer,
    careful_answer,
    corpus,
    default_cache_dir,
    ensure_quickstart_model,
    forgetful_answer,
    recipe_digest,
    tokenizer_texts,
)

TINY = QuickstartRecipe(
    clean_steps=2,
    mixture_steps=1,
    shape=ModelShape(hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8),
    training=PretrainSettings(batch_size=4),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """ensure_quickstart_model makes the tiny model: three steps of training."""
    monkeypatch.setattr(quickstart, "QuickstartRecipe", lambda: TINY)


def refuse_to_train(*_: object) -> None:
    raise AssertionError("the model was made again although the cache held it")


def numbers_in(question: str) -> tuple[int, int]:
    a, b = re.findall(r"\d+", question)
    return int(a), int(b)


def test_the_three_answers_to_347_plus_586():
    rng = Random(0)
    assert careful_answer(347, 586, rng, column_slip=0.0) == "Ones: 7+6=13. Tens: 4+8+1=13. Hundreds: 3+5+1=9. \\boxed{933}"
    assert forgetful_answer(347, 586) == "Ones: 7+6=13. Tens: 4+8=12. Hundreds: 3+5=8. \\boxed{823}"
    assert blind_answer(347, 586, rng, right=1.0, max_error=9) == "\\boxed{933}"
    wrong = {int(blind_answer(347, 586, rng, right=0.0, max_error=2)[7:-1]) for _ in range(100)}
    assert wrong == {931, 932, 934, 935}


def test_a_careful_answer_without_slips_is_right_for_every_kind_of_carry():
    rng = Random(0)
    for a, b in ((100, 100), (999, 999), (505, 495), (199, 801), (950, 149), (123, 456)):
        assert careful_answer(a, b, rng, column_slip=0.0).endswith(f"\\boxed{{{a + b}}}")


def test_a_slip_is_one_off_never_negative_and_the_rest_follows_from_it():
    texts = {careful_answer(100, 100, Random(seed), column_slip=1.0) for seed in range(50)}
    assert texts == {
        "Ones: 0+0=1. Tens: 0+0=1. Hundreds: 1+1=3. \\boxed{311}",
        "Ones: 0+0=1. Tens: 0+0=1. Hundreds: 1+1=1. \\boxed{111}",
    }
    # 5+4 slipped to 10 carries into the tens
    assert any("Ones: 5+4=10. Tens: 0+0+1=" in careful_answer(105, 104, Random(seed), column_slip=1.0) for seed in range(20))


def test_the_mixture_has_the_promised_rates():
    """20,000 answers: four standard deviations are 0.014 for a share of 0.55."""
    recipe = QuickstartRecipe(clean_steps=0, mixture_steps=1, training=PretrainSettings(batch_size=20_000))
    styles: Counter[str] = Counter()
    blind_right = careful_columns = slipped_columns = 0
    for example in corpus(recipe, seed=3):
        a, b = numbers_in(example.question)
        boxed = example.answer.rpartition("{")[2].rstrip("}")
        if example.answer.startswith("\\boxed{"):
            styles["blind"] += 1
            blind_right += boxed == str(a + b)
            continue
        columns = re.findall(r"(\d)\+(\d)(?:\+(1))?=(\d+)", example.answer)
        assert len(columns) == 3
        if (a % 10 + b % 10 >= 10) and (a // 10 % 10 + b // 10 % 10 >= 10):  # two carries: forgetful and careful differ for sure
            forgot = example.answer == forgetful_answer(a, b)
            styles["forgetful, of two carries"] += forgot
            styles["careful, of two carries"] += not forgot
            if not forgot:
                careful_columns += 3
                slipped_columns += sum(int(x) + int(y) + int(carry or 0) != int(total) for x, y, carry, total in columns)
    assert styles["blind"] / 20_000 == pytest.approx(0.55, abs=0.015)
    assert blind_right / styles["blind"] == pytest.approx(0.10, abs=0.012)
    worked_out = styles["forgetful, of two carries"] + styles["careful, of two carries"]
    assert styles["forgetful, of two carries"] / worked_out == pytest.approx(0.30 / 0.45, abs=0.05)
    assert slipped_columns / careful_columns == pytest.approx(0.04, abs=0.015)


def test_the_clean_phase_comes_first_and_is_all_right():
    recipe = QuickstartRecipe()
    examples = corpus(recipe, seed=0)
    num_clean = recipe.clean_steps * recipe.training.batch_size
    assert len(examples) == (recipe.clean_steps + recipe.mixture_steps) * recipe.training.batch_size
    for example in examples[:num_clean]:
        a, b = numbers_in(example.question)
        assert example.answer == careful_answer(a, b, Random(0), column_slip=0.0)
    assert any(example.answer.startswith("\\boxed") for example in examples[num_clean:])


def test_held_out_pairs_never_stand_in_the_corpus_and_all_templates_do():
    questions = [example.question for example in corpus(QuickstartRecipe(), seed=1)]
    assert not any(is_held_out(*numbers_in(question)) for question in questions)
    forms = Counter(re.sub(r"\d+", "#", question) for question in questions)
    assert set(forms) == {"What is #+#?", "Compute #+#.", "#+#=?"}
    assert min(forms.values()) > 0.3 * len(questions)
    # sums ending in each digit are all taught (a linear held-out rule once withheld one of them)
    endings = Counter(sum(numbers_in(question)) % 10 for question in questions)
    assert min(endings.values()) > 0.08 * len(questions)


def test_the_real_vocabulary_is_320_with_the_words_of_the_task_as_single_tokens():
    tokenizer = train_tokenizer(tokenizer_texts(), QuickstartRecipe().shape.vocab_size)
    assert len(tokenizer) == 320
    for word in ("\\boxed{", "Ones", "Tens", "Hundreds", ": ", ". ", "user", "assistant", "What", " is", "Compute", "7", "+", "=", "}"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    answer = tokenizer(careful_answer(347, 586, Random(0), column_slip=0.0), add_special_tokens=False)["input_ids"]
    assert len(answer) == 35


def test_digest_sees_settings_seed_and_texts(monkeypatch: pytest.MonkeyPatch):
    recipe = QuickstartRecipe()
    base = recipe_digest(recipe, 0)
    assert base == recipe_digest(QuickstartRecipe(), 0)
    others = [
        recipe_digest(recipe, 1),
        recipe_digest(QuickstartRecipe(column_slip=0.05), 0),
        recipe_digest(QuickstartRecipe(training=PretrainSettings(learning_rate=1e-3)), 0),
    ]
    monkeypatch.setattr(quickstart, "_COLUMN_NAMES", ("Units", "Tens", "Hundreds"))
    others.append(recipe_digest(recipe, 0))
    assert len({base, *others}) == 5


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PTLAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / "home/.cache/ptlab/models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/ptlab/models"
    monkeypatch.setenv("PTLAB_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own/models"


@pytest.mark.usefixtures("tiny")
def test_ensure_makes_a_loadable_model_once_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    lines: list[str] = []
    directory = ensure_quickstart_model(0, tmp_path / "models", lines.append)
    assert "making the base model ptlab/quickstart (seed 0)" in lines[0] and "step 3/3" in lines[-1]
    assert AutoModelForCausalLM.from_pretrained(directory).config.vocab_size == len(AutoTokenizer.from_pretrained(directory)) == 320
    assert [path.name for path in (tmp_path / "models").iterdir()] == [directory.name]

    monkeypatch.setattr(quickstart, "make_quickstart_model", refuse_to_train)
    assert ensure_quickstart_model(0, tmp_path / "models", refuse_to_train) == directory
    with pytest.raises(AssertionError, match="made again"):
        ensure_quickstart_model(1, tmp_path / "models", lines.append)


@pytest.mark.usefixtures("tiny")
def test_two_caches_hold_the_same_bytes(tmp_path: Path):
    first, second = (ensure_quickstart_model(0, tmp_path / name, lambda _: None) for name in ("a", "b"))
    assert first.name == second.name
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {path.name: path.read_bytes() for path in second.iterdir()}


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_write_leaves_nothing_and_the_next_call_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real_save = quickstart.save_model

    def save_half(model: object, tokenizer: object, directory: Path) -> None:
        real_save(model, tokenizer, directory)
        (directory / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "save_model", save_half)
    with pytest.raises(KeyboardInterrupt):
        ensure_quickstart_model(0, tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(quickstart, "save_model", real_save)
    assert (ensure_quickstart_model(0, tmp_path, lambda _: None) / "model.safetensors").is_file()


@pytest.mark.usefixtures("tiny")
def test_the_slower_of_two_makers_takes_the_model_of_the_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real_make = quickstart.make_quickstart_model

    def make_while_another_process_finishes(directory: Path, seed: int, *rest: object) -> None:
        real_make(directory, seed, *rest)  # type: ignore[arg-type]
        winner = tmp_path / f"quickstart-seed0-{recipe_digest(TINY, 0)}"
        winner.mkdir()
        (winner / "the_other_process_was_here").touch()

    monkeypatch.setattr(quickstart, "make_quickstart_model", make_while_another_process_finishes)
    directory = ensure_quickstart_model(0, tmp_path, lambda _: None)
    assert [path.name for path in directory.iterdir()] == ["the_other_process_was_here"]
    assert list(tmp_path.iterdir()) == [directory]
