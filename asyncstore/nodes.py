"""One server as the store sees it: its connections, what it can give, and how appends get to it.

Appends of `MEMORY` and `FSYNC` share the server's connection with all else. A wait for replicas
keeps its connection waiting, so those appends have one of their own, a lane, made when the first of
them comes. On a cluster that is read from replicas, each of them has a connection, too.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asyncstore.appends import Appender, HeldAppender, Turns
from asyncstore.durability import Levels
from asyncstore.errors import StoreUnavailable
from asyncstore.transport import Transport
from asyncstore.values import Durability
from asyncstore.wire import ReplyError, Shipment

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncstore.durability import Reached
    from asyncstore.keys import Keys
    from asyncstore.observing import Tally
    from asyncstore.transport import Bounds, Detour
    from asyncstore.wire import Reply, Request

_SHARE_OF_TIMEOUT: Final = 0.8  # of a call's time, for a wait; the rest is for the way


class Lane(Enum):
    """Which of a node's connections a request travels on."""

    SHARED = "shared by all that waits for nothing"
    WAITING = "kept waiting for replicas"
    READING = "of a replica that is read from"


@dataclass(frozen=True, slots=True)
class Ways:
    """How the servers of a store are used: see Settings."""

    bounds: Bounds
    keys: Keys
    tally: Tally
    always: bool  # the operator's word that they have `appendfsync always`
    is_own: bool = False  # an embedded server that is to sync each write
    max_replica_lag: int | None = None  # of a replica that is read from, in bytes; None: none is


class Node:
    """A server. `url` is dialled, `where` is shown; `detours` makes the ways around it."""

    def __init__(
        self,
        url: str,
        where: str,
        ways: Ways,
        detours: Callable[[Lane], Detour] | None = None,
    ) -> None:
        self.url = url
        self.where = where
        self._ways = ways
        self._detours = detours
        self.transport = self._make_transport(Lane.SHARED)
        self.appender = Appender(self.transport, ways.keys)
        self._levels = Levels(self.transport, where, always=ways.always, is_own=ways.is_own)
        self._waiting: Transport | None = None
        self.is_left = False  # it is no node of use any more
        self._turns = Turns()
        self._appenders: dict[Durability, Appender] = {Durability.MEMORY: self.appender}

    async def aclose(self) -> None:
        """Close its connections; calls in flight fail."""
        await self._levels.aclose()
        if self._waiting is not None:
            await self._waiting.aclose()
        await self.transport.aclose()

    def leave(self) -> None:
        """Give the server up: it is no node of use any more."""
        self.is_left = True
        if self._waiting is not None:
            self._waiting.leave()
        self.transport.leave()

    def is_at_work(self) -> bool:
        """Whether it is connected, with requests under way."""
        lanes = (self.transport, self._waiting)
        return any(lane is not None and lane.is_at_work() for lane in lanes)

    def in_flight(self) -> int:
        """Return how many callers wait for its answers."""
        lanes = (self.transport, self._waiting)
        return sum(lane.in_flight() for lane in lanes if lane is not None)

    def send(self, request: Request, lane: Lane) -> None:
        """Send a request that was on its way to another node."""
        if lane is not Lane.WAITING or not isinstance(request, Shipment):
            self.transport.send(request)
            return
        transport, shipment = self._waiting_transport(), request

        def depart() -> asyncio.Future[None]:
            shipment.pack()  # its proofs have less time now
            transport.send(shipment)
            return shipment.over

        self._turns.ask(depart, transport.loop())

    def ready(self, wanted: Durability) -> Appender | None:
        """Return what sends appends of a level, or None if `made_ready` has to see to it first.

        Raises `DurabilityUnavailable`.
        """
        if wanted is not Durability.MEMORY and not self._levels.knows(wanted):
            return None
        return self._appenders.get(wanted)

    async def made_ready(self, wanted: Durability, deadline: float) -> Appender:
        """Return what sends appends of a level.

        Raises `DurabilityUnavailable`, or `StoreUnavailable` after the deadline, by the clock of
        the event loop.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._levels.ensure(wanted)
        except TimeoutError:
            why = f"no answer in {self._ways.bounds.timeout} s; nothing was changed"
            raise StoreUnavailable(self.where, why) from None
        if wanted not in self._appenders:
            self._appenders[wanted] = self._make_appender(wanted)
        return self._appenders[wanted]

    async def ensure(self, wanted: Durability) -> None:
        """Raise `DurabilityUnavailable` if the server can't give the level now."""
        await self._levels.ensure(wanted)

    def reached(self, wanted: Durability, answer: Any) -> tuple[Reply, Reached | None]:
        """Return the script's answer for an append, and what was reached for it."""
        if type(answer) is not tuple:
            return answer, None  # nothing was to be proven
        reply, proofs = answer
        if type(reply) is ReplyError:
            return reply, None
        return reply, self._levels.reached(wanted, proofs)

    def _make_appender(self, wanted: Durability) -> Appender:
        patience = _SHARE_OF_TIMEOUT * self._ways.bounds.timeout
        proofs = partial(self._levels.proofs, wanted, patience)
        if not wanted.on_replicas:
            return Appender(self.transport, self._ways.keys, proofs)
        lane = self._waiting_transport()
        return HeldAppender(lane, self._ways.keys, proofs, turns=self._turns)

    def _waiting_transport(self) -> Transport:
        if self._waiting is None:
            self.transport.loop()  # or it is closed
            self._waiting = self._make_transport(Lane.WAITING)
            self._waiting.start()
            if self.is_left:
                self._waiting.leave()  # what comes here yet goes on
        return self._waiting

    def _make_transport(self, lane: Lane) -> Transport:
        detour = self._detours(lane) if self._detours is not None else None
        ways = self._ways
        return Transport(self.url, self.where, ways.bounds, detour=detour, tally=ways.tally)
