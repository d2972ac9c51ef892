"""A connection that hears what is published on channels, and asks nothing else.

It speaks RESP2 and RESP3: messages come as lists in the one and as pushes in the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import hiredis

from asyncstore.wire import ReplyError

if TYPE_CHECKING:
    from collections.abc import Iterable

_NOT_YET: Final = object()
_PING: Final = hiredis.pack_command(("PING",))
_A_PING: Final = ""  # stands for one where others are channels


class Hearer(Protocol):
    """Whoever has an ear. All calls must return at once."""

    def heard(self, message: bytes) -> None:
        """Take what was published."""

    def gained(self, channel: str) -> None:
        """Take notice that a channel is heard from now on."""

    def lost(self, channel: str) -> None:
        """Take notice that a channel is not heard any more: its slot has moved."""

    def refused(self, channel: str, error: ReplyError) -> None:
        """Take notice that a channel can't be heard here."""

    def drained(self) -> None:
        """Take notice that all that came so far was handed over."""


class Ear(asyncio.Protocol):
    """The protocol of one such connection. `closed` is done when it is gone, with the reason."""

    def __init__(self, hearer: Hearer) -> None:
        loop = asyncio.get_running_loop()
        self.last_heard = loop.time()
        self.closed: asyncio.Future[str] = loop.create_future()
        self._loop = loop
        self._hearer = hearer
        self._asked: deque[str] = deque()  # channels, and pings, in the order of the answers
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOT_YET, replyError=ReplyError)
        self._reason = "the server closed the connection"

    def take(self, writer: asyncio.StreamWriter) -> None:
        """Take over a connection that was dialled."""
        self._writer = writer  # it closes its transport when nobody holds it
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)

    def listen(self, channels: Iterable[str]) -> None:
        """Ask for channels; each is gained or refused."""
        asked = list(channels)
        if self._transport is None or not asked:
            return
        self._asked.extend(asked)
        # One command for each: those of different slots would be refused together.
        commands = [hiredis.pack_command(cast(Any, ("SSUBSCRIBE", name))) for name in asked]
        self._transport.write(b"".join(commands))

    def is_waiting(self) -> bool:
        """Whether some channels were asked for that are neither gained nor refused yet."""
        return any(self._asked)

    def ping(self) -> None:
        """Ask for a sign of life: any answer is one, also that it loads its data or has no disk."""
        if self._transport is not None:
            self._asked.append(_A_PING)
            self._transport.write(_PING)

    def abort(self, reason: str) -> None:
        """Give the connection up."""
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # The transport's calls

    def data_received(self, data: bytes) -> None:
        """Hand over messages, and note what else is said."""
        self.last_heard = self._loop.time()
        self._reader.feed(data)
        try:
            while (said := self._reader.gets()) is not _NOT_YET:
                self._hear(said)
        except (hiredis.HiredisError, IndexError):
            self.abort("what answers there does not speak the protocol of Redis")
        self._hearer.drained()

    def _hear(self, said: Any) -> None:
        if isinstance(said, ReplyError):
            channel = self._asked.popleft()
            if channel != _A_PING:
                self._hearer.refused(channel, said)
        elif _is_pong(said):
            self._asked.popleft()
        elif isinstance(said, list) and len(said) == 3:
            kind, channel, what = said
            if kind == b"smessage":
                self._hearer.heard(what)
            elif kind == b"ssubscribe":
                self._asked.popleft()
                self._hearer.gained(channel.decode())
            elif kind == b"sunsubscribe":
                self._hearer.lost(channel.decode())

    def eof_received(self) -> bool:
        """Close: the server has said its last."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that it is over."""
        self._transport = None
        if exc is not None:
            self._reason = f"the connection broke ({type(exc).__name__})"
        if not self.closed.done():
            self.closed.set_result(self._reason)


def _is_pong(said: Any) -> bool:
    """Whether it answers a ping: in RESP2, once something is heard, in the form of a message."""
    return said == b"PONG" or (isinstance(said, list) and said[:1] == [b"pong"])
