"""What listening and subscriptions cost on a cluster of three primaries.

python -m benchmarks.subscribing_on_clusters [--output build/bench-cluster-subscriptions.json]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import tracemalloc
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import redis.asyncio
import typer
from rich.console import Console

import asyncstore
from asyncstore import ANY, Aggregate, Event, Store, embedded_cluster
from asyncstore.embedded_cluster import Cluster
from benchmarks import machine

IDLE, IDLE_SECONDS = 10, 20.0
FILLED = 20_000
CALLS = 1_000
DATA = {"text": "x" * 180}

console = Console(highlight=False, width=120)


class Servers:
    """The primaries, looked at from outside."""

    def __init__(self, cluster: Cluster) -> None:
        urls = [node.url for node in cluster.nodes if node.is_primary]
        self._clients = [redis.asyncio.Redis.from_url(url) for url in urls]

    async def total(self, *fields: str) -> float:
        """Return the sum of some fields of INFO."""
        infos = [await client.info("all") for client in self._clients]
        return sum(float(info[field]) for info in infos for field in fields)

    async def cpu(self) -> float:
        """Return the seconds that they have used."""
        return await self.total("used_cpu_user", "used_cpu_sys")

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


async def channels(cluster: Cluster, servers: Servers) -> dict[str, float]:
    """Return what it takes to hear all slots: for the first listener, and for one more."""
    found: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        for which in ("first", "further"):
            store = await stack.enter_async_context(asyncstore.open(urls=cluster.urls))
            memory, cpu = await servers.total("used_memory"), await servers.cpu()
            own, began = time.process_time(), time.perf_counter()
            await stack.enter_async_context(store.listen())
            found[f"{which}_ms"] = 1e3 * (time.perf_counter() - began)
            found[f"{which}_client_cpu_ms"] = 1e3 * (time.process_time() - own)
            found[f"{which}_server_cpu_ms"] = 1e3 * (await servers.cpu() - cpu)
            found[f"{which}_server_mb"] = (await servers.total("used_memory") - memory) / 2**20
    async with asyncstore.open(urls=cluster.urls) as store:
        tracemalloc.start()
        async with store.listen():
            found["client_mb"] = tracemalloc.get_traced_memory()[0] / 2**20
        tracemalloc.stop()
    return found


async def idle(store: Store, servers: Servers) -> dict[str, float]:
    """Return what subscriptions cost that have nothing to do."""
    async with AsyncExitStack() as stack:
        for n in range(IDLE):
            await stack.enter_async_context(store.subscribe(f"idle-{n}", "idle"))
        await asyncio.sleep(5)
        commands, cpu = await servers.total("total_commands_processed"), await servers.cpu()
        own = time.process_time()
        await asyncio.sleep(IDLE_SECONDS)
        return {
            "commands_per_second": (await servers.total("total_commands_processed") - commands)
            / IDLE_SECONDS,
            "client_cpu_percent": 100 * (time.process_time() - own) / IDLE_SECONDS,
            "server_cpu_percent": 100 * (await servers.cpu() - cpu) / IDLE_SECONDS,
        }


async def begin(store: Store) -> dict[str, float]:
    """Return what it takes a worker to begin in a store with something in most slots."""
    for first in range(0, FILLED, 500):
        places = [Aggregate("filled", f"{n}") for n in range(first, first + 500)]
        await asyncio.gather(
            *(store.events.append(p, [Event("Benched", DATA)], expected=ANY) for p in places)
        )
    found = {}
    for name, start in (("first", asyncstore.FIRST), ("now", asyncstore.NOW)):
        began, own = time.perf_counter(), time.process_time()
        async with store.subscribe(name, "filled", start=start) as sub:
            found[f"{name}_entered_ms"] = 1e3 * (time.perf_counter() - began)
            if name == "first":
                await (await anext(sub)).ack()
                found["first_delivery_ms"] = 1e3 * (time.perf_counter() - began)
                for _ in range(FILLED - 1):
                    await (await anext(sub)).ack()
                found["caught_up_ms"] = 1e3 * (time.perf_counter() - began)
                began = time.perf_counter()
                await store.subscriptions.status(name)
                found["status_ms"] = 1e3 * (time.perf_counter() - began)
        found[f"{name}_client_cpu_ms"] = 1e3 * (time.process_time() - own)
    return found


async def delay(store: Store) -> dict[str, float]:
    """Return the microseconds from an append to its handler, one at a time."""
    found = []
    async with store.subscribe("delay", "delay") as sub, store.listen("delay"):
        for _ in range(CALLS):
            place = Aggregate("delay", uuid.uuid4())
            began = time.perf_counter()
            writing = asyncio.ensure_future(
                store.events.append(place, [Event("Benched", DATA)], expected=ANY)
            )
            delivery = await anext(sub)
            found.append(1e6 * (time.perf_counter() - began))
            await asyncio.gather(writing, delivery.ack())
    cuts = statistics.quantiles(found, n=100)
    return {"p50_us": cuts[49], "p99_us": cuts[98]}


async def measure() -> dict[str, Any]:
    async with embedded_cluster.running() as cluster:
        servers = Servers(cluster)
        results: dict[str, Any] = {"channels": await channels(cluster, servers)}
        async with asyncstore.open(urls=cluster.urls) as store:
            results["idle"] = await idle(store, servers)
            results["delay"] = await delay(store)
            results["begin"] = await begin(store)
        await servers.aclose()
    return results


def main(
    output: Annotated[Path, typer.Option()] = Path("build/bench-cluster-subscriptions.json"),
) -> None:
    """Measure, print, and write down."""
    results = asyncio.run(measure())
    for topic, figures in results.items():
        for name, value in figures.items():
            console.print(f"{topic:10} {name:24} {value:12,.2f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(machine.describe() | results, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
