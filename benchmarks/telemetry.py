"""What telemetry costs an append: switched off, beside the code without it, and switched on.

The code without it is the code itself: `Events.append` without its decorator, and a writer without
the lines that look for an observer. All sides have a store of their own on one server and take
turns, in an order that changes; what is told is the median of the differences within a turn. CPU
time is that of this process, which has no other work: it is far quieter than the clock on the wall.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import statistics
import textwrap
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import typer
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from rich.console import Console
from rich.table import Table

import asyncstore
from asyncstore import ANY, Aggregate, Event, Store, telemetry, writing
from asyncstore.events import Events
from asyncstore.writing import Writer
from benchmarks import machine

SEED = 1
AT_ONCE = 128
LIMIT = 1.0  # µs an append, for telemetry that is off
WITHOUT, OFF = "without the code", "off"
SPANS, CARRIED = "spans and metrics", "the same, and contexts in events"

_LOOK = """\
    observer = self._router.observer
    if observer is not None:
        batch = observer.outgoing(batch)
"""

Append = Callable[[Aggregate, list[Event]], Awaitable[object]]
Figures = dict[str, dict[str, float]]

console = Console(highlight=False)


def without_telemetry(store: Store) -> Append:
    """Return the append of a store as it would be if there was no telemetry."""
    source = textwrap.dedent(inspect.getsource(Writer._encode))
    if source.count(_LOOK) != 1:
        raise RuntimeError("the writer is not what this benchmark takes it for")
    names: dict[str, Any] = {}
    exec(source.replace(_LOOK, ""), vars(writing), names)  # noqa: S102 - our own source
    plain = type("PlainWriter", (Writer,), {"_encode": names["_encode"], "__slots__": ()})
    fields = [getattr(store._writer, name) for name in Writer.__dataclass_fields__]
    object.__setattr__(store.events, "_writer", plain(*fields))
    bare = cast(Any, Events.append).__wrapped__
    return cast(Append, partial(bare, store.events, expected=ANY))


async def sides(stack: AsyncExitStack) -> dict[str, Append]:
    """Open a store for each side, and return how each appends."""
    directory = stack.enter_context(TemporaryDirectory())
    url = f"embedded://{directory}"
    tracers, meters = TracerProvider(), MeterProvider([InMemoryMetricReader()])
    found: dict[str, Append] = {}
    for name in (WITHOUT, OFF, SPANS, CARRIED):
        prefix = f"side-{len(found)}:"
        store = await stack.enter_async_context(asyncstore.open(url, key_prefix=prefix))
        if name in (SPANS, CARRIED):
            options = {"tracer_provider": tracers, "meter_provider": meters}
            telemetry.instrument(store, **cast(Any, options), propagate=name == CARRIED)
        is_without = name == WITHOUT
        found[name] = (
            without_telemetry(store) if is_without else partial(store.events.append, expected=ANY)
        )
    return found


async def turn(append: Append, appends: int, at_once: int) -> float:
    """Return the CPU time of an append, in µs."""
    roots = [Aggregate("orders", f"{n}") for n in range(at_once)]
    events = [[Event("OrderPlaced", {"total": n})] for n in range(appends)]

    async def caller(n: int) -> None:
        for event in events[n::at_once]:
            await append(roots[n], event)

    began = time.process_time()
    await asyncio.gather(*map(caller, range(at_once)))
    return 1e6 * (time.process_time() - began) / appends


async def single(append: Append, n: int) -> float:
    """Return the CPU time of one append that has the connection for itself, in µs."""
    aggregate, events = Aggregate("orders", f"{n % AT_ONCE}"), [Event("OrderPlaced", {"total": n})]
    began = time.process_time_ns()
    await append(aggregate, events)
    return (time.process_time_ns() - began) / 1e3


async def measure(rounds: int, appends: int) -> dict[str, Figures]:
    """Return for each side the CPU time of an append, and the difference to the first side.

    Single appends take turns one by one, and those of many callers in runs.
    """
    async with AsyncExitStack() as stack:
        found = await sides(stack)
        alone = await take_turns(found, single, rounds * appends // 4)
        many = await take_turns(found, lambda append, _: turn(append, appends, AT_ONCE), rounds)
        return {"1 at once": alone, f"{AT_ONCE} at once": many}


async def take_turns(
    found: dict[str, Append], take: Callable[[Append, int], Awaitable[float]], turns: int
) -> Figures:
    """Return the medians of many turns; what the first eighth of them says does not count."""
    costs: dict[str, list[float]] = {name: [] for name in found}
    for n in range(turns):
        for name in random.sample(list(found), len(found)):
            costs[name].append(await take(found[name], n))
    warm = {name: own[turns // 8 :] for name, own in costs.items()}
    return {
        name: {"cpu_us": statistics.median(own), "more_us": _more(own, warm[WITHOUT])}
        for name, own in warm.items()
    }


def _more(own: list[float], others: list[float]) -> float:
    return statistics.median(mine - base for mine, base in zip(own, others, strict=True))


def show(results: dict[str, Figures]) -> None:
    table = Table("telemetry", "callers", "CPU an append", "more than without the code")
    for callers, figures in results.items():
        for name, figure in figures.items():
            more = "" if name == WITHOUT else f"{figure['more_us']:+.2f} µs"
            table.add_row(name, callers, f"{figure['cpu_us']:.2f} µs", more)
    console.print(table)
    worst = max(figures[OFF]["more_us"] for figures in results.values())
    verdict = "kept" if worst <= LIMIT else "MISSED"
    console.print(f"off: at most {worst:+.2f} µs, {LIMIT} µs are allowed: {verdict}")


def main(
    output: Annotated[Path, typer.Option(help="the JSON file")] = Path("build/telemetry.json"),
    rounds: Annotated[int, typer.Option(help="turns of each side")] = 60,
    appends: Annotated[int, typer.Option(help="appends a turn")] = 1280,
) -> None:
    """Measure, print, save."""
    random.seed(SEED)
    results = asyncio.run(measure(rounds, appends))
    show(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe() | {"seed": SEED, "rounds": rounds, "appends": appends}
    output.write_text(json.dumps(about | {"cpu": results}, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
