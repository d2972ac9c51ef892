"""Bad input: a clear error before anything is sent."""

from __future__ import annotations

import math
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum, IntEnum
from typing import Any

import pytest

import asyncstore
from asyncstore import (
    ANY,
    MAIN,
    NEW,
    Aggregate,
    AsyncStoreError,
    Event,
    InvalidName,
    InvalidType,
    InvalidValue,
    ProtectedEdition,
    Settings,
    Source,
    Store,
    StoreClosed,
)

ORDER = Aggregate("orders", "1")


@pytest.fixture
def closed_store() -> Store:
    """A store that was never entered: all that could be sent would be StoreClosed."""
    return Store(Settings(url="redis://127.0.0.1:1"))


class TestNames:
    @pytest.mark.parametrize("name", ["a", "A.b_c-9", "-", "x" * 128, "main"])
    def test_good_names(self, name: str) -> None:
        aggregate = Aggregate(name, "1", edition=name)
        assert (aggregate.domain, aggregate.edition) == (name, name)

    @pytest.mark.parametrize(
        "name", ["", "a:b", "a b", "é", "a/b", "a*", "a\n", "{a}", "x" * 129, "٣", 7, None, b"a"]
    )
    async def test_bad_names(self, name: Any, closed_store: Store) -> None:
        for part, arguments in {"domain": (name, "1"), "edition": ("orders", "1", name)}.items():
            with pytest.raises(InvalidName) as caught:
                Aggregate(*arguments)
            assert caught.value.part == part
            assert caught.value.why
        with pytest.raises(InvalidName):
            ORDER.on(name)
        for call in (closed_store.positions.put, closed_store.positions.advance):
            with pytest.raises(InvalidName, match="handler"):
                await call(name, ORDER, 1)
        with pytest.raises(InvalidName, match="handler"):
            await closed_store.positions.get(name, ORDER)
        with pytest.raises(InvalidName, match="domain"):
            closed_store.events.roots(name)
        with pytest.raises(InvalidName, match="edition"):
            closed_store.events.roots("orders", edition=name)
        with pytest.raises(InvalidName, match="domain"):
            closed_store.events.editions(name)

    @pytest.mark.parametrize(
        "root", ["a b", "a:b:c", "☃🎉", "*?[x]", "x" * 512, "é" * 256, "\u200d", "a\\b'\"", "."]
    )
    def test_good_roots(self, root: str) -> None:
        assert Aggregate("orders", root).root == root

    @pytest.mark.parametrize(
        ("root", "why"),
        [
            ("", "empty"),
            ("x" * 513, "513 bytes"),
            ("é" * 257, "514 bytes"),
            ("a{b", "braces"),
            ("}", "braces"),
            ("a\nb", "control"),
            ("\x00", "control"),
            ("\x7f", "control"),
            ("\x9b", "control"),
            ("\ud800", "surrogate"),
            (5, "str"),
            (None, "str"),
            (b"a", "str"),
        ],
    )
    def test_bad_roots(self, root: Any, why: str) -> None:
        with pytest.raises(InvalidName, match=why) as caught:
            Aggregate("orders", root)
        assert caught.value.part == "root"
        assert isinstance(caught.value, ValueError)
        assert len(str(caught.value)) < 200
        str(caught.value).encode()  # can be printed and logged

    async def test_names_of_enums_are_their_text(self, store: Store) -> None:
        class Domain(str, Enum):  # noqa: UP042 - unlike a StrEnum, it shows itself as Domain.ORDERS
            ORDERS = "orders"

        class Place(IntEnum):
            FIRST = 0

        place = Aggregate(Domain.ORDERS, Domain.ORDERS, Domain("orders"))
        assert place == Aggregate("orders", "orders", "orders")
        assert type(place.domain) is type(place.root) is type(place.edition) is str
        place = Aggregate(Domain.ORDERS, Domain.ORDERS)
        await store.events.append(place, [Event("A", 1)], expected=Place.FIRST)
        assert len(await store.events.read(Aggregate("orders", "orders"), start=Place.FIRST)) == 1
        await store.positions.put(Domain.ORDERS, place, Place.FIRST)
        assert await store.positions.get("orders", place) == 0
        await store.snapshots.put(place, sequence=Place.FIRST, state=1)
        assert (await store.load(place)).snapshot is not None

    def test_a_uuid_is_its_text(self) -> None:
        root = uuid.uuid4()
        assert Aggregate("orders", root) == Aggregate("orders", str(root))
        assert Aggregate("orders", root).edition == MAIN

    @pytest.mark.parametrize("edition", ["Main", "MAIN", "", None])
    def test_main_has_one_spelling(self, edition: Any) -> None:
        with pytest.raises(InvalidName, match="edition"):
            Aggregate("orders", "1", edition=edition)
        with pytest.raises(InvalidName, match="edition"):
            ORDER.on(edition)

    async def test_main_does_not_branch_and_is_not_deleted(self, closed_store: Store) -> None:
        with pytest.raises(ProtectedEdition, match="main"):
            await closed_store.events.branch(ORDER, at=0)
        with pytest.raises(ProtectedEdition, match="main"):
            await closed_store.events.delete_edition("orders", "main")
        with pytest.raises(InvalidValue, match="diverge_at"):
            await closed_store.events.read(ORDER, diverge_at=1)


class TestTraces:
    @pytest.mark.parametrize(
        ("value", "error"),
        [(5, InvalidType), (b"k", InvalidType), (0, InvalidType), (False, InvalidType)]
        + [(text, InvalidValue) for text in ("a\nb", "\x00", "\x9b", "\ud800", "é" * 257)],
        ids=repr,
    )
    async def test_bad_keys_and_correlation_ids(
        self, closed_store: Store, value: Any, error: type[Exception]
    ) -> None:
        events = closed_store.events
        for name in ("idempotency_key", "correlation_id"):
            with pytest.raises(error, match=name) as caught:
                await events.append(ORDER, [], expected=NEW, **{name: value})
            assert not isinstance(value, str) or value not in str(caught.value)
        with pytest.raises(error):
            await events.find_idempotency_key(ORDER, value)
        with pytest.raises(error):
            await events.correlated(value)

    @pytest.mark.parametrize("source", ["orders", ("orders", "1", "main", 0), ORDER, 5])
    async def test_bad_sources(self, closed_store: Store, source: Any) -> None:
        with pytest.raises(InvalidType, match="source"):
            await closed_store.events.append(ORDER, [], expected=NEW, source=source)
        with pytest.raises(InvalidType, match="source"):
            await closed_store.events.find_source(ORDER, source)

    @pytest.mark.parametrize(
        "fields",
        [
            ("a b", "1", "main", 0),
            ("a", "{", "main", 0),
            ("a", "1", "Main", 0),
            ("a", "1", "x", -1),
        ],
    )
    def test_a_source_is_checked_when_it_is_made(self, fields: Any) -> None:
        with pytest.raises((InvalidName, InvalidValue)):
            Source(*fields)
        assert Source("a", uuid.UUID(int=1), "main", 0).root == str(uuid.UUID(int=1))


class TestSequences:
    @pytest.mark.parametrize("value", [-1, 1.0, 0.5, True, False, "1", None, 2**53, math.nan])
    async def test_bad_sequences(self, closed_store: Store, value: Any) -> None:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: closed_store.events.append(ORDER, [], expected=value),
            lambda: closed_store.events.read(ORDER, start=value),
            lambda: closed_store.positions.put("p", ORDER, value),
            lambda: closed_store.positions.advance("p", ORDER, value),
            lambda: closed_store.snapshots.put(ORDER, sequence=value, state=None),
        ]
        if value is not None:
            calls += [
                lambda: closed_store.events.read(ORDER, stop=value),
                lambda: closed_store.snapshots.get(ORDER, at=value),
            ]
        for call in calls:
            with pytest.raises((InvalidValue, InvalidType)) as caught:
                await call()
            assert isinstance(caught.value, (ValueError, TypeError))

    async def test_bad_ranges(self, closed_store: Store) -> None:
        with pytest.raises(InvalidValue, match="stop: 3 is before start, 4"):
            await closed_store.events.read(ORDER, start=4, stop=3)
        bad_limits: list[Any] = [-1, 1.5, True]
        for limit in bad_limits:
            with pytest.raises((InvalidValue, InvalidType), match="limit"):
                await closed_store.events.read(ORDER, limit=limit)
        with pytest.raises(InvalidValue, match="time zone"):
            await closed_store.events.read(ORDER, until=datetime(2024, 1, 1))
        with pytest.raises(InvalidType, match="until"):
            await closed_store.events.read(ORDER, until="2024-01-01")  # type: ignore[arg-type]

    async def test_a_stream_checks_before_it_is_used(self, closed_store: Store) -> None:
        with pytest.raises(InvalidValue):
            closed_store.events.stream(ORDER, start=4, stop=3)

    async def test_an_aggregate_is_wanted(self, closed_store: Store) -> None:
        wrong: Any = "orders/1"
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: closed_store.events.append(wrong, [], expected=NEW),
            lambda: closed_store.events.read(wrong),
            lambda: closed_store.events.delete(wrong),
            lambda: closed_store.load(wrong),
            lambda: closed_store.positions.get("p", wrong),
            lambda: closed_store.positions.put("p", wrong, 1),
            lambda: closed_store.snapshots.get(wrong),
            lambda: closed_store.snapshots.put(wrong, sequence=1, state=1),
            lambda: closed_store.snapshots.delete(wrong),
        ]
        for call in calls:
            with pytest.raises(InvalidType, match="aggregate"):
                await call()


class Number(Enum):
    NAN = math.nan


class Hiding(dict[str, float]):
    def values(self) -> Any:
        return []


@dataclass
class Point:
    x: int


class TestEvents:
    def test_bad_events(self) -> None:
        bad: list[dict[str, Any]] = [
            {"type": ""},
            {"type": None},
            {"type": 5},
            {"type": "\ud800"},
            {"id": "0193a4c7-f2e0-7cc3-8e1d-2f3a4b5c6d7e"},
            {"time": datetime(2024, 1, 1)},
            {"time": "2024-01-01T00:00:00Z"},
            {"time": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))},
            {"time": datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))},
        ]
        for fields in bad:
            with pytest.raises((InvalidValue, InvalidType)):
                Event(**{"type": "Good", "data": None, **fields})

    @pytest.mark.parametrize(
        "data",
        [
            math.nan,
            {"deep": [1, {"er": math.inf}]},
            [None, -math.inf],
            ({"a": None}, (math.nan,)),
            Number.NAN,
            {"deep": [Number.NAN]},
            Hiding(a=math.nan),
            {1: "a number as a key"},
            {"a set"},
            object(),
            2**64,
            "\ud800",
            Point(1),
            {"point": Point(1)},
        ],
        ids=lambda data: type(data).__name__,
    )
    async def test_what_is_not_json(self, closed_store: Store, data: Any) -> None:
        for event in (Event("Bad", data), Event("Bad", None, metadata={"key": data})):
            with pytest.raises((InvalidValue, InvalidType)) as caught:
                await closed_store.events.append(ORDER, [Event("Good", 1), event], expected=ANY)
            assert isinstance(caught.value, (ValueError, TypeError))
        with pytest.raises((InvalidValue, InvalidType), match="state"):
            await closed_store.snapshots.put(ORDER, sequence=1, state=data)

    async def test_endless_data_is_refused(self, closed_store: Store) -> None:
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises(InvalidType, match="data"):
            await closed_store.events.append(ORDER, [Event("Bad", endless)], expected=ANY)

    async def test_lists_of_something_else(self, closed_store: Store) -> None:
        good = Event("Good", 1)
        bad: list[Any] = [good, "an event", None, 5, [good, {"type": "Bad"}], [None], {good.id: 1}]
        for events in bad:
            with pytest.raises(InvalidType, match="Event"):
                await closed_store.events.append(ORDER, events, expected=ANY)

    async def test_an_error_of_the_callers_own_stays_his(self, closed_store: Store) -> None:
        def events() -> Iterator[Event]:
            yield Event("Good", 1)
            raise TypeError("my own")

        with pytest.raises(TypeError, match="my own"):
            await closed_store.events.append(ORDER, events(), expected=ANY)

    async def test_metadata_is_a_mapping(self, closed_store: Store) -> None:
        event = Event("Bad", 1, metadata=["a", "list"])  # type: ignore[arg-type]
        with pytest.raises(InvalidType, match="metadata"):
            await closed_store.events.append(ORDER, [event], expected=ANY)

    async def test_retention_is_one(self, closed_store: Store) -> None:
        with pytest.raises(InvalidType, match="retention"):
            await closed_store.snapshots.put(
                ORDER,
                sequence=1,
                state=1,
                retention="persist",  # type: ignore[arg-type]
            )

    async def test_no_data_in_errors_and_reprs(self, closed_store: Store) -> None:
        secret = "s3cret"
        event = Event("Login", {"password": secret}, metadata={"token": secret})
        assert secret not in repr(event)
        bad: list[Any] = [{"password": secret, "x": math.nan}, {"p": secret, "q": object()}]
        for data in bad:
            with pytest.raises(AsyncStoreError) as caught:
                await closed_store.events.append(ORDER, [Event("Login", data)], expected=ANY)
            assert secret not in str(caught.value)
            assert secret not in repr(caught.value)

    async def test_nothing_of_a_bad_batch_is_written(self, store: Store, order: Aggregate) -> None:
        batch = [Event("Good", 1), Event("Bad", math.nan)]
        with pytest.raises(InvalidValue):
            await store.events.append(order, batch, expected=NEW)
        assert await store.events.next_sequence(order) == 0


class TestClosedStores:
    async def test_before_and_after(self) -> None:
        store = asyncstore.open("embedded://")
        with pytest.raises(StoreClosed, match="not open"):
            await store.events.read(ORDER)
        async with store:
            assert await store.events.read(ORDER) == []
        with pytest.raises(StoreClosed, match="not open"):
            await store.events.read(ORDER)
        with pytest.raises(StoreClosed, match="entered once"):
            async with store:
                pass


def test_moments_are_compared_as_moments() -> None:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    assert Event("A", 1, time=moment).time == moment
