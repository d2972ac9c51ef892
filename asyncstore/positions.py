"""How far each handler has come in each aggregate."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncstore import forms, scripts
from asyncstore.errors import CorruptPosition, StillBehind
from asyncstore.names import MAIN, check_name, check_seconds, check_sequence
from asyncstore.observing import observed

if TYPE_CHECKING:
    from asyncstore.keys import Keys
    from asyncstore.router import Router
    from asyncstore.values import Aggregate


_FIRST_PAUSE: Final = 0.001  # seconds
_LONGEST_PAUSE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions of a store. A position is the last sequence that a handler has processed.

    Each edition has its own. One that was put while an edition still read as main, and further
    than where it then diverged, counts as standing right before that.
    """

    _router: Router
    _keys: Keys

    @observed("positions.get")
    async def get(self, handler: str, aggregate: Aggregate) -> int | None:
        """Return the position, or None where the handler has none. 0 is a position."""
        return await self._get(handler, aggregate)

    @observed("positions.put")
    async def put(self, handler: str, aggregate: Aggregate, sequence: int) -> None:
        """Set the position, forwards or backwards."""
        await self._put(handler, aggregate, sequence, "anywhere")

    @observed("positions.advance")
    async def advance(self, handler: str, aggregate: Aggregate, sequence: int) -> bool:
        """Move the position forwards. False, and nothing moved, if it is there or further."""
        return await self._put(handler, aggregate, sequence, "forwards")

    async def wait(
        self,
        handler: str,
        aggregate: Aggregate,
        sequence: int,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - as other stores have it
    ) -> None:
        """Wait until the handler has come to a sequence, or further: to read your own writes.

        Raises `StillBehind` after `timeout` seconds. It asks again and again, at most every tenth
        of a second.
        """
        sequence = check_sequence("sequence", sequence)
        limit = math.inf if timeout is None else check_seconds("timeout", timeout)
        ends, pause = time.monotonic() + limit, _FIRST_PAUSE
        while True:
            position = await self._get(handler, aggregate)
            if position is not None and position >= sequence:
                return
            left = ends - time.monotonic()
            if left <= 0:
                raise StillBehind(handler, aggregate, sequence, position)
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _get(self, handler: str, aggregate: Aggregate) -> int | None:
        handler = check_name("handler", handler)
        key = self._keys.position(handler, aggregate)
        value: bytes | None
        if aggregate.edition == MAIN:
            value = await self._router.read(forms.is_text_or_nil, "GET", key)
        else:
            keys = [key, self._keys.divergence(aggregate)]
            value = await self._router.run(scripts.GET_POSITION, keys)
        if value is None:
            return None
        if not value.isdigit():
            raise CorruptPosition(key)
        return int(value)

    async def _put(self, handler: str, aggregate: Aggregate, sequence: int, direction: str) -> bool:
        handler = check_name("handler", handler)
        position = self._keys.position(handler, aggregate)
        sequence = check_sequence("sequence", sequence)
        keys = [position, self._keys.handlers(aggregate)]
        if aggregate.edition != MAIN:
            attached = self._keys.attached_of(aggregate)
            keys += [self._keys.divergence(aggregate), attached]
        (outcome,) = await self._router.run(
            scripts.PUT_POSITION, keys, [handler, sequence, direction, aggregate.root]
        )
        return bool(outcome == b"ok")
