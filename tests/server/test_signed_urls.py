"""Addresses nobody else can make."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import pytest

from ptlab.errors import GoneError, InvalidRequestError
from ptlab.server.signed_urls import SignedUrls


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def query(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def test_an_address_names_what_was_signed_until_it_expires() -> None:
    clock = Clock()
    urls = SignedUrls(60, clock)
    url, expires = urls.sign("http://here/download", {"path": "tinker://a:train:0/weights/b", "file": "c d&e=ü"})
    assert url.startswith("http://here/download?") and expires.timestamp() == 1060
    assert urls.check(query(url)) == {"path": "tinker://a:train:0/weights/b", "file": "c d&e=ü"}
    clock.now = 1060
    urls.check(query(url))
    clock.now = 1061
    with pytest.raises(GoneError):
        urls.check(query(url))


@pytest.mark.parametrize(
    "change",
    [
        {"path": "other"}, {"file": "other"}, {"expires": "9999999999"}, {"expires": "x"}, {"expires": ""}, {"signature": ""},
        {"signature": "é"}, {"more": "x"}, {"expires": "1\u06660"},
    ],
)  # fmt: skip
def test_nothing_in_it_can_be_changed(change: dict[str, str]) -> None:
    urls = SignedUrls(60, Clock())
    good = query(urls.sign("http://here", {"path": "p", "file": "f"})[0])
    with pytest.raises(InvalidRequestError):
        urls.check(good | change)
    for name in good:
        with pytest.raises(InvalidRequestError):
            urls.check({key: value for key, value in good.items() if key != name})


def test_neighbouring_fields_cannot_be_shifted_into_each_other() -> None:
    urls = SignedUrls(60, Clock())
    good = query(urls.sign("http://here", {"a": "bc", "d": "e"})[0])
    for shifted in ({"ab": "c", "d": "e"}, {"a": "b", "cd": "e"}, {"a": "bcde"}):
        with pytest.raises(InvalidRequestError):
            urls.check(shifted | {"expires": good["expires"], "signature": good["signature"]})


def test_another_server_does_not_honour_it() -> None:
    url, _ = SignedUrls(60, Clock()).sign("http://here", {"path": "p"})
    with pytest.raises(InvalidRequestError):
        SignedUrls(60, Clock()).check(query(url))
