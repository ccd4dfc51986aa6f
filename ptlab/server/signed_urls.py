"""Download addresses that work without an API key, for one file and a limited time.

An address names what to send and when it expires, and carries an HMAC-SHA256 of both. The key is made at start and never leaves the
process, so no address outlives it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

from ptlab.errors import GoneError, InvalidRequestError


class SignedUrls:
    """Makes and checks download addresses.

    Args:
        lifetime_s: how long an address works.
        clock: unix seconds.
    """

    def __init__(self, lifetime_s: float, clock: Callable[[], float] = time.time) -> None:
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._key = secrets.token_bytes(32)

    def sign(self, route: str, what: Mapping[str, str]) -> tuple[str, datetime]:
        """(address, when it expires).

        Args:
            route: absolute URL of the download route.
            what: names what to download; becomes the query.
        """
        expires = int(self._clock() + self._lifetime_s)
        query = {**what, "expires": str(expires), "signature": self._signature(what, expires)}
        return f"{route}?{urlencode(query, quote_via=quote)}", datetime.fromtimestamp(expires, UTC)

    def check(self, query: Mapping[str, str]) -> dict[str, str]:
        """What an address names. Raises: InvalidRequestError if this server did not sign it; GoneError after it has expired."""
        what = {key: value for key, value in query.items() if key not in ("expires", "signature")}
        expires, signature = query.get("expires", ""), query.get("signature", "")
        # compared before the time is looked at, and as bytes: a str comparison refuses non-ASCII with an error of its own
        if not expires.isdecimal() or not hmac.compare_digest(self._signature(what, expires).encode(), signature.encode()):
            raise InvalidRequestError("this download address was not made by this server, or was changed; ask for a new one")
        if int(expires) < self._clock():
            raise GoneError("this download address has expired; ask for a new one")
        return what

    def _signature(self, what: Mapping[str, str], expires: int | str) -> str:
        # length-prefixed, so that no two different requests give the same bytes
        parts = [part for key in sorted(what) for part in (key, what[key])] + [str(expires)]
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()
