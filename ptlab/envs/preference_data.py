"""Comparisons of two replies to one conversation, from files, from the hub, or made: what reward models, DPO and RLHF train on.

Rows come in any of these forms, told apart by their fields:

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello!", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: What?"}      Anthropic/hh-rlhf
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}                        UltraFeedback and its kin
    {"prompt": "Hi" or [messages], "chosen": "Hello!" or [messages], "rejected": ...}
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": ...}, ...}       LLaMA-Factory

A row without a comparison in it (the replies agree, or answer different conversations: hh-rlhf has some hundreds) is left out and counted.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ptlab.envs.made_preferences import all_questions, draw_pair, utility
from ptlab.envs.rows import rows_of
from ptlab.errors import ConfigError
from ptlab.renderers import Message, text_of
from ptlab.rl.seeds import stable_seed
from ptlab.section import Section

Truth = Callable[[Sequence[Message], Message], float]
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One judgement: after `prompt`, `chosen` was preferred to `rejected`."""

    prompt: tuple[Message, ...]
    """The conversation up to the reply; ends with a message of the user."""
    chosen: Message
    rejected: Message

    def swapped(self) -> Comparison:
        return Comparison(prompt=self.prompt, chosen=self.rejected, rejected=self.chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """What a run learns from and is measured on; no prompt is in both."""

    train: Sequence[Comparison]
    test: Sequence[Comparison]
    truth: Truth | None = None
    """What the raters' rule says of a reply, where it is known: data the project made."""


class MadePreferencesConfig(Section):
    kind: Literal["made"] = "made"
    """Made by the project, nothing to download: kind, rude, padded and evasive replies to small questions (envs/made_preferences.py)."""
    num_train: int = Field(default=4000, ge=1)
    """Comparisons to train on."""
    num_test: int = Field(default=200, ge=1)
    """Held-out comparisons, of questions that are in no training comparison."""
    labels: Literal["given", "shuffled"] = "given"
    """"shuffled" tosses a coin for which reply of a training comparison was preferred: the negative control, which must not learn."""

    def files(self) -> Mapping[str, str | None]:
        return {}

    def load(self, seed: int) -> Preferences:
        questions = all_questions()
        sides = {held_out: [q for q in questions if q.is_held_out is held_out] for held_out in (False, True)}

        def draw(count: int, *, held_out: bool) -> list[Comparison]:
            rng = random.Random(stable_seed("made preferences", str(held_out)))  # the data are one fixed set, as a download is
            chosen_from = sides[held_out]
            drawn = []
            for index in range(count):
                question = chosen_from[index % len(chosen_from)]
                chosen, rejected = draw_pair(question, rng)
                drawn.append(Comparison(prompt=(_said("user", question.text),), chosen=_reply(chosen), rejected=_reply(rejected)))
            return drawn

        train, test = draw(self.num_train, held_out=False), draw(self.num_test, held_out=True)
        return Preferences(train=_labelled(train, self.labels, seed), test=test, truth=_made_truth)


class PreferenceRowsConfig(Section):
    kind: Literal["rows"] = "rows"
    """Rows of a local file or of a data set on the hub."""
    path: str | None = None
    """Local JSONL or parquet, relative to the working directory; None = from the hub."""
    test_path: str | None = None
    """The same for the held-out comparisons; None = num_test are held out of `path`."""
    hub_name: str = Field(default="Anthropic/hh-rlhf", min_length=1)
    """Data set on the Hugging Face hub, used when no path is set."""
    subset: str | None = None
    """Its configuration."""
    split: str = Field(default="train", min_length=1)
    """The hub's split to train on."""
    test_split: str | None = "test"
    """The hub's split of held-out comparisons; None = num_test are held out of `split`."""
    num_train: int | None = Field(default=None, ge=1)
    """Read only so many training comparisons; None = all."""
    num_test: int = Field(default=256, ge=1)
    """Held-out comparisons that an evaluation asks."""
    labels: Literal["given", "shuffled"] = "given"
    """"shuffled" tosses a coin for which reply of a training comparison was preferred: the negative control, which must not learn."""

    @model_validator(mode="after")
    def _test_path_has_a_path(self) -> PreferenceRowsConfig:
        if self.test_path is not None and self.path is None:
            raise ValueError(f"test_path is set but path is not; set both (local files) or neither (hub {self.hub_name})")
        return self

    def files(self) -> Mapping[str, str | None]:
        return {"path": self.path, "test_path": self.test_path}

    def load(self, seed: int) -> Preferences:
        """Raises: ConfigError for rows that are missing, of no known form, or without a single comparison."""
        train = self._read(self.path, self.split)
        local = self.path is not None
        if (self.test_path is None) if local else (self.test_split is None):
            train, test = hold_out(train, self.num_test, where=self.path or self.hub_name)
        else:
            test = self._read(self.test_path, self.test_split or "")[: self.num_test]
            asked = {_key(comparison.prompt) for comparison in test}
            train = [comparison for comparison in train if _key(comparison.prompt) not in asked]
        return Preferences(train=_labelled(train[: self.num_train], self.labels, seed), test=test)

    def _read(self, path: str | None, split: str) -> list[Comparison]:
        where = path or f"{self.hub_name}/{split}"
        return comparisons_of(rows_of(path, hub_name=self.hub_name, split=split, subset=self.subset), where=where)


PreferenceDataConfig = Annotated[MadePreferencesConfig | PreferenceRowsConfig, Field(discriminator="kind")]
"""The section `data` of everything that learns from comparisons."""


def comparisons_of(rows: Iterable[tuple[str, Mapping[str, Any]]], *, where: str) -> list[Comparison]:
    """All comparisons, in order. Raises: ConfigError if a row is of no known form, or there is no comparison at all."""
    found: list[Comparison] = []
    left_out = 0
    for place, row in rows:
        comparison = comparison_of(row, place)
        if comparison is None:
            left_out += 1
        else:
            found.append(comparison)
    if left_out:
        logger.warning("%s: %d of %d rows hold no comparison and are left out", where, left_out, left_out + len(found))
    if not found:
        raise ConfigError(f"{where}: no comparisons among {left_out} rows; needed rows with two different replies to one conversation")
    return found


def comparison_of(row: Mapping[str, Any], where: str) -> Comparison | None:
    """The comparison of a row in one of the forms above; None if the replies agree or answer different conversations.

    Raises: ConfigError if the row is of no known form.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise ConfigError(f'{where}: needed the fields "chosen" and "rejected" (and perhaps "prompt"), found {sorted(row)}')
    given = row.get("prompt", row.get("conversations"))
    before = [] if given is None else _conversation(given, "user", where, "prompt")
    if isinstance(row.get("system"), str) and row["system"]:
        before = [_said("system", row["system"]), *before]
    first, second = (_conversation(value, "assistant", where, name) for name, value in (("chosen", chosen), ("rejected", rejected)))
    if len(first) > 1 and before and first[: len(before)] == before:
        before = []  # UltraFeedback: the prompt again, at the start of both
    first, second = [*before, *first], [*before, *second]
    if first[:-1] != second[:-1] or first[-1] == second[-1]:
        return None
    if not first[:-1] or first[-2]["role"] != "user" or {first[-1]["role"], second[-1]["role"]} != {"assistant"}:
        return None
    if not text_of(first[-1]).strip() or not text_of(second[-1]).strip():
        return None
    return Comparison(prompt=tuple(first[:-1]), chosen=first[-1], rejected=second[-1])


def hold_out(comparisons: Sequence[Comparison], count: int, *, where: str) -> tuple[list[Comparison], list[Comparison]]:
    """(train, test): about `count` comparisons go to the test, all those of a prompt together, chosen by a hash of the prompt.

    Raises: ConfigError if nothing would be left to train on.
    """
    ordered = sorted(comparisons, key=lambda comparison: _key(comparison.prompt))
    asked = {_key(comparison.prompt) for comparison in ordered[:count]}
    train = [comparison for comparison in comparisons if _key(comparison.prompt) not in asked]
    if not train:
        raise ConfigError(f"{where}: num_test {count} of {len(comparisons)} comparisons leaves none to train on; ask for fewer")
    return train, [comparison for comparison in ordered if _key(comparison.prompt) in asked]


def prompts_of(comparisons: Sequence[Comparison]) -> list[tuple[Message, ...]]:
    """Each conversation once, in the order of its first comparison."""
    return list({_key(comparison.prompt): comparison.prompt for comparison in comparisons}.values())


def _conversation(value: Any, role: str, where: str, name: str) -> list[Message]:
    """A text of hh-rlhf, a plain text (one message of `role`), one message, or a list of messages."""
    if isinstance(value, str):
        return _hh_messages(value) if _HH_TURN.match(value) else [_said(role, value)]
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or not items:
        raise ConfigError(f"{where}: {name!r} is {str(value)[:80]!r}; needed a text, a message or a list of messages")
    messages = []
    for item in items:
        said = (item.get("role", item.get("from")), item.get("content", item.get("value"))) if isinstance(item, Mapping) else (None, None)
        if said[0] not in _ROLES or not isinstance(said[1], str):
            raise ConfigError(
                f'{where}: {name!r} holds {str(item)[:80]!r}; needed messages {{"role": "user" | "assistant" | "system", "content": text}}'
            )
        messages.append(_said(_ROLES[said[0]], said[1]))
    return messages


def _hh_messages(text: str) -> list[Message]:
    """Turns of `\\n\\nHuman: ... \\n\\nAssistant: ...`; two of one speaker in a row (hh-rlhf has them) become one."""
    parts = _HH_TURN.split(text)[1:]
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = _ROLES[{"Human": "human", "Assistant": "gpt"}[speaker]]
        if messages and messages[-1]["role"] == role:
            messages[-1] = _said(role, messages[-1]["content"] + "\n\n" + said.strip())
        else:
            messages.append(_said(role, said.strip()))
    return messages


def _labelled(train: list[Comparison], labels: Literal["given", "shuffled"], seed: int) -> list[Comparison]:
    if labels == "given":
        return train
    coin = random.Random(stable_seed(seed, "shuffled labels"))
    return [comparison.swapped() if coin.random() < 0.5 else comparison for comparison in train]


def _made_truth(prompt: Sequence[Message], reply: Message) -> float:
    del prompt
    return utility(text_of(reply))


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _reply(content: str) -> Message:
    return _said("assistant", content)


def _key(prompt: Sequence[Message]) -> str:
    text = "\x1f".join(f"{message['role']}\x1e{message['content']}" for message in prompt)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
