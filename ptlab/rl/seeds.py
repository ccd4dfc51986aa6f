"""One stable seed per sampling request: the same request of the same run has the same seed in every process."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: int | str) -> int:
    """A seed in 0 .. 2**62 - 1 that depends on nothing but `parts` and their order.

    Python's own hash() of a string differs between processes; a resumed run must draw what the unbroken one would have drawn.
    62 bits leave room below 2**63 for `seed + i`, which samplers use for the i-th sample of a request.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
