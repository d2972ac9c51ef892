"""What was wrong with the Redis back end this one descends from: a test for each of its mistakes.

They are numbered as in the contract that the tests are written from. Runs on each server of the
matrix.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.crc import key_slot

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    CorruptEvent,
    Event,
    InvalidName,
    InvalidType,
    InvalidValue,
    Retention,
    SequenceConflict,
    Source,
    Store,
    UnexpectedReply,
    UnsafeServer,
)
from asyncstore.keys import Keys
from tests import servers
from tests.builders import listed, numbered, sequences
from tests.proxy import proxy_to
from tests.servers import Server, keys_with, redis_server, rewrite_member
from tests.test_contract_commands import Recorder, recording

CART = Source("carts", "7", "main", 3)
MAX_SEQUENCE = 2**53 - 1


@pytest.fixture
def recorder(server: Server, prefix: str) -> Iterator[Recorder]:
    with recording(server, prefix) as recorder:
        yield recorder


@pytest.fixture
async def branch(store: Store, order: Aggregate) -> Aggregate:
    """An edition that has left main, of six events, at 3: it goes on with 10, 11, 12."""
    noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
    for place, numbers, expected in ((order, range(6), 0), (order.on("if"), range(10, 13), 3)):
        events = [Event("At", {"n": n}, time=noon + timedelta(minutes=n)) for n in numbers]
        await store.events.append(place, events, expected=expected)
    return order.on("if")


def numbers(events: list[asyncstore.RecordedEvent]) -> list[int]:
    return [event.data["n"] for event in events]


def keys_of(server: Server, prefix: str) -> list[str]:
    return sorted(key.removeprefix(prefix) for key in keys_with(server, prefix))


@pytest.mark.parametrize("where", ["main", "what-if"])
async def test_mistake_01_check_then_write(
    server: Server, prefix: str, store: Store, order: Aggregate, where: str
) -> None:
    place = order.on(where)
    async with asyncstore.open(server.url, key_prefix=prefix) as other:
        for n in range(50):
            outcomes = await asyncio.gather(
                *(
                    writer.events.append(place, [Event("By", {"n": n, "by": by})], expected=n)
                    for by, writer in enumerate((store, other, store, other))
                ),
                return_exceptions=True,
            )
            won = [by for by, outcome in enumerate(outcomes) if outcome == Appended(n, n)]
            assert len(won) == 1
            assert sum(isinstance(o, SequenceConflict) for o in outcomes) == 3
            (event,) = await store.events.read(place, start=n)
            assert event.data == {"n": n, "by": won[0]}
    assert sequences(await store.events.read(place)) == list(range(50))


@pytest.mark.parametrize("count", [1, 5, 1000])
async def test_mistake_02_round_trips(
    server: Server, store: Store, order: Aggregate, recorder: Recorder, count: int
) -> None:
    # On a cluster the index of the correlation id is in another slot, and comes before.
    wanted = ["ZADD", "EVALSHA"] if server.is_cluster else ["EVALSHA"]
    for place in (order, order.on("what-if")):
        call = store.events.append(
            place,
            numbered(count),
            expected=NEW,
            idempotency_key="k",
            correlation_id="c",
            source=CART,
        )
        assert await recorder.of(call) == wanted
        assert recorder.inside.count("TIME") == 1
        assert len(recorder.inside) < 25, "and there is none for each event inside of it"


@pytest.mark.parametrize("where", ["main", "what-if"])
@pytest.mark.parametrize("index", ["roots", "editions", "domains", "correlated", "claims"])
async def test_mistake_03_indexes_are_changed_with_the_event(
    server: Server, prefix: str, store: Store, order: Aggregate, where: str, index: str
) -> None:
    place, keys = order.on(where), server.keys(prefix)
    roots, editions, domains = keys.indexes_of(place)
    key = {
        "roots": roots,
        "editions": editions,
        "domains": domains,
        "correlated": keys.correlated("c"),
        "claims": keys.claims(place),
    }[index]

    async def append() -> None:
        await store.events.append(
            place, numbered(2), expected=NEW, correlation_id="c", idempotency_key="k"
        )

    with server.client() as client:
        client.rpush(key, "in the way")  # so that the script fails in the middle
        with pytest.raises(UnexpectedReply, match="WRONGTYPE"):
            await append()
        client.delete(key)
    assert await store.events.read(place) == [], "no event that an index does not know of"
    await append()
    assert await listed(store.events.domains()) == ["orders"]
    assert await listed(store.events.editions("orders")) == [where]
    assert await listed(store.events.roots("orders", edition=where)) == [order.root]
    assert [book.aggregate for book in await store.events.correlated("c")] == [place]
    assert len(await store.events.find_idempotency_key(place, "k")) == 2


async def test_mistake_03_the_event_is_written_last(
    server: Server, prefix: str, store: Store, order: Aggregate, recorder: Recorder
) -> None:
    keys = server.keys(prefix)
    roots, editions, domains = keys.indexes_of(order)
    correlated, claims = keys.correlated("c"), keys.claims(order)
    # On a cluster the index of the correlation id comes before the script, as the first of all.
    first = [correlated, domains, editions, roots, claims]
    first = first if server.is_cluster else [domains, editions, roots, correlated, claims]
    later = [key for key in first if key not in (domains, editions)]
    for expected, indexes in enumerate((first, later)):
        await recorder.of(
            store.events.append(
                order, numbered(1), expected=expected, correlation_id="c", source=CART
            )
        )
        commands = [seen["command"].split() for seen in recorder.seen]
        written = [words[1] for words in commands if words[0] == "ZADD"]
        assert written == [*indexes, keys.events(order)]


@pytest.mark.parametrize("expected", [0, 1, 4, 6, 7])
async def test_mistake_04_every_sequence_of_a_batch_is_checked(
    store: Store, order: Aggregate, expected: int
) -> None:
    await store.events.append(order, numbered(5), expected=NEW)
    before = await store.events.read(order)
    # From the first one, from the last one, and beyond the end: no part of it is stored.
    with pytest.raises(SequenceConflict) as caught:
        await store.events.append(order, numbered(3, 70), expected=expected)
    assert caught.value.actual == 5
    assert await store.events.read(order) == before


@pytest.mark.parametrize("first", range(7))
async def test_mistake_05_a_branch_begins_anywhere(
    store: Store, order: Aggregate, first: int
) -> None:
    place = order.on("what-if")
    await store.events.append(order, numbered(6), expected=NEW)
    done = await store.events.append(place, numbered(2, 90), expected=first)
    assert done == Appended(first, first + 1)
    assert numbers(await store.events.read(place)) == [*range(first), 90, 91]
    assert await store.events.next_sequence(place) == first + 2
    with pytest.raises(SequenceConflict):
        await store.events.append(order.on("other"), numbered(1), expected=7)


async def test_mistake_06_read_is_read_from_0(store: Store, branch: Aggregate) -> None:
    events = await store.events.read(branch)
    assert numbers(events) == [0, 1, 2, 10, 11, 12]
    assert sequences(events) == [0, 1, 2, 3, 4, 5]
    assert await store.events.read(branch, start=0) == events
    assert await store.events.read(branch, start=0, stop=MAX_SEQUENCE) == events
    assert (await store.load(branch)).events == events
    assert await listed(store.events.stream(branch)) == events


async def test_mistake_07_ranges_are_composite(store: Store, branch: Aggregate) -> None:
    wanted = [0, 1, 2, 10, 11, 12]
    for start in range(8):
        for stop in range(start, 8):
            found = await store.events.read(branch, start=start, stop=stop)
            assert numbers(found) == wanted[start:stop]
            assert sequences(found) == list(range(start, min(stop, 6)))
            back = await store.events.read(branch, start=start, stop=stop, reverse=True)
            assert back == found[::-1]
    for place in (branch, branch.on("main")):
        assert await store.events.read(place, stop=0) == []
        assert await store.events.read(place, stop=0, reverse=True) == []


async def test_mistake_08_time_reads_are_composite(store: Store, branch: Aggregate) -> None:
    noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
    wanted = [0, 1, 2, 10, 11, 12]
    for minute in range(14):
        found = await store.events.read(branch, until=noon + timedelta(minutes=minute))
        assert numbers(found) == [n for n in wanted if n <= minute]
    assert await store.events.read(branch, until=noon - timedelta(microseconds=1)) == []


@pytest.mark.parametrize("where", ["main", "what-if"])
async def test_mistake_08_time_reads_send_what_is_wanted_only(
    server: Server, store: Store, order: Aggregate, where: str
) -> None:
    place = order.on(where)
    noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
    body = "x" * 2000
    events = [Event("At", body, time=noon + timedelta(minutes=n)) for n in range(2000)]
    await store.events.append(place, events, expected=NEW)

    async def bytes_of(call: Awaitable[list[asyncstore.RecordedEvent]], count: int) -> int:
        with server.primaries() as clients:

            def sent() -> int:
                stats: list[Any] = [client.info("stats") for client in clients]
                return sum(int(each["total_net_output_bytes"]) for each in stats)

            before = sent()
            assert len(await call) == count
            return sent() - before

    assert await bytes_of(store.events.read(place, until=noon + timedelta(minutes=4)), 5) < 100_000
    assert await bytes_of(store.events.read(place), 2000) > 4_000_000


async def test_mistake_09_the_main_timeline_has_one_spelling(
    server: Server, prefix: str, store: Store
) -> None:
    one = Aggregate("orders", "1")
    for same in (Aggregate("orders", "1", "main"), Aggregate("orders", "1", edition="main")):
        assert same == one
    assert one.on("what-if").on("main") == one
    for spelling in ("", "Main", "MAIN", "main ", " main", "maiN"):
        with pytest.raises(InvalidName):
            Aggregate("orders", "1", spelling)
        with pytest.raises(InvalidName):
            await store.events.delete_edition("orders", spelling)
    with pytest.raises(InvalidName):
        Aggregate("orders", "1", None)  # type: ignore[arg-type]
    await store.events.append(one, numbered(1), expected=NEW)
    await store.events.append(one.on("main"), numbered(1), expected=1)
    assert [k for k in keys_of(server, prefix) if k.startswith("events")] == [
        "events:orders:main:{1}"
    ]


async def test_mistake_10_names_with_separators(store: Store) -> None:
    with pytest.raises(InvalidName):
        Aggregate("a:b", "c")
    with pytest.raises(InvalidName):
        Aggregate("a", "c", "b:c")
    with pytest.raises(InvalidName):
        await store.positions.put("a:b", Aggregate("a", "c"), 1)
    places = [
        Aggregate("a", "b:c"),
        Aggregate("a", "c", "b"),
        Aggregate("a", "main:b:c"),
        Aggregate("a", "b:c", "main-b"),
        Aggregate("main", "b:c", "a"),
        Aggregate("a", ":"),
        Aggregate("a", "::"),
        Aggregate("a", " b:c "),
    ]
    for n, place in enumerate(places):
        await store.events.append(
            place, numbered(1, n), expected=NEW, correlation_id="c", idempotency_key="k"
        )
        await store.positions.put("p", place, n)
        await store.snapshots.put(place, sequence=0, state=n)
    for n, place in enumerate(places):
        assert numbers(await store.events.read(place)) == [n]
        assert await store.positions.get("p", place) == n
        snapshot = await store.snapshots.get(place)
        assert snapshot is not None
        assert snapshot.state == n
    roots = {
        (domain, edition): set(await listed(store.events.roots(domain, edition=edition)))
        for domain in await listed(store.events.domains())
        for edition in await listed(store.events.editions(domain))
    }
    assert roots == {
        ("a", "main"): {"b:c", "main:b:c", ":", "::", " b:c "},
        ("a", "b"): {"c"},
        ("a", "main-b"): {"b:c"},
        ("main", "a"): {"b:c"},
    }
    books = await store.events.correlated("c")
    assert {book.aggregate: numbers(book.events) for book in books} == {
        place: [n] for n, place in enumerate(places)
    }


async def test_mistake_11_correlation_loads_what_it_names(store: Store, recorder: Recorder) -> None:
    places = [Aggregate("orders", "1"), Aggregate("orders", "2"), Aggregate("carts", "1")]
    for place in places:
        await store.events.append(place, numbered(1500), expected=NEW)
        await store.events.append(place, numbered(2, 1500), expected=1500, correlation_id="c")
        await store.events.append(place, numbered(1500, 1502), expected=1502)
    await store.events.append(
        Aggregate("orders", "3"), numbered(9), expected=NEW, correlation_id="other"
    )
    books = await store.events.correlated("c")
    assert {book.aggregate: numbers(book.events) for book in books} == {
        place: [1500, 1501] for place in places
    }
    # Those of the aggregates travel together.
    assert await recorder.of(store.events.correlated("c")) == ["ZRANGE", *["EVALSHA"] * 3]
    assert recorder.inside == ["ZRANGE"] * 6


async def test_mistake_12_deleting_an_edition(
    server: Server, store: Store, recorder: Recorder
) -> None:
    neighbours = [
        Aggregate("orders", "1"),
        Aggregate("orders", "1", "what-if-2"),
        Aggregate("orders", "1", "what"),
        Aggregate("orders", "1", "what.if"),
        Aggregate("orders", "1", "whatXif"),
        Aggregate("orders", "what-if:1"),
        Aggregate("orders", "what-if", "x"),
        Aggregate("orders-2", "1", "what-if"),
        Aggregate("what-if", "1", "what-if"),
    ]
    gone = [Aggregate("orders", root, "what-if") for root in ("1", "2", "*", "[12]", "?", "a:b")]
    for n, place in enumerate([*neighbours, *gone]):
        await store.events.append(place, numbered(2, n), expected=NEW, idempotency_key="k")
        await store.positions.put("p", place, 1)
        await store.snapshots.put(place, sequence=1, state=n)
    # The recorder refuses whatever looks at all keys.
    count = store.events.delete_edition("orders", "what-if")
    asked = {"EXISTS"} if server.is_cluster else set()
    assert set(await recorder.of(count)) == {"ZRANGE", "EVALSHA"} | asked
    for place in gone:
        # A root that main has reads as main again.
        assert numbers(await store.events.read(place)) == ([0, 1] if place.root == "1" else [])
        assert await store.positions.get("p", place) is None
        assert await store.snapshots.get(place) is None
        assert await store.events.find_idempotency_key(place, "k") == []
    assert await listed(store.events.roots("orders", edition="what-if")) == []
    for n, place in enumerate(neighbours):
        assert numbers(await store.events.read(place)) == [n, n + 1]
        assert await store.positions.get("p", place) == 1
        assert await store.snapshots.get(place) is not None
        assert len(await store.events.find_idempotency_key(place, "k")) == 2
    # The same of an edition whose name is a pattern, to whoever takes it for one.
    await store.events.delete_edition("orders", "what.if")
    assert numbers(await store.events.read(neighbours[4])) == [4, 5]


async def test_mistake_13_hash_tags(server: Server, prefix: str, store: Store) -> None:
    order = Aggregate("orders", "a:b ☃")
    for place in (order, order.on("what-if")):
        for _ in range(2):
            await store.events.append(
                place,
                numbered(3),
                expected=ANY,
                idempotency_key="k",
                correlation_id="{process}:1",
                source=CART,
            )
        for sequence, retention in enumerate(
            [Retention.PERSIST, Retention.DEFAULT, Retention.DEFAULT]
        ):
            await store.snapshots.put(place, sequence=sequence, state=1, retention=retention)
        for handler in ("p", "main"):
            await store.positions.put(handler, place, 1)
    await store.events.branch(order.on("empty"), at=1)
    everything = keys_of(server, prefix)
    own = [key for key in everything if key.endswith("{a:b ☃}")]
    others = [key for key in everything if key not in own]
    kinds = {key.split(":")[0] for key in own}
    assert kinds == {
        "claims",
        "divergence",
        "events",
        "handlers",
        "positions",
        "snapshots",
        "snapshots-kept",
        "snapshots-recent",
    }
    # Not one, with its prefix and all, is in another slot than the others of the aggregate.
    assert {key_slot((prefix + key).encode()) for key in own} == {key_slot(order.root.encode())}
    # What is not of one aggregate alone is under the tag of the indexes, or the id's own.
    indexes = [key for key in others if not key.startswith("correlated:")]
    assert {key.split(":")[0] for key in indexes} == {
        "attached",
        "commits",
        "domains",
        "editions",
        "layout",
        "roots",
    }
    for key in indexes:
        is_beside = server.is_cluster and key != "layout:{all}"
        tag = order.root if is_beside else "all"
        assert key_slot((prefix + key).encode()) == key_slot(tag.encode())
    assert [key for key in others if key not in indexes] == ["correlated:{{process}:1}"]


async def test_mistake_14_a_missing_sequence_is_not_0(
    server: Server, prefix: str, store: Store, order: Aggregate
) -> None:
    append: Callable[..., Awaitable[Appended]] = store.events.append
    with pytest.raises(TypeError):
        await append(order, numbered(1))
    for nothing in (None, "", False, "0", 0.0, b""):
        with pytest.raises(InvalidType):
            await append(order, numbered(1), expected=nothing)
        with pytest.raises((InvalidType, InvalidValue)):
            await store.positions.put("p", order, nothing)  # type: ignore[arg-type]
        with pytest.raises((InvalidType, InvalidValue)):
            await store.snapshots.put(order, sequence=nothing, state=1)  # type: ignore[arg-type]
        with pytest.raises((InvalidType, InvalidValue)):
            Source("carts", "7", "main", nothing)  # type: ignore[arg-type]
    assert await store.events.next_sequence(order) == 0
    assert await store.positions.get("p", order) is None
    await store.events.append(order, numbered(3), expected=NEW)
    rewrite_member(server, Keys(prefix).events(order), 1, lambda member: b"[" + member[2:])
    with pytest.raises(CorruptEvent):
        await store.events.read(order)


@pytest.mark.parametrize("size", [1, 2000])
async def test_mistake_15_replies_are_bounded(
    server: Server, store: Store, order: Aggregate, recorder: Recorder, size: int
) -> None:
    branch = order.on("what-if")
    for first in range(0, 12_000, 2000):
        events = [Event("E", "x" * size) for _ in range(2000)]
        await store.events.append(order, events, expected=first, correlation_id="c", source=CART)
    await store.events.append(branch, numbered(10), expected=12_000)
    pages = 12_000 // 5000 + 1 if size == 1 else 12_000 * size // 2**20
    for call, count in (
        (lambda: store.events.read(order), 12_000),
        (lambda: store.events.read(branch, reverse=True), 12_010),
        (lambda: store.events.find_source(order, CART), 12_000),
    ):

        async def counted(
            call: Callable[[], Awaitable[list[asyncstore.RecordedEvent]]] = call,
            count: int = count,
        ) -> None:
            assert len(await call()) == count

        commands = await recorder.of(counted())
        assert commands == ["EVALSHA"] * len(commands)
        assert pages <= len(commands) <= pages + 4


@pytest.mark.parametrize("beyond", [2**53, 2**53 + 1, 2**63, 10**30])
async def test_mistake_16_no_score_above_2_to_53(
    server: Server, prefix: str, store: Store, order: Aggregate, beyond: int
) -> None:
    await store.events.append(order, numbered(2), expected=NEW)
    before = keys_of(server, prefix)
    branch = order.on("what-if")
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.events.append(order, numbered(1), expected=beyond),
        lambda: store.events.read(order, start=beyond),
        lambda: store.events.read(order, stop=beyond),
        lambda: store.events.read(branch, diverge_at=beyond),
        lambda: store.events.branch(branch, at=beyond),
        lambda: store.positions.put("p", order, beyond),
        lambda: store.positions.advance("p", order, beyond),
        lambda: store.snapshots.put(order, sequence=beyond, state=1),
        lambda: store.snapshots.get(order, at=beyond),
    ]
    for call in calls:
        with pytest.raises(InvalidValue, match="largest sequence"):
            await call()
    with pytest.raises(InvalidValue, match="largest sequence"):
        Source("carts", "7", "main", beyond)
    assert keys_of(server, prefix) == before
    assert sequences(await store.events.read(order)) == [0, 1]


async def test_mistake_16_the_largest_ones_are_exact(store: Store, order: Aggregate) -> None:
    for sequence in (MAX_SEQUENCE - 1, MAX_SEQUENCE):
        await store.positions.put("p", order, sequence)
        assert await store.positions.get("p", order) == sequence
        await store.snapshots.put(order, sequence=sequence, state=sequence)
        source = Source("carts", "7", "main", sequence)
        await store.events.append(order, numbered(1), expected=ANY, source=source)
    assert await store.positions.advance("p", order, MAX_SEQUENCE) is False
    for n, sequence in enumerate((MAX_SEQUENCE - 1, MAX_SEQUENCE)):
        snapshot = await store.snapshots.get(order, at=sequence)
        assert snapshot is not None
        assert snapshot.state == sequence
        source = Source("carts", "7", "main", sequence)
        assert sequences(await store.events.find_source(order, source)) == [n]
    with pytest.raises(SequenceConflict) as caught:
        await store.events.append(order, numbered(1), expected=MAX_SEQUENCE)
    assert (caught.value.expected, caught.value.actual) == (MAX_SEQUENCE, 2)


@pytest.mark.parametrize("where", ["main", "what-if"])
async def test_mistake_17_a_late_position_puts_nobody_back(
    store: Store, order: Aggregate, where: str
) -> None:
    place = order.on(where)
    assert await store.positions.advance("p", place, 10) is True
    for late in (9, 0, 10):
        assert await store.positions.advance("p", place, late) is False
        assert await store.positions.get("p", place) == 10
    moved = await asyncio.gather(*(store.positions.advance("p", place, n) for n in range(40)))
    assert await store.positions.get("p", place) == 39
    assert [n for n, was_moved in enumerate(moved) if was_moved] == list(range(11, 40))


@pytest.mark.parametrize("where", ["main", "what-if"])
async def test_mistake_18_an_older_snapshot_replaces_no_newer_one(
    store: Store, order: Aggregate, where: str
) -> None:
    place = order.on(where)
    await store.events.append(order, numbered(20), expected=NEW)
    await store.snapshots.put(place, sequence=15, state="new")
    for retention in Retention:
        await store.snapshots.put(place, sequence=5, state="old", retention=retention)
        loaded = await store.load(place)
        assert loaded.snapshot is not None
        assert (loaded.snapshot.sequence, loaded.snapshot.state) == (15, "new")
        assert sequences(loaded.events) == [16, 17, 18, 19]
    await store.snapshots.put(place, sequence=7, state="kept", retention=Retention.PERSIST)
    found = [await store.snapshots.get(place, at=at) for at in (7, 14, 15)]
    assert [snapshot and snapshot.sequence for snapshot in found] == [7, 7, 15]


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lfu"])
async def test_mistake_19_a_server_that_evicts_is_refused(binary: str, policy: str) -> None:
    with redis_server(binary, "--maxmemory-policy", policy) as running:
        with pytest.raises(UnsafeServer, match=policy):
            async with asyncstore.open(running.url):
                pass
        with running_client(running) as client:
            assert client.dbsize() == 0
            client.config_set("maxmemory-policy", "noeviction")
        async with asyncstore.open(running.url) as store:
            await store.events.append(Aggregate("orders", "1"), numbered(1), expected=NEW)


def running_client(running: servers.RedisServer) -> Any:
    return Server("", running.url).client()


@pytest.mark.parametrize("key", [None, "pay"])
async def test_mistake_19_a_resent_append_does_not_conflict_with_itself(
    binary: str, order: Aggregate, key: str | None
) -> None:
    with redis_server(binary) as running:
        path = Path(urlsplit(running.url).path)
        async with proxy_to(path) as proxy, asyncstore.open(proxy.url) as store:
            await store.events.append(order, numbered(1), expected=NEW)
            lost: list[tuple[Aggregate, asyncstore.Expected, int]] = [
                (order, 1, 1),
                (order, ANY, 3),
                (order.on("what-if"), 2, 2),
                (order.on("what-if"), 4, 4),
                (order.on("new"), NEW, 0),
                (Aggregate("orders", "other"), NEW, 0),
            ]
            for n, (place, expected, first) in enumerate(lost):
                proxy.replies.cut()
                done = await store.events.append(
                    place,
                    numbered(2, 10 * n),
                    expected=expected,
                    idempotency_key=key and f"{key}-{n}",
                )
                assert done == Appended(first, first + 1, duplicate=False)
                assert numbers(await store.events.read(place))[first:] == [10 * n, 10 * n + 1]
            assert proxy.cuts == len(lost)
            assert sequences(await store.events.read(order)) == [0, 1, 2, 3, 4]
            # It is another append that conflicts, be its reply lost or not.
            proxy.replies.cut()
            with pytest.raises(SequenceConflict):
                await store.events.append(order, numbered(1), expected=1)


def test_each_mistake_has_its_test() -> None:
    numbers = {int(n) for n in re.findall(r"test_mistake_(\d\d)_", " ".join(globals()))}
    assert numbers == set(range(1, 20))
