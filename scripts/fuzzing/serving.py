"""The server that scripts/fuzz_server.py starts: engines that need no model, limits that are soon reached, two API keys."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ptlab.engines.protocols import Engines
from ptlab.engines.scripted import ScriptedSampler, ScriptedTrainer, unigram_info
from ptlab.server.assembly import assembled
from ptlab.server.listen import address, bind, listen
from ptlab.server.settings import ServeSettings
from ptlab.types import LoraConfig

BASE: Final = "scripted/unigram"
GAP_S: Final = 1.0
"""How long the server started here waits for a missing number."""
LIMITS: Final[dict[str, Any]] = {
    "long_poll_s": 0.3, "gap_timeout_s": GAP_S, "maintenance_every_s": 0.2, "max_body_bytes": 2**20, "max_decompressed_bytes": 2**22,
    "max_num_samples": 64, "max_new_tokens": 256, "result_grace_s": 20.0, "park_after_s": 3.0, "sampler_idle_s": 3.0,
    "max_pending_per_key": 500,
}  # fmt: skip
"""Small, so that they are reached."""


class ErrorLog(logging.Handler):
    """What the server logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


def letters() -> PreTrainedTokenizerFast:
    """For the endpoints that speak text: the tokens 0 to 7 are the letters a to g and everything else."""
    vocab = {letter: number for number, letter in enumerate("abcdefg?")}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="g")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return fast


@contextmanager
def serving(data_dir: Path) -> Iterator[tuple[FastAPI, str, list[str]]]:
    """(the app, its URL, two keys) of a scripted server in a thread. Raises: whatever ends the server."""
    settings = ServeSettings(data_dir=data_dir, port=0, **LIMITS)
    info = unigram_info()
    ScriptedTrainer(info).create_adapter("first", LoraConfig(rank=1))  # torch imports for seconds when the first optimizer is made
    bound = bind(settings.host, 0)
    ready = threading.Event()
    made: list[Any] = []

    async def main() -> None:
        engines = Engines(trainer=ScriptedTrainer(info), sampler=ScriptedSampler(info), tokenizer=letters())
        async with assembled(settings, lambda name: engines, [BASE]) as app:
            access, stop = app.state.context.access, asyncio.Event()
            keys = [await access.create_key(name) for name in ("alice", "bob")]
            made.extend((app, keys, asyncio.get_running_loop(), stop))
            await listen(app, bound, stop, ready.set)

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as err:  # raised again where the caller is
            failures.append(err)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="fuzzed-server")
    thread.start()
    ready.wait()
    try:
        if failures:
            raise failures[0]
        app, keys, loop, stop = made
        try:
            yield app, address(bound), keys
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(60)
        bound.close()
    if failures or thread.is_alive():
        raise failures[0] if failures else RuntimeError("the server did not stop")
