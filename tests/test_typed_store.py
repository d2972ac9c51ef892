"""A store of objects, on a real server: append, read, fold, decide, handle; and what bodies do."""

from __future__ import annotations

import asyncio
import bz2
import uuid
import zlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_type

import anyio
import pytest

import asyncstore
from asyncstore import (
    ANY,
    MAIN,
    NEW,
    Aggregate,
    ConfigurationError,
    CorruptEvent,
    Event,
    InvalidName,
    InvalidType,
    InvalidValue,
    RecordedEvent,
    Settings,
    Store,
    StoreClosed,
    verify,
)
from asyncstore.transfer import Import, export_lines
from asyncstore.typed import (
    Bodies,
    Forgotten,
    ForgottenEvent,
    InvalidEvent,
    Key,
    MemoryKeys,
    Policy,
    Registry,
    StoredKeys,
    Typed,
    TypedStore,
    UnreadableEvent,
    Zlib,
)
from tests import servers
from tests.builders import listed
from tests.fix_clusters import SmallCluster

MARK = "5ecret-marker"
LONG = "all work and no play " * 100


@dataclass(frozen=True)
class Deposited:
    amount: int
    note: str = ""


@dataclass(frozen=True)
class Moved:
    customer: str
    address: str


@dataclass(frozen=True)
class Left:
    customer: str
    address: str


def registry(**policies: Policy) -> Registry:
    bank = Registry(**policies)
    bank.event("Deposited")(Deposited)
    bank.event("Moved", version=2, upcasters={1: dict}, subject=lambda moved: moved.customer)(Moved)
    bank.event("Left", version=2, upcasters={1: dict})(Left)
    return bank


@pytest.fixture
async def store(one_server: servers.Server, prefix: str) -> AsyncIterator[Store]:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as opened:
        yield opened
    servers.sweep(one_server, prefix)


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys()


@pytest.fixture
def bank(store: Store, keys: MemoryKeys) -> TypedStore:
    return TypedStore(store, registry(), Bodies(compressions=[Zlib()], keys=keys))


def values(found: Sequence[Typed]) -> list[Any]:
    return [typed.value for typed in found]


ALL = [Deposited(1), Moved("c-17", MARK), Deposited(2, LONG), Moved("c-18", LONG)]


class TestStore:
    async def test_append_and_read(self, bank: TypedStore, store: Store, order: Aggregate) -> None:
        done = await bank.append(
            order, ALL, expected=NEW, metadata={"user": "u1"}, correlation_id="c", missed=True
        )
        assert (done.first_sequence, done.last_sequence) == (0, 3)
        found = await bank.read(order)
        assert values(found) == ALL
        assert [typed.event.sequence for typed in found] == [0, 1, 2, 3]
        assert {typed.event.correlation_id for typed in found} == {"c"}
        assert [typed.event.metadata for typed in found] == [
            {"user": "u1"},
            {"user": "u1", "$version": 2},
            {"user": "u1"},
            {"user": "u1", "$version": 2},
        ]
        assert values(await bank.read(order, reverse=True, limit=2)) == ALL[:1:-1]
        assert values([typed async for typed in bank.stream(order, start=1)]) == ALL[1:]
        (book,) = await store.events.correlated("c")
        assert values(await bank.from_events(book.events)) == ALL

    async def test_type_checkers_know_what_there_is(self, store: Store, order: Aggregate) -> None:
        bank: TypedStore[Deposited | Left] = TypedStore(store, registry())

        def balance(total: int, event: Deposited | Left) -> int:
            return total + event.amount if isinstance(event, Deposited) else 0

        await bank.append(order, [Deposited(1)], expected=NEW)
        await bank.update(order, lambda total: [Deposited(total + 1)], balance, 0)
        for found in await bank.read(order):
            assert_type(found.value, Deposited | Left)
        assert_type(await bank.fold(order, balance, 0), int)

        @bank.handler("mailer", "orders")
        async def mail(found: Typed[Deposited | Left]) -> None:
            assert_type(found.value, Deposited | Left)

        async for any_one in TypedStore(store, registry()).stream(order):
            assert_type(any_one.value, Any)

    async def test_what_others_see(self, bank: TypedStore, store: Store, order: Aggregate) -> None:
        await bank.append(order, ALL, expected=NEW)
        plain, locked, small, both = await store.events.read(order)
        assert (plain.data, plain.metadata) == ({"amount": 1, "note": ""}, {})
        assert small.metadata == {"$body": "json+zlib"}
        assert zlib.decompress(small.data).startswith(b'{"amount":2,')
        assert locked.metadata["$body"] == "json+aes-gcm"
        assert both.metadata["$body"] == "json+zlib+aes-gcm"
        assert both.metadata["$key"][0] == "c-18"
        assert len(both.data) < 200, "compressed before it was locked"
        assert isinstance(locked.data, bytes)
        assert MARK.encode() not in locked.data
        assert await listed(verify.problems(store)) == []

    async def test_a_long_stream_is_opened_bit_by_bit(self, store: Store, order: Aggregate) -> None:
        asked: list[int] = []

        class Counted(MemoryKeys):
            async def find(self, subjects: Collection[str]) -> Mapping[str, Key]:
                asked.append(len(subjects))
                return await super().find(subjects)

        bank = TypedStore(store, registry(), Bodies(keys=Counted()))
        many = [Moved(f"c-{n}", "here") for n in range(300)]
        await bank.append(order, many, expected=NEW)
        asked.clear()
        assert values([typed async for typed in bank.stream(order)]) == many
        assert asked == [128, 128, 44]

    async def test_fold_and_update(self, bank: TypedStore, order: Aggregate) -> None:
        def balance(state: int, event: Any) -> int:
            assert isinstance(event, Deposited | Moved)
            return state + (event.amount if isinstance(event, Deposited) else 0)

        def double(state: int) -> list[Any]:
            return [Deposited(state), Moved("c-17", f"{state}")]

        async def add(state: int) -> list[Any]:
            await asyncio.sleep(0)  # so that others come in between
            return [Deposited(1), Moved("c-17", f"{state}")]

        await bank.append(order, ALL, expected=NEW)
        assert await bank.fold(order, balance, 0) == 3
        done = await bank.update(order, double, balance, 0, idempotency_key="k")
        again = await bank.update(order, double, balance, 0, idempotency_key="k")
        assert (done.first_sequence, again.first_sequence, again.duplicate) == (4, 4, True)
        await asyncio.gather(*(bank.update(order, add, balance, 0) for _ in range(4)))
        assert await bank.fold(order, balance, 0) == 10
        assert (await bank.update(order, lambda _: [], balance, 0)).first_sequence == 14

    async def test_an_update_has_metadata(
        self, bank: TypedStore, store: Store, order: Aggregate
    ) -> None:
        def deposit(_: int) -> list[Deposited]:
            return [Deposited(1)]

        await bank.update(order, deposit, lambda state, _: state, 0, metadata={"user": "u1"})
        assert [event.metadata for event in await store.events.read(order)] == [{"user": "u1"}]

    async def test_snapshots_hold_no_secrets(self, bank: TypedStore, order: Aggregate) -> None:
        def last(state: str, event: Any) -> str:
            return event.address if isinstance(event, Moved) else state

        with pytest.raises(InvalidValue, match="a snapshot is not encrypted"):
            await bank.fold(order, last, "", snapshot_every=1)
        await bank.append(order, ALL, expected=NEW)
        state = await bank.fold(
            order, last, "", snapshot_every=1, dump=lambda _: None, restore=lambda _: "gone"
        )
        assert state == LONG
        options: Any = {"dump": lambda _: None, "restore": lambda _: "gone"}
        assert await bank.fold(order, last, "", snapshot_every=1, **options) == "gone"

    async def test_snapshots_without_keys(self, store: Store, order: Aggregate) -> None:
        bank = TypedStore(store, registry())
        await bank.append(order, [Deposited(3)], expected=NEW)
        total = await bank.fold(
            order, lambda state, event: state + event.amount, 0, snapshot_every=1
        )
        snapshot = await store.snapshots.get(order)
        assert snapshot is not None
        assert total == snapshot.state == 3

    async def test_deliveries_and_handlers(
        self, bank: TypedStore, store: Store, order: Aggregate
    ) -> None:
        await bank.append(order, [ALL[1]], expected=NEW)
        async with store.subscribe("movers", order.domain, types={"Moved"}) as sub:
            delivery = await anext(sub)
            (typed,) = await bank.from_events(delivery.events)
            assert typed.value == ALL[1]
            effects = await bank.to_events(order, [Deposited(5), Moved("c-17", "new")])
            await delivery.ack(append=effects)
        seen: list[Typed] = []
        done = asyncio.Event()

        @bank.handler("readers", order.domain, concurrency=1)
        async def read(typed: Typed) -> None:
            seen.append(typed)
            if len(seen) == 3:
                done.set()

        assert read.__name__ == "read"
        running = asyncio.ensure_future(store.run_handlers())
        with anyio.fail_after(20):
            await done.wait()
        running.cancel()
        assert values(seen) == [ALL[1], Deposited(5), Moved("c-17", "new")]
        assert seen[1].event.source == asyncstore.Source(order.domain, order.root, MAIN, 0)

    async def test_unknown_events_are_passed_over(self, store: Store, order: Aggregate) -> None:
        known = registry(unknown=Policy.SKIP)
        bank = TypedStore(store, known)
        events = [Event("Closed", {}), Event("Deposited", {"amount": 3})]
        await store.events.append(order, events, expected=NEW)
        assert values(await bank.read(order)) == [Deposited(3)]
        assert await bank.fold(order, lambda state, event: state + event.amount, 0) == 3
        assert known.skipped == {"Closed": 2}

    async def test_an_edition_shares_what_main_has(
        self, bank: TypedStore, order: Aggregate
    ) -> None:
        await bank.append(order, ALL[:2], expected=NEW)
        other = order.on("what-if")
        await bank.append(other, [ALL[3]], expected=ANY)
        assert values(await bank.read(other)) == [*ALL[:2], ALL[3]]

    @pytest.mark.parametrize("policy", [Policy.KEEP, Policy.SKIP])
    async def test_what_is_unknown_is_not_opened(
        self, bank: TypedStore, store: Store, order: Aggregate, policy: Policy
    ) -> None:
        await bank.append(order, [ALL[1], ALL[0]], expected=NEW)
        known = Registry(unknown=policy)
        known.event("Deposited")(Deposited)
        found = await TypedStore(store, known).read(order)  # without keys
        stored, _ = await store.events.read(order)
        assert values(found) == ([stored, ALL[0]] if policy is Policy.KEEP else [ALL[0]])

    async def test_export_and_import(
        self, bank: TypedStore, store: Store, one_server: servers.Server, prefix: str,
        keys: MemoryKeys, order: Aggregate,
    ) -> None:  # fmt: skip
        await bank.append(order, ALL, expected=NEW)
        lines = [line async for line in export_lines(store)]
        async with asyncstore.open(one_server.url, key_prefix=f"{prefix}copy:") as copy:
            await Import(copy).load(enumerate(lines, 1))
            copied = TypedStore(copy, registry(), Bodies(compressions=[Zlib()], keys=keys))
            assert values(await copied.read(order)) == ALL


class TestBadInput:
    """All of it is refused before any I/O: the store was never entered."""

    @pytest.fixture
    def closed(self) -> TypedStore:
        store = Store(Settings(url="redis://127.0.0.1:1"))
        return TypedStore(store, registry(), Bodies(keys=StoredKeys(store)))

    @pytest.mark.parametrize(
        ("objects", "error"),
        [
            ([Deposited("x")], InvalidEvent),  # type: ignore[arg-type]  # on purpose
            ([Deposited(1), {"amount": 1}], InvalidType),
            (Deposited(1), InvalidType),
            ({"amount": 1}, InvalidType),
            ("Deposited", InvalidType),
            ([Moved("c-17", MARK), Moved("c-17", 7)], InvalidEvent),  # type: ignore[arg-type]
            ([Moved("", MARK)], InvalidName),
            ([Moved("{c-17}", MARK)], InvalidName),
        ],
        ids=["field", "dict", "object", "mapping", "text", "second", "no-subject", "braces"],
    )
    async def test_objects(
        self, closed: TypedStore, order: Aggregate, objects: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error) as caught:
            await closed.append(order, objects, expected=NEW)
        assert MARK not in str(caught.value)

    @pytest.mark.parametrize(
        ("place", "expected", "error"),
        [(None, NEW, InvalidType), ("", -1, InvalidValue), ("", "0", InvalidType)],
        ids=["no-aggregate", "negative", "text"],
    )
    async def test_where(
        self, closed: TypedStore, order: Aggregate, place: Any, expected: Any, error: Any
    ) -> None:
        with pytest.raises(error):
            await closed.append(order if place == "" else place, [ALL[1]], expected=expected)

    @pytest.mark.parametrize("metadata", [{"$version": 7}, ["x"]], ids=["ours", "list"])
    async def test_metadata_of_an_update(
        self, closed: TypedStore, order: Aggregate, metadata: Any
    ) -> None:
        with pytest.raises((InvalidType, InvalidValue), match="metadata"):
            await closed.update(order, lambda _: [], lambda state, _: state, 0, metadata=metadata)

    async def test_the_first_io(self, closed: TypedStore, order: Aggregate) -> None:
        with pytest.raises(StoreClosed):
            await closed.append(order, [Moved("c-17", MARK)], expected=NEW)

    async def test_a_secret_without_keys(self, store: Store, order: Aggregate) -> None:
        with pytest.raises(InvalidValue, match=r"give Bodies\(keys=…\)"):
            await TypedStore(store, registry()).append(order, [ALL[1]], expected=NEW)
        with pytest.raises(InvalidValue, match="a Moved is kept secret"):
            registry().to_event(ALL[1])

    async def test_a_subject_that_is_none(self, bank: TypedStore, order: Aggregate) -> None:
        @dataclass
        class Seen:
            customer: int | None

        bank._registry.event("Seen", subject=lambda seen: seen.customer)(Seen)
        await bank.append(order, [Seen(None)], expected=NEW)
        assert values(await bank.read(order)) == [Seen(None)]
        with pytest.raises(InvalidType, match="subject: it must return a str or None, not int"):
            await bank.append(order, [Seen(17)], expected=1)

    def test_the_registry(self, store: Store) -> None:
        wrong: Any = {}
        with pytest.raises(InvalidType, match="a Registry is wanted"):
            TypedStore(store, wrong)

    @pytest.mark.parametrize(
        "options",
        [
            {"compressions": [zlib]},
            {"compressions": [Zlib]},
            {"compress_above": -1},
            {"compressions": [type("Own", (Zlib,), {"name": "a+b"})()]},
            {"compressions": [type("Own", (Zlib,), {"name": "aes-gcm"})()]},
        ],
        ids=["module", "class", "negative", "plus", "taken"],
    )
    def test_bodies(self, options: Any) -> None:
        with pytest.raises((InvalidType, InvalidValue)):
            Bodies(**options)

    @pytest.mark.parametrize("options", [{"level": 10}, {"most": 0}], ids=str)
    def test_zlib(self, options: Any) -> None:
        with pytest.raises(InvalidValue):
            Zlib(**options)

    def test_keys_are_not_read_from_replicas(self) -> None:
        store = Store(Settings(urls=("redis://127.0.0.1:1",), read_from="replica"))
        with pytest.raises(ConfigurationError, match="keys are read from primaries only"):
            StoredKeys(store)

    @pytest.mark.parametrize(
        ("events", "keys"),
        [
            ({"url": "redis://h", "key_prefix": "events:"}, {"url": "redis://h:6379"}),
            ({"url": "redis://h/0"}, {"url": "rediss://u:pw@h/1"}),
            ({"url": "unix:///run/r.sock"}, {"url": "unix:///run/r.sock?db=2"}),
            ({"urls": ["redis://a", "redis://b"]}, {"urls": ["redis://c", "redis://b"]}),
            ({"url": "embedded:///srv/events"}, {"path": "/srv/events"}),
        ],
        ids=["prefix", "database", "socket", "cluster", "embedded"],
    )
    def test_keys_beside_the_events(
        self, events: Any, keys: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        here, beside = Store(Settings(**events)), Store(Settings(**keys))
        TypedStore(here, registry(), Bodies(keys=StoredKeys(beside)))
        assert "keep keys on a server of their own" in caplog.text
        assert "pw" not in caplog.text

    @pytest.mark.parametrize(
        ("events", "keys"),
        [
            ("redis://h:1", "redis://h:2"),
            ("redis://h", "redis://i"),
            ("embedded://", "embedded://"),
        ],
        ids=["port", "host", "throw-away"],
    )
    def test_keys_apart_from_the_events(
        self, events: str, keys: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        here, apart = Store(Settings(url=events)), Store(Settings(url=keys))
        TypedStore(here, registry(), Bodies(keys=StoredKeys(apart)))
        assert not caplog.records


class TestBodies:
    async def stored(self, store: Store, order: Aggregate, bank: TypedStore) -> RecordedEvent:
        await bank.append(order, [Moved("c-17", MARK)], expected=NEW)
        (event,) = await store.events.read(order)
        return event

    @pytest.mark.parametrize(
        "change",
        [
            lambda at, event: (at, same(event, type="Left")),
            lambda at, event: (at, same(event, id=uuid.UUID(int=1))),
            lambda at, event: (Aggregate("orders", "other"), same(event)),
            lambda at, event: (Aggregate("others", at.root), same(event)),
            lambda at, event: (at, same(event, data=event.data[:-1] + b"\x00\x01")),
            lambda at, event: (at, same(event, data=event.data[:5])),
            lambda at, event: (at, same(event, data=b"")),
            lambda at, event: (at, same(event, metadata={**said(event), "$version": 1})),
            lambda at, event: (
                at,
                same(event, metadata={**said(event), "$body": "bytes+aes-gcm"}),
            ),
        ],
        ids=[
            "type",
            "id",
            "root",
            "domain",
            "bits",
            "nonce",
            "empty",
            "version",
            "encoding",
        ],
    )
    async def test_a_body_is_bound_to_its_event(
        self, bank: TypedStore, store: Store, order: Aggregate, change: Any
    ) -> None:
        event = await self.stored(store, order, bank)
        place, forged = change(order, event)
        await store.events.delete(order)
        await store.events.append(place, [forged], expected=ANY)
        with pytest.raises(UnreadableEvent, match="not the one that was locked") as caught:
            await bank.read(place)
        assert (caught.value.aggregate, caught.value.sequence) == (place, 0)
        await store.events.delete(place)

    @pytest.mark.parametrize(
        ("data", "metadata", "why"),
        [
            (b"none", {"$body": "json+zlib"}, "error when it was decompressed"),
            (b"{", {"$body": "json"}, "not what was stored"),
            (zlib.compress(b"{"), {"$body": "json+zlib"}, "not what was stored"),
            (zlib.compress(b"{}")[:-3], {"$body": "json+zlib"}, "ValueError when it was decomp"),
            (b"x", {"$body": "json+brotli"}, r"'brotli': give that to Bodies"),
            (b"x", {"$body": "xml"}, "not known to this version"),
            (b"x", {"$body": "json+zlib+zlib"}, "not known to this version"),
            ({}, {"$body": "json+zlib"}, "its body no bytes"),
            (b"x", {"$body": 7}, "its body no bytes"),
            (b"x", {"$body": "json+aes-gcm"}, "its .key is not a subject"),
            (b"x", {"$body": "json+aes-gcm", "$key": ["c"]}, "its .key is not a subject"),
            (b"x", {"$body": "json+aes-gcm", "$key": ["c", 7]}, "its .key is not a subject"),
        ],
        ids=str,
    )
    async def test_what_no_bodies_made(
        self, bank: TypedStore, store: Store, order: Aggregate, data: Any, metadata: Any, why: str
    ) -> None:
        event = Event("Deposited", data, metadata=metadata)
        await store.events.append(order, [event], expected=NEW)
        with pytest.raises(UnreadableEvent, match=why):
            await bank.read(order)

    async def test_a_reader_that_lacks_something(
        self, bank: TypedStore, store: Store, order: Aggregate
    ) -> None:
        await bank.append(order, ALL, expected=NEW)
        without = TypedStore(store, registry())
        with pytest.raises(UnreadableEvent, match=r"sequence 1: .* give Bodies\(keys=…\)"):
            await without.read(order, start=1, stop=2)
        with pytest.raises(UnreadableEvent, match=r"sequence 2: .*'zlib'"):
            await without.read(order, start=2, stop=3)

    async def test_a_bomb(self, store: Store, order: Aggregate) -> None:
        large = TypedStore(store, registry(), Bodies(compressions=[Zlib()]))
        await large.append(order, [Deposited(1, "x" * 100_000)], expected=NEW)
        small = TypedStore(store, registry(), Bodies(compressions=[Zlib(most=10_000)]))
        with pytest.raises(UnreadableEvent, match=r"more bytes than Zlib\(most=10000\)"):
            await small.read(order)
        with pytest.raises(InvalidValue, match=r"more than Zlib\(most=10000\)"):
            await small.append(order, [Deposited(1, "x" * 100_000)], expected=1)

    def test_the_most_that_zlib_gives_back(self) -> None:
        exact = Zlib(most=1000)
        assert exact.decompress(exact.compress(b"x" * 1000)) == b"x" * 1000

    async def test_a_compression_of_ones_own(self, store: Store, order: Aggregate) -> None:
        class Bz2:
            name = "bz2"
            compress = staticmethod(bz2.compress)
            decompress = staticmethod(bz2.decompress)

        before = TypedStore(store, registry(), Bodies(compressions=[Zlib()]))
        after = TypedStore(store, registry(), Bodies(compressions=[Bz2(), Zlib()]))
        await before.append(order, [Deposited(1, LONG)], expected=NEW)
        await after.append(order, [Deposited(2, LONG)], expected=1)
        assert values(await after.read(order)) == [Deposited(1, LONG), Deposited(2, LONG)]
        event = (await store.events.read(order))[1]
        assert event.metadata == {"$body": "json+bz2"}
        broken = same(event, data=event.data[:-9], id=uuid.UUID(int=1))
        await store.events.append(order, [broken], expected=2)
        with pytest.raises(UnreadableEvent, match=r"sequence 2: .*Error when it was decompressed"):
            await after.read(order)

    async def test_a_broken_event_stays_corrupt(
        self, bank: TypedStore, store: Store, order: Aggregate, one_server: servers.Server,
        prefix: str,
    ) -> None:  # fmt: skip
        await bank.append(order, [ALL[0]], expected=NEW)
        key = one_server.keys(prefix).events(order)
        servers.rewrite_member(one_server, key, 0, servers.without_end)
        with pytest.raises(CorruptEvent):
            await bank.read(order)

    async def test_what_is_not_smaller_stays(self, store: Store, order: Aggregate) -> None:
        bodies = Bodies(compressions=[Zlib()], compress_above=0)
        await TypedStore(store, registry(), bodies).append(order, ALL[:1], expected=NEW)
        (event,) = await store.events.read(order)
        assert event.data == {"amount": 1, "note": ""}


class TestForgetting:
    @pytest.fixture(params=["memory", "stored"])
    async def any_keys(
        self, request: pytest.FixtureRequest, one_server: servers.Server, prefix: str
    ) -> AsyncIterator[MemoryKeys | StoredKeys]:
        if request.param == "memory":
            yield MemoryKeys()
            return
        async with asyncstore.open(one_server.url, key_prefix=f"{prefix}keys:") as apart:
            yield StoredKeys(apart)

    async def test_what_readers_get(
        self, store: Store, order: Aggregate, any_keys: MemoryKeys | StoredKeys
    ) -> None:
        bodies = Bodies(compressions=[Zlib()], keys=any_keys)
        bank = TypedStore(store, registry(), bodies)
        await bank.append(order, ALL, expected=NEW)
        assert await any_keys.forget("c-17")
        assert not await any_keys.forget("c-17")
        assert values(await bank.read(order)) == [ALL[0], Forgotten("Moved", "c-17"), *ALL[2:]]

        skipping = registry(forgotten=Policy.SKIP)
        assert values(await TypedStore(store, skipping, bodies).read(order)) == [ALL[0], *ALL[2:]]
        assert skipping.skipped == {"Moved": 1}

        failing = TypedStore(store, registry(forgotten=Policy.FAIL), bodies)
        with pytest.raises(ForgottenEvent, match="sequence 1: Moved version 2: its subject, c-17"):
            await failing.read(order)

    async def test_a_subject_that_comes_back(
        self, store: Store, order: Aggregate, any_keys: MemoryKeys | StoredKeys
    ) -> None:
        bank = TypedStore(store, registry(), Bodies(keys=any_keys))
        await bank.append(order, [Moved("c-17", "old")], expected=NEW)
        await any_keys.forget("c-17")
        await bank.append(order, [Moved("c-17", "new")], expected=1)
        assert values(await bank.read(order)) == [Forgotten("Moved", "c-17"), Moved("c-17", "new")]

    async def test_who_asks_at_once_gets_the_same_key(
        self, any_keys: MemoryKeys | StoredKeys
    ) -> None:
        made = await asyncio.gather(*(any_keys.make({"c-17", "c-18"}) for _ in range(20)))
        assert all(keys == made[0] for keys in made)
        assert made[0]["c-17"].secret != made[0]["c-18"].secret
        assert await any_keys.find({"c-17", "c-19"}) == {"c-17": made[0]["c-17"]}

    async def test_keys_on_a_cluster(self, small_cluster: SmallCluster, prefix: str) -> None:
        persons = [Aggregate("people", f"c-{n}") for n in range(6)]
        moves: dict[Aggregate, object] = {person: Moved(person.root, MARK) for person in persons}
        async with (
            asyncstore.open(urls=small_cluster.urls, key_prefix=prefix) as store,
            asyncstore.open(urls=small_cluster.urls, key_prefix=f"{prefix}keys:") as apart,
        ):
            keys = StoredKeys(apart)
            bank = TypedStore(store, registry(), Bodies(keys=keys))
            for person in persons:
                await bank.append(person, [moves[person], *moves.values()], expected=NEW)
            assert await keys.forget("c-3")
            moves[persons[3]] = Forgotten("Moved", "c-3")
            for person in persons:
                assert values(await bank.read(person)) == [moves[person], *moves.values()]

    async def test_a_key_is_as_it_was_made(self, one_server: servers.Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=f"{prefix}keys:") as apart:
            made = await StoredKeys(apart).make(["c-17"])
        async with asyncstore.open(one_server.url, key_prefix=f"{prefix}keys:") as apart:
            assert await StoredKeys(apart).find(["c-17"]) == made
            foreign = Aggregate("subjects", "c-18")
            await apart.events.append(foreign, [Event("KeyMade", b"short")], expected=NEW)
            with pytest.raises(CorruptEvent, match="not the key of a subject"):
                await StoredKeys(apart).find(["c-18"])

    def test_a_repr_shows_no_key(self) -> None:
        assert repr(Key("9c41", b"s3cret")) == "Key(id='9c41')"


def said(event: RecordedEvent) -> dict[str, Any]:
    return dict(event.metadata)


def same(event: RecordedEvent, **changes: Any) -> Event:
    """The event, to be put somewhere else."""
    kept = {"type": event.type, "data": event.data, "id": event.id, "metadata": said(event)}
    return Event(**{**kept, **changes})
