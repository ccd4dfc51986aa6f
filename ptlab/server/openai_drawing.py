"""From an OpenAI request to prompts, and from prompts to finished choices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptlab.backend.sampling import SamplingSessions
from ptlab.errors import EngineError
from ptlab.model_info import get_recommended_renderer_name
from ptlab.renderers import RENDERER_NAMES, Renderer, TextCodec, get_renderer
from ptlab.server.openai_answers import Choice, ScoredToken, Usage, top_rows
from ptlab.server.openai_bodies import ChatBody, CompletionBody, OpenAIRequestError
from ptlab.server.openai_samplers import OpenSampler
from ptlab.server.openai_text import AnswerText, Detokenizer, TokenText, decode
from ptlab.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

CHAT_TEMPLATE = "chat_template"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one group of choices follows."""

    tokens: list[int]
    text: str
    """For echo."""
    num_added: int = 0
    """Tokens at the front that stand for nothing in the text (begin of text)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request ready for the sampler."""

    prompts: Sequence[Prompt]
    num_choices: int
    """Of each prompt."""
    params: SamplingParams
    stop_texts: Sequence[str]
    """What the engine keeps and the answer must not show."""
    num_top: int | None
    """How many of the likeliest tokens to report; None = no log-probabilities at all."""
    echo: bool = False
    renderer: str | None = None
    """What wrote the messages of a chat."""

    @property
    def answers_nothing(self) -> bool:
        """Only the prompt is to be scored."""
        return self.params.max_tokens == 0


@dataclass(slots=True)
class Language:
    """Tokenizer of a base model and what is derived from it once."""

    base_model: str
    tokenizer: Any
    special: frozenset[int]
    _renderers: dict[str, Renderer] = field(default_factory=dict)

    def renderer(self, name: str | None) -> Renderer:
        """The one asked for, else the tokenizer's own chat template, else the format that ptlab knows the model by.

        Raises: InvalidRequestError if it does not fit the tokenizer.
        """
        if name is None:
            name = CHAT_TEMPLATE if self.tokenizer.chat_template else get_recommended_renderer_name(self.base_model)
            if name == CHAT_TEMPLATE and not self.tokenizer.chat_template:
                raise OpenAIRequestError(
                    f"{self.base_model} has no chat template; use /v1/completions, or name a `renderer` ({', '.join(RENDERER_NAMES)})",
                    param="renderer",
                )
        if name not in self._renderers:
            self._renderers[name] = get_renderer(name, self.tokenizer)
        return self._renderers[name]

    def encode(self, prompt: str | list[int]) -> Prompt:
        """Raises: InvalidRequestError."""
        if not isinstance(prompt, str):
            if max(prompt) >= len(self.tokenizer):
                raise OpenAIRequestError(f"prompt: token {max(prompt)} is outside 0 .. {len(self.tokenizer) - 1}", param="prompt")
            return Prompt(prompt, decode(self.tokenizer, prompt))
        plain = list(self.tokenizer.encode(prompt, add_special_tokens=False))
        tokens = list(self.tokenizer.encode(prompt, add_special_tokens=True))
        return Prompt(tokens, prompt, num_added=len(tokens) - len(plain) if tokens[len(tokens) - len(plain) :] == plain else 0)


class Languages:
    """One Language per base model, made when first asked for."""

    def __init__(self, get_tokenizer: Callable[[str], Awaitable[Any]]) -> None:
        self._get_tokenizer = get_tokenizer
        self._known: dict[str, Language] = {}

    async def of(self, base_model: str) -> Language:
        if base_model not in self._known:
            tokenizer = await self._get_tokenizer(base_model)
            self._known[base_model] = Language(base_model, tokenizer, TextCodec(tokenizer).special_ids)
        return self._known[base_model]


def ask_of(body: ChatBody | CompletionBody, language: Language) -> Ask:
    """Render or encode. Blocking. Raises: InvalidRequestError."""
    if isinstance(body, ChatBody):
        return _chat(body, language)
    params = body.sampling_params(body.most_tokens, body.stop_texts or None)
    return Ask(
        prompts=[language.encode(prompt) for prompt in body.prompts],
        num_choices=body.num_choices,
        params=params,
        stop_texts=body.stop_texts,
        num_top=body.logprobs,
        echo=bool(body.echo),
    )


def _chat(body: ChatBody, language: Language) -> Ask:
    renderer = language.renderer(body.renderer)
    tokens = renderer.build_generation_prompt(body.messages_to_render()).to_ints()
    ends = renderer.get_stop_sequences()
    stop: list[str] | list[int] = ends
    if body.stop_texts:  # an engine takes ids or texts, and texts may spell special tokens
        stop = [*body.stop_texts, *(decode(language.tokenizer, [end]) if isinstance(end, int) else end for end in ends)]
    return Ask(
        prompts=[Prompt(tokens, "")],
        num_choices=body.num_choices,
        params=body.sampling_params(body.most_tokens, stop or None),
        stop_texts=[text for text in stop if isinstance(text, str)],
        num_top=(body.top_logprobs or 0) if body.logprobs else None,
        renderer=renderer.name,
    )


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """All choices after one prompt."""

    choices: Sequence[Choice]
    usage: Usage


async def draw(sampling: SamplingSessions, sampler: OpenSampler, ask: Ask, index: int, language: Language) -> PromptAnswer:
    """The choices after prompt `index`. Cancelling it aborts the draws in the engine.

    Raises: EngineError if the sampler answered from other weights than the sampler's version.
    """
    prompt = ask.prompts[index]
    scores_prompt = ask.echo and ask.num_top is not None
    response = await sampling.sample(
        sampling_session_id=sampler.sampling_session_id,
        prompt=ModelInput.from_ints(prompt.tokens),
        num_samples=1 if ask.answers_nothing else ask.num_choices,
        params=ask.params.model_copy(update={"max_tokens": 1}) if ask.answers_nothing else ask.params,
        include_prompt_logprobs=scores_prompt,
        topk_prompt_logprobs=(ask.num_top or 0) if scores_prompt else 0,
        topk_sample_logprobs=ask.num_top or 0,
    )
    for sequence in response.sequences:
        if sequence.policy_version != sampler.version:
            raise EngineError(
                f"asked for version {sampler.version} ({sampler.fingerprint}), the sampler answered with {sequence.policy_version}; "
                f"the answer was thrown away",
                engine="openai",
                operation="sample",
            )
    return await asyncio.to_thread(_finish, ask, index, response, language)  # detokenizing would hold up the event loop


def _finish(ask: Ask, index: int, response: SampleResponse, language: Language) -> PromptAnswer:
    prompt = ask.prompts[index]
    echoed = _echoed(ask, prompt, response, language)
    sequences: list[SampledSequence | None] = list(response.sequences)
    if ask.answers_nothing:
        sequences = [None] * ask.num_choices
    choices = [_choice(ask, index * ask.num_choices + i, prompt, sequence, echoed, language) for i, sequence in enumerate(sequences)]
    sampled = sum(choice.num_tokens for choice in choices)
    return PromptAnswer(choices, Usage(len(prompt.tokens), sampled, min(response.prompt_cache_hit_tokens, len(prompt.tokens))))


def _choice(
    ask: Ask, number: int, prompt: Prompt, sequence: SampledSequence | None, echoed: Sequence[ScoredToken], language: Language
) -> Choice:
    before = prompt.text if ask.echo else ""
    if sequence is None:
        return Choice(number, before, "length", echoed, 0)
    answer = AnswerText(language.tokenizer, before=prompt.tokens, stop_texts=ask.stop_texts, special=language.special)
    tokens = sequence.tokens
    text = answer.feed(tokens, sequence.stop_reason)
    scored: list[ScoredToken] = []
    if ask.num_top is not None:
        logprobs = sequence.logprobs or []
        tops = top_rows(sequence.topk_logprobs_np, len(tokens))
        scored = [
            ScoredToken(TokenText(shown.token, len(before) + shown.offset), logprob, top)
            for shown, logprob, top in zip(answer.tokens, logprobs, tops, strict=False)  # the stop's own tokens are not shown
        ]
    return Choice(number, before + text, "length" if answer.ended == "length" else "stop", [*echoed, *scored], len(tokens))


def _echoed(ask: Ask, prompt: Prompt, response: SampleResponse, language: Language) -> list[ScoredToken]:
    """The prompt's tokens with their scores, where they are to be shown."""
    if not ask.echo or ask.num_top is None:
        return []
    logprobs = response.prompt_logprobs or [None] * len(prompt.tokens)
    tops = top_rows(response.topk_prompt_logprobs_np, len(prompt.tokens))
    detokenizer, offset, scored = Detokenizer(language.tokenizer), 0, []
    for position, (token, logprob, top) in enumerate(zip(prompt.tokens, logprobs, tops, strict=True)):
        scored.append(ScoredToken(TokenText(token, min(offset, len(prompt.text))), logprob, top))
        text = detokenizer.add(token)
        offset += 0 if position < prompt.num_added else len(text)
    return scored
