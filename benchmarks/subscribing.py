"""Subscriptions beside Redis Streams with a consumer group on redis-py, on one server in one run.

    python -m benchmarks.subscribing [--output build/bench-subscriptions.json] [--quick]

Streams are what people would use otherwise: one stream, with neither order per aggregate nor replay
of one aggregate. Both write to the same server; their entries have the same body, and say of which
aggregate and type they are. Both decode it, and ack each event, each batch of one aggregate, or as
many events of any as a consumer gets at once, which for a stream is the same. The sides take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
import redis.asyncio
import typer
from rich.console import Console
from rich.table import Table

import asyncstore
from asyncstore import ANY, NEW, Aggregate, Event, RecordedEvent, Store, embedded, scripts
from asyncstore.appends import Appender
from asyncstore.keys import Keys
from benchmarks import machine
from benchmarks.sides import BareWire, client_of

AGGREGATES, EVENTS = 7_500, 65_000
DATA = {"text": "x" * 180}
BATCH = 64
IDLE, IDLE_SECONDS = 10, 10.0
WAYS = {
    "event": "an ack each event",
    "handler": "@store.handler",
    "batch": "an ack each batch",
    "bundle": "an ack each bundle",
}
EACH = "event", "handler"  # ways in which a stream's consumer acks each event
DOMAIN, STREAM, GROUP = "bench", "bench-stream", "workers"

console = Console(highlight=False, width=120)

Figures = dict[str, list[float]]


class Quiet(Keys):
    """Keys without a channel: appends tell nobody."""

    def live(self, tag: str) -> str:
        """Return no channel."""
        return ""


# Delay from the append to the handler


async def delay_of_store(store: Store, count: int) -> list[float]:
    place, found = Aggregate("delay", uuid.uuid4()), []
    async with store.subscribe("delay", "delay") as sub:
        for _ in range(count):
            started = time.perf_counter()
            writing = asyncio.ensure_future(
                store.events.append(place, [Event("Benched", DATA)], expected=ANY)
            )
            delivery = await anext(sub)
            found.append(1e6 * (time.perf_counter() - started))
            await asyncio.gather(writing, delivery.ack())
    return found


async def delay_of_stream(client: redis.asyncio.Redis, count: int) -> list[float]:
    await client.delete(STREAM)
    await client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    found = []
    value = json.dumps(DATA)
    for _ in range(count):
        reading: Any = asyncio.ensure_future(
            client.xreadgroup(GROUP, "one", {STREAM: ">"}, count=1, block=10_000)
        )
        await asyncio.sleep(0.0005)  # until it waits on the server
        started = time.perf_counter()
        writing = asyncio.ensure_future(client.xadd(STREAM, {"data": value}))
        replies: Any = await reading
        found.append(1e6 * (time.perf_counter() - started))
        entry = replies[0][1][0][0]
        await asyncio.gather(writing, client.xack(STREAM, GROUP, entry))
    return found


# Catching up


async def fill(store: Store, client: redis.asyncio.Redis) -> None:
    counts = [EVENTS // AGGREGATES + (n < EVENTS % AGGREGATES) for n in range(AGGREGATES)]

    async def write(number: int) -> None:
        batch = [Event("Benched", DATA) for _ in range(counts[number])]
        await store.events.append(Aggregate(DOMAIN, f"{number}"), batch, expected=NEW)

    for first in range(0, AGGREGATES, 500):
        await asyncio.gather(*(write(n) for n in range(first, min(first + 500, AGGREGATES))))
    pipeline = client.pipeline(transaction=False)
    for number in range(EVENTS):
        pipeline.xadd(STREAM + "-full", _entry(number % AGGREGATES))
        if number % 1000 == 999:
            await pipeline.execute()
    await pipeline.execute()


def _entry(root: int) -> dict[Any, Any]:
    """Return what an event is in a stream."""
    return {
        "root": f"{root}",
        "type": "Benched",
        "id": uuid.uuid4().hex,
        "data": orjson.dumps(DATA),
    }


async def store_catches_up(store: Store, handlers: int, how: str) -> float:
    if how == "handler":
        return await handler_catches_up(store, handlers)
    done, seen = asyncio.Event(), 0

    async def work() -> None:
        nonlocal seen
        taken: Any = {"event": sub.__aiter__, "batch": sub.batches, "bundle": sub.bundles}[how]()
        async for some in taken:
            for event in some.events:
                assert event.data == DATA  # noqa: S101
            seen += len(some.events)
            await some.ack()
            if seen == EVENTS:
                done.set()

    started = time.perf_counter()
    async with store.subscribe(f"h{uuid.uuid4().hex}", DOMAIN, batch=BATCH) as sub:
        workers = [asyncio.ensure_future(work()) for _ in range(handlers)]
        await done.wait()
        elapsed = time.perf_counter() - started
    await asyncio.gather(*workers)
    return EVENTS / elapsed


async def handler_catches_up(store: Store, concurrency: int) -> float:
    """Return how many events a second a function of `store.handler` gets."""
    done, seen = asyncio.Event(), 0

    @store.handler(f"h{uuid.uuid4().hex}", DOMAIN, concurrency=concurrency, batch=BATCH)
    async def handle(event: RecordedEvent) -> None:
        nonlocal seen
        assert event.data == DATA  # noqa: S101
        seen += 1
        if seen == EVENTS:
            done.set()

    started = time.perf_counter()
    running = asyncio.create_task(store.run_handlers())
    await done.wait()
    elapsed = time.perf_counter() - started
    running.cancel()
    await asyncio.wait([running])
    store._handlers.clear()  # the next one has another name
    return EVENTS / elapsed


async def stream_catches_up(client: redis.asyncio.Redis, handlers: int, how: str) -> float:
    group = uuid.uuid4().hex
    await client.xgroup_create(STREAM + "-full", group, id="0")

    async def work(name: str) -> None:
        streams: Any = {STREAM + "-full": ">"}
        while found := await client.xreadgroup(group, name, streams, count=BATCH):
            pages: Any = found
            entries = [entry for _, page in pages for entry in page]
            for some in [[entry] for entry in entries] if how in EACH else [entries]:
                for _, fields in some:
                    assert orjson.loads(fields[b"data"]) == DATA  # noqa: S101
                await client.xack(STREAM + "-full", group, *(entry for entry, _ in some))

    started = time.perf_counter()
    await asyncio.gather(*(work(f"{n}") for n in range(handlers)))
    elapsed = time.perf_counter() - started
    await client.xgroup_destroy(STREAM + "-full", group)
    return EVENTS / elapsed


# What one handler that awaits each ack can't go beyond


async def bare_acks(url: str, count: int) -> float:
    """Return how many acks a second our script takes that are sent one by one, and nothing else."""
    loop = asyncio.get_running_loop()
    path = urlsplit(url).path
    transport, bare = await loop.create_unix_connection(BareWire, path)
    _, _, lease, _ = keys = [f"bare:{name}:{{x}}" for name in ("d", "p", "l", "e")]
    await bare.call(("DEL", *keys))
    await bare.call(("HSET", lease, "holder", "h", "until", 2**53))
    sha = await bare.call(("SCRIPT", "LOAD", scripts.ACK.source))
    started = time.perf_counter()
    for n in range(count):
        about = "x", "h", n, uuid.uuid4().hex, n + 1, ""
        reply = await bare.call(("EVALSHA", sha, 4, *keys, *about))
        assert reply == [b"ok"]  # noqa: S101
    elapsed = time.perf_counter() - started
    transport.close()
    return count / elapsed


async def lone_xacks(client: redis.asyncio.Redis, count: int) -> float:
    """Return how many XACKs a second redis-py takes that are sent one by one, and nothing else."""
    group = uuid.uuid4().hex
    await client.xgroup_create(STREAM + "-full", group, id="0")
    pages: Any = await client.xreadgroup(group, "one", {STREAM + "-full": ">"}, count=count)
    started = time.perf_counter()
    for entry, _ in pages[0][1]:
        await client.xack(STREAM + "-full", group, entry)
    elapsed = time.perf_counter() - started
    await client.xgroup_destroy(STREAM + "-full", group)
    return count / elapsed


async def lone_acks(url: str, client: redis.asyncio.Redis, rounds: int) -> dict[str, float]:
    """Return the rates of both."""
    rates: Figures = defaultdict(list)
    for _ in range(rounds):
        rates["our script, bare socket"].append(await bare_acks(url, 5_000))
        rates["XACK, redis-py"].append(await lone_xacks(client, 5_000))
    return {side: statistics.median(found) for side, found in rates.items()}


# What it costs to be there


async def append_cost(store: Store, rounds: int) -> dict[str, float]:
    """Return the times of appends that ring, in those of appends that tell nobody."""
    node = store._router.nodes()[0]
    loud, quiet = node.appender, Appender(node.transport, Quiet(store._keys.prefix))
    ratios: Figures = defaultdict(list)
    for number in range(rounds + 1):
        times: dict[tuple[bool, int], float] = {}
        for writers in (1, 128):
            sides = [True, False]
            random.shuffle(sides)
            for rings in sides:
                node.appender = loud if rings else quiet
                times[rings, writers] = await _time_of_appends(store, writers)
        if number:  # the first is for warming up
            for writers in (1, 128):
                ratios[f"{writers}"].append(times[True, writers] / times[False, writers])
    node.appender = loud
    return {writers: statistics.median(found) for writers, found in ratios.items()}


async def _time_of_appends(store: Store, writers: int) -> float:
    async def write() -> None:
        place = Aggregate("cost", uuid.uuid4())
        for sequence in range(3200 // writers if writers > 1 else 1000):
            await store.events.append(place, [Event("Benched", DATA)], expected=sequence)

    started = time.perf_counter()
    await asyncio.gather(*(write() for _ in range(writers)))
    return time.perf_counter() - started


async def idle_cost(store: Store, client: redis.asyncio.Redis, seconds: float) -> dict[str, float]:
    """Return what some idle subscriptions of one store cost: commands, CPU here and there."""
    subs = [store.subscribe(f"idle-{n}", DOMAIN, start=asyncstore.NOW) for n in range(IDLE)]
    for sub in subs:
        await sub.__aenter__()
    await asyncio.sleep(0.5)
    before, used = await client.info("all"), time.process_time()
    await asyncio.sleep(seconds)
    used, after = time.process_time() - used, await client.info("all")
    for sub in subs:
        await sub.__aexit__(None, None, None)
    server = sum(after[key] - before[key] for key in ("used_cpu_user", "used_cpu_sys"))
    commands = after["total_commands_processed"] - before["total_commands_processed"]
    return {
        "commands_per_second": commands / seconds,
        "client_cpu_percent": 100 * used / seconds,
        "server_cpu_percent": 100 * server / seconds,
    }


# All of it


async def measure(
    url: str, store: Store, client: redis.asyncio.Redis, rounds: int
) -> dict[str, Any]:
    results: dict[str, Any] = {"cost_on_append": await append_cost(store, 4 * rounds)}
    delays: Figures = defaultdict(list)
    for _ in range(rounds):
        delays["asyncstore"] += await delay_of_store(store, 500)
        delays["streams"] += await delay_of_stream(client, 500)
    results["delay_us"] = {
        side: {"p50": cuts[49], "p99": cuts[98]}
        for side, cuts in ((s, statistics.quantiles(d, n=100)) for s, d in delays.items())
    }
    await fill(store, client)
    results["lone_acks_per_second"] = await lone_acks(url, client, 2 * rounds)
    results["idle"] = await idle_cost(store, client, IDLE_SECONDS)
    return results


async def rates_of_catching_up(rounds: int) -> dict[str, dict[str, float]]:
    """Return how many events a second each side has caught up with, by how it was done.

    Each round has a server of its own, and another order: with each handler that has been there,
    the server gets slower.
    """
    ways = list(itertools.product((1, 8), WAYS))
    rates: dict[str, Figures] = {_name_of(*way): defaultdict(list) for way in ways}
    for _ in range(rounds):
        async with opened() as (_, store, client):
            await fill(store, client)
            for handlers, how in random.sample(ways, len(ways)):
                found = rates[_name_of(handlers, how)]
                sides: list[tuple[str, Callable[..., Awaitable[float]], Any]] = [
                    ("asyncstore", store_catches_up, store),
                    ("streams", stream_catches_up, client),
                ]
                random.shuffle(sides)
                for side, catch_up, through in sides:
                    found[side].append(await catch_up(through, handlers, how))
    return {
        name: {side: statistics.median(values) for side, values in found.items()}
        for name, found in rates.items()
    }


def _name_of(handlers: int, how: str) -> str:
    return f"{handlers} at once, {WAYS[how]}"


def show(results: dict[str, Any]) -> None:
    table = Table("", "asyncstore", "Streams, redis-py", "ratio", title="subscriptions")
    for cut in ("p50", "p99"):
        ours, theirs = (results["delay_us"][side][cut] for side in ("asyncstore", "streams"))
        table.add_row(f"append to handler, {cut}, µs", *_cells(ours, theirs))
    for name, sides in results["events_per_second"].items():
        table.add_row(f"catch-up, {name}, events/s", *_cells(sides["asyncstore"], sides["streams"]))
    console.print(table)
    for side, rate in results["lone_acks_per_second"].items():
        console.print(f"one ack after the other and nothing else, {side}: {rate:,.0f}/s")
    for writers, ratio in results["cost_on_append"].items():
        console.print(f"appends that ring, {writers} at once: {ratio:.3f} × the time without")
    idle = results["idle"]
    console.print(
        f"{IDLE} idle subscriptions: {idle['commands_per_second']:.1f} commands/s, "
        f"{idle['client_cpu_percent']:.2f} % of a core here, "
        f"{idle['server_cpu_percent']:.2f} % on the server"
    )


def _cells(ours: float, theirs: float) -> tuple[str, str, str]:
    return f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}"


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[str, Store, redis.asyncio.Redis]]:
    """Yield the URL of a new server, and what both sides have of it."""
    async with (
        embedded.running(None) as url,
        asyncstore.open(url, key_prefix="subscribing:") as store,
        client_of(url) as client,
    ):
        yield url, store, client


async def run(rounds: int) -> dict[str, Any]:
    rates = await rates_of_catching_up(rounds)
    async with opened() as (url, store, client):
        results = {"server": await machine.server(client)}
        results |= await measure(url, store, client, rounds)
    return results | {"events_per_second": rates}


def main(
    output: Annotated[Path, typer.Option(help="the JSON file to write")] = Path(
        "build/bench-subscriptions.json"
    ),
    quick: Annotated[bool, typer.Option(help="one round: only to see that it works")] = False,
) -> None:
    """Measure, print, save."""
    rounds = 1 if quick else 5
    results = machine.describe() | {"rounds": rounds} | asyncio.run(run(rounds))
    show(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
