"""Request bodies of the OpenAI-compatible endpoints, and which of OpenAI's parameters ptlab has.

A parameter that would change the answer and that ptlab does not have is refused by name, unless it has the value that changes nothing:
an answer that looks right but was drawn in another way is worse than an error. Unknown names are refused too (OpenAI does the same).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptlab.errors import InvalidRequestError
from ptlab.renderers import Message
from ptlab.types import SamplingParams

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, LONGEST_STOP = 128, 128, 16, 200
DEFAULT_COMPLETION_TOKENS = 16
SEED_MASK = 2**63 - 1

_DISTRIBUTION = "it changes the distribution that tokens are drawn from, which ptlab's samplers leave as the model has it"
_TOOLS = "how a tool call looks is the model's own format; write it into the messages and parse the answer's text"
_JSON = "constrained decoding changes the distribution that tokens are drawn from; ask for the format in a message and check the answer"
_TEXT = "this server reads and writes text only"
_TEMPLATE = "the chat template decides how a model thinks; choose another `renderer`, or write the prompt for /v1/completions yourself"
REFUSED: Mapping[str, tuple[Sequence[Any], str]] = {
    "tools": ([[]], _TOOLS),
    "tool_choice": (["none", "auto"], _TOOLS),
    "functions": ([[]], _TOOLS),
    "function_call": (["none", "auto"], _TOOLS),
    "response_format": ([{"type": "text"}], _JSON),
    "logit_bias": ([{}], _DISTRIBUTION),
    "frequency_penalty": ([0], _DISTRIBUTION),
    "presence_penalty": ([0], _DISTRIBUTION),
    "modalities": ([["text"]], _TEXT),
    "audio": ([], _TEXT),
    "prediction": ([], "there is no speculative decoding from a given text"),
    "reasoning_effort": ([], _TEMPLATE),
    "verbosity": ([], _TEMPLATE),
    "web_search_options": ([], "this server has no other source than the model"),
    "moderation": ([], "this server has no moderation model"),
    "store": ([False], "answers are not kept"),
    "suffix": ([""], "the models served here are not trained to fill in the middle"),
}
"""Refused unless null or one of these values, with the reason."""
IGNORED = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "user",
})  # fmt: skip
"""Accepted and without effect here: they do not bear on the answer."""

StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
T = TypeVar("T", bound=BaseModel)


class OpenAIRequestError(InvalidRequestError):
    """A body that OpenAI's API would refuse too, or a parameter that ptlab does not have.

    Args:
        param: name of the offending field, as OpenAI's error format has it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.param))


def _rebuild(message: str, param: str | None) -> OpenAIRequestError:
    return OpenAIRequestError(message, param=param)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool = False


class _SamplingBody(_Body):
    """What both endpoints take. null means the default everywhere."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Not OpenAI's, but every open server's: -1 or 0 = all tokens."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int | None, stop: str | Sequence[str] | Sequence[int] | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            seed=None if self.seed is None else self.seed & SEED_MASK,
            stop=stop,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or -1,
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises: OpenAIRequestError naming the field."""
        parsed = _validated(cls, body)
        extra = parsed.model_extra or {}
        for name, value in extra.items():
            if name in IGNORED or value is None:
                continue
            if name not in REFUSED:
                raise OpenAIRequestError(f"{name!r} is no parameter of this endpoint; leave it out", param=name)
            neutral, reason = REFUSED[name]
            if value not in neutral:
                raise OpenAIRequestError(f"{name!r} is not supported: {reason}", param=name)
        if parsed.stream_options is not None and not parsed.stream:
            raise OpenAIRequestError("'stream_options' is for stream=true only", param="stream_options")
        return parsed


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message with text. What else OpenAI's messages may hold must be null or empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self, index: int) -> Message:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, ""):
                raise OpenAIRequestError(
                    f"messages[{index}].{name} is not supported: this server renders role and text only; write it into 'content'",
                    param=f"messages[{index}].{name}",
                )
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatBody(_SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    renderer: str | None = None
    """ptlab's own: name of the renderer that writes the messages; None = the tokenizer's chat template."""

    @classmethod
    def parse(cls, body: bytes) -> Self:
        parsed = super().parse(body)
        if parsed.top_logprobs is not None and not parsed.logprobs:
            raise OpenAIRequestError("'top_logprobs' needs logprobs=true", param="top_logprobs")
        if parsed.max_tokens is not None and parsed.max_completion_tokens not in (None, parsed.max_tokens):
            raise OpenAIRequestError("'max_tokens' and 'max_completion_tokens' differ; give one of them", param="max_tokens")
        return parsed

    @property
    def most_tokens(self) -> int | None:
        """None = as many as the context holds, OpenAI's default too."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def messages_to_render(self) -> list[Message]:
        return [message.message(index) for index, message in enumerate(self.messages)]


TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


class CompletionBody(_SamplingBody):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        parsed = super().parse(body)
        if parsed.best_of not in (None, parsed.num_choices):
            raise OpenAIRequestError("'best_of' is not supported: sample n choices and pick one yourself", param="best_of")
        if parsed.max_tokens == 0 and not parsed.echo:
            raise OpenAIRequestError("'max_tokens' is 0, which needs echo=true (to score the prompt)", param="max_tokens")
        if len(parsed.prompts) * parsed.num_choices > MOST_CHOICES:
            raise OpenAIRequestError(
                f"{len(parsed.prompts)} prompts with n={parsed.num_choices} are more than {MOST_CHOICES} choices; send several requests",
                param="prompt",
            )
        return parsed

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    @property
    def most_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


def _validated(cls: type[T], body: bytes) -> T:
    try:
        return cls.model_validate_json(body or b"{}")
    except ValidationError as err:
        problem = _nearest(err)
        where = _where(problem["loc"])
        found = "" if problem["type"] in ("missing", "json_invalid") else f"; found {_shortened(problem['input'])}"
        raise OpenAIRequestError(f"{where + ': ' if where else ''}{problem['msg']}{found}", param=where or None) from err


def _nearest(err: ValidationError) -> Mapping[str, Any]:
    """Of several alternatives of a union, the one whose check got farthest: it says most about the mistake."""

    def distance(problem: Mapping[str, Any]) -> tuple[bool, int]:
        return not problem["type"].endswith("_type"), len([part for part in problem["loc"] if isinstance(part, int)])

    return max(err.errors(include_url=False), key=distance)


def _where(loc: Sequence[int | str]) -> str:
    """`messages[0].content` without pydantic's names for the members of a union."""
    where = ""
    for part in loc:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "TextPart"):
            where += f".{part}" if where else part
    return where


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
