"""Which connection an append travels on: one lane for each thing that its reply has to wait for.

Appends of `MEMORY` and `FSYNC` share the store's connection. A wait for replicas keeps its
connection waiting, so those appends have one of their own, dialled when the first of them comes.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asyncstore.appends import Appender, HeldAppender
from asyncstore.errors import StoreClosed
from asyncstore.wire import ReplyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncstore.durability import Levels, Reached
    from asyncstore.keys import Keys
    from asyncstore.transport import Transport
    from asyncstore.values import Durability
    from asyncstore.wire import Reply

_SHARE_OF_TIMEOUT: Final = 0.8  # of a call's time, for the wait; the rest is for the way


class Lanes:
    """The lanes of a store. `default` is the level of appends that name none."""

    def __init__(
        self,
        transport: Transport,
        keys: Keys,
        levels: Levels,
        default: Durability,
        timeout: float,
        make_transport: Callable[[], Transport],
    ) -> None:
        self.default = default
        self._transport = transport
        self._keys = keys
        self._levels = levels
        self._timeout = timeout
        self._make_transport = make_transport
        self._waiting: Transport | None = None
        self._opening = asyncio.Lock()
        self._place = ("", "")
        self._is_closed = False
        self._appenders: dict[Durability, Appender] = {}

    def opened(self, url: str, where: str) -> None:
        """Remember where to dial: the store is open."""
        self._place = url, where

    async def aclose(self) -> None:
        """Close the lane of the waits, if there is one, or as soon as it is dialled."""
        self._is_closed = True
        if self._waiting is not None:
            await self._waiting.aclose()

    async def appender(self, wanted: Durability) -> Appender:
        """Return what sends appends of a level, or raise `DurabilityUnavailable`."""
        await self._levels.ensure(wanted)
        found = self._appenders.get(wanted)
        if found is None:
            found = self._appenders.setdefault(wanted, await self._make(wanted))
        return found

    async def _make(self, wanted: Durability) -> Appender:
        proofs = partial(self._levels.proofs, wanted, _SHARE_OF_TIMEOUT * self._timeout)
        if not wanted.on_replicas:
            return Appender(self._transport, self._keys, proofs)
        return HeldAppender(await self._waiting_transport(), self._keys, proofs)

    async def _waiting_transport(self) -> Transport:
        async with self._opening:
            if self._waiting is None:
                self._transport.loop()  # or it is closed
                transport = self._make_transport()
                await transport.open(*self._place)
                if self._is_closed:
                    await transport.aclose()
                    raise StoreClosed("the store was closed; nothing was changed")
                self._waiting = transport
        return self._waiting

    def reached(self, wanted: Durability, answer: Any) -> tuple[Reply, Reached | None]:
        """Return the script's answer for an append, and what was reached for it."""
        if type(answer) is not tuple:
            return answer, None  # an error
        reply, proofs = answer
        if type(reply) is ReplyError:
            return reply, None
        return reply, self._levels.reached(wanted, proofs)
