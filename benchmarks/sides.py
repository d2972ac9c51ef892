"""The sides of a comparison: the store, and other ways to the same script or history.

What a side sends is prepared before the clock starts. So the store's figures have all that `append`
does - checks, encoding, keys, answers - and the others' only what it takes to send the same script
call and get its reply.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import coredis
import glide
import hiredis
import orjson
import redis.asyncio

from asyncstore import Aggregate, Event, Store, codec, scripts
from asyncstore.keys import Keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEYS = Keys("bench:")
MOST_CONNECTIONS = 600
PLAIN_PREFIX = "plain:"


@dataclass(frozen=True)
class Workload:
    """Events of `body` bytes, `events` an append, to aggregates of `length` events."""

    body: int = 200
    events: int = 1
    length: int = 100

    def data(self) -> dict[str, str]:
        """Return data that have `body` bytes as JSON."""
        return {"text": "x" * (self.body - len('{"text":""}'))}


@dataclass(frozen=True, slots=True)
class Append:
    """One append to be made."""

    aggregate: Aggregate
    events: list[Event]
    expected: int


@dataclass
class Writer:
    """Makes one writer's appends, one aggregate after the other."""

    workload: Workload
    aggregate: Aggregate = field(default_factory=lambda: fresh())
    next: int = 0

    def appends(self, count: int) -> list[Append]:
        """Return the next appends."""
        made = []
        for _ in range(count):
            if self.next >= self.workload.length:
                self.aggregate, self.next = fresh(), 0
            events = [Event("Benched", self.workload.data()) for _ in range(self.workload.events)]
            made.append(Append(self.aggregate, events, self.next))
            self.next += self.workload.events
        return made


def fresh() -> Aggregate:
    return Aggregate("bench", uuid.uuid4())


class Side(ABC):
    """One way to append."""

    name: str

    @abstractmethod
    def prepare(self, append: Append) -> Any:
        """Return what `append` takes; not timed."""

    @abstractmethod
    async def append(self, prepared: Any) -> Any:
        """Make one append."""

    def stored(self, reply: Any) -> bool:
        """Whether the reply of `append` says that it was stored."""
        return type(reply) is list and reply[0][0] == b"ok"

    async def run(self, work: Sequence[Sequence[Any]]) -> tuple[list[float], float]:
        """Run one writer for each list, all at once; return latencies and the time of all."""
        latencies: list[float] = []
        replies: list[Any] = []

        async def write(prepared: Sequence[Any]) -> None:
            for item in prepared:
                started = time.perf_counter()
                reply = await self.append(item)
                latencies.append(time.perf_counter() - started)
                replies.append(reply)

        started = time.perf_counter()
        await asyncio.gather(*(write(prepared) for prepared in work))
        elapsed = time.perf_counter() - started
        self.check(replies)
        return latencies, elapsed

    def check(self, replies: Sequence[Any]) -> None:
        """Raise where a reply does not say that its append was stored."""
        if not all(self.stored(reply) for reply in replies):
            raise RuntimeError(f"{self.name}: an append was not stored")


class AsyncStore(Side):
    """The store itself."""

    name = "asyncstore"

    def __init__(self, store: Store) -> None:
        self.store = store

    def prepare(self, append: Append) -> Append:
        return append

    async def append(self, prepared: Append) -> Any:
        return await self.store.events.append(
            prepared.aggregate, prepared.events, expected=prepared.expected
        )

    def stored(self, reply: Any) -> bool:
        return not reply.duplicate


Traces = Callable[[int], dict[str, Any]]
"""From the number of an append to the keywords of it that say where it comes from."""


class Traced(AsyncStore):
    """The store, with appends that say where they come from."""

    def __init__(self, store: Store, name: str, traces: Traces) -> None:
        super().__init__(store)
        self.name = name
        self._traces = traces
        self._number = itertools.count()

    async def append(self, prepared: Append) -> Any:
        return await self.store.events.append(
            prepared.aggregate,
            prepared.events,
            expected=prepared.expected,
            **self._traces(next(self._number)),
        )


Call = tuple[Sequence[str], Sequence[str | bytes]]
"""Keys and arguments of the append script."""


def script_call(append: Append, names: Keys = KEYS, *, anywhere: bool = False) -> Call:
    """Return the call of the store's own append script for one append.

    `anywhere`: wherever the aggregate ends, whatever the append expects.
    """
    aggregate = append.aggregate
    tag = names.tag_of(aggregate.root)
    keys = (names.commits(tag), *names.indexes_of(aggregate), names.events(aggregate))
    members = [part for event in append.events for part in codec.encode_event(event)]
    place = "" if anywhere else str(append.expected)
    about = (aggregate.root, place, str(len(append.events)), "")
    head = ("", aggregate.domain, aggregate.edition, "1", names.live(tag))
    return keys, (*head, *about, *members)


def evalsha(append: Append) -> tuple[str | bytes, ...]:
    """Return the same as one command."""
    keys, arguments = script_call(append)
    return ("EVALSHA", scripts.APPEND.sha, str(len(keys)), *keys, *arguments)


class ScriptSide(Side):
    """A side that sends the store's own append script, one call an append."""

    def prepare(self, append: Append) -> Any:
        return script_call(append)


class RedisPy(ScriptSide):
    """redis-py's `evalsha`, with a pool that is large enough."""

    name = "redis-py evalsha"

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client: Any = client

    async def append(self, prepared: Any) -> Any:
        keys, arguments = prepared
        return await self.client.evalsha(scripts.APPEND.sha, len(keys), *keys, *arguments)


class RedisPyPipelines(RedisPy):
    """redis-py's pipelines: one carries what the writers have to say, and they all wait for it."""

    name = "redis-py pipelines"

    async def run(self, work: Sequence[Sequence[Any]]) -> tuple[list[float], float]:
        latencies: list[float] = []
        replies: list[Any] = []
        begun = time.perf_counter()
        for turn in zip(*work, strict=True):
            started = time.perf_counter()
            pipeline = self.client.pipeline(transaction=False)
            for keys, arguments in turn:
                pipeline.evalsha(scripts.APPEND.sha, len(keys), *keys, *arguments)
            replies += await pipeline.execute()
            latencies += [time.perf_counter() - started] * len(turn)
        elapsed = time.perf_counter() - begun
        self.check(replies)
        return latencies, elapsed


class Coredis(ScriptSide):
    """coredis, with a pool that is large enough."""

    name = "coredis"

    def __init__(self, client: Any) -> None:
        self.client = client

    async def append(self, prepared: Any) -> Any:
        keys, arguments = prepared
        return await self.client.evalsha(scripts.APPEND.sha, keys, arguments)


class Glide(ScriptSide):
    """valkey-glide, which knows TCP only."""

    name = "valkey-glide (TCP)"

    def __init__(self, client: Any) -> None:
        self.client = client

    def prepare(self, append: Append) -> Any:
        return list(evalsha(append))

    async def append(self, prepared: Any) -> Any:
        return await self.client.custom_command(prepared)


class Bare(ScriptSide):
    """The floor: hiredis on a bare socket, a write for each call."""

    name = "bare socket"

    def __init__(self, wire: BareWire) -> None:
        self.wire = wire

    def prepare(self, append: Append) -> Any:
        return evalsha(append)

    async def append(self, prepared: Any) -> Any:
        return await self.wire.call(prepared)


class BarePipelined(Bare):
    """The same, with the calls of one turn of the event loop in one write."""

    name = "bare, auto-pipelined"

    async def append(self, prepared: Any) -> Any:
        return await self.wire.call_with_others(prepared)


class BareWire(asyncio.Protocol):
    """The least that can carry calls and match replies."""

    def __init__(self) -> None:
        self.reader = hiredis.Reader()
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.outbox: list[bytes] = []
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            self.waiting.popleft().set_result(reply)

    def call(self, command: tuple[Any, ...]) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        self.waiting.append(future)
        self.transport.write(hiredis.pack_command(command))
        return future

    def call_with_others(self, command: tuple[Any, ...]) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        self.waiting.append(future)
        if not self.outbox:
            self.loop.call_soon(self.flush)
        self.outbox.append(hiredis.pack_command(command))
        return future

    def flush(self) -> None:
        self.transport.write(b"".join(self.outbox))
        self.outbox = []


class Plain(Side):
    """What people write today: an append in separate commands, checked before and not atomic."""

    name = "separate commands"

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client: Any = client

    def prepare(self, append: Append) -> tuple[Aggregate, int, dict[bytes, int]]:
        members = {
            orjson.dumps(
                {"sequence": place, "id": event.id, "type": event.type, "data": event.data}
            ): place
            for place, event in enumerate(append.events, append.expected)
        }
        return append.aggregate, append.expected, members

    async def append(self, prepared: Any) -> Any:
        (aggregate, expected, members), client = prepared, self.client
        key = f"{PLAIN_PREFIX}{aggregate.domain}:{aggregate.root}"
        last = await client.zrange(key, 0, 0, desc=True, withscores=True)
        sequence = int(last[0][1]) + 1 if last else 0
        if sequence != expected:
            return 0
        await client.zadd(key, members)
        await client.sadd(f"{PLAIN_PREFIX}roots:{aggregate.domain}", aggregate.root)
        return await client.sadd(f"{PLAIN_PREFIX}domains", aggregate.domain) + 1

    def stored(self, reply: Any) -> bool:
        return bool(reply)


@asynccontextmanager
async def all_sides(url: str, store: Store) -> AsyncIterator[list[Side]]:
    """Connect every side to the server of the store, whose key prefix is that of KEYS."""
    path = url.removeprefix("unix://").partition("?")[0]
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_of(url))
        await client.script_load(scripts.APPEND.source)
        other = coredis.Redis(unix_socket_path=path, max_connections=MOST_CONNECTIONS)
        yield [
            AsyncStore(store),
            RedisPy(client),
            RedisPyPipelines(client),
            Coredis(await stack.enter_async_context(other)),
            Glide(await stack.enter_async_context(_glide(client))),
            Bare(await stack.enter_async_context(_wire(path))),
            BarePipelined(await stack.enter_async_context(_wire(path))),
            Plain(client),
        ]


def client_of(url: str) -> redis.asyncio.Redis:
    """Return a redis-py client as it comes, but for the size of its pool."""
    pool = redis.asyncio.ConnectionPool.from_url(url, max_connections=MOST_CONNECTIONS)
    return redis.asyncio.Redis.from_pool(pool)


@asynccontextmanager
async def _wire(path: str) -> AsyncIterator[BareWire]:
    _, wire = await asyncio.get_running_loop().create_unix_connection(BareWire, path)
    try:
        yield wire
    finally:
        wire.transport.abort()


@asynccontextmanager
async def _glide(client: redis.asyncio.Redis) -> AsyncIterator[Any]:
    """Have the server listen on a loopback port too, and connect there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    await client.config_set("bind", "127.0.0.1")
    await client.config_set("port", port)
    address = glide.NodeAddress("127.0.0.1", port)
    connection = await glide.GlideClient.create(glide.GlideClientConfiguration([address]))
    try:
        yield connection
    finally:
        await connection.close()
