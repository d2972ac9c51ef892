"""`bench`: how long calls take on the user's own server, with keys that are there for it only."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from asyncstore import forms
from asyncstore.commands.exits import run
from asyncstore.commands.options import (
    AsJson,
    KeyPrefix,
    Level,
    Url,
    options_at,
    settings_of_a_store,
)
from asyncstore.commands.output import (
    Rows,
    numbers,
    print_json,
    print_line,
    print_rows,
    progress,
    say,
)
from asyncstore.errors import AsyncStoreError
from asyncstore.settings import Settings
from asyncstore.sharing import all_of
from asyncstore.store import open as open_store
from asyncstore.values import Aggregate, Durability, Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from asyncstore.settings import Options
    from asyncstore.store import Store

_DOMAIN: Final = "bench"
_EVENTS_AN_AGGREGATE: Final = 100
_WARM_UP: Final = 20
_BARS: Final = 14
_BAR_WIDTH: Final = 40
_REMOVING_SECONDS: Final = 15.0

app = typer.Typer()


@app.command("bench")
def bench_(
    count: Annotated[int, typer.Option(min=10, max=100_000, help="Calls of each kind.")] = 1000,
    size: Annotated[int, typer.Option(min=1, max=1_000_000, help="Bytes of an event.")] = 200,
    durability: Level = None,
    as_json: AsJson = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Measure how long an append and a read take on your server, one after the other.

    It writes events under a key prefix of its own, behind yours, and deletes them in the end, also
    at Ctrl-C and SIGTERM. Nothing else is touched.
    """
    run(lambda: _bench(_Load(count, size, durability), as_json, options_at(url, key_prefix)))


@dataclass(frozen=True, slots=True)
class _Load:
    """How much is measured."""

    count: int
    size: int
    durability: str | None

    def places(self) -> list[Aggregate]:
        """Return the aggregates that are written to, spread over a cluster."""
        used = math.ceil((self.count + _WARM_UP) / _EVENTS_AN_AGGREGATE)
        return [Aggregate(_DOMAIN, f"{number}") for number in range(used)]


async def _bench(load: _Load, as_json: bool, options: Options) -> int:
    settings = _apart(settings_of_a_store(options))
    if load.durability is not None:
        settings = replace(settings, durability=Durability.parse(load.durability))
    say(
        f"{load.count:,} appends of {load.size:,} bytes (durability {settings.durability}) and as "
        f"many reads, one after the other, at {settings.where()}; the keys begin with "
        f"{settings.key_prefix} and are deleted in the end"
    )
    async with open_store(settings) as store, _removed(store, load.places()):
        taken = {"append": await _appends(store, load), "read": await _reads(store, load)}
    found = {name: _Latencies(sorted(some)) for name, some in taken.items()}
    if as_json:
        fields = {name: one.fields() for name, one in found.items()}
        level = str(settings.durability)
        print_json({"durability": level, "size": load.size, "unit": "ms", **fields})
    else:
        _print(found)
    return 0


def _apart(settings: Settings) -> Settings:
    """Return the settings with a prefix that nobody else has, within what an ACL grants."""
    return replace(settings, key_prefix=f"{settings.key_prefix}bench-{uuid.uuid4().hex[:12]}:")


@asynccontextmanager
async def _removed(store: Store, places: list[Aggregate]) -> AsyncIterator[None]:
    """Delete all that was written, also when it is cut off."""
    try:
        yield
    finally:
        try:
            async with asyncio.timeout(_REMOVING_SECONDS):
                await _remove(store, places)
        except (AsyncStoreError, TimeoutError):
            say(f"not all was deleted: look for keys that begin with {store.settings.key_prefix}")
            raise


async def _remove(store: Store, places: list[Aggregate]) -> None:
    await all_of(store.events.delete(place) for place in places)
    # What lasts when the aggregates are gone: the prefix will not be used again.
    keys = store._keys
    lasting = {keys.layout(), *(keys.commits(keys.tag_of(place.root)) for place in places)}
    await all_of(store._router.change(forms.is_count, "UNLINK", key) for key in lasting)


# Measuring


async def _appends(store: Store, load: _Load) -> list[float]:
    data, places = b"x" * load.size, load.places()

    def call(number: int) -> Awaitable[Any]:
        which, expected = divmod(number, _EVENTS_AN_AGGREGATE)
        event = Event("Measured", data)
        return store.events.append(places[which], [event], expected=expected)

    return await _timed("appending", call, load.count)


async def _reads(store: Store, load: _Load) -> list[float]:
    places = load.places()

    def call(number: int) -> Awaitable[Any]:
        which, sequence = divmod(number, _EVENTS_AN_AGGREGATE)
        return store.events.read(places[which], start=sequence, limit=1)

    return await _timed("reading", call, load.count)


async def _timed(what: str, call: Callable[[int], Awaitable[Any]], count: int) -> list[float]:
    """Make calls one after the other, and return the seconds of each but the first few."""
    taken = []
    with progress(what, _WARM_UP + count, "calls") as advance:
        for number in range(_WARM_UP + count):
            started = time.perf_counter()
            await call(number)
            taken.append(time.perf_counter() - started)
            if number % 100 == 0:
                advance(number, number)
    return taken[_WARM_UP:]


# Showing


@dataclass(frozen=True, slots=True)
class _Latencies:
    """How long calls took, in seconds, the shortest first."""

    taken: list[float]

    def at(self, percent: int) -> float:
        """Return what so many percent of the calls did not exceed."""
        return statistics.quantiles(self.taken, n=100, method="inclusive")[percent - 1]

    def fields(self) -> dict[str, float]:
        """Return them for programs, in milliseconds."""
        in_milliseconds = {
            "p50": self.at(50),
            "p90": self.at(90),
            "p99": self.at(99),
            "min": self.taken[0],
            "max": self.taken[-1],
        }
        rounded = {name: round(1000 * seconds, 4) for name, seconds in in_milliseconds.items()}
        return {"calls": len(self.taken), **rounded}

    def bars(self) -> list[tuple[str, int]]:
        """Return how many calls took how long: ranges that grow by the same factor, up to p99."""
        low, high = self.taken[0], max(self.at(99), self.taken[0] * 1.001)
        factor = (high / low) ** (1 / _BARS)
        counts = [0] * (_BARS + 1)
        for seconds in self.taken:
            place = int(math.log(seconds / low, factor)) if seconds < high else _BARS
            counts[min(place, _BARS)] += 1
        ends = [f"{1000 * low * factor**place:.3f} ms" for place in range(_BARS + 1)]
        return list(zip(ends, counts, strict=True))


def _print(found: dict[str, _Latencies]) -> None:
    names = ("p50", "p90", "p99", "min", "max")
    rows = []
    for name, one in found.items():
        fields = one.fields()
        rows.append([name, *(f"{fields[which]:.3f}" for which in names)])
    print_rows(Rows(["milliseconds", *numbers(*names)], rows))
    for name, one in found.items():
        print_line(f"{name}: how many took from so long on; the last line is the slowest 1 %")
        most = max(count for _, count in one.bars())
        for start, count in one.bars():
            bar = "█" * math.ceil(_BAR_WIDTH * count / most)
            print_line(f"{start:>12}  {bar} {count:,}")
