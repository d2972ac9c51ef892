"""Measure what typed events cost: encode and decode of one event, beside plain JSON.

    python -m benchmarks.typed_events [--output build/bench-typed.json] [--quick]

No server takes part. Encoding is all from an object to the bytes that are sent, decoding all from
the bytes that came to an object; plain is the same with a dict. The sides take turns, and what
counts is the median of their rounds, in processor time.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pydantic
import typer
from rich.console import Console
from rich.table import Table

from asyncstore import Aggregate, Event, RecordedEvent, codec
from asyncstore.keys import Places
from asyncstore.recorded import event_of_member
from asyncstore.typed import Bodies, Compression, MemoryKeys, Registry, Zlib
from benchmarks import machine

ORDER = Aggregate("orders", "8f1c")
EVENTS_A_ROUND = 1000
ROUNDS, QUICK_ROUNDS = 60, 6
PLAIN = "plain JSON"

console = Console(highlight=False, width=120)


@dataclass(frozen=True)
class Line:
    """An order's line, as a dataclass."""

    sku: str
    quantity: int
    price: float


@dataclass(frozen=True)
class Placed:
    """An order, as a dataclass."""

    customer: str
    when: datetime
    currency: str
    lines: tuple[Line, ...]


class LineStruct(msgspec.Struct, frozen=True):
    """A line of msgspec."""

    sku: str
    quantity: int
    price: float


class PlacedStruct(msgspec.Struct, frozen=True):
    """An order of msgspec."""

    customer: str
    when: datetime
    currency: str
    lines: tuple[LineStruct, ...]


class LineModel(pydantic.BaseModel):
    """A line of pydantic."""

    sku: str
    quantity: int
    price: float


class PlacedModel(pydantic.BaseModel):
    """An order of pydantic."""

    customer: str
    when: datetime
    currency: str
    lines: tuple[LineModel, ...]


OBJECT = Placed(
    "c-17",
    datetime(2026, 1, 2, 12, tzinfo=UTC),
    "EUR",
    tuple(Line(f"sku-{n}", n + 1, 9.5 * n) for n in range(3)),
)
DATA = msgspec.to_builtins(OBJECT)


@dataclass(frozen=True)
class Side:
    """How one event is encoded, and how what that gave is decoded."""

    name: str
    encode: Callable[[], bytes]
    decode: Callable[[bytes], Any]


def member_of(event: Event) -> bytes:
    """Return the event as it is stored; the script writes the beginning."""
    _, rest = codec.encode_event(event)
    return b"[0,1732345678901234," + rest


def recorded(member: bytes) -> RecordedEvent:
    return event_of_member(ORDER, Places(""), member)


def plain() -> Side:
    return Side(
        PLAIN,
        lambda: member_of(Event("Placed", DATA)),
        lambda member: recorded(member).data,
    )


def typed(name: str, cls: type) -> Side:
    registry = Registry()
    registry.event("Placed")(cls)
    value = registry.from_event(recorded(member_of(Event("Placed", DATA))))
    return Side(
        name,
        lambda: member_of(registry.to_event(value)),
        lambda member: registry.from_event(recorded(member)),
    )


def upcast(steps: int) -> Side:
    """The same by dataclass, with that many upcasters on the way back."""
    registry = Registry()
    upcasters: dict[int, Callable[[Any], Any]] = dict.fromkeys(range(1, steps + 1), dict)
    registry.event("Placed", version=steps + 1, upcasters=upcasters)(Placed)
    old = member_of(Event("Placed", DATA))
    return Side(
        f"dataclass, {steps} upcasters",
        lambda: member_of(registry.to_event(OBJECT)),
        lambda _: registry.from_event(recorded(old)),
    )


def through(name: str, compressions: list[Compression], subject: str | None) -> Side:
    """Plain JSON that goes through compression or encryption; keys are at hand."""
    bodies = Bodies(compressions=compressions, compress_above=0, keys=MemoryKeys())

    def encode() -> bytes:
        (event,) = at_once(bodies._seal(ORDER, [Event("Placed", DATA)], [subject]))
        return member_of(event)

    def decode(member: bytes) -> Any:
        (event,) = at_once(bodies._open([recorded(member)]))
        return event.data

    return Side(name, encode, decode)


def at_once(call: Any) -> Any:
    """Return what a coroutine returns that waits for nothing: no event loop is to be measured."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def sides() -> list[Side]:
    return [
        plain(),
        typed("msgspec Struct", PlacedStruct),
        typed("dataclass", Placed),
        typed("pydantic model", PlacedModel),
        upcast(3),
        through("zlib", [Zlib()], None),
        through("AES-GCM", [], "c-17"),
        through("zlib and AES-GCM", [Zlib()], "c-17"),
    ]


def microseconds(call: Callable[[], object]) -> float:
    """Return the processor time of a call, in one round: others on the machine don't count."""
    begun = time.thread_time_ns()
    for _ in range(EVENTS_A_ROUND):
        call()
    return (time.thread_time_ns() - begun) / 1000 / EVENTS_A_ROUND


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Let the sides take turns, and return medians."""
    encoding: defaultdict[str, list[float]] = defaultdict(list)
    decoding: defaultdict[str, list[float]] = defaultdict(list)
    order = sides()
    members = {side.name: side.encode() for side in order}
    for number in range(rounds + 1):
        random.shuffle(order)
        for side in order:
            encoded = microseconds(side.encode)
            decoded = microseconds(partial(side.decode, members[side.name]))
            if number:  # the first is for warming up
                encoding[side.name].append(encoded)
                decoding[side.name].append(decoded)
    return {
        name: {
            "encode_us": statistics.median(encoding[name]),
            "decode_us": statistics.median(decoding[name]),
            "bytes": len(member),
        }
        for name, member in members.items()
    }


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"One event of {results[PLAIN]['bytes']} bytes, microseconds, medians")
    for column in ("", "encode", "× plain", "decode", "× plain", "bytes"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in results.items():
        row = [name]
        for what in ("encode_us", "decode_us"):
            row += [f"{figures[what]:.2f}", f"{figures[what] / results[PLAIN][what]:.2f}"]
        table.add_row(*row, f"{figures['bytes']}")
    console.print(table)


def main(
    output: Annotated[Path, typer.Option(help="the JSON file to write")] = Path(
        "build/bench-typed.json"
    ),
    quick: Annotated[bool, typer.Option(help="few rounds: only to see that it works")] = False,
) -> None:
    """Measure, print, save."""
    results = measure(QUICK_ROUNDS if quick else ROUNDS)
    show(results)
    libraries = {name: metadata.version(name) for name in ("cryptography", "msgspec", "pydantic")}
    output.parent.mkdir(parents=True, exist_ok=True)
    found = machine.describe() | {"libraries": libraries, "event": DATA, "results": results}
    output.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
