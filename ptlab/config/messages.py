"""A user's mistake in a config, said in one sentence: where, what was found, what was needed, and the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "`key: value` pairs",
    "model_type": "a section of `key: value` pairs",
    "model_attributes_type": "a section of `key: value` pairs",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def sentences(error: ValidationError, root: type[BaseModel], raw: Mapping[str, Any], *, source: str, changed: Sequence[str]) -> list[str]:
    """One sentence per mistake in `raw`, in the order of the sections.

    Args:
        root: the model that refused raw.
        source: the file, named where a key came from it.
        changed: dotted keys that came from `--set` instead.
    """
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, section = _locate(detail["loc"], root, raw)
        found.setdefault(".".join(path), _sentence(detail, path, section, root, source, changed))
    return list(found.values())


def _sentence(
    detail: ErrorDetails, path: list[str], section: type[BaseModel], root: type[BaseModel], source: str, changed: Sequence[str]
) -> str:
    """One mistake found by pydantic: where, what was found, what was needed."""
    dotted, kind, context = ".".join(path), detail["type"], detail.get("ctx", {})
    where = f"--set {dotted}" if dotted in changed else f"{source}: {dotted}"
    found = f"found {describe(detail['input'])}"
    if kind == "extra_forbidden":
        return f"{where}: unknown key ({_nearest(path, section, root)})"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":  # found by a section about several of its keys; an override may have brought it about
        overrides = [f"--set {key}" for key in changed if key.startswith(f"{dotted}.") or not dotted]
        where = where if dotted in changed else f"{' '.join([source, *overrides])}: {dotted}".removesuffix(": ")
        return f"{where}: {context['error']}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = context.get("expected_tags") or ", ".join(repr(k) for k in _kinds(section, path[-1]))
        near = difflib.get_close_matches(str(context.get("tag", "")), re.findall(r"'([^']*)'", expected), n=1)
        found = f"found {context['tag']!r}" if kind == "union_tag_invalid" else "missing"
        return f"{where}.kind: {found}, needed one of {expected}" + (f" (did you mean {near[0]}?)" if near else "")
    if kind == "literal_error":
        near = difflib.get_close_matches(str(detail["input"]), re.findall(r"'([^']*)'", context["expected"]), n=1)
        return f"{where}: {found}, needed {context['expected']}" + (f" (did you mean {near[0]}?)" if near else "")
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{where}: {found}, needed {words} {context[key]:g}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {found}, needed letters, digits, '.', '_' or '-', starting with a letter or digit"
    return f"{where}: {found}, needed {_NEEDED.get(kind, detail['msg'])}"


def _locate(loc: tuple[int | str, ...], root: type[BaseModel], raw: Mapping[str, Any]) -> tuple[list[str], type[BaseModel]]:
    """Dotted path as the user wrote it (without pydantic's union tags), and the section that holds its last key."""
    path: list[str] = []
    section = root
    node: Any = raw
    for part in loc:
        if path and isinstance(node, Mapping) and part not in node and part == node.get("kind"):
            continue
        if path:
            section = next((s for s in _sections(section, path[-1]) if _is_kind(s, node)), section)
        path.append(str(part))
        node = node.get(part) if isinstance(node, Mapping) else None
    if path and path[-1] in ("float", "str") and len(path) > 1:  # the members of a scalar union are no keys
        path.pop()
    return path, section


def _sections(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The section classes a field of a section may hold (several where `kind` decides)."""
    if key not in section.model_fields:
        return []
    annotation = section.model_fields[key].annotation
    return [s for s in (annotation, *get_args(annotation)) if isinstance(s, type) and issubclass(s, BaseModel)]


def _kinds(section: type[BaseModel], key: str) -> list[str]:
    return [str(s.model_fields["kind"].default) for s in _sections(section, key)]


def _is_kind(section: type[BaseModel], node: Any) -> bool:
    if "kind" not in section.model_fields or not isinstance(node, Mapping):
        return True
    return bool(node.get("kind", section.model_fields["kind"].default) == section.model_fields["kind"].default)


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key in section.model_fields:
        yield f"{prefix}{key}"
        for child in _sections(section, key):
            yield from _all_keys(child, f"{prefix}{key}.")


def _nearest(path: list[str], section: type[BaseModel], root: type[BaseModel]) -> str:
    here = difflib.get_close_matches(path[-1], list(section.model_fields), n=1)
    if here:
        return f"did you mean {here[0]}?"
    inside = "".join(f"{part}." for part in path[:-1])
    keys = [key for key in _all_keys(root) if not (inside and key.startswith(inside))]  # there it is this section's kind that counts
    keys += list(_all_keys(section, inside)) if inside else []
    elsewhere = [key for key in keys if key.rsplit(".", 1)[-1] == path[-1] and key != ".".join(path)]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(section.model_fields)}"


def describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return str(value)
