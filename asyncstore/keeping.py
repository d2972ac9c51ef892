"""Leases that a worker keeps for a moment though all is handled, as more is likely to come soon."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from asyncstore.deliveries import Held

SOON: Final = 1.0  # seconds from one event of an aggregate to the next


class Kept:
    """Those leases. What nothing has come of goes to `give_back` after that time, or twice it."""

    def __init__(self, give_back: Callable[[list[Held]], None]) -> None:
        self._give_back = give_back
        self._held: dict[Held, float] = {}  # since when
        self._review: asyncio.TimerHandle | None = None

    def __contains__(self, held: Held) -> bool:
        return held in self._held

    def add(self, held: Held) -> None:
        """Keep one."""
        loop = asyncio.get_running_loop()
        self._held[held] = loop.time()
        if self._review is None:
            self._review = loop.call_later(SOON, self._look_through)

    def drop(self, held: Held) -> None:
        """Keep it no more; one that is not kept is fine."""
        self._held.pop(held, None)

    def give_back(self, some: Collection[Held] | None = None) -> None:
        """Have leases given back: all, or some of those that are kept."""
        leaving = list(self._held if some is None else some)
        for held in leaving:
            self.drop(held)
            held.is_leaving = True
        if leaving:
            self._give_back(leaving)

    def close(self) -> None:
        """Look at none of them again."""
        if self._review is not None:
            self._review.cancel()

    def _look_through(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time() - SOON
        self.give_back([held for held, since in self._held.items() if since <= last])
        self._review = loop.call_later(SOON, self._look_through) if self._held else None
