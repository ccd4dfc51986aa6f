"""Plain values as text, and text through a pipe: how the judge, the tested code and ptlab talk. Part of the judge's text.

What is read here may have been written by untrusted code: reading makes exact plain types, runs nothing, and is bounded by the length of
the text.
"""

from __future__ import annotations

import os
import select
import time
from _collections_abc import Iterator  # collections.abc, without its import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DEPTH = 100
MAX_ITEMS = 4_000_000
MAX_YIELDED = 100_000
"""Of an iterator, which may have no end."""
MAX_FRAME_BYTES = 16 * 2**20
"""Of a question to the tested code, or its answer."""


class Opaque:
    """A value that is not plain data. It can be asked whether it is true and nothing else; a test that compares it fails."""

    def __init__(self, type_name: str, truth: bool) -> None:
        self.type_name = type_name
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth

    def __eq__(self, other: object) -> bool:
        raise TypeError(f"a {self.type_name} is no plain data: a test cannot compare it")

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = None  # type: ignore[assignment]


def encode(value: Any) -> str:
    """Text of a plain value: None, numbers, strings, bytes and their containers; what is none of these becomes an Opaque."""
    parts: list[str] = []
    _encode(value, parts, 0)
    return "".join(parts)


def _encode(value: Any, parts: list[str], depth: int) -> None:
    if depth > MAX_DEPTH or len(parts) > MAX_ITEMS:
        raise ValueError("nested too deep or too large")
    kind = type(value)
    if value is None or kind is bool:
        parts.append({None: "N", True: "T", False: "F"}[value])
    elif isinstance(value, int):
        parts.append(f"i{int.__index__(value):x};")
    elif isinstance(value, float):
        parts.append(f"f{float.__repr__(value)};")
    elif isinstance(value, complex):
        parts.append(f"c{value.real!r},{value.imag!r};")
    elif isinstance(value, str):
        text = str.__str__(value)
        parts.append(f"s{len(text):x}:{text}")
    elif isinstance(value, (bytes, bytearray)):
        parts.append("{}{:x}:{}".format("b" if isinstance(value, bytes) else "a", len(value), bytes(value).decode("latin-1")))
    elif isinstance(value, dict):
        parts.append(f"d{len(value):x};")
        for key, held in dict.items(value):
            _encode(key, parts, depth + 1)
            _encode(held, parts, depth + 1)
    elif isinstance(value, range):
        parts.append(f"r{value.start:x},{value.stop:x},{value.step:x};")
    else:
        _encode_items(value, kind, parts, depth)


def _encode_items(value: Any, kind: type, parts: list[str], depth: int) -> None:
    items: list[Any]
    if isinstance(value, list):
        letter, items = "l", list(list.__iter__(value))
    elif isinstance(value, tuple):
        letter, items = "t", list(tuple.__iter__(value))
    elif isinstance(value, set):
        letter, items = "S", list(set.__iter__(value))
    elif isinstance(value, frozenset):
        letter, items = "Z", list(frozenset.__iter__(value))
    else:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in ("decimal.Decimal", "fractions.Fraction"):
            text = str(value)
            parts.append("{}{:x}:{}".format("D" if name == "decimal.Decimal" else "R", len(text), text))
            return
        if name == "collections.deque":
            letter, items = "q", list(value)
        elif name in ("builtins.dict_keys", "builtins.dict_values", "builtins.dict_items"):
            letter, items = "v", list(value)
        elif isinstance(value, Iterator):  # a generator, map, zip, ...: what it yields, so that a test may iterate over it
            letter, items = "I", []
            for item in value:
                items.append(item)
                if len(items) > MAX_YIELDED:
                    raise ValueError("an iterator without end")
        else:
            name = ("+" if value else "-") + name
            parts.append(f"o{len(name):x}:{name}")
            return
    parts.append(f"{letter}{len(items):x};")
    for item in items:
        _encode(item, parts, depth + 1)


def decode(text: str) -> Any:
    """The value that `encode` wrote, made of exact plain types. Raises: ValueError for anything else."""
    try:
        value, end = _decode(text, 0, 0)
    except (IndexError, KeyError, TypeError, OverflowError) as err:
        raise ValueError(f"not an encoded value: {type(err).__name__}") from None
    if end != len(text):
        raise ValueError("not an encoded value: more text behind it")
    return value


def _decode(text: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    letter = text[at]
    if letter in "NTF":
        return {"N": None, "T": True, "F": False}[letter], at + 1
    if letter in "sbaoDR":
        colon = text.index(":", at)
        end = colon + 1 + int(text[at + 1 : colon], 16)
        if not colon < end <= len(text):
            raise ValueError("not an encoded value: a length beyond its end")
        return _from_text(letter, text[colon + 1 : end]), end
    end = text.index(";", at)
    head = text[at + 1 : end]
    if letter == "i":
        return int(head, 16), end + 1
    if letter == "f":
        return float(head), end + 1
    if letter in "cr":
        numbers = head.split(",")
        return (complex(*map(float, numbers)) if letter == "c" else range(*(int(number, 16) for number in numbers))), end + 1
    count = int(head, 16) * (2 if letter == "d" else 1)
    if not 0 <= count <= len(text):
        raise ValueError("not an encoded value: more items than text")
    items, at = [], end + 1
    for _ in range(count):
        item, at = _decode(text, at, depth + 1)
        items.append(item)
    return _from_items(letter, items), at


def _from_text(letter: str, text: str) -> Any:
    if letter == "s":
        return text
    if letter in "ba":
        return (bytes if letter == "b" else bytearray)(text.encode("latin-1"))
    if letter == "o":
        return Opaque(text[1:], text[0] == "+")
    if len(text) > 1000:  # arithmetic on huge decimals and fractions has no bound
        raise ValueError("too long a number")
    if letter == "D":
        import decimal

        try:
            return decimal.Decimal(text)
        except decimal.InvalidOperation:
            raise ValueError("not a decimal") from None
    import fractions

    return fractions.Fraction(text)


def _from_items(letter: str, items: list[Any]) -> Any:
    if letter == "d":
        return dict(zip(items[::2], items[1::2]))  # noqa: B905 - Python 3.8 has no strict
    if letter == "q":
        import collections

        return collections.deque(items)
    if letter == "I":
        return iter(items)
    if letter == "v":
        return dict(enumerate(items)).values()
    return {"l": list, "t": tuple, "S": set, "Z": frozenset}[letter](items)


def read_exactly(descriptor: int, size: int, deadline: float | None = None) -> bytes | None:
    """None at the end of the stream; raises TimeoutError at the deadline."""
    parts = []
    while size:
        if deadline is not None and not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int, deadline: float | None = None, most: int = MAX_FRAME_BYTES) -> str | None:
    """Text from another process: 8 hex digits of length, then ASCII with escapes. None at the end. Raises: ValueError for anything else."""
    head = read_exactly(descriptor, 8, deadline)
    if head is None:
        return None
    size = int(head, 16)
    if not 0 <= size <= most:
        raise ValueError(f"a frame of {size} bytes")
    body = read_exactly(descriptor, size, deadline)
    return None if body is None else body.decode("unicode_escape")


def write_frame(descriptor: int, text: str) -> None:
    data = frame(text)
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError("too large")
    write_all(descriptor, data)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def frame(text: str) -> bytes:
    """What `read_frame` reads; ASCII, so that any way to stdin will do."""
    body = text.encode("unicode_escape")
    return b"%08x" % len(body) + body
