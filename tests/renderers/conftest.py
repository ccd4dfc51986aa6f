"""Tokenizers for the renderers: the real Qwen3 one, and tiny ones trained on a few lines with the control tokens of a format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

QWEN3_DIR = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers" / "qwen3"

# Split pattern of Llama 3's tokenizer (and, up to the number of digits, of Qwen3's); published in its tokenizer.json.
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Any:
    if not (QWEN3_DIR / "tokenizer.json").exists():
        pytest.skip(f"the real Qwen3 tokenizer is not beside this checkout: {QWEN3_DIR}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3_DIR)


def tiny_tokenizer(specials: list[str], normalizer: Any = None, **names: str) -> Any:
    """Byte-level BPE of 600 tokens on Llama 3's split pattern; it knows "\\n\\n" as one token, as the real ones do."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    lines = [f"the user asked {a} and\n\nthe assistant said {a * 7}: thanks\n\n\nsystem assistant user." for a in range(100)]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens([AddedToken(special, special=True, normalized=normalizer is not None) for special in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="session")
def chatml_tokenizer() -> Any:
    """With the chat template that ChatML is, so that apply_chat_template can be asked."""
    tokenizer = tiny_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def lowercasing_tokenizer() -> Any:
    """Finds special tokens in the text after lowercasing it, so "<|IM_END|>" is one."""
    from tokenizers import normalizers

    return tiny_tokenizer(["<|im_start|>", "<|im_end|>"], normalizer=normalizers.Lowercase(), eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Any:
    """Llama 3's control tokens and split pattern over a tiny vocabulary; no chat template: the tests bring theirs."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    return tiny_tokenizer(specials, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
