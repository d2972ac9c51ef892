"""A connection that hears what is published on channels, and asks nothing else.

It speaks RESP2 and RESP3: messages come as lists in the one and as pushes in the other.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

import hiredis

from asyncstore.wire import ReplyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NOT_YET: Final = object()
_PING: Final = hiredis.pack_command(("PING",))


class Ear(asyncio.Protocol):
    """The protocol of one such connection; `on_message` gets what was published.

    `subscribed` is done when all channels are, with the error of the server if it refused one.
    `closed` is done when the connection is gone, with the reason.
    """

    def __init__(self, on_message: Callable[[bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        self.last_heard = loop.time()
        self.subscribed: asyncio.Future[ReplyError | None] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()
        self._loop = loop
        self._on_message = on_message
        self._missing: set[bytes] = set()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOT_YET, replyError=ReplyError)
        self._reason = "the server closed the connection"

    def take(self, writer: asyncio.StreamWriter, channels: Sequence[str]) -> None:
        """Take over a connection that was dialled, and ask for the channels of one slot."""
        self._writer = writer  # it closes its transport when nobody holds it
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)
        self._missing = {channel.encode() for channel in channels}
        # One command for each: those of different slots would be refused together.
        for channel in channels:
            self._transport.write(hiredis.pack_command(cast(Any, ("SSUBSCRIBE", channel))))

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self._transport is not None:
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
        except hiredis.HiredisError:
            self.abort("what answers there does not speak the protocol of Redis")

    def _hear(self, said: Any) -> None:
        if isinstance(said, ReplyError):
            if not self.subscribed.done():
                self.subscribed.set_result(said)
        elif isinstance(said, list) and len(said) == 3:
            kind, channel, what = said
            if kind == b"smessage":
                self._on_message(what)
            elif kind == b"ssubscribe":
                self._confirm(channel)
            elif kind == b"sunsubscribe":
                self.abort("its slot has moved to another server")

    def _confirm(self, channel: bytes) -> None:
        self._missing.discard(channel)
        if not self._missing and not self.subscribed.done():
            self.subscribed.set_result(None)

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
