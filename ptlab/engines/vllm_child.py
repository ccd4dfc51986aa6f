"""The main module of vLLM's own processes, in place of the user's script: it ends them with the process that started them.

vLLM ends its processes when it is closed; of a killed parent they learn nothing, and would keep their memory for ever. Standard library
only: what is imported here is imported in each of them.
"""

from __future__ import annotations

import multiprocessing.spawn
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POLL_S = 0.1


@contextmanager
def main_module_replaced() -> Iterator[None]:
    """Give the processes that vLLM starts meanwhile this main module, which those they start take over.

    The user's, if it has no `if __name__ == "__main__"`, would run a second time.
    """
    stock = multiprocessing.spawn.get_preparation_data

    def prepare(name: str) -> dict[str, Any]:
        data = dict(stock(name))
        if name.startswith(("EngineCore", "VllmWorker")):
            data.pop("init_main_from_name", None)
            data["init_main_from_path"] = __file__
        return data

    multiprocessing.spawn.get_preparation_data = prepare
    try:
        yield
    finally:
        multiprocessing.spawn.get_preparation_data = stock


def follow_parent() -> None:
    """Wait for the end of the parent process, then end this one on the spot: whatever it still holds nobody can ask for."""
    while (parent := multiprocessing.parent_process()) is None:  # known once this process has unpickled what it is to run
        time.sleep(POLL_S)
    parent.join()
    os._exit(1)


if __name__ == "__mp_main__":
    threading.Thread(target=follow_parent, name="ptlab-follow-parent", daemon=True).start()
