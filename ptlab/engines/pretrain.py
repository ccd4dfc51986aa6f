"""A very small language model, made from nothing: byte-level BPE, the Qwen3 architecture, one short supervised training.

The only place that trains all weights of a model. It knows nothing of a task: ptlab/tiny_models/ brings the texts.

Deterministic: the same texts, settings and seed give the same bytes on the same machine and library versions (one thread, no
dropout, no data-dependent order). Another processor may round differently; the model behaves the same but its bytes differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from ptlab.errors import InvalidRequestError

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)  # ids 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What may become one token: `\boxed{`, a word with the space before it, one digit, punctuation with the space after it.
# The last keeps "Tens: " and "13. " one token shorter each, a tenth of an answer worked out step by step.
_PIECES = r"\\boxed\{|[^\S\n]?\p{L}+|\p{N}|[:;.,?!]+ ?|[^\s\p{L}\p{N}:;.,?!\\]+|\\|\s"

_IGNORED = -100

Progress = Callable[[int, float], None]
"""Called after every step with the number of steps done and the mean loss of that step in nats per answer token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the Qwen3ForCausalLM; the defaults give 434,944 parameters with a vocabulary of 320."""

    vocab_size: int = 320
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    max_context_length: int = 512
    initializer_range: float = 0.08
    """The usual 0.02 starts slowly at width 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSettings:
    """AdamW with linear warm-up, a constant stretch, and linear decay to zero."""

    batch_size: int = 32
    learning_rate: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    """Applied to matrices, not to the norms' gains."""
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    """The last part of the steps, over which the learning rate falls to zero."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    text: str
    learned: bool
    """Whether its text, and the end-of-message token after it, is trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    """A chat of one turn or many; the turns that are not learned are what the others follow from."""

    turns: tuple[Turn, ...]


def question_and_answer(question: str, answer: str) -> Example:
    """One turn of chat: only the answer is learned."""
    return Example((Turn("user", question, False), Turn("assistant", answer, True)))


def chat_prompt(question: str) -> str:
    """The ChatML text after which the assistant's answer begins; equals the tokenizer's chat template on one user message."""
    return f"{MESSAGE_START}user\n{question}{MESSAGE_END}\n{MESSAGE_START}assistant\n"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Byte-level BPE with single digits and ChatML's special tokens, as a transformers PreTrainedTokenizerFast.

    Ids: the special tokens, then the 256 bytes, then the merges; any text can be encoded. End of sequence is <|im_end|>,
    padding is <|endoftext|>.

    Raises: InvalidRequestError if `texts` hold too few different words to fill `vocab_size`, or it does not cover all bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise InvalidRequestError(f"tokenizer: vocab_size is {vocab_size}; special tokens and bytes alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise InvalidRequestError(f"tokenizer: the texts fill a vocabulary of {found}, not {vocab_size}; give more text or ask for less")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[MESSAGE_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(shape: ModelShape, tokenizer: Any, seed: int) -> Any:
    """A Qwen3ForCausalLM in float32 with random weights; torch's global random state is left as it was."""
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_context_length,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return model


def pretrain(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: PretrainSettings, *, progress: Progress | None = None
) -> None:
    """Train every weight in place on the examples, once, in their order, len(examples) // batch_size steps; in one thread.

    Two threads on busy cores spin at their barriers: one is about three times cheaper. The thread count is restored.

    Raises: InvalidRequestError if there are fewer examples than one batch.
    """
    num_steps = len(examples) // settings.batch_size
    if num_steps < 1:
        raise InvalidRequestError(f"pretrain: {len(examples)} examples do not fill one batch of {settings.batch_size}")
    rows = _encode(tokenizer, examples[: num_steps * settings.batch_size])
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
    )
    model.train()
    with _one_thread():
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, num_steps, settings)
            batch = rows[step * settings.batch_size : (step + 1) * settings.batch_size]
            num_targets = sum(sum(learned) for _, learned in batch)
            loss = 0.0
            for part in _halves_by_length(batch):
                part_loss = _answer_loss_sum(model, part) / num_targets
                torch.autograd.backward(part_loss)
                loss += part_loss.item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                progress(step + 1, loss)
    model.eval()


def learning_rate_at(step: int, num_steps: int, settings: PretrainSettings) -> float:
    """Learning rate of step 0 .. num_steps - 1: up to its full value over the warm-up, down to zero over the decay."""
    warmup = (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
    decay_steps = settings.decay_fraction * num_steps
    decay = (num_steps - step) / decay_steps if decay_steps else 1.0
    return settings.learning_rate * min(1.0, warmup, decay)


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a directory that transformers and vLLM load by path: config, safetensors, generation config, tokenizer, template."""
    with _no_progress_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 5 writes names here that transformers 4 (some vLLM releases) cannot read; both read these.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_Row = tuple[list[int], list[bool]]  # token ids, and which of them are learned


def _encode(tokenizer: Any, examples: Sequence[Example]) -> list[_Row]:
    """Each example cut where learning begins and ends, each piece tokenized for itself, as prompt and sampled answer are."""
    pieces = [piece for example in examples for piece in _pieces(example)]
    ids = iter(tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"])
    rows: list[_Row] = []
    for example in examples:
        tokens: list[int] = []
        learned: list[bool] = []
        for _, is_learned in _pieces(example):
            piece = next(ids)
            tokens += piece
            learned += [is_learned] * len(piece)
        rows.append((tokens, learned))
    return rows


def _pieces(example: Example) -> list[tuple[str, bool]]:
    """ChatML text and whether it is learned: `<|im_start|>role\n` never, text and `<|im_end|>` as the turn says."""
    pieces: list[tuple[str, bool]] = []
    given = ""
    for number, turn in enumerate(example.turns):
        given += ("\n" if number else "") + f"{MESSAGE_START}{turn.role}\n"
        if turn.learned:
            pieces += [(given, False), (turn.text + MESSAGE_END, True)]
            given = ""
        else:
            given += turn.text + MESSAGE_END
    return pieces


def _halves_by_length(batch: Sequence[_Row]) -> list[list[_Row]]:
    """The short rows and the long rows, cut at the middle of the lengths: a blind answer is not padded to a reasoned one."""
    ordered = sorted(batch, key=lambda row: len(row[0]))
    lengths = [len(tokens) for tokens, _ in ordered]
    middle = (lengths[0] + lengths[-1]) / 2
    cut = sum(length <= middle for length in lengths)
    if lengths[-1] - lengths[0] < 8 or cut == len(ordered):  # two passes would cost more than the padding
        return [ordered]
    return [ordered[:cut], ordered[cut:]]


def _answer_loss_sum(model: Any, rows: Sequence[_Row]) -> Tensor:
    """Sum over the learned tokens of -log p in nats. Rows are padded on the right, which a causal model cannot see."""
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids_BT = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    targets_BT = torch.tensor(
        [
            [token if is_learned else _IGNORED for token, is_learned in zip(tokens[1:], learned[1:], strict=True)]
            + [_IGNORED] * (longest - len(tokens))
            for tokens, learned in rows
        ]
    )
    hidden_BTH = model.model(input_ids=input_ids_BT[:, :-1], use_cache=False).last_hidden_state
    learned_BT = targets_BT != _IGNORED
    logits_NV = model.lm_head(hidden_BTH[learned_BT])
    return functional.cross_entropy(logits_NV, targets_BT[learned_BT], reduction="sum")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar for one small file is noise in the middle of the caller's own progress."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
