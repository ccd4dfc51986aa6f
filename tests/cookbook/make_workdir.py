"""Make the directory in which a user would run the cookbook's recipes, without a network.

    python -m tests.cookbook.make_workdir DIR [--data ../shared/data]

In DIR, `Qwen/Qwen3-8B` resolves to a tiny model with the real Qwen3 tokenizer, and so does every data set a recipe names: transformers and
datasets both look for a directory of that name before they ask the hub. Real rows where ../shared/data has them (GSM8K, MATH, preference
pairs), otherwise rows of our own with the same fields.

The models are Markov chains written into weights: the next token depends almost only on the current one, so they speak from the start
(`\\boxed{4}`, `Guess: 17`, `[5]`, words), stop now and then, and are sometimes right. A random model would earn the same reward everywhere,
and an RL recipe would skip every training step. Two random decoder layers move the logits a little by what came before, so that
attention, positions and caches count; they are what LoRA trains.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUCT, BASE = "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"
VOCAB_SIZE = 151_936  # Qwen3's: 151,669 tokens and padding
CONTEXT_LENGTH = 4096
HIDDEN_SIZE = 32
DIGITS = {"4": 0.35, "6": 0.25, "5": 0.2, "2": 0.1, "3": 0.04, "8": 0.03, "0": 0.03}
WORDS = {" the": 0.4, " and": 0.3, " a": 0.3}
GSM8K_ANSWERS = ("4", "6", "5")  # rows with these answers: the models guess them about one time in five


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Which token follows which. Keys and values of `follows` are single tokens of the Qwen3 vocabulary; `*` is every other token.

    `eos` and `stops` go into the configuration files, as the published models have them.
    """

    follows: Mapping[str, Mapping[str, float]]
    eos: str
    stops: tuple[str, ...]


def _or(*parts: tuple[float, Mapping[str, float] | str]) -> dict[str, float]:
    """A mixture of distributions (a string is one token); the shares sum to 1."""
    mixed: dict[str, float] = {}
    for share, part in parts:
        for token, probability in ({part: 1.0} if isinstance(part, str) else part).items():
            mixed[token] = mixed.get(token, 0.0) + share * probability
    return mixed


def _each(tokens: Iterable[str], distribution: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    return {token: distribution for token in tokens}


# The instruct model answers after "assistant\n" or "</think>\n\n": a boxed digit, a guess, a move, a bare number, or words.
INSTRUCT_CHAIN = Chain(
    follows={
        **_each(("\n", "\n\n"), _or((0.3, "\\"), (0.25, "Guess"), (0.25, "["), (0.1, DIGITS), (0.08, WORDS), (0.02, "<|im_end|>"))),
        "\\": {"boxed": 1.0},
        "boxed": {"{": 1.0},
        "Guess": {":": 1.0},
        ":": {" ": 1.0},
        **_each(("{", " ", "["), DIGITS),
        **_each(DIGITS, _or((0.3, "}"), (0.3, "]\n"), (0.32, "<|im_end|>"), (0.08, DIGITS))),
        **_each(("}", "]\n"), _or((0.8, "<|im_end|>"), (0.2, WORDS))),
        "*": _or((0.6, WORDS), (0.4, "<|im_end|>")),
    },
    eos="<|im_end|>",
    stops=("<|im_end|>", "<|endoftext|>"),
)
# The base model answers after "Assistant:" and stops with "\n\nUser:", three tokens of which the first ends the answer too, or with EOS.
BASE_CHAIN = Chain(
    follows={
        ":": _or((0.9, " \\"), (0.05, " "), (0.05, WORDS)),
        " \\": {"boxed": 1.0},
        "boxed": {"{": 1.0},
        **_each(("{", " "), DIGITS),
        **_each(DIGITS, _or((0.55, "}\n\n"), (0.32, "}"), (0.1, "<|endoftext|>"), (0.03, DIGITS))),
        **_each(("}\n\n", "\n\n"), _or((0.9, "User"), (0.1, WORDS))),
        "User": {":": 1.0},
        "}": _or((0.7, "<|endoftext|>"), (0.3, WORDS)),
        "*": _or((0.6, WORDS), (0.3, "\n\n"), (0.1, "<|endoftext|>")),
    },
    eos="<|endoftext|>",
    stops=("<|endoftext|>",),
)


def write_model(directory: Path, tokenizer_dir: Path, chain: Chain, *, seed: int) -> None:
    """Write a Qwen3 model (2 layers, fp32) that follows `chain`, with the tokenizer of `tokenizer_dir`. 39 MB.

    Channel 0 is the same for every token and makes all tokens unlikely; channel 1+s is set by the tokens of state s and makes their
    followers likely; the others are noise. Raises: ValueError if a token of the chain is not a single token.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer_dir / name, directory / name)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": chain.eos}, indent=2))
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def id_of(token: str) -> int:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{token!r} is {len(ids)} tokens of {tokenizer_dir}; a chain needs single tokens")
        return int(ids[0])

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,  # the smallest that vLLM has on the CPU
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=False,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=id_of(chain.eos),
            pad_token_id=id_of("<|endoftext|>"),
            dtype="float32",
        )
    )
    states = list(chain.follows)
    if 1 + len(states) > HIDDEN_SIZE - 4:
        raise ValueError(f"{len(states)} states need more than {HIDDEN_SIZE} channels")
    embedding = model.model.embed_tokens.weight.data
    embedding[:, : 1 + len(states)] = 0.0
    embedding[:, 0] = 1.0
    embedding[:, 1 + states.index("*")] = 1.0
    for number, state in enumerate(states):
        if state != "*":
            embedding[id_of(state), 1 : 1 + len(states)] = 0.0
            embedding[id_of(state), 1 + number] = 1.0
    scale = math.sqrt(HIDDEN_SIZE / 2.0)  # what the last RMSNorm multiplies a channel by: two ones and little noise
    unlikely = 18.0  # nats: all other 151,936 tokens together have 2e-3
    head = model.lm_head.weight.data
    head[:, : 1 + len(states)] = 0.0
    head[:, 0] = -unlikely / scale
    for number, state in enumerate(states):
        for token, probability in chain.follows[state].items():
            head[id_of(token), 1 + number] = (unlikely + math.log(probability)) / scale
    model.generation_config.eos_token_id = [id_of(token) for token in chain.stops]
    model.generation_config.pad_token_id = id_of("<|endoftext|>")
    model.save_pretrained(directory)


def write_dataset(directory: Path, splits: Mapping[str, list[dict[str, Any]]], *, config: str = "default") -> None:
    """JSON lines per split, and the README whose `configs:` tells datasets which file is which split."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (directory / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_datasets(directory: Path, data: Path) -> None:
    """Everything the recipes of run_recipes.py load. `data` is ../shared/data."""
    gsm8k = {split: [row for row in _rows(data / f"gsm8k/{split}.jsonl") if len(row["question"]) < 200] for split in ("train", "test")}
    guessable = {split: [row for row in rows if row["answer"].split("####")[1].strip() in GSM8K_ANSWERS] for split, rows in gsm8k.items()}
    write_dataset(directory / "openai/gsm8k", {"train": guessable["train"][:256], "test": guessable["test"][:16]}, config="main")

    chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in gsm8k["train"]]
    no_robots = [
        {"prompt": chat[0]["content"], "prompt_id": f"{number:064x}", "messages": chat, "category": "Open QA"}
        for number, chat in enumerate(chats[:96])
    ]
    write_dataset(directory / "HuggingFaceH4/no_robots", {"train": no_robots[:80], "test": no_robots[80:]})
    tulu = [{"id": f"gsm8k-{number}", "messages": chat, "source": "gsm8k"} for number, chat in enumerate(chats[96:160])]
    write_dataset(directory / "allenai/tulu-3-sft-mixture", {"train": tulu})
    thoughts = [
        {"domain": "math", "conversations": [{"from": "human", "value": chat[0]["content"]}, {"from": "gpt", "value": chat[1]["content"]}]}
        for chat in chats[160:224]
    ]
    write_dataset(directory / "open-thoughts/OpenThoughts3-1.2M", {"train": thoughts})

    deepmath = [
        {"question": row["problem"], "final_answer": row["answer"], "difficulty": 3.0, "topic": row["type"]}
        for row in _rows(data / "math/math_train-300.jsonl")
        if len(row["problem"]) < 300
    ]
    write_dataset(directory / "zwhe99/DeepMath-103K", {"train": deepmath[:64]})

    pairs = [row for row in _rows(data / "prefs/dpo_en_as_hh.jsonl") if len(row["chosen"]) + len(row["rejected"]) < 2400]
    write_dataset(directory / "Anthropic/hh-rlhf", {"train": pairs[:-8], "test": pairs[-8:]})

    questions = [
        {
            "question": f"An atom has {protons} protons and is neutral. How many electrons has it?",
            "choices": {"text": [str(protons + shift) for shift in (1, 0, 2, 5)], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
            "type": "mcq-4-choices",
            "domain": "Chemistry",
            "details": {"level": "L3", "task": "atoms", "subtask": "charge", "source": "ptlab"},
            "answer": "",
        }
        for protons in range(1, 41)
    ]
    write_dataset(directory / "hicai-zju/SciKnowEval", {"test": questions})
    tools = [
        {"instruction": f"Call the adder with {number} and {number + 1}.", "input": "", "output": f"add({number}, {number + 1})"}
        for number in range(40)
    ]
    write_dataset(directory / "tangqiaoyu/ToolAlpaca", {"train": tools})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]  # splitlines would also split at U+2028


def make_workdir(directory: Path, data: Path) -> None:
    """Models and data sets into `directory`. About five seconds and 80 MB."""
    write_model(directory / INSTRUCT, data / "tokenizers/qwen3", INSTRUCT_CHAIN, seed=0)
    write_model(directory / BASE, data / "tokenizers/qwen3", BASE_CHAIN, seed=1)
    write_datasets(directory, data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    make_workdir(arguments.directory, arguments.data)
    print(arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
