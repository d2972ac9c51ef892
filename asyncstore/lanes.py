"""Which connection an append travels on: one lane for each thing that its reply has to wait for.

Appends of `MEMORY` and `FSYNC` share the store's connection. A wait for replicas keeps its
connection waiting, so those appends have one of their own, dialled when the first of them comes.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asyncstore.appends import Appender, HeldAppender, Turns
from asyncstore.errors import StoreUnavailable
from asyncstore.sharing import Shared
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
        self._place = ("", "")
        self._waiting: Transport | None = None
        self._dialling = Shared(self._dial)
        self._turns = Turns()
        self._appenders: dict[Durability, Appender] = {}

    def opened(self, url: str, where: str) -> None:
        """Remember where to dial: the store is open."""
        self._place = url, where

    async def aclose(self) -> None:
        """Close the lane of the waits, if there is one."""
        await self._dialling.aclose()
        if self._waiting is not None:
            await self._waiting.aclose()

    def ready(self, wanted: Durability) -> Appender | None:
        """Return what sends appends of a level, or None if `made_ready` has to see to it first.

        Raises `DurabilityUnavailable`.
        """
        return self._appenders.get(wanted) if self._levels.knows(wanted) else None

    async def made_ready(self, wanted: Durability, born: float) -> Appender:
        """Return what sends appends of a level, for a caller who began to wait at `born`.

        Raises `DurabilityUnavailable`, or `StoreUnavailable` when the caller's time is over.
        """
        try:
            async with asyncio.timeout_at(born + self._timeout):
                await self._levels.ensure(wanted)
                if wanted.on_replicas and self._waiting is None:
                    await self._dialling.result()
        except TimeoutError:
            why = f"no answer in {self._timeout} s; nothing was changed"
            raise StoreUnavailable(self._place[1], why) from None
        if wanted not in self._appenders:
            self._appenders[wanted] = self._make(wanted)
        return self._appenders[wanted]

    def _make(self, wanted: Durability) -> Appender:
        proofs = partial(self._levels.proofs, wanted, _SHARE_OF_TIMEOUT * self._timeout)
        if self._waiting is None or not wanted.on_replicas:
            return Appender(self._transport, self._keys, proofs)
        return HeldAppender(self._waiting, self._keys, proofs, turns=self._turns)

    async def _dial(self) -> None:
        transport = self._make_transport()
        await transport.open(*self._place)
        self._waiting = transport

    def reached(self, wanted: Durability, answer: Any) -> tuple[Reply, Reached | None]:
        """Return the script's answer for an append, and what was reached for it."""
        if type(answer) is not tuple:
            return answer, None  # an error
        reply, proofs = answer
        if type(reply) is ReplyError:
            return reply, None
        return reply, self._levels.reached(wanted, proofs)
