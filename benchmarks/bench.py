"""Measure the store beside other clients, on one server and in one run.

    python -m benchmarks.bench [--output build/bench.json] [--quick]

The sides take turns, so that a slow moment of the machine meets all of them. What counts is the
ratio. Prints tables, and saves a JSON file that says where it was measured, and a picture.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import orjson
import redis.asyncio
import typer
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import asyncstore
from asyncstore import (
    ANY,
    MAIN,
    NEW,
    Aggregate,
    Event,
    Source,
    Store,
    appends,
    embedded,
    scripts,
)
from asyncstore.recorded import event_of_member
from benchmarks import machine, picture, script_costs
from benchmarks.sides import (
    KEYS,
    Bare,
    Side,
    Traced,
    Traces,
    Workload,
    Writer,
    all_sides,
    client_of,
    fresh,
)
from tests.servers import redis_server

SEED = 11
ONE_AT_A_TIME, MANY = 1, 128
BOUNDED_WRITERS = 256
BOUNDS = (1, 4, 8, 16, 32, 64, 128, 256)
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
APPENDS_A_TURN = 1000
OURS, REDIS_PY, BARE, PIPELINED = (
    "asyncstore",
    "redis-py evalsha",
    "bare socket",
    "bare, auto-pipelined",
)

console = Console(highlight=False, width=150)


@dataclass
class Figures:
    """What was measured of one side in one setting, over all rounds; times in microseconds."""

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    client_cpu: list[float] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return medians and percentiles."""
        cuts = statistics.quantiles(self.latencies, n=100)
        return {
            "p50_us": cuts[49],
            "p95_us": cuts[94],
            "p99_us": cuts[98],
            "rate": statistics.median(self.rates),
            "client_cpu_us": statistics.median(self.client_cpu),
            "server_cpu_us": statistics.median(self.server_cpu),
        }


@dataclass
class Budget:
    """A row of the table of budgets."""

    what: str
    measured: float
    limit: float
    unit: str = "×"
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass
class Bench:
    """All that is measured in one run."""

    rounds: int
    progress: Progress
    results: dict[str, Any] = field(default_factory=dict)
    budgets: list[Budget] = field(default_factory=list)

    # Comparing

    async def compare(
        self,
        what: str,
        sides: Sequence[Side],
        client: redis.asyncio.Redis,
        concurrency: int,
        workload: Workload,
    ) -> dict[str, Figures]:
        """Let the sides take turns with the same workload."""
        figures: defaultdict[str, Figures] = defaultdict(Figures)
        writers = {side.name: [Writer(workload) for _ in range(concurrency)] for side in sides}
        turns = max(2, APPENDS_A_TURN // workload.events // max(concurrency, 4))
        for number in self.progress.track(range(self.rounds + 1), description=what):
            order = list(sides)
            random.shuffle(order)
            for side in order:
                work = [
                    [side.prepare(append) for append in writer.appends(turns)]
                    for writer in writers[side.name]
                ]
                await self._turn(side, work, client, figures[side.name], warm_up=number == 0)
        return dict(figures)

    async def _turn(
        self,
        side: Side,
        work: list[list[Any]],
        client: redis.asyncio.Redis,
        figures: Figures,
        *,
        warm_up: bool,
    ) -> None:
        count = sum(map(len, work))
        server, used = await server_cpu(client), time.process_time()
        latencies, elapsed = await side.run(work)
        used, server = time.process_time() - used, await server_cpu(client) - server
        if warm_up:
            return
        figures.latencies += [1e6 * latency for latency in latencies]
        figures.rates.append(count / elapsed)
        figures.client_cpu.append(1e6 * used / count)
        figures.server_cpu.append(1e6 * server / count)

    def keep(self, section: str, setting: str, figures: dict[str, Figures]) -> None:
        """Put figures into the results, and print them."""
        summaries = {name: measured.summary() for name, measured in figures.items()}
        self.results.setdefault(section, {})[setting] = summaries
        table = Table(
            "side", "p50 µs", "p95", "p99", "appends/s", "client CPU µs", "server CPU µs",
            title=f"{section}: {setting}", title_justify="left",
        )  # fmt: skip
        for name, row in summaries.items():
            cells = (row[key] for key in ("p50_us", "p95_us", "p99_us", "rate"))
            cpu = (row[key] for key in ("client_cpu_us", "server_cpu_us"))
            table.add_row(name, *(f"{cell:,.0f}" for cell in cells), *(f"{c:.1f}" for c in cpu))
        console.print(table)

    # What is compared

    async def appends(self, sides: list[Side], client: redis.asyncio.Redis) -> dict[str, Any]:
        """Compare all sides, one append at a time and many at once; return the latencies."""
        one = await self.compare("one at a time", sides, client, ONE_AT_A_TIME, Workload())
        self.keep("appends of 200 bytes", "one at a time", one)
        many = await self.compare("128 at once", sides, client, MANY, Workload())
        self.keep("appends of 200 bytes", "128 at once", many)
        lone = {name: figures.summary()["p50_us"] for name, figures in one.items()}
        rate = {name: figures.summary()["rate"] for name, figures in many.items()}
        ours = many[OURS].summary()
        self.budgets += [
            Budget("one append, p50 / bare socket", lone[OURS] / lone[BARE], 1.3),
            Budget("one append, p50 / redis-py", lone[OURS] / lone[REDIS_PY], 0.65),
            Budget("128 at once, rate / redis-py", rate[OURS] / rate[REDIS_PY], 8, at_least=True),
            Budget(
                "128 at once, rate / bare auto-pipelined",
                rate[OURS] / rate[PIPELINED],
                1.25,
                at_least=True,
            ),
            Budget("server CPU an append, 128 at once", ours["server_cpu_us"], 10, "µs"),
            Budget("client CPU an append, 128 at once", ours["client_cpu_us"], 12, "µs"),
        ]
        return {"one": one, "many": many}

    async def sweep(
        self, sides: list[Side], client: redis.asyncio.Redis
    ) -> dict[str, list[tuple[int, float]]]:
        """Compare rates from one writer to hundreds."""
        rates: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for concurrency in CONCURRENCIES:
            what = f"{concurrency} at once"
            figures = await self.compare(what, sides, client, concurrency, Workload())
            for name, measured in figures.items():
                rates[name].append((concurrency, statistics.median(measured.rates)))
        self.results["rate by concurrency"] = rates
        table = Table(
            "appends/s", *map(str, CONCURRENCIES), title="by concurrency", title_justify="left"
        )
        for name, points in rates.items():
            table.add_row(name, *(f"{rate:,.0f}" for _, rate in points))
        console.print(table)
        return rates

    async def variations(self, sides: list[Side], client: redis.asyncio.Redis) -> None:
        """Compare other sizes of events, appends and aggregates."""
        some = [side for side in sides if side.name in (OURS, REDIS_PY, BARE, PIPELINED)]
        settings = {
            "events of 2 KB": Workload(body=2048),
            "ten events an append": Workload(events=10),
            "aggregates of 10": Workload(length=10),
            "aggregates of 1,000": Workload(length=1000),
        }
        for what, workload in settings.items():
            await self.both(what, some, client, workload)

    async def both(
        self, what: str, sides: list[Side], client: redis.asyncio.Redis, workload: Workload
    ) -> None:
        """Compare one at a time and many at once."""
        for concurrency in (ONE_AT_A_TIME, MANY):
            setting = f"{what}, {concurrency} at once"
            figures = await self.compare(setting, sides, client, concurrency, workload)
            self.keep("other settings", setting, figures)

    async def bounds(self, sides: list[Side], client: redis.asyncio.Redis) -> None:
        """Compare bounds on the appends of one call: rate, and how long a call keeps the server."""
        (ours,) = [side for side in sides if side.name == OURS]
        writers = [Writer(Workload()) for _ in range(BOUNDED_WRITERS)]
        rates: defaultdict[int, list[float]] = defaultdict(list)
        held: defaultdict[int, list[float]] = defaultdict(list)
        sizes: defaultdict[int, list[float]] = defaultdict(list)
        for _ in self.progress.track(range(self.rounds), description="bounds"):
            for bound in BOUNDS:
                work = [[ours.prepare(item) for item in writer.appends(20)] for writer in writers]
                await client.config_resetstat()
                with group_bound(bound):
                    _, elapsed = await ours.run(work)
                calls = (await client.info("commandstats"))["cmdstat_evalsha"]
                rates[bound].append(20 * len(writers) / elapsed)
                held[bound].append(calls["usec_per_call"])
                sizes[bound].append(20 * len(writers) / calls["calls"])
        table = Table(
            f"appends a call, at most, of {BOUNDED_WRITERS} at once",
            "on average",
            "appends/s",
            "µs of the server a call",
        )
        for bound in BOUNDS:
            row = tuple(statistics.median(kept[bound]) for kept in (sizes, rates, held))
            table.add_row(str(bound), *(f"{cell:,.0f}" for cell in row))
            self.results.setdefault("bounds", {})[bound] = row
        console.print(table)

    async def loads(self, store: Store, client: redis.asyncio.Redis, sides: list[Side]) -> None:
        """Compare the load of a snapshot and ten events with two commands of redis-py."""
        aggregate = fresh()
        events = [Event("Benched", Workload().data()) for _ in range(20)]
        await store.events.append(aggregate, events, expected=NEW)
        await store.snapshots.put(aggregate, sequence=9, state={"n": 10})

        async def ours() -> int:
            loaded = await store.load(aggregate)
            return len([event.data for event in loaded.events])

        async def theirs() -> int:
            key = KEYS.events(aggregate)
            snapshot = await redis_py.hgetall(KEYS.snapshots(aggregate)[0])
            start = int(snapshot[b"sequence"]) + 1
            members = await redis_py.zrangebyscore(key, start, "+inf")
            orjson.loads(snapshot[b"state"])
            places = KEYS.places(aggregate, 0)
            events = [event_of_member(aggregate, places, member) for member in members]
            return len([event.data for event in events])

        async def floor() -> int:
            keys = (*KEYS.snapshots(aggregate), *KEYS.timeline(aggregate))
            command = ("EVALSHA", scripts.LOAD.sha, str(len(keys)), *keys, "5000", "")
            return len((await bare.call(command))[3]) - 2

        await client.script_load(scripts.LOAD.source)
        redis_py: Any = client
        (bare,) = [side.wire for side in sides if type(side) is Bare]
        calls = {OURS: ours, REDIS_PY: theirs, "bare socket, nothing decoded": floor}
        p50 = await self.p50s("load of a snapshot and 10 events", calls, 10)
        self.budgets.append(Budget("load, p50 / redis-py", p50[OURS] / p50[REDIS_PY], 0.45))

    async def traces(self, store: Store, client: redis.asyncio.Redis) -> None:
        """Compare appends with and without a key, a source and a correlation id."""
        key: Traces = lambda n: {"idempotency_key": f"request-{n}"}  # noqa: E731
        source: Traces = lambda n: {"source": Source("orders", "1", MAIN, n)}  # noqa: E731
        correlation: Traces = lambda n: {"correlation_id": f"checkout-{n // 10}"}  # noqa: E731
        sides: list[Side] = [
            Traced(store, "plain", lambda _: {}),
            Traced(store, "with a key", key),
            Traced(store, "with a source", source),
            Traced(store, "with a correlation id", correlation),
            Traced(store, "with all three", lambda n: key(n) | source(n) | correlation(n)),
        ]
        for concurrency in (ONE_AT_A_TIME, MANY):
            setting = f"{concurrency} at once"
            figures = await self.compare(setting, sides, client, concurrency, Workload())
            self.keep("what an append says of where it comes from", setting, figures)

    async def branches(self, store: Store) -> None:
        """Compare a branch with a plain aggregate of the same length."""
        main, branch = fresh(), fresh()
        events = [Event("Benched", Workload().data()) for _ in range(100)]
        await store.events.append(main, events, expected=NEW)
        await store.events.append(branch, events, expected=NEW)
        branch = branch.on("what-if")
        await store.events.append(branch, events[50:], expected=50)

        def reading(aggregate: Aggregate) -> Callable[[], Awaitable[int]]:
            async def read() -> int:
                return len(await store.events.read(aggregate))

            return read

        def loading(aggregate: Aggregate) -> Callable[[], Awaitable[int]]:
            async def load() -> int:
                return len((await store.load(aggregate)).events)

            return load

        sides = {"main": main, "a branch": branch}
        for what, call in (("read", reading), ("load", loading)):
            calls = {name: call(aggregate) for name, aggregate in sides.items()}
            await self.p50s(f"{what} of 100 events", calls, 100)
        await store.events.delete_edition("bench", "what-if")

    async def fairness(self, sides: list[Side]) -> None:
        """Measure what small appends wait for beside one who appends 5,000 events each time."""
        (ours,) = [side for side in sides if side.name == OURS]
        small, large = Writer(Workload()), Writer(Workload(events=5000, length=5000))
        alone: list[float] = []
        beside: list[float] = []
        giant: list[float] = []
        for _ in self.progress.track(range(self.rounds), description="fairness"):
            latencies, _ = await ours.run([small.appends(50)])
            alone += latencies
            work = [ours.prepare(append) for append in large.appends(5)]
            under_way = asyncio.ensure_future(ours.run([work]))
            while not under_way.done():
                latencies, _ = await ours.run([small.appends(1)])
                beside += latencies
            giant += (await under_way)[0]
        figures = {
            "a small append alone, p50": statistics.median(alone),
            "5,000 events in one append, p50": statistics.median(giant),
            "a small append beside it, p50": statistics.median(beside),
            "a small append beside it, longest": max(beside),
        }
        self.results["fairness"] = {name: 1e6 * figure for name, figure in figures.items()}
        console.print("; ".join(f"{name} {1e6 * us:,.0f} µs" for name, us in figures.items()))

    async def p50s(
        self, what: str, calls: Mapping[str, Callable[[], Awaitable[int]]], expected: int
    ) -> dict[str, float]:
        """Compare calls that are made one at a time, each of which answers with `expected`."""
        latencies: defaultdict[str, list[float]] = defaultdict(list)
        for _ in self.progress.track(range(100 * self.rounds), description=what):
            for name, call in random.sample(list(calls.items()), len(calls)):
                started = time.perf_counter()
                answer = await call()
                latencies[name].append(1e6 * (time.perf_counter() - started))
                if answer != expected:
                    raise RuntimeError(f"{name} answered {answer}, not {expected}")
        p50 = {name: statistics.median(measured) for name, measured in latencies.items()}
        self.results[what] = p50
        console.print(f"{what}: " + ", ".join(f"{k} {v:,.0f} µs" for k, v in p50.items()))
        return p50

    async def memory(self, store: Store, client: redis.asyncio.Redis) -> None:
        """Measure the server's bytes an event above its data and type."""
        aggregates, events = 100, 100
        before = (await client.info("memory"))["used_memory"]
        for _ in range(aggregates):
            batch = [Event("Benched", Workload().data()) for _ in range(events)]
            await store.events.append(fresh(), batch, expected=ANY)
        after = (await client.info("memory"))["used_memory"]
        overhead = (after - before) / (aggregates * events) - 200 - len("Benched")
        self.budgets.append(Budget("server memory an event above data and type", overhead, 96, "B"))

    async def fsync(self, build: Path) -> None:
        """Compare 128 appends at once on a server that flushes each to the disk."""
        with TemporaryDirectory(dir=build) as directory:  # on a disk, which /tmp may not be
            async with opened(Path(directory)) as (_, client, sides):
                await client.config_set("appendfsync", "always")
                some = [side for side in sides if side.name in (OURS, REDIS_PY, PIPELINED)]
                figures = await self.compare("appendfsync always", some, client, MANY, Workload())
                self.keep("durable appends", "appendfsync always, 128 at once", figures)
                rate = {name: statistics.median(f.rates) for name, f in figures.items()}
                ratio = rate[OURS] / rate[REDIS_PY]
                self.budgets.append(Budget("FSYNC, rate / redis-py", ratio, 6, at_least=True))

    async def other_loop(self) -> None:
        """Compare on whatever event loop this is run in."""
        async with opened(None) as (_, client, sides):
            some = [side for side in sides if side.name in (OURS, REDIS_PY, BARE, PIPELINED)]
            await self.both("uvloop", some, client, Workload())

    async def other_server(self, url: str) -> None:
        """Compare on another server."""
        async with connected(url) as (_, client, sides):
            some = [side for side in sides if side.name in (OURS, REDIS_PY, BARE, PIPELINED)]
            version = (await client.info("server"))["redis_version"]
            await self.both(f"Redis {version}", some, client, Workload())

    def print_budgets(self) -> None:
        """Print what was measured beside what it should be."""
        table = Table("budget", "measured", "wanted", "", title="budgets", title_justify="left")
        for row in self.budgets:
            wanted = f"{'≥' if row.at_least else '≤'} {row.limit:g} {row.unit}"
            met = "met" if row.is_met else "missed"
            table.add_row(row.what, f"{row.measured:.2f} {row.unit}", wanted, met)
        console.print(table)
        self.results["budgets"] = [{**asdict(row), "met": row.is_met} for row in self.budgets]


@contextmanager
def group_bound(bound: int) -> Iterator[None]:
    """Let groups of appends have this size, from the first of a turn on."""
    chosen = appends.FIRST_APPENDS, appends.MOST_APPENDS
    appends.FIRST_APPENDS = appends.MOST_APPENDS = bound  # type: ignore[misc]
    try:
        yield
    finally:
        appends.FIRST_APPENDS, appends.MOST_APPENDS = chosen  # type: ignore[misc]


async def server_cpu(client: redis.asyncio.Redis) -> float:
    """Return the seconds of CPU time that the server has used so far."""
    info = await client.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


Opened = tuple[Store, redis.asyncio.Redis, list[Side]]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Opened]:
    """Connect all sides to a server."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(asyncstore.open(url, key_prefix=KEYS.prefix))
        sides = await stack.enter_async_context(all_sides(url, store))
        yield store, await stack.enter_async_context(client_of(url)), sides


@asynccontextmanager
async def opened(directory: Path | None) -> AsyncIterator[Opened]:
    """Connect all sides to an embedded server."""
    async with embedded.running(directory) as url, connected(url) as everything:
        yield everything


async def measure_embedded(bench: Bench, pictures: Path, sweep_rounds: int) -> None:
    async with opened(None) as (store, client, sides):
        bench.results["server"] = await machine.server(client)
        await bench.memory(store, client)
        latencies = await bench.appends(sides, client)
        await bench.loads(store, client, sides)
        await bench.traces(store, client)
        await bench.branches(store)
        await bench.variations(sides, client)
        await bench.bounds(sides, client)
        await bench.fairness(sides)
        bench.rounds, rounds = sweep_rounds, bench.rounds
        rates = await bench.sweep(sides, client)
        bench.rounds = rounds
        bench.results["script"] = costs = await script_costs.measure(client)
        console.print(script_costs.table(costs))
    picture.draw(pictures, latencies, rates)
    await bench.fsync(pictures.parent)


def main(
    output: Annotated[Path, typer.Option(help="the JSON file to write")] = Path("build/bench.json"),
    quick: Annotated[bool, typer.Option(help="few rounds: only to see that it works")] = False,
) -> None:
    """Measure, print, save."""
    random.seed(SEED)
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = output.with_suffix(".png")
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        bench = Bench(2 if quick else 20, progress)
        bench.results |= machine.describe() | {"seed": SEED, "rounds": bench.rounds}
        asyncio.run(measure_embedded(bench, pictures, 1 if quick else 6))
        uvloop.run(bench.other_loop())
        if shutil.which("redis-server"):
            with redis_server("redis-server") as server:
                asyncio.run(bench.other_server(server.url))
        else:
            console.print("Redis from the PATH: skipped, there is no redis-server")
    bench.print_budgets()
    output.write_text(json.dumps(bench.results, indent=2) + "\n")
    console.print(f"saved to {output} and {pictures}")


if __name__ == "__main__":
    typer.run(main)
