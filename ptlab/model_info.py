"""What a model's name says about it: chat or base, and which renderer writes its format."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelAttributes:
    """`recommended_renderers`: best first; never empty."""

    is_chat: bool
    recommended_renderers: tuple[str, ...]


_SIZE = r"\d+(?:\.\d+)?B(?:-A\d+(?:\.\d+)?B)?"
_QUANTIZED = r"(?:-(?:FP8|AWQ|GPTQ-Int[48]|MLX-\w+))?"

# Matched against the whole last part of the name ("Qwen/Qwen3-8B" -> "Qwen3-8B"), so that a model that merely begins alike
# (Qwen3-Coder, Qwen3-VL, Qwen3-Embedding: other templates) falls through to its own chat template.
_MODELS: tuple[tuple[str, ModelAttributes], ...] = (
    (rf"Qwen3-{_SIZE}-Base", ModelAttributes(False, ("role_colon",))),
    (rf"Qwen3-{_SIZE}-Instruct-2507{_QUANTIZED}", ModelAttributes(True, ("qwen3_instruct",))),
    (rf"Qwen3-{_SIZE}-Thinking-2507{_QUANTIZED}", ModelAttributes(True, ("qwen3_thinking",))),
    (rf"Qwen3-{_SIZE}{_QUANTIZED}", ModelAttributes(True, ("qwen3", "qwen3_disable_thinking", "qwen3_preserve_thinking"))),
    (rf"(?:Meta-)?Llama-3(?:\.\d)?-{_SIZE}-Instruct{_QUANTIZED}", ModelAttributes(True, ("llama3",))),
    (rf"(?:Meta-)?Llama-3(?:\.\d)?-{_SIZE}", ModelAttributes(False, ("role_colon",))),
)
_TINY = ModelAttributes(True, ("chatml",))  # the models that ptlab makes itself (tiny_models/)
_UNKNOWN = ModelAttributes(True, ("chat_template",))


def get_model_attributes(model_name: str) -> ModelAttributes:
    """Attributes by name; a `:checkpoint` suffix and the folders of a local path do not matter. Unknown: its chat template."""
    name = model_name.split(":", 1)[0].rstrip("/")
    if name.startswith("ptlab/"):
        return _TINY
    last_part = name.rpartition("/")[2]
    return next((attributes for pattern, attributes in _MODELS if re.fullmatch(pattern, last_part)), _UNKNOWN)


def get_recommended_renderer_name(model_name: str) -> str:
    """Name for `renderers.get_renderer`: the format this model was trained on, "chat_template" if ptlab does not know the model."""
    return get_model_attributes(model_name).recommended_renderers[0]
