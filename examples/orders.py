"""The orders of a shop: what both example services do, whatever framework serves it.

A command is a function of the order as it is; it returns the events that happen, or raises
`Refused`. An order is a fold over its events. See `fastapi_orders` and `aiohttp_orders`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import reduce
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from asyncstore import ANY, MAIN, Aggregate, Appended, Event, Expected, RecordedEvent, Store

DOMAIN = "orders"

# What comes in: names that are in a path, and the bodies of commands.

OrderId = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")]
Edition = Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,32}$")]
WhatIf = Annotated[str, StringConstraints(pattern="^what-if-[a-z0-9-]{1,32}$")]


def _whole(value: object) -> object:
    """JSON has one kind of numbers: 3.0 is 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Sequence = Annotated[int, Field(ge=0, le=2**53 - 1), Whole]
Limit = Annotated[int, Field(ge=1, le=1000)]


def _not_a_number(value: object) -> object:
    """Pydantic takes seconds since 1970, too."""
    if isinstance(value, str) and "T" not in value.upper():
        raise ValueError("a moment such as 2026-01-31T12:00:00Z is wanted")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_not_a_number)]


class Command(BaseModel):
    """What is common to all bodies: nothing is converted, nothing is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Item(Command):
    """An item of an order."""

    sku: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9-]{1,32}$")]
    quantity: Annotated[int, Field(ge=1, le=1000), Whole]
    cents: Annotated[int, Field(ge=0, le=10_000_000), Whole]


class Place(Command):
    """A new order."""

    customer: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9-]{1,32}$")]
    items: Annotated[list[Item], Field(max_length=100)] = []


class Pay(Command):
    """What is paid: just what the order costs."""

    cents: Annotated[int, Field(ge=0, le=2**53), Whole]


class Note(Command):
    """A remark."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Branch(Command):
    """Where another time line leaves main: its next sequence there."""

    at: Sequence


# What goes out.


class Status(enum.StrEnum):
    """What became of an order."""

    UNKNOWN = "unknown"
    PLACED = "placed"
    PAID = "paid"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Order:
    """An order: a fold over its events, `sequence` of them."""

    status: Status = Status.UNKNOWN
    customer: str = ""
    items: int = 0
    cents: int = 0
    sequence: int = 0


class OrderView(BaseModel):
    """An order, as it is shown."""

    status: Status
    customer: str
    items: int
    cents: int
    sequence: int


class Done(BaseModel):
    """Which events a command has brought. `duplicate`: they were there before, by the same key."""

    first_sequence: int
    last_sequence: int
    duplicate: bool


class EventView(BaseModel):
    """An event, as it is shown."""

    sequence: int
    type: str
    time: datetime
    id: str
    metadata: dict[str, Any]
    correlation_id: str | None
    data: Any


# The rules.


class Refused(Exception):
    """The order is not such that this could be done."""


class Unknown(Exception):
    """There is no such order, or there was none then."""


Decide = Callable[[Order], list[Event]]


def apply(order: Order, event: RecordedEvent) -> Order:
    order = replace(order, sequence=event.sequence + 1)
    match event.type:
        case "OrderPlaced":
            return replace(order, status=Status.PLACED, customer=event.data["customer"])
        case "ItemAdded":
            item = event.data
            cents = order.cents + item["quantity"] * item["cents"]
            return replace(order, items=order.items + item["quantity"], cents=cents)
        case "OrderPaid":
            return replace(order, status=Status.PAID)
        case "OrderCancelled":
            return replace(order, status=Status.CANCELLED)
    return order


def place(command: Place) -> Decide:
    def decide(order: Order) -> list[Event]:
        if order.status is not Status.UNKNOWN:
            raise Refused("there is such an order already")
        placed = Event("OrderPlaced", {"customer": command.customer})
        return [placed, *(Event("ItemAdded", item.model_dump()) for item in command.items)]

    return decide


def add(item: Item) -> Decide:
    def decide(order: Order) -> list[Event]:
        _must_be(order, Status.PLACED)
        return [Event("ItemAdded", item.model_dump())]

    return decide


def pay(command: Pay) -> Decide:
    def decide(order: Order) -> list[Event]:
        _must_be(order, Status.PLACED)
        if command.cents != order.cents:
            raise Refused(f"the order is {order.cents} cents")
        return [Event("OrderPaid", {"cents": command.cents})]

    return decide


def note(command: Note) -> Decide:
    return lambda order: [Event("NoteAdded", {"text": command.text})]


def cancel(order: Order) -> list[Event]:
    _must_be(order, Status.PLACED)
    return [Event("OrderCancelled", {})]


def _must_be(order: Order, status: Status) -> None:
    if order.status is not status:
        raise Refused(f"the order is {order.status}, not {status}")


# The store.


def aggregate(order_id: str, edition: str = MAIN) -> Aggregate:
    return Aggregate(DOMAIN, order_id, edition)


async def carry_out(
    store: Store, order: Aggregate, decide: Decide, expected: Expected, key: str | None
) -> Appended:
    """Append what a command brings, once.

    Who expects a sequence decides on the order as of then, and is refused if something is new.
    Without it, the decision is made again as often as others are faster.
    """
    if expected is ANY:
        done = await store.update(order, decide, apply, Order(), idempotency_key=key)
    else:
        events = decide(fold(await store.events.read(order, stop=expected)))
        done = await store.events.append(order, events, expected=expected, idempotency_key=key)
    return await _checked(store, order, decide, done)


async def add_note(
    store: Store, order: Aggregate, command: Note, expected: Expected, key: str | None
) -> Appended:
    """Append a note. No state is asked for, so this is one round trip to the store."""
    decide = note(command)
    events = decide(Order())
    done = await store.events.append(order, events, expected=expected, idempotency_key=key)
    return await _checked(store, order, decide, done)


async def _checked(store: Store, order: Aggregate, decide: Decide, done: Appended) -> Appended:
    """Refuse another request under a key that was used: it would have brought other events."""
    if done.duplicate:
        events = await store.events.read(order, stop=done.last_sequence + 1)
        first = done.first_sequence
        if not _brings(decide, fold(events[:first]), events[first:]):
            raise Refused("this Idempotency-Key was used for another request to this order")
    return done


def _brings(decide: Decide, order: Order, events: list[RecordedEvent]) -> bool:
    try:
        meant = decide(order)
    except Refused:
        return False
    return [(e.type, e.data) for e in meant] == [(e.type, e.data) for e in events]


async def order_at(store: Store, order: Aggregate, until: datetime | None) -> Order:
    """Return the order as it is, or as it was at a moment."""
    if until is None:
        found = await store.fold(order, apply, Order())
    else:
        found = fold(await store.events.read(order, until=until))
    if found.status is Status.UNKNOWN:
        raise Unknown(f"there is no order {order}")
    return found


def fold(events: list[RecordedEvent]) -> Order:
    return reduce(apply, events, Order())


async def order_ids(store: Store, limit: int) -> list[str]:
    """Return orders, those that have changed least recently first."""
    found: list[str] = []
    async for root in store.events.roots(DOMAIN):
        found.append(root)
        if len(found) == limit:
            break
    return found
