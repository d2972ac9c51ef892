"""A proxy in front of a server that does to connections what networks do, when a test says so.

    async with fault_proxy("redis://127.0.0.1:6379") as proxy, asyncstore.open(proxy.url) as store:
        proxy.replies.cut()                       # the next reply is lost, and its connection
        proxy.requests.cut(Cut.IN, having=b"EVALSHA")  # half of the next script call arrives
        proxy.replies.delay = 0.2                 # seconds that each reply takes
        proxy.requests.piece = 1                  # one byte at a time
        proxy.hold()                              # half-open: nothing comes through, until
        proxy.release()                           # it all arrives, late

A request or a reply is here what comes at once, up to 64 KiB: calls that leave together are one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from asyncstore.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from urllib.parse import SplitResult

_CHUNK: Final = 65536
_BREATH: Final = 32  # pieces that are sent before others have their turn
_PLAIN: Final = ("redis", "valkey", "unix")
_DEFAULT_PORT: Final = 6379


class Cut(Enum):
    """When a connection is cut, as seen from a request or a reply that is under way."""

    BEFORE = "nothing of it arrives"
    IN = "half of it arrives"
    AFTER = "all of it arrives"


class Way:
    """One direction of all connections: the requests, or the replies.

    `delay` is how many seconds each chunk takes, `piece` how many bytes are handed on at once (0:
    all), `change` what becomes of a chunk. They may be set at any time.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.piece = 0
        self.change: Callable[[bytes], bytes] = bytes
        self._open = asyncio.Event()
        self._open.set()
        self.mend()

    def cut(self, how: Cut = Cut.BEFORE, *, times: int | None = 1, having: bytes = b"") -> None:
        """Cut connections at the next `times` chunks (None: at all) that have these bytes."""
        self._next_how, self._having = how, having
        self._left = math.inf if times is None else times

    def cut_at_random(self, odds: float, how: Cut = Cut.BEFORE) -> None:
        """Cut connections at chunks that the proxy's dice choose."""
        self._odds, self._random_how = odds, how

    def mend(self) -> None:
        """Cut nothing any more."""
        self.cut(times=0)
        self.cut_at_random(0.0)

    def swallow(self) -> None:
        """Throw away what comes, and keep the connections: the other side seems silent."""
        self.change = _nothing

    def pass_on(self) -> None:
        """Hand on what comes, unchanged."""
        self.change = bytes

    def hold(self) -> None:
        """Let nothing through until `release`: what was sent lies on the way."""
        self._open.clear()

    def release(self) -> None:
        """Let everything through, also what was held."""
        self._open.set()

    async def _arrives(self, data: bytes) -> bytes:
        """Return what becomes of a chunk, when it has taken its time."""
        await self._open.wait()
        if self.delay:
            await asyncio.sleep(self.delay)
        return self.change(data)

    def _cut_at(self, data: bytes, dice: random.Random) -> Cut | None:
        if self._left > 0 and self._having in data:
            self._left -= 1
            return self._next_how
        return self._random_how if self._odds and dice.random() < self._odds else None


class FaultProxy:
    """What `fault_proxy` yields: connections from a port on loopback to a server.

    `url` is the proxy's, with the user, database and options of the server's; `port` is its port on
    127.0.0.1. `target` is where new connections lead. `cuts`, `connections` and `open_connections`
    count; `on_cut` is called when a connection is about to be cut. `dice` decide what is cut at
    random. While `is_deaf`, new connections are accepted, and nobody reads them.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.url = ""
        self.port = 0
        self.requests = Way()
        self.replies = Way()
        self.is_deaf = False
        self.dice = random.Random(0)  # noqa: S311 - the same in each run
        self.on_cut: Callable[[], object] = _nobody
        self.cuts = 0
        self.connections = 0
        self.open_connections = 0
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut_all(self) -> None:
        """Cut all connections now."""
        for end in list(self._ends):
            end.transport.abort()

    def switch(self, target: str) -> None:
        """Let the address lead to another server; connections to the old one are cut."""
        self.target = target
        self.cut_all()

    def hold(self) -> None:
        """Let nothing through in either direction, until `release`."""
        self.requests.hold()
        self.replies.hold()

    def release(self) -> None:
        """Let everything through, also what was held."""
        self.requests.release()
        self.replies.release()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a server calls this in a task
        self.connections += 1
        self._tasks.add(task)
        self._ends.add(writer)
        try:
            await self._hang_up_in_the_end(reader, writer)
        except OSError:  # nobody listens there now
            pass
        finally:
            self._drop(writer)
            self._tasks.discard(task)

    async def _hang_up_in_the_end(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.is_deaf:
            await reader.read()  # until the other side gives up
            return
        there, back = await _dial(self.target)
        self._ends.add(back)
        self.open_connections += 1
        try:
            await asyncio.gather(
                self._pump(self.requests, reader, back, writer),
                self._pump(self.replies, there, writer, back),
            )
        finally:
            self.open_connections -= 1
            self._drop(back)

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
                arriving = await way._arrives(data)
                cut = way._cut_at(data, self.dice)
                await _deliver(target, arriving[: _part(len(arriving), cut)], way.piece)
                if cut:
                    self.cuts += 1
                    self.on_cut()
                    break
        # What was written and not sent yet is for the kernel; then both ends are gone.
        for end in (target, other):
            end.close()

    async def _close(self) -> None:
        """Cut all connections, and wait until that is done."""
        self.release()
        while self._tasks:
            self.cut_all()
            await asyncio.wait(self._tasks, timeout=0.1)


@asynccontextmanager
async def fault_proxy(target: str) -> AsyncIterator[FaultProxy]:
    """Run a proxy at a free port on loopback, in front of the server that a URL names.

    The URL is one of `redis://`, `valkey://` and `unix://`. The proxy reads along, so there is none
    for TLS. For an embedded server it is the server's own URL, which `event_store_settings` has.
    """
    parts = urlsplit(target)
    if parts.scheme not in _PLAIN:
        why = f"a proxy is for {', '.join(f'{scheme}://' for scheme in _PLAIN)}"
        raise ConfigurationError("target", f"{why}, not {parts.scheme}://")
    proxy = FaultProxy(target)
    server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
    _, proxy.port = server.sockets[0].getsockname()
    proxy.url = _through(parts, proxy.port)
    try:
        yield proxy
    finally:
        server.close()
        await proxy._close()
        await server.wait_closed()


async def _dial(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(target)
    if parts.scheme == "unix":
        return await asyncio.open_unix_connection(parts.path)
    return await asyncio.open_connection(parts.hostname, parts.port or _DEFAULT_PORT)


def _through(parts: SplitResult, port: int) -> str:
    """Return the URL of a server with the proxy's address in the place of its own."""
    user, at, _ = parts.netloc.rpartition("@")
    place = parts._replace(scheme="redis", netloc=f"{user}{at}127.0.0.1:{port}")
    return (place._replace(path="") if parts.scheme == "unix" else place).geturl()


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


def _nothing(_: bytes) -> bytes:
    return b""


def _nobody() -> None:
    return None
