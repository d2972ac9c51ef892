"""Measure the store on clusters, beside redis-py's cluster client and the store on one server.

    python -m benchmarks.clusters [--output build/clusters.json] [--quick]

The nodes share the machine, so more of them do not append more. What must not grow with them is
what an append costs: round trips, connections, CPU time.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import redis.asyncio
import typer
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from rich.console import Console
from rich.progress import Progress

import asyncstore
from asyncstore import embedded, embedded_cluster, scripts, slots
from asyncstore.keys import Keys
from asyncstore.slots import slot_of_tag
from benchmarks import machine
from benchmarks.bench import MANY, ONE_AT_A_TIME, OURS, SEED, Bench, Budget
from benchmarks.sides import (
    KEYS,
    MOST_CONNECTIONS,
    Append,
    AsyncStore,
    BareWire,
    Side,
    Workload,
    script_call,
)
from tests.servers import redis_server

CLUSTER_KEYS = Keys(KEYS.prefix, by_slot=True)
PRIMARIES = (3, 6, 9)
ONE_SERVER, REDIS_CLUSTER = "asyncstore, one server", "redis-py RedisCluster.evalsha"
BARE = "bare sockets, auto-pipelined"

console = Console(highlight=False, width=150)


class OneServer(AsyncStore):
    """The store on one server, over TCP as the nodes of the cluster."""

    name = ONE_SERVER


class RedisCluster(Side):
    """redis-py's cluster client, with the same script call."""

    name = REDIS_CLUSTER

    def __init__(self, client: redis.asyncio.RedisCluster) -> None:
        self._client: Any = client

    def prepare(self, append: Append) -> Any:
        return script_call(append, CLUSTER_KEYS)

    async def append(self, prepared: Any) -> Any:
        keys, arguments = prepared
        return await self._client.evalsha(scripts.APPEND.sha, len(keys), *keys, *arguments)


class Bare(Side):
    """The floor: calls of one turn in one write for each node, on bare sockets that are known."""

    name = BARE

    def __init__(self, wires: list[tuple[range, BareWire]]) -> None:
        self._by_slot = {slot: wire for some, wire in wires for slot in some}

    def prepare(self, append: Append) -> Any:
        keys, arguments = script_call(append, CLUSTER_KEYS)
        wire = self._by_slot[slot_of_tag(append.aggregate.root)]
        command = ("EVALSHA", scripts.APPEND.sha, str(len(keys)), *keys, *arguments)
        return wire, command

    async def append(self, prepared: Any) -> Any:
        wire, command = prepared
        return await wire.call_with_others(command)


@asynccontextmanager
async def _bare(cluster: embedded_cluster.Cluster) -> AsyncIterator[Bare]:
    loop = asyncio.get_running_loop()
    ports = [node.port for node in cluster.nodes]
    bounds = [slots.COUNT * part // len(ports) for part in range(len(ports) + 1)]
    wires = [
        (range(*bounds[n : n + 2]), (await loop.create_connection(BareWire, "127.0.0.1", port))[1])
        for n, port in enumerate(ports)
    ]
    try:
        yield Bare(wires)
    finally:
        for _, wire in wires:
            wire.transport.abort()


@dataclass
class Servers:
    """The servers whose CPU time is counted, as `Bench` asks for it."""

    clients: list[redis.asyncio.Redis] = field(default_factory=list)

    async def info(self, section: str) -> dict[str, Any]:
        """Return the sums of the numbers that all of them tell."""
        every: Any = await asyncio.gather(*(client.info(section) for client in self.clients))
        return {
            name: sum(one[name] for one in every)
            for name, value in every[0].items()
            if isinstance(value, int | float)
        }


@asynccontextmanager
async def connected(primaries: int, other: str) -> AsyncIterator[tuple[list[Side], Servers]]:
    """Run a cluster, and connect the sides to it and to another server."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(
            embedded_cluster.running(primaries=primaries, replicas=0)
        )
        one = await stack.enter_async_context(asyncstore.open(other, key_prefix=KEYS.prefix))
        store = await stack.enter_async_context(
            asyncstore.open(urls=cluster.urls, key_prefix=KEYS.prefix)
        )
        client = await stack.enter_async_context(_redis_cluster(cluster.urls[0]))
        servers = Servers()
        for url in [*cluster.urls, other]:
            servers.clients.append(
                await stack.enter_async_context(redis.asyncio.Redis.from_url(url))
            )
            await servers.clients[-1].script_load(scripts.APPEND.source)
        bare = await stack.enter_async_context(_bare(cluster))
        yield [AsyncStore(store), RedisCluster(client), bare, OneServer(one)], servers


def _redis_cluster(url: str) -> redis.asyncio.RedisCluster:
    return redis.asyncio.RedisCluster.from_url(
        url, max_connections=MOST_CONNECTIONS, retry=Retry(NoBackoff(), 0)
    )


async def compare(bench: Bench, primaries: int, other: str) -> None:
    """Compare the sides on a cluster of this size."""
    async with connected(primaries, other) as (sides, servers):
        client: Any = servers
        one = await bench.compare("one at a time", sides, client, ONE_AT_A_TIME, Workload())
        bench.keep(f"{primaries} primaries", "one at a time", one)
        many = await bench.compare("128 at once", sides, client, MANY, Workload())
        bench.keep(f"{primaries} primaries", "128 at once", many)
        connections = await _connections(sides)
        bench.results[f"{primaries} primaries"]["connections"] = connections
        console.print(f"connections: {connections}")
    if primaries != PRIMARIES[0]:
        return
    rate = {name: figures.summary()["rate"] for name, figures in many.items()}
    p50 = {name: figures.summary()["p50_us"] for name, figures in one.items()}
    bench.budgets += [
        Budget(
            "128 at once, rate / RedisCluster", rate[OURS] / rate[REDIS_CLUSTER], 5, at_least=True
        ),
        Budget("one append, p50 / one server", p50[OURS] / p50[ONE_SERVER], 1.2),
    ]


async def _connections(sides: Sequence[Side]) -> int:
    """Return how many connections the store on the cluster has."""
    (ours,) = [side for side in sides if type(side) is AsyncStore]
    return len(ours.store._router.nodes())


async def router_costs(bench: Bench) -> None:
    """Measure what the router takes of each call, and of memory."""
    async with embedded_cluster.running(primaries=3, replicas=0) as cluster:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        async with asyncstore.open(urls=cluster.urls) as store:
            gc.collect()
            memory = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            calls = 200_000
            roots = [f"{n:x}" for n in range(calls)]
            started = time.perf_counter()
            for root in roots:
                store._router.home_of(root)
            home = 1e6 * (time.perf_counter() - started) / calls
    figures = {"home_of a root, us": home, "memory of an open store, KiB": memory / 1024}
    bench.results["router"] = figures
    console.print(figures)


def main(
    output: Annotated[Path, typer.Option(help="the JSON file")] = Path("build/clusters.json"),
    quick: Annotated[bool, typer.Option(help="few rounds: only to see that it works")] = False,
) -> None:
    """Measure, print, save."""
    random.seed(SEED)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        bench = Bench(2 if quick else 10, progress)
        bench.results |= machine.describe() | {"seed": SEED, "rounds": bench.rounds}
        with redis_server(str(embedded.find_binary()), tcp=True) as server:
            for primaries in PRIMARIES:
                asyncio.run(compare(bench, primaries, server.url))
        asyncio.run(router_costs(bench))
    bench.print_budgets()
    output.write_text(json.dumps(bench.results, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
