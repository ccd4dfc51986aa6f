"""Players who wait for one another: the one thing that two environments of a game share besides its board."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

Player = TypeVar("Player")


class Turns(Generic[Player]):
    """Whose turn it is, until the game is over. For the tasks of one event loop; nothing here can fail.

    Nobody waits for ever if whoever holds the turn passes it on or ends the game, which an environment does in step() or, however its
    attempt ended, in close().
    """

    def __init__(self, first: Player) -> None:
        self.whose = first
        self.over = False
        self._changed = asyncio.Event()

    def pass_to(self, player: Player) -> None:
        self.whose = player
        self._wake()

    def end(self) -> None:
        self.over = True
        self._wake()

    async def wait_for(self, player: Player) -> None:
        """Until it is this player's turn or the game is over."""
        while not self.over and self.whose != player:
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
