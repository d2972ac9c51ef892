"""Nodes of a cluster of our own making, that answer what a test wants them to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import hiredis

from asyncstore import codec
from asyncstore.slots import COUNT

Answer = bytes | None
"""What a node says; None for nothing at all."""

_clients = itertools.count(1)


@dataclass(frozen=True)
class Range:
    """Slots that a node says to be at some address."""

    first: int
    last: int
    host: str | None
    port: int


@dataclass
class Call:
    """What a call of the store sent to a node: a script, or ZCARD for the next sequence."""

    node: FakeNode
    words: list[bytes]
    is_asking: bool  # the command right before it was ASKING
    _writer: asyncio.StreamWriter

    @property
    def mark(self) -> bytes:
        return self._argument(0)

    @property
    def appends(self) -> int:
        return int(self._argument(3))

    def _argument(self, place: int) -> bytes:
        return self.words[3 + int(self.words[2]) + place]

    def close(self) -> None:
        """Close the connection, behind what was answered."""
        self._writer.close()

    def answer(self, answer: bytes) -> None:
        """Answer late, when there was no answer."""
        self._writer.write(answer)

    def stored(self, sequence: int = 0) -> bytes:
        """Return the answer that all appends of the group are stored."""
        return b"*%d\r\n" % self.appends + b"*2\r\n$2\r\nok\r\n:%d\r\n" % sequence * self.appends

    def done(self) -> bytes:
        """Return what appends, or `next_sequence`, answer when all is well."""
        return b":7\r\n" if self.words[0] == b"ZCARD" else self.stored()


@dataclass
class FakeNode:
    """One node. `on_call` answers calls of the store; `view` and `epoch` are what it tells."""

    host: str = "127.0.0.1"
    port: int = 0
    view: list[Range] = field(default_factory=list)
    epoch: int = 1
    on_call: Callable[[Call], Answer] = Call.done
    policy: str = "noeviction"
    is_silent: bool = False  # takes connections, and answers nothing
    asked: Counter[str] = field(default_factory=Counter)
    words: list[list[bytes]] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis://{host}:{self.port}"

    @property
    def calls(self) -> int:
        return self.asked["EVALSHA"] + self.asked["EVAL"] + self.asked["ZCARD"]

    def has(self, first: int = 0, last: int = COUNT - 1) -> Range:
        return Range(first, last, self.host, self.port)

    def cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        self._writers.add(writer)
        try:
            with contextlib.suppress(ConnectionError):
                await self._answer_all(reader, writer)
        finally:
            self.open_connections -= 1
            self._writers.discard(writer)
            writer.close()

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser, is_asking, is_stuck = hiredis.Reader(), False, False
        while data := await reader.read(65536):
            parser.feed(data)
            while (words := parser.gets()) is not False:
                self.words.append(words)
                answer = None if self.is_silent else self._answer(words, is_asking, writer)
                is_asking = words == [b"ASKING"]
                is_stuck |= answer is None  # later answers would be taken for this one
                if answer is not None and not is_stuck:
                    writer.write(answer)
            await writer.drain()

    def _answer(self, words: list[bytes], is_asking: bool, writer: asyncio.StreamWriter) -> Answer:
        name = words[0].decode()
        self.asked[f"CLUSTER {words[1].decode()}" if name == "CLUSTER" else name] += 1
        if name in ("EVALSHA", "EVAL", "ZCARD"):
            return self.on_call(Call(self, words, is_asking, writer))
        if name == "CLUSTER":
            return self._of_cluster(words[1])
        return self._plain(name)

    def _plain(self, name: str) -> bytes:
        if name == "HELLO":
            return b"*2\r\n$2\r\nid\r\n:%d\r\n" % next(_clients)
        if name == "INFO":
            lines = "redis_version:7.2.4", "cluster_enabled:1", f"run_id:{id(self)}", "role:master"
            rest = "connected_slaves:1", "slave0:state=online", f"maxmemory_policy:{self.policy}"
            return _text("\r\n".join([*lines, *rest]))
        if name == "GET":
            return _text(codec.layout(by_slot=True).decode())
        return {"CLIENT": b":1\r\n", "WAIT": b":1\r\n", "CONFIG": b"*0\r\n"}.get(name, b"+OK\r\n")

    def _of_cluster(self, part: bytes) -> bytes:
        if part == b"SLOTS":
            return b"*%d\r\n" % len(self.view) + b"".join(map(_entry, self.view))
        if part == b"INFO":
            return _text(f"cluster_state:ok\r\ncluster_current_epoch:{self.epoch}\r\n")
        return _text("one-id 127.0.0.1:1@2 master")


def _text(text: str) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text.encode()), text.encode())


def _entry(span: Range) -> bytes:
    host = b"$-1\r\n" if span.host is None else _text(span.host)
    where = b"*2\r\n" + host + b":%d\r\n" % span.port
    return b"*3\r\n:%d\r\n:%d\r\n" % (span.first, span.last) + where


def moved(slot: int, place: str) -> bytes:
    return f"-MOVED {slot} {place}\r\n".encode()


def ask(slot: int, node: FakeNode) -> bytes:
    return f"-ASK {slot} {node.host}:{node.port}\r\n".encode()


@asynccontextmanager
async def fake_node(host: str = "127.0.0.1") -> AsyncIterator[FakeNode]:
    """Run a node at a free port; it has no slots until it is given a view."""
    node = FakeNode(host)
    server = await asyncio.start_server(node.serve, host, 0)
    node.port = server.sockets[0].getsockname()[1]
    try:
        yield node
    finally:
        server.close()
        node.cut()
        await server.wait_closed()


@asynccontextmanager
async def fake_cluster(nodes: int = 2) -> AsyncIterator[list[FakeNode]]:
    """Run nodes of which the first has all slots, as all of them say."""
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(fake_node()) for _ in range(nodes)]
        for node in found:
            node.view = [found[0].has()]
        yield found
