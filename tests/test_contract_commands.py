"""Which commands each call sends, as MONITOR tells it. Runs on each server of the matrix.

How many round trips a call costs, and that none of them, nor a script, looks at the whole keyspace.
On a cluster all primaries are recorded, and some calls send more: see `ON_A_CLUSTER`.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    BranchExists,
    Event,
    ProtectedEdition,
    Retention,
    SequenceConflict,
    Source,
    Store,
    scripts,
    slots,
)
from asyncstore.events import Events
from asyncstore.positions import Positions
from asyncstore.snapshots import Snapshots
from tests.builders import listed, numbered, roots_of_one_slot, sequences
from tests.servers import Server

FORBIDDEN = re.compile(r"KEYS|\w*SCAN|FLUSHALL|FLUSHDB|RANDOMKEY|SORT")


@dataclass
class Recorder:
    """Tells what the servers are asked to do while a call is made.

    `sent` are the names of the commands that came from clients, `inside` those that scripts ran.
    The beginning and the end are marked by an ECHO of `mark` on another connection.
    """

    client: redis.Redis
    watched: list[tuple[redis.Redis, Any]]  # each server, and its monitor
    mark: str
    seen: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sent(self) -> list[str]:
        names = [_name(each) for each in self.seen if each["client_type"] != "lua"]
        # A connection that was idle for seconds, as one of a cluster may be, is looked after.
        return [name for name in names if name != "PING"]

    @property
    def inside(self) -> list[str]:
        return [_name(each) for each in self.seen if each["client_type"] == "lua"]

    def drain(self) -> None:
        """Take what was recorded up to now. No command may be one that looks at all keys."""
        seen = [each for client, monitor in self.watched for each in self._seen_by(client, monitor)]
        self.seen = sorted(seen, key=lambda each: float(each["time"]))
        forbidden = {name for name in map(_name, seen) if FORBIDDEN.fullmatch(name)}
        assert not forbidden, forbidden

    def _seen_by(self, client: redis.Redis, monitor: Any) -> Iterator[dict[str, Any]]:
        client.echo(self.mark)
        while not (seen := monitor.next_command())["command"].startswith("ECHO " + self.mark):
            yield seen

    async def of(self, call: Awaitable[object]) -> list[str]:
        """Make the call, and return the commands that clients have sent for it."""
        self.drain()
        await call
        self.drain()
        return self.sent


def _name(seen: dict[str, Any]) -> str:
    return str(seen["command"]).split()[0].upper()


@contextmanager
def recording(server: Server, prefix: str) -> Iterator[Recorder]:
    """Record a server, or the primaries of a cluster, which have all scripts already."""
    with server.client() as client, server.primaries() as primaries, ExitStack() as stack:
        for script in scripts.ALL:
            client.script_load(script.source)
        yield Recorder(client, [(each, _monitor(stack, each)) for each in primaries], prefix)


def _monitor(stack: ExitStack, client: Any) -> Any:
    return stack.enter_context(client.monitor())


@pytest.fixture
def recorder(server: Server, prefix: str) -> Iterator[Recorder]:
    with recording(server, prefix) as recorder:
        yield recorder


CART = Source("carts", "7", "main", 3)
PERSIST = Retention.PERSIST


@dataclass(frozen=True)
class World:
    """A store with something in it: see `world`."""

    store: Store
    order = Aggregate("orders", "1")  # five events, the first two with a trace; position, snapshot
    branch = Aggregate("orders", "1", "what-if")  # two events of its own; position and snapshot
    explicit = Aggregate("orders", "1", "explicit")  # has left main, and has no events
    undiverged = Aggregate("orders", "1", "undiverged")
    fresh = Aggregate("orders", "fresh")

    @property
    def events(self) -> Events:
        return self.store.events

    @property
    def positions(self) -> Positions:
        return self.store.positions

    @property
    def snapshots(self) -> Snapshots:
        return self.store.snapshots


@pytest.fixture
async def world(store: Store) -> World:
    world = World(store)
    for place, expected in ((world.order, 0), (world.branch, 1)):
        await store.events.append(
            place,
            numbered(2),
            expected=expected,
            idempotency_key="pay",
            correlation_id="checkout",
            source=CART,
        )
        await store.events.append(place, numbered(3), expected=ANY)
        await store.positions.put("projector", place, 1)
        await store.snapshots.put(place, sequence=0, state=0, retention=PERSIST)
        await store.snapshots.put(place, sequence=1, state=1)
    await store.events.branch(world.explicit, at=3)
    return world


async def refused(
    call: Awaitable[object], error: type[Exception] | tuple[type[Exception], ...]
) -> Exception:
    with pytest.raises(error) as caught:
        await call
    return caught.value


async def append_traced(world: World, place: Aggregate, expected: int) -> None:
    await world.events.append(
        place,
        numbered(2),
        expected=expected,
        idempotency_key="ship",
        correlation_id="delivery",
        source=Source("carts", "7", "main", 9),
    )


async def append_duplicate(world: World) -> None:
    done = await world.events.append(
        world.order, numbered(1), expected=77, idempotency_key="pay", source=CART
    )
    assert done.duplicate


async def conflict_with_missed(world: World, place: Aggregate) -> None:
    call = world.events.append(place, numbered(1), expected=0, missed=True)
    conflict = await refused(call, SequenceConflict)
    assert isinstance(conflict, SequenceConflict)
    assert conflict.actual == 5 + (place.edition != "main")


SCRIPT, RANGE, COUNT = ["EVALSHA"], ["ZRANGE"], ["ZCARD"]
Call = Callable[[World], Awaitable[object]]
CALLS: dict[str, tuple[list[str], Call]] = {
    "append": (SCRIPT, lambda w: w.events.append(w.order, numbered(1), expected=5)),
    "append: any": (SCRIPT, lambda w: w.events.append(w.order, numbered(1), expected=ANY)),
    "append: fifty": (SCRIPT, lambda w: w.events.append(w.fresh, numbered(50), expected=NEW)),
    "append: traced": (SCRIPT, lambda w: append_traced(w, w.fresh, 0)),
    "append: first on a branch": (
        SCRIPT,
        lambda w: w.events.append(w.undiverged, numbered(2), expected=2),
    ),
    "append: traced, first on a branch": (SCRIPT, lambda w: append_traced(w, w.undiverged, 5)),
    "append: later on a branch": (
        SCRIPT,
        lambda w: w.events.append(w.branch, numbered(2), expected=6),
    ),
    "append: traced, later on a branch": (SCRIPT, lambda w: append_traced(w, w.branch, 6)),
    "append: after branch()": (
        SCRIPT,
        lambda w: w.events.append(w.explicit, numbered(2), expected=3),
    ),
    "append: duplicate": (SCRIPT, append_duplicate),
    "append: conflict": (
        SCRIPT,
        lambda w: refused(w.events.append(w.order, numbered(1), expected=2), SequenceConflict),
    ),
    "append: conflict with missed": (SCRIPT, lambda w: conflict_with_missed(w, w.order)),
    "append: conflict with missed on a branch": (
        SCRIPT,
        lambda w: conflict_with_missed(w, w.branch),
    ),
    "append: nothing": (COUNT, lambda w: w.events.append(w.order, [], expected=NEW)),
    "append: nothing on a branch": (
        SCRIPT,
        lambda w: w.events.append(w.branch, [], expected=NEW),
    ),
    "read": (SCRIPT, lambda w: w.events.read(w.order)),
    "read: unknown": (SCRIPT, lambda w: w.events.read(w.fresh)),
    "read: a range": (
        SCRIPT,
        lambda w: w.events.read(w.order, start=1, stop=4, limit=2, reverse=True),
    ),
    "read: nothing": ([], lambda w: w.events.read(w.order, stop=0)),
    "read: on a branch": (SCRIPT, lambda w: w.events.read(w.branch)),
    "read: on one that has not diverged": (SCRIPT, lambda w: w.events.read(w.undiverged)),
    "read: as if it diverged": (SCRIPT, lambda w: w.events.read(w.undiverged, diverge_at=2)),
    "stream": (SCRIPT, lambda w: listed(w.events.stream(w.order))),
    "stream: on a branch": (SCRIPT, lambda w: listed(w.events.stream(w.branch))),
    "next_sequence": (COUNT, lambda w: w.events.next_sequence(w.order)),
    "next_sequence: on a branch": (SCRIPT, lambda w: w.events.next_sequence(w.branch)),
    "confirm": (COUNT, lambda w: w.events.confirm(w.order)),
    "load": (SCRIPT, lambda w: w.events.load(w.order)),
    "load: by the store": (SCRIPT, lambda w: w.store.load(w.order)),
    "load: unknown": (SCRIPT, lambda w: w.store.load(w.fresh)),
    "load: on a branch": (SCRIPT, lambda w: w.store.load(w.branch)),
    "load: on one that has not diverged": (SCRIPT, lambda w: w.store.load(w.undiverged)),
    "load: of another schema": (SCRIPT, lambda w: w.store.load(w.order, schema_version=7)),
    "find_source": (SCRIPT, lambda w: w.events.find_source(w.order, CART)),
    "find_source: none": (SCRIPT, lambda w: w.events.find_source(w.fresh, CART)),
    "find_source: on a branch": (SCRIPT, lambda w: w.events.find_source(w.branch, CART)),
    "find_idempotency_key": (SCRIPT, lambda w: w.events.find_idempotency_key(w.order, "pay")),
    "find_idempotency_key: none": (SCRIPT, lambda w: w.events.find_idempotency_key(w.order, "x")),
    "find_idempotency_key: empty": ([], lambda w: w.events.find_idempotency_key(w.order, "")),
    "correlated": ([*RANGE, *SCRIPT, *SCRIPT], lambda w: w.events.correlated("checkout")),
    "correlated: unknown": (RANGE, lambda w: w.events.correlated("unknown")),
    "correlated: empty": ([], lambda w: w.events.correlated("")),
    "branch": (SCRIPT, lambda w: w.events.branch(w.undiverged, at=2)),
    "branch: there already": (
        SCRIPT,
        lambda w: refused(w.events.branch(w.branch, at=2), BranchExists),
    ),
    "branch: beyond main": (
        SCRIPT,
        lambda w: refused(w.events.branch(w.undiverged, at=9), SequenceConflict),
    ),
    "branch: main": ([], lambda w: refused(w.events.branch(w.order, at=2), ProtectedEdition)),
    "divergence": (["GET"], lambda w: w.events.divergence(w.branch)),
    "divergence: none": (["GET"], lambda w: w.events.divergence(w.undiverged)),
    "divergence: of main": ([], lambda w: w.events.divergence(w.order)),
    "delete: unknown": (SCRIPT, lambda w: w.events.delete(w.fresh)),
    "delete: without handlers and correlation ids": (
        SCRIPT,
        lambda w: w.events.delete(w.explicit),
    ),
    # Its handlers are asked for; it is erased; it is taken out of the indexes of correlation ids.
    "delete": (SCRIPT * 3, lambda w: w.events.delete(w.order)),
    "delete: on a branch": (SCRIPT * 3, lambda w: w.events.delete(w.branch)),
    "delete_edition": (
        [*RANGE, *SCRIPT, *SCRIPT, *SCRIPT, *RANGE],
        lambda w: w.events.delete_edition("orders", "what-if"),
    ),
    "delete_edition: unknown": (
        [*RANGE, *RANGE],
        lambda w: w.events.delete_edition("orders", "unknown"),
    ),
    "delete_edition: main": (
        [],
        lambda w: refused(w.events.delete_edition("orders", "main"), ProtectedEdition),
    ),
    "domains": (RANGE, lambda w: listed(w.events.domains())),
    "editions": (RANGE, lambda w: listed(w.events.editions("orders"))),
    "roots": (RANGE, lambda w: listed(w.events.roots("orders"))),
    "roots: on a branch": (RANGE, lambda w: listed(w.events.roots("orders", edition="what-if"))),
    "positions.get": (["GET"], lambda w: w.positions.get("projector", w.order)),
    "positions.get: unknown": (["GET"], lambda w: w.positions.get("projector", w.fresh)),
    "positions.get: on a branch": (SCRIPT, lambda w: w.positions.get("projector", w.branch)),
    # It asks until the position is reached, which it is.
    "positions.wait": (["GET"], lambda w: w.positions.wait("projector", w.order, 1, timeout=5)),
    "positions.put": (SCRIPT, lambda w: w.positions.put("projector", w.order, 3)),
    "positions.put: on a branch": (SCRIPT, lambda w: w.positions.put("saga", w.undiverged, 3)),
    "positions.advance": (SCRIPT, lambda w: w.positions.advance("projector", w.order, 3)),
    "positions.advance: back": (SCRIPT, lambda w: w.positions.advance("projector", w.order, 0)),
    "positions.advance: on a branch": (
        SCRIPT,
        lambda w: w.positions.advance("projector", w.branch, 3),
    ),
    "snapshots.get": (SCRIPT, lambda w: w.snapshots.get(w.order)),
    "snapshots.get: unknown": (SCRIPT, lambda w: w.snapshots.get(w.fresh)),
    "snapshots.get: at": (SCRIPT, lambda w: w.snapshots.get(w.order, at=0)),
    "snapshots.get: on a branch": (SCRIPT, lambda w: w.snapshots.get(w.branch, at=0)),
    "snapshots.put": (SCRIPT, lambda w: w.snapshots.put(w.order, sequence=4, state=1)),
    "snapshots.put: older": (
        SCRIPT,
        lambda w: w.snapshots.put(w.order, sequence=0, state=1, retention=PERSIST),
    ),
    "snapshots.put: on a branch": (
        SCRIPT,
        lambda w: w.snapshots.put(w.undiverged, sequence=4, state=1),
    ),
    "snapshots.delete": (SCRIPT, lambda w: w.snapshots.delete(w.order)),
    "snapshots.delete: on a branch": (SCRIPT, lambda w: w.snapshots.delete(w.branch)),
}


# The index of a correlation id, in another slot, is changed by a command of its own: before the
# events are stored, and after they are erased.
TRACED = ["ZADD", *SCRIPT]
ERASED = [*SCRIPT, *SCRIPT, "ZREMRANGEBYLEX", *SCRIPT]
# Each slot has its own indexes: first it is asked which of them are there, then these are read.
THERE = ["EXISTS"] * slots.COUNT
LISTED = [*THERE, *RANGE]
ON_A_CLUSTER = {
    "append: traced": TRACED,
    "append: traced, first on a branch": TRACED,
    "append: traced, later on a branch": TRACED,
    "delete": ERASED,
    "delete: on a branch": ERASED,
    "delete_edition": [*LISTED, *ERASED, *THERE],
    "delete_edition: unknown": [*THERE, *THERE],
    "domains": LISTED,
    "editions": LISTED,
    "roots": LISTED,
    "roots: on a branch": LISTED,
}


@pytest.mark.parametrize("name", CALLS)
async def test_commands_of_a_call(
    server: Server, world: World, recorder: Recorder, name: str
) -> None:
    commands, call = CALLS[name]
    if server.is_cluster:
        commands = ON_A_CLUSTER.get(name, commands)
    sent = await recorder.of(call(world))
    assert Counter(sent) == Counter(commands)
    # Questions to all slots go in rounds, with what is read in between.
    assert _without_exists(sent) == _without_exists(commands)
    assert bool(recorder.inside) == ("EVALSHA" in commands), "what scripts do is recorded, too"


def _without_exists(commands: list[str]) -> list[str]:
    return [name for name in commands if name != "EXISTS"]


def test_every_call_is_counted() -> None:
    public = {
        prefix + name
        for prefix, kind in (("", Events), ("positions.", Positions), ("snapshots.", Snapshots))
        for name in vars(kind)
        if not name.startswith("_")
    }
    assert {name.split(":")[0] for name in CALLS} == public


class TestTheRecorder:
    """It would notice."""

    @pytest.mark.parametrize("command", [["KEYS", "none"], ["SCAN", "0"], ["ZSCAN", "none", "0"]])
    async def test_a_forbidden_command(self, recorder: Recorder, command: list[str]) -> None:
        recorder.drain()
        recorder.client.execute_command(*command)  # type: ignore[no-untyped-call]
        with pytest.raises(AssertionError, match=command[0]):
            recorder.drain()

    @pytest.mark.parametrize("command", ["'KEYS', 'none'", "'HSCAN', 'none', 0"])
    async def test_a_forbidden_command_in_a_script(self, recorder: Recorder, command: str) -> None:
        recorder.drain()
        recorder.client.eval(f"return redis.call({command})", 1, "none")
        with pytest.raises(AssertionError, match=r"KEYS|HSCAN"):
            recorder.drain()

    @pytest.mark.parametrize("name", ["FLUSHALL", "FLUSHDB", "KEYS", "SCAN", "SSCAN", "HSCAN"])
    def test_the_names_that_are_forbidden(self, name: str) -> None:
        assert FORBIDDEN.fullmatch(name)

    async def test_the_rest_of_a_call_that_is_not_over(
        self, recorder: Recorder, store: Store, order: Aggregate
    ) -> None:
        async def twice() -> None:
            await store.events.append(order, numbered(1), expected=0)
            await store.events.append(order, numbered(1), expected=1)

        assert await recorder.of(twice()) == ["EVALSHA", "EVALSHA"]


class TestOpening:
    async def test_opening_and_closing_looks_at_no_keyspace(
        self, server: Server, prefix: str, recorder: Recorder
    ) -> None:
        async def open_and_close() -> None:
            async with asyncstore.open(server.url, key_prefix=prefix + "other:"):
                pass

        for is_there_already in (False, True):
            commands = await recorder.of(open_and_close())
            assert {"INFO", "GET"} <= set(commands)
            assert ("EVALSHA" not in commands) == is_there_already
        recorder.client.delete(f"{prefix}other:layout:{{all}}")

    async def test_a_script_that_the_server_lacks_is_sent_once(
        self, recorder: Recorder, store: Store, order: Aggregate
    ) -> None:
        recorder.client.script_flush()
        call = store.events.append(order, numbered(1), expected=0)
        assert await recorder.of(call) == ["EVALSHA", "EVAL"]
        call = store.events.append(order, numbered(1), expected=1)
        assert await recorder.of(call) == ["EVALSHA"]


def append_with_key(store: Store) -> Callable[[Aggregate], Awaitable[object]]:
    keys = itertools.count()
    return lambda place: store.events.append(
        place, numbered(1), expected=ANY, idempotency_key=f"{next(keys)}"
    )


def slots_of(places: list[Aggregate]) -> int:
    return len({slots.slot_of_tag(place.root) for place in places})


class TestMany:
    async def test_appends_of_one_turn_travel_together(
        self, server: Server, recorder: Recorder, store: Store
    ) -> None:
        places = [Aggregate("orders", f"{n}") for n in range(128)]
        commands = await recorder.of(asyncio.gather(*map(append_with_key(store), places)))
        assert set(commands) == {"EVALSHA"}
        # On a cluster one call can't have what is in two slots.
        assert len(commands) <= (slots_of(places) if server.is_cluster else 128 // 8)

    async def test_appends_of_one_turn_and_slot_travel_together(
        self, recorder: Recorder, store: Store
    ) -> None:
        places = [Aggregate("orders", root) for root in roots_of_one_slot(8)] * 16
        commands = await recorder.of(asyncio.gather(*map(append_with_key(store), places)))
        assert set(commands) == {"EVALSHA"}
        assert len(commands) <= 128 // 8

    @pytest.mark.parametrize("where", ["main", "what-if"])
    async def test_finding_does_not_read_the_aggregate(
        self, recorder: Recorder, store: Store, order: Aggregate, where: str
    ) -> None:
        place = order.on(where)
        await store.events.append(place, numbered(2500), expected=NEW)
        await store.events.append(
            place, numbered(2, 2500), expected=2500, source=CART, idempotency_key="pay"
        )
        await store.events.append(place, numbered(2498, 2502), expected=2502)

        async def by_source() -> None:
            assert sequences(await store.events.find_source(place, CART)) == [2500, 2501]

        async def by_key() -> None:
            found = await store.events.find_idempotency_key(place, "pay")
            assert sequences(found) == [2500, 2501]

        for find in (by_source, by_key):
            assert await recorder.of(find()) == ["EVALSHA"]
            # The claims, and the events that they name.
            assert recorder.inside == ["ZRANGE", "ZRANGE"]

    async def test_a_duplicate_does_not_read_the_aggregate(
        self, recorder: Recorder, store: Store, order: Aggregate
    ) -> None:
        await store.events.append(order, numbered(1000), expected=NEW, idempotency_key="bulk")
        await store.events.append(order, numbered(4000), expected=1000)
        call = store.events.append(order, numbered(1), expected=ANY, idempotency_key="bulk")
        assert await recorder.of(call) == ["EVALSHA"]
        assert recorder.inside == ["ZCARD", "ZRANGE"]

    async def test_correlated_is_one_and_one_for_each_aggregate(
        self, recorder: Recorder, store: Store
    ) -> None:
        await asyncio.gather(
            *(
                store.events.append(
                    Aggregate("orders", f"{n}"), numbered(20), expected=0, correlation_id="c"
                )
                for n in range(250)
            ),
            *(
                store.events.append(
                    Aggregate("carts", f"{n}"), numbered(1), expected=0, correlation_id="d"
                )
                for n in range(50)
            ),
        )
        commands = await recorder.of(store.events.correlated("c"))
        assert commands.count("EVALSHA") == 250
        assert commands.count("ZRANGE") == 3  # pages of a hundred aggregates
        assert len(commands) == 253
        assert len(await recorder.of(store.events.correlated("d"))) == 51

    async def test_correlated_does_not_read_the_aggregates(
        self, recorder: Recorder, store: Store
    ) -> None:
        for place in (Aggregate("orders", "1"), Aggregate("carts", "1", "what-if")):
            await store.events.append(place, numbered(2000), expected=NEW)
            await store.events.append(place, numbered(1), expected=2000, correlation_id="c")
            await store.events.append(place, numbered(2000), expected=2001)
        books = await store.events.correlated("c")
        assert [sequences(book.events) for book in books] == [[2000], [2000]]
        assert len(await recorder.of(store.events.correlated("c"))) == 3
        assert recorder.inside == ["ZRANGE"] * 4

    async def test_delete_is_one_more_for_handlers_and_for_each_200_ids(
        self, server: Server, recorder: Recorder, store: Store, order: Aggregate
    ) -> None:
        await asyncio.gather(
            *(
                store.events.append(order, numbered(10), expected=ANY, correlation_id=f"c{n}")
                for n in range(300)
            ),
            *(store.positions.put(f"handler-{n}", order, 1) for n in range(100)),
        )
        commands = await recorder.of(store.events.delete(order))
        scripts_sent = [name for name in commands if name != "ZREMRANGEBYLEX"]
        assert scripts_sent == ["EVALSHA"] * 4
        # On a cluster the indexes of the ids are in other slots: one more for each of them.
        assert commands.count("ZREMRANGEBYLEX") == (300 if server.is_cluster else 0)
        assert await recorder.of(store.events.delete(order)) == ["EVALSHA"]

    async def test_delete_edition_is_two_for_each_aggregate(
        self, server: Server, recorder: Recorder, store: Store
    ) -> None:
        places = [Aggregate("orders", f"{n}", "what-if") for n in range(150)]
        for place in places:
            await store.events.append(place, numbered(1), expected=NEW, correlation_id="c")
        commands = await recorder.of(store.events.delete_edition("orders", "what-if"))
        wanted = Counter(EVALSHA=300, ZRANGE=3)  # two pages of roots, one of what else is there
        if server.is_cluster:
            # Roots of each slot, and nothing else on the edition; the id's index is elsewhere.
            wanted = Counter(
                EVALSHA=300, ZREMRANGEBYLEX=150, ZRANGE=slots_of(places), EXISTS=2 * slots.COUNT
            )
        assert Counter(commands) == wanted

    async def test_listing_is_one_for_each_thousand(
        self, server: Server, prefix: str, recorder: Recorder, store: Store
    ) -> None:
        first = Aggregate("orders", "0")
        await store.events.append(first, numbered(1), expected=NEW)
        index = server.keys(prefix).indexes_of(first)[0]
        recorder.client.zadd(index, {f"{n}": n for n in range(1, 2500)})
        commands = await recorder.of(listed(store.events.roots("orders")))
        assert commands.count("ZRANGE") == 3
        assert commands.count("EXISTS") == (slots.COUNT if server.is_cluster else 0)
        assert len(commands) == commands.count("ZRANGE") + commands.count("EXISTS")

    async def test_listing_of_many_slots(
        self, server: Server, recorder: Recorder, store: Store
    ) -> None:
        places = [Aggregate("orders", f"{n}") for n in range(2500)]
        await asyncio.gather(
            *(store.events.append(place, numbered(1), expected=NEW) for place in places)
        )
        commands = await recorder.of(listed(store.events.roots("orders")))
        assert commands.count("ZRANGE") == (slots_of(places) if server.is_cluster else 3)
        commands = await recorder.of(listed(store.events.domains()))
        assert commands.count("ZRANGE") == (slots_of(places) if server.is_cluster else 1)

    async def test_a_read_of_much_is_one_for_each_megabyte(
        self, recorder: Recorder, store: Store, order: Aggregate
    ) -> None:
        events = [Event("Large", b"x" * 10_000) for _ in range(400)]
        await store.events.append(order, events, expected=NEW, correlation_id="c", source=CART)
        calls: list[Awaitable[object]] = [
            store.events.read(order),
            store.load(order),
            store.events.find_source(order, CART),
        ]
        for call in calls:
            commands = await recorder.of(call)
            assert set(commands) == {"EVALSHA"}
            assert 3 <= len(commands) <= 5
