"""Which samples are ready, for clients that ask for all of theirs at once (retrieve_futures).

A client says up to where it knows (a cursor) and gets what became ready since. Numbers are given here, in the order in which completions
are first reported; they hold for the life of the process.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from ptlab.backend.requests import Answer, Requests
from ptlab.server.bodies import RetrieveFuturesBody

SEQ_IDS_PER_CLIENT = 1_000_000_000
"""A sampling client's seq_ids lie in cloned_sampler_id * this + 0, 1, 2 ..."""
MAX_REMEMBERED = 50_000
IDLE_PAUSE_S = 0.25


class Completions:
    """Belongs to the backend's event loop."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._numbers: OrderedDict[str, int] = OrderedDict()  # request_id -> cursor at which it was reported
        self._newest = 0

    async def since(self, owner: str, query: RetrieveFuturesBody, timeout_s: float) -> dict[str, Any]:
        """{"completions": [...], "cursor"}: waits for the first one."""
        target = query.target
        known = set(query.retrieved_request_ids)
        known |= {request_id for request_id, number in self._numbers.items() if number <= query.prev_cursor}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            ready = await self._requests.finished_since(target.sampling_session_id, owner, known, max(0.0, deadline - loop.time()))
            mine = {i: answer for i, answer in ready.items() if _client_of(i) == target.cloned_sampler_id}
            if mine or loop.time() >= deadline:
                return self._report(mine, query.prev_cursor)
            known |= ready.keys()  # of other copies of the client
            if not ready:  # nothing is being worked on: requests may still come
                await asyncio.sleep(min(IDLE_PAUSE_S, max(0.0, deadline - loop.time())))

    def _report(self, ready: dict[str, Answer], prev_cursor: int) -> dict[str, Any]:
        for request_id in ready:
            if request_id not in self._numbers:
                self._newest += 1
                self._numbers[request_id] = self._newest
        while len(self._numbers) > MAX_REMEMBERED:
            self._numbers.popitem(last=False)
        cursor = max([prev_cursor, *(self._numbers.get(request_id, 0) for request_id in ready)])
        return {"completions": [_completion(request_id, answer) for request_id, answer in ready.items()], "cursor": cursor}


def _client_of(request_id: str) -> int:
    return int(request_id.rpartition(":")[2]) // SEQ_IDS_PER_CLIENT


def _completion(request_id: str, answer: Answer) -> dict[str, Any]:
    if answer.failure is not None:
        return {"state": "failed", "request_id": request_id}
    return {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": len(answer.payload)}
