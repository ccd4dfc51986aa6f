from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptlab.engines.pretrain import (
    Example,
    ModelShape,
    PretrainSettings,
    Turn,
    _encode,
    chat_prompt,
    learning_rate_at,
    new_model,
    pretrain,
    question_and_answer,
    save_model,
    train_tokenizer,
)
from ptlab.errors import InvalidRequestError

TEXTS = ["What is 12+34?", "Ones: 2+4=6. \\boxed{46} \\boxed{6}", "user\n", "assistant\n"] * 3
VOCAB_SIZE = 280
SHAPE = ModelShape(vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, VOCAB_SIZE)


def examples(n: int) -> list[Example]:
    """Answers of very different lengths, so that both parts of a batch are used."""
    return [
        question_and_answer(f"What is {i}+1?", f"\\boxed{{{i + 1}}}" if i % 2 else f"Ones: {i}+1={i + 1}. \\boxed{{{i + 1}}}")
        for i in range(n)
    ]


def encoded(tokenizer, example: Example) -> tuple[list[int], list[int]]:
    prompt, answer = chat_prompt(example.turns[0].text), example.turns[1].text + "<|im_end|>"
    return tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_tokenizer_has_exactly_the_asked_size_and_the_special_tokens_first(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_tokenizer_never_joins_digits_and_gives_any_text_back(tokenizer):
    digits = tokenizer("12+12=24", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in digits] == list("12+12=24")
    for text in ("  two  spaces \n\n\t", "ä 中 🙂", "<|im_start|>user\nx<|im_end|>", "a\\b{c} .5, it's", "½ 7²", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_boxed_is_one_token_after_any_neighbour(tokenizer):
    boxed = tokenizer("\\boxed{", add_special_tokens=False)["input_ids"]
    assert len(boxed) == 1
    for text in ("4. \\boxed{46}", "x\\boxed{1", "\n\\boxed{\\boxed{"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(boxed[0]) == text.count("\\boxed{")


def test_chat_template_is_chatml_and_agrees_with_chat_prompt(tokenizer):
    question = [{"role": "user", "content": "What is 1+2?"}]
    prompt = "<|im_start|>user\nWhat is 1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt("What is 1+2?") == prompt
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == prompt
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "3"}], tokenize=False)
    assert whole == prompt + "3<|im_end|>\n"


def test_prompt_and_answer_encode_the_same_apart_and_together(tokenizer):
    """Training encodes them apart; a renderer may encode the whole chat."""
    prompt, answer = chat_prompt("What is 1+2?"), "Ones: 1+2=3. \\boxed{3}<|im_end|>"
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    assert apart[0] + apart[1] == tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]


def test_tokenizer_refuses_what_it_cannot_fill():
    with pytest.raises(InvalidRequestError, match="fill a vocabulary of"):
        train_tokenizer(["ab"], 300)
    with pytest.raises(InvalidRequestError, match="need 259"):
        train_tokenizer(TEXTS, 100)


def test_learning_rate_warms_up_stays_and_decays():
    settings = PretrainSettings(learning_rate=1.0, warmup_steps=4, decay_fraction=0.5)
    rates = [learning_rate_at(step, 20, settings) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == 1.0 and rates[11] == pytest.approx(0.9) and rates[19] == pytest.approx(0.1)


def test_new_model_follows_its_seed_and_leaves_torch_random_state_alone(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (weights(new_model(SHAPE, tokenizer, seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"].std().item() == pytest.approx(0.08, rel=0.1)


def test_first_loss_is_the_mean_over_answer_tokens_only(tokenizer):
    """Against a plain unbatched computation on the same weights: padding, prompts and the split by length must not show."""
    model = new_model(SHAPE, tokenizer, 0)
    data = examples(6)
    nats = []
    for example in data:
        prompt, answer = encoded(tokenizer, example)
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats += functional.cross_entropy(logits_TV, torch.tensor(answer), reduction="none").tolist()
    seen: list[float] = []
    pretrain(model, tokenizer, data, PretrainSettings(batch_size=6), progress=lambda step, loss: seen.append(loss))
    assert seen == [pytest.approx(sum(nats) / len(nats), rel=1e-5)]
    assert 0.5 * math.log(VOCAB_SIZE) < seen[0] < 2 * math.log(VOCAB_SIZE)


def test_first_step_moves_each_weight_against_its_gradient(tokenizer):
    """AdamW's first step is lr * sign(gradient), after shrinking matrices by lr * weight_decay; gains are not shrunk."""
    settings = PretrainSettings(batch_size=4, learning_rate=1e-2, warmup_steps=2, decay_fraction=0.0, weight_decay=0.5)
    model, reference = new_model(SHAPE, tokenizer, 0), new_model(SHAPE, tokenizer, 0)
    data = examples(4)
    nats = torch.tensor(0.0)
    for example in data:
        prompt, answer = encoded(tokenizer, example)
        logits_TV = reference(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats = nats + functional.cross_entropy(logits_TV, torch.tensor(answer), reduction="sum")
    nats.backward()
    pretrain(model, tokenizer, data, settings)
    moved = dict(model.named_parameters())
    for name, before in reference.named_parameters():
        assert before.grad is not None
        strong = before.grad.abs() > 1e-2  # where rounding and epsilon cannot turn the sign
        shrink = 1 - 0.005 * 0.5 if before.dim() >= 2 else 1.0
        expected = before.detach() * shrink - 0.005 * before.grad.sign()
        torch.testing.assert_close(moved[name].detach()[strong], expected[strong], rtol=0, atol=2e-5)
        assert strong.any(), name


def test_pretraining_is_deterministic_in_one_thread_and_restores_the_count(tokenizer):
    threads: list[int] = []
    results = []

    def count_threads(*_: float) -> None:
        threads.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            model = new_model(SHAPE, tokenizer, 0)
            pretrain(model, tokenizer, examples(12), PretrainSettings(batch_size=4), progress=count_threads)
            results.append(weights(model))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 6
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_pretraining_learns_one_answer_by_heart(tokenizer):
    model = new_model(SHAPE, tokenizer, 0)
    losses: list[float] = []
    pretrain(
        model,
        tokenizer,
        [question_and_answer("What is 1+2?", "\\boxed{3}")] * 60,
        PretrainSettings(batch_size=1, learning_rate=2e-2, warmup_steps=5),
        progress=lambda _, loss: losses.append(loss),
    )
    assert losses[-1] < 0.1 < losses[0]


def test_too_few_examples_are_refused(tokenizer):
    with pytest.raises(InvalidRequestError, match="3 examples do not fill one batch of 4"):
        pretrain(new_model(SHAPE, tokenizer, 0), tokenizer, examples(3), PretrainSettings(batch_size=4))


def test_saved_directory_loads_in_plain_transformers(tokenizer, tmp_path: Path):
    model = new_model(SHAPE, tokenizer, 0)
    save_model(model, tokenizer, tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and loaded.config.model_type == "qwen3"
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == loaded_tokenizer.eos_token_id == 2
    assert loaded.generation_config.pad_token_id == loaded_tokenizer.pad_token_id == 0
    text = chat_prompt("What is 12+34?") + "Ones: 2+4=6. \\boxed{46}<|im_end|>"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert sorted(loaded_tokenizer.all_special_ids) == [0, 1, 2]


def test_every_learned_turn_of_a_chat_is_trained_on_and_nothing_else(tokenizer):
    turns = (
        Turn("system", "What", False),
        Turn("user", "What is 1+2?", False),
        Turn("assistant", "\\boxed{3}", True),
        Turn("user", "2+2=?", False),
        Turn("assistant", "\\boxed{4}", True),
    )
    [(tokens, learned)] = _encode(tokenizer, [Example(turns)])
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert tokenizer.decode(tokens) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
    trained = tokenizer.decode([token for token, is_learned in zip(tokens, learned, strict=True) if is_learned])
    assert trained == "\\boxed{3}<|im_end|>\\boxed{4}<|im_end|>"
