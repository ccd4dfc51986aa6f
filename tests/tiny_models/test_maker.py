"""Making a tiny model once: the cache, two makers at a time, and what a kill leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptlab.engines.pretrain import Example, ModelShape, PretrainSettings, question_and_answer
from ptlab.tiny_models import maker
from ptlab.tiny_models.maker import Stage, TinyModel, default_cache_dir, ensure_model
from ptlab.tiny_models.quickstart import tokenizer_texts
from ptlab.tiny_models.table import TINY_MODELS, tiny_model_directory


def draw(rng: Random) -> Example:
    number = rng.randrange(90)
    return question_and_answer(f"What is {number}+1?", f"\\boxed{{{number + 1}}}")


TINY = TinyModel(
    name="ptlab/tiny-test",
    stages=(Stage(steps=2, draw=draw), Stage(steps=1, draw=draw)),
    tokenizer_texts=tokenizer_texts,
    shape=ModelShape(hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8),
    training=PretrainSettings(batch_size=4),
)


def refuse_to_train(*_: object) -> None:
    raise AssertionError("the model was made again although the cache held it")


def test_digest_sees_settings_seed_steps_and_texts():
    other_text = replace(TINY, stages=(TINY.stages[0], Stage(steps=1, draw=lambda rng: question_and_answer("?", str(rng.random())))))
    variants = [
        TINY,
        replace(TINY, training=PretrainSettings(batch_size=4, learning_rate=1e-3)),
        replace(TINY, stages=(Stage(steps=3, draw=draw), Stage(steps=1, draw=draw))),
        replace(TINY, tokenizer_texts=lambda: [*tokenizer_texts(), "more"]),
        other_text,
    ]
    digests = {model.digest(0) for model in variants}
    assert len(digests | {TINY.digest(1)}) == 6
    assert replace(TINY).digest(0) == TINY.digest(0)


def test_the_corpus_follows_the_stages_and_the_seed():
    assert len(TINY.corpus(0)) == 3 * 4
    assert TINY.corpus(0) == TINY.corpus(0) != TINY.corpus(1)


def test_each_model_of_the_table_is_named_as_it_is_called():
    assert {name: make().name for name, make in TINY_MODELS.items()} == {name: name for name in TINY_MODELS}
    assert tiny_model_directory("ptlab/none-such") is None


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PTLAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / "home/.cache/ptlab/models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/ptlab/models"
    monkeypatch.setenv("PTLAB_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own/models"


def test_ensure_makes_a_loadable_model_once_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    lines: list[str] = []
    directory = ensure_model(TINY, 0, tmp_path / "models", lines.append)
    assert "making the base model ptlab/tiny-test (seed 0)" in lines[0] and "step 3/3" in lines[-1]
    assert AutoModelForCausalLM.from_pretrained(directory).config.vocab_size == len(AutoTokenizer.from_pretrained(directory)) == 320
    assert [path.name for path in (tmp_path / "models").iterdir()] == [directory.name]

    monkeypatch.setattr(maker, "make_model", refuse_to_train)
    assert ensure_model(TINY, 0, tmp_path / "models", refuse_to_train) == directory
    with pytest.raises(AssertionError, match="made again"):
        ensure_model(TINY, 1, tmp_path / "models", lines.append)


def test_two_caches_hold_the_same_bytes(tmp_path: Path):
    first, second = (ensure_model(TINY, 0, tmp_path / name, lambda _: None) for name in ("a", "b"))
    assert first.name == second.name
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {path.name: path.read_bytes() for path in second.iterdir()}


def test_an_interrupted_write_leaves_nothing_and_the_next_call_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real_save = maker.save_model

    def save_half(model: object, tokenizer: object, directory: Path) -> None:
        real_save(model, tokenizer, directory)
        (directory / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(maker, "save_model", save_half)
    with pytest.raises(KeyboardInterrupt):
        ensure_model(TINY, 0, tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(maker, "save_model", real_save)
    assert (ensure_model(TINY, 0, tmp_path, lambda _: None) / "model.safetensors").is_file()


def test_the_slower_of_two_makers_takes_the_model_of_the_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real_make = maker.make_model

    def make_while_another_process_finishes(model: TinyModel, directory: Path, *rest: object) -> None:
        real_make(model, directory, *rest)  # type: ignore[arg-type]
        winner = tmp_path / f"tiny-test-seed0-{TINY.digest(0)}"
        winner.mkdir()
        (winner / "the_other_process_was_here").touch()

    monkeypatch.setattr(maker, "make_model", make_while_another_process_finishes)
    directory = ensure_model(TINY, 0, tmp_path, lambda _: None)
    assert [path.name for path in directory.iterdir()] == ["the_other_process_was_here"]
    assert list(tmp_path.iterdir()) == [directory]
