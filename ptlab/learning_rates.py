"""A learning rate to start from, for LoRA on a model of some family and width.

    python -m ptlab.learning_rates Qwen/Qwen3-8B
    python -m ptlab.learning_rates path/to/model --full

    lr = 5e-5 x 10 x (2000 / hidden size)^exponent        exponent: 0.781 for Llama, 0.0775 for Qwen

Sources. "LoRA Without Regret" (Schulman and Thinking Machines Lab 2025, thinkingmachines.ai/blog/lora): the best rate of LoRA is ten times
that of full fine-tuning (more for runs under 100 steps), hardly depends on the rank while alpha is fixed and the update is scaled by 1/rank
(ptlab's adapters are: alpha 32), and falls with the width as above; fitted to supervised runs on Tulu 3 with Llama and Qwen models. The
constants are those of earlier versions of the Tinker cookbook's hyperparam_utils.get_lr. Its present one is a table from sweeps instead
(3e-4 or 1e-3 for most models), which the formula meets within a factor of about two on Llama 1B to 70B and Qwen3 8B: sweep around it.
Deviation: a family that was not fitted gets Qwen's exponent, which is nearly none, and says so; the cookbook refuses it.
For RL take less: the cookbook's setting for Llama-3.1-8B on GSM8K is 4e-5, a seventh of it. The signal is noisier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptlab.errors import ConfigError, InvalidRequestError

FULL_FINE_TUNING_RATE = 5e-5
"""For a model of width 2000."""
LORA_FACTOR = 10.0
REFERENCE_WIDTH = 2000
EXPONENTS: Mapping[str, float] = {"llama": 0.781, "qwen": 0.0775}
OTHER_EXPONENT = EXPONENTS["qwen"]
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """A rate, and what it was made of."""

    value: float
    family: str | None
    """None: the family was not among those the exponents were fitted to."""
    hidden_size: int


def get_learning_rate(model_name: str, hidden_size: int, *, is_lora: bool = True) -> LearningRate:
    """The formula at the head of this file.

    Args:
        model_name: names the family ("Qwen/Qwen3-8B", "meta-llama/..."); a path will do.
        hidden_size: width of the residual stream, e.g. 4096 for Llama-3.1-8B.
    """
    if hidden_size < 1:
        raise InvalidRequestError(f"hidden_size is {hidden_size}; the width of the model is needed, e.g. 4096")
    family = next((name for name in EXPONENTS if name in model_name.lower()), None)
    exponent = OTHER_EXPONENT if family is None else EXPONENTS[family]
    factor = LORA_FACTOR if is_lora else 1.0
    return LearningRate(
        value=FULL_FINE_TUNING_RATE * factor * (REFERENCE_WIDTH / hidden_size) ** exponent, family=family, hidden_size=hidden_size
    )


def read_hidden_size(model: str) -> int:
    """The width that a model's config.json states; `model` is a directory, a tiny model of ptlab, or a name on the hub.

    Raises: ConfigError if there is no such model, or its config.json states no width.
    """
    path = _config_file(model)
    try:
        stated: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path}: cannot be read: {err}; needed the config.json of a model") from err
    text = stated.get("text_config", stated)  # of a model that also sees
    for key in _WIDTH_KEYS:
        if isinstance(text.get(key), int):
            return int(text[key])
    raise ConfigError(f"{path}: none of {', '.join(_WIDTH_KEYS)}; call get_learning_rate(name, hidden_size) with the model's width")


def _config_file(model: str) -> Path:
    from ptlab.tiny_models.table import tiny_model_directory

    directory = tiny_model_directory(model) or Path(model)
    if directory.is_dir():
        return directory / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as err:
        raise ConfigError(f"{model}: no directory, and its config.json cannot be had from the hub: {str(err).splitlines()[0]}") from err


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptlab.learning_rates", description="A learning rate to start from.")
    parser.add_argument("model", help="hub name, or directory with a config.json")
    parser.add_argument("--full", action="store_true", help="for full fine-tuning instead of LoRA")
    args = parser.parse_args(argv)
    try:
        rate = get_learning_rate(args.model, read_hidden_size(args.model), is_lora=not args.full)
    except ConfigError as err:
        print(f"error: {err.message}", file=sys.stderr)
        return 2
    fitted = f"family {rate.family}" if rate.family else "a family the formula was not fitted to"
    print(f"{rate.value:.2g}   ({fitted}, hidden size {rate.hidden_size}; a starting point: sweep around it)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
