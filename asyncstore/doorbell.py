"""Hears that something was appended: one connection for all who listen in a store.

What is heard may be incomplete, as the server tells nobody again what was said while the connection
was gone. So every member is told when that may have happened, and must look for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio

from asyncstore.errors import AsyncStoreError, StoreClosed, StoreUnavailable
from asyncstore.pubsub import Ear

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 0.01  # seconds between two dials; doubled each time
_LONGEST_PAUSE: Final = 1.0
_HEARTBEAT: Final = 5.0  # seconds between two pings, at most


@dataclass(frozen=True, slots=True)
class Change:
    """An append: to which root, from which sequence on, how many events."""

    root: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Ring:
    """Appends to a domain and edition that were stored together."""

    domain: str
    edition: str
    lines: str

    @classmethod
    def of(cls, message: bytes) -> Ring:
        """Return what ring.lua has said; ValueError for anything else."""
        domain, edition, lines = message.decode().split("\n", 2)
        return cls(domain, edition, lines)

    def changes(self) -> list[Change]:
        """Return the appends: decoded only for those whom the ring is for."""
        parts = [line.split(" ", 2) for line in self.lines.split("\n")]
        return [Change(root, int(first), int(count)) for first, count, root in parts]


class Member(Protocol):
    """Whoever listens. Both calls must return at once."""

    def heard(self, ring: Ring) -> None:
        """Take notice of appends."""

    def missed(self) -> None:
        """Take notice that the connection was gone for a while, and is there again."""


class Doorbell:
    """The connection, as long as it has members: dialled again whenever it breaks.

    `dial` returns a connection to the server that has the channels. Nothing is open before the
    first member joins, or after the last has left.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[asyncio.StreamWriter]],
        refused: Callable[[str, str], AsyncStoreError],
        channels: Sequence[str],
        timeout: float,
    ) -> None:
        self._dial = dial
        self._refused = refused
        self._channels = channels
        self._timeout = timeout
        self._members: list[Member] = []
        self._keeper: asyncio.Task[None] | None = None
        self._is_closed = False
        self._connected = asyncio.Event()
        self._attempted = asyncio.Event()  # since the last time that it was cleared
        self._trouble: AsyncStoreError | None = None

    async def join(self, member: Member) -> None:
        """Let a member hear all that is appended from now on.

        Raises `StoreUnavailable` and what else a first connection may raise; then it has not
        joined.
        """
        if self._is_closed:
            raise StoreClosed("the store was closed")
        self.enlist(member)
        try:
            while not self._connected.is_set():
                self._attempted.clear()
                await self._attempted.wait()
                if self._trouble is not None:
                    raise self._trouble
        except BaseException:
            await self.leave(member)
            raise

    def enlist(self, member: Member) -> None:
        """Let a member hear what can be heard, without waiting for it: it is told when it can."""
        self._members.append(member)
        if self._keeper is None and not self._is_closed:
            self._keeper = asyncio.ensure_future(self._keep())

    async def leave(self, member: Member) -> None:
        """Let a member hear nothing more."""
        if member in self._members:
            self._members.remove(member)
        if not self._members:
            await self._hang_up()

    async def aclose(self) -> None:
        """Hang up for good."""
        self._is_closed = True
        await self._hang_up()

    async def _hang_up(self) -> None:
        keeper, self._keeper = self._keeper, None
        self._connected.clear()
        if keeper is not None:
            keeper.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([keeper])

    # The keeper's task

    async def _keep(self) -> None:
        """Keep a connection, with pauses between dials that grow until one has worked."""
        pause, was_there = 0.0, False
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            try:
                async with contextlib.AsyncExitStack() as stack:
                    ear = await self._connect(stack)
                    self._is_there(was_there)
                    pause, was_there = 0.0, True
                    await self._listen(ear)
            except AsyncStoreError as error:
                self._is_away(error)

    async def _connect(self, stack: contextlib.AsyncExitStack) -> Ear:
        ear = Ear(self._hear)
        try:
            async with asyncio.timeout(self._timeout):
                ear.take(await self._dial(), self._channels)
                stack.push_async_callback(_end, ear)
                ends: list[asyncio.Future[Any]] = [ear.subscribed, ear.closed]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StoreUnavailable("the doorbell", "it did not answer in time") from None
        if not ear.subscribed.done():
            raise StoreUnavailable("the doorbell", ear.closed.result())
        refusal = ear.subscribed.result()
        if refusal is not None:
            raise self._refused("ssubscribe", refusal.code)
        return ear

    async def _listen(self, ear: Ear) -> None:
        """Stay until the connection is gone, or has been silent through a whole heartbeat."""
        loop = asyncio.get_running_loop()
        heartbeat = min(_HEARTBEAT, self._timeout)
        while True:
            pinged = loop.time()
            ear.ping()
            await asyncio.wait([ear.closed], timeout=heartbeat)
            if ear.closed.done():
                raise StoreUnavailable("the doorbell", ear.closed.result())
            if ear.last_heard < pinged:
                raise StoreUnavailable("the doorbell", "it has gone silent")

    def _is_there(self, was_there: bool) -> None:
        self._trouble = None
        self._connected.set()
        self._attempted.set()
        if was_there:
            _log.info("the doorbell is connected again")
            for member in list(self._members):
                member.missed()

    def _is_away(self, error: AsyncStoreError) -> None:
        if self._connected.is_set() or self._trouble is None:
            _log.warning("appends are not heard for now: %s", error)
        self._trouble = error
        self._connected.clear()
        self._attempted.set()

    def _hear(self, message: bytes) -> None:
        try:
            ring = Ring.of(message)
            for member in list(self._members):
                member.heard(ring)
        except ValueError:  # InvalidName is one
            _log.warning("something else than asyncstore publishes on %s", self._channels[0])


async def _end(ear: Ear) -> None:
    ear.abort("it is not needed any more")
    with anyio.CancelScope(shield=True):
        await asyncio.wait([ear.closed])
