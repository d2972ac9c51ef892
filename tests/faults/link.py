"""A TCP link to a server that can be slow, silent, half-open, chopped into bytes, cut or moved."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

_CHUNK = 65536
_BREATH = 32  # pieces that are sent before others have their turn


class Cut(Enum):
    """When the connection is cut, as seen from a request or a reply that is under way."""

    BEFORE = "nothing of it arrives"
    IN = "half of it arrives"
    AFTER = "all of it arrives"


@dataclass
class Way:
    """One direction of the link."""

    delay: float = 0.0  # seconds that each chunk takes
    piece: int = 0  # bytes that are handed on at once; 0 for all
    cut: Cut | None = None  # how it is cut, if the dice say so
    is_open: asyncio.Event = field(default_factory=asyncio.Event)  # else it holds what comes

    def __post_init__(self) -> None:
        self.is_open.set()


class Link:
    """Connections from a port on loopback to the unix socket `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.requests = Way()
        self.replies = Way()
        self.odds = 0.3  # of a chunk to be the one at which a connection is cut
        self.dice = random.Random(0)
        self.cuts = 0
        self.chunks = 0
        self.port = 0
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def switch(self, target: Path) -> None:
        """Let the address lead to another server; connections to the old one are cut."""
        self.target = target
        self.cut_all()

    def cut_all(self) -> None:
        for end in list(self._ends):
            end.transport.abort()

    def hold(self, *ways: Way) -> None:
        """Let nothing through until `release`: what was sent lies on the way, and nobody knows."""
        for way in ways:
            way.is_open.clear()

    def release(self) -> None:
        for way in (self.requests, self.replies):
            way.is_open.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._ends.add(writer)
        try:
            await self._connect(reader, writer)
        except OSError:
            self._drop(writer)  # nobody listens there now
        finally:
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self.target)
        self._ends.add(back)
        try:
            await asyncio.gather(
                self._pump(self.requests, reader, back, writer),
                self._pump(self.replies, there, writer, back),
            )
        finally:
            for end in (writer, back):
                self._drop(end)

    def _drop(self, end: asyncio.StreamWriter) -> None:
        self._ends.discard(end)
        end.transport.abort()

    async def _pump(
        self,
        way: Way,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        other: asyncio.StreamWriter,
    ) -> None:
        """Hand on what comes, as the way is; at the end, or when it is cut, both ends close."""
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                self.chunks += 1
                await way.is_open.wait()
                if way.delay:
                    await asyncio.sleep(way.delay)
                cut = way.cut if way.cut and self.dice.random() < self.odds else None
                await _deliver(target, data[: _part(len(data), cut)], way.piece)
                if cut:
                    self.cuts += 1
                    break
        # What was written and not sent yet is for the kernel; then both ends are gone.
        for end in (target, other):
            end.close()

    async def close(self) -> None:
        """Cut all connections, and wait until that is done."""
        self.release()
        while self._tasks:
            self.cut_all()
            await asyncio.wait(self._tasks, timeout=0.1)


def _part(size: int, cut: Cut | None) -> int:
    """Return how many bytes get through."""
    return {None: size, Cut.AFTER: size, Cut.IN: size // 2, Cut.BEFORE: 0}[cut]


async def _deliver(target: asyncio.StreamWriter, data: bytes, piece: int) -> None:
    step = piece or len(data) or 1
    for number, first in enumerate(range(0, len(data), step)):
        target.write(data[first : first + step])
        await target.drain()
        if number % _BREATH == _BREATH - 1:
            await asyncio.sleep(0)


@asynccontextmanager
async def link_to(target: Path) -> AsyncIterator[Link]:
    """Run a link on loopback, at a free port."""
    link = Link(target)
    server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    _, link.port = server.sockets[0].getsockname()
    try:
        yield link
    finally:
        server.close()
        await link.close()
        await server.wait_closed()
