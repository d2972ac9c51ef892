"""From one server to a cluster: all of it arrives, and comparing both sides tells if not."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

import asyncstore
from asyncstore import (
    NEW,
    Aggregate,
    Event,
    Retention,
    Source,
    Store,
    comparing,
    embedded,
    transfer,
)
from asyncstore.comparing import Difference
from tests.builders import listed, numbered
from tests.fix_clusters import SmallCluster
from tests.servers import Server, as_user, redis_server
from tests.test_transfer import load, run

ONE, WHAT_IF = Aggregate("orders", "1"), Aggregate("orders", "1", "what-if")


async def fill(store: Store, roots: int = 30) -> None:
    """Put in what there can be."""
    append, source = store.events.append, Source("payments", "p 1", "what-if", 7)
    for root in (*map(str, range(roots)), "☃ 'x:y"):
        place = Aggregate("orders", root)
        await append(place, numbered(2), expected=NEW)
        await append(place, numbered(3), expected=2, idempotency_key="k1", correlation_id="c")
        await append(place, [Event("Raw", b"\x00\xff", metadata={"a": 1})], expected=5)
        await append(place.on("what-if"), numbered(2), expected=3, source=source)
        await store.positions.put("projector", place, 4)
        await store.positions.put("projector", place.on("what-if"), 3)
        await store.positions.put("saga", place, 0)
    await store.events.branch(ONE.on("empty"), at=6)
    await store.events.branch(Aggregate("carts", "none").on("early"), at=0)
    await store.positions.put("saga", ONE.on("empty"), 2)
    # On an edition that others are on, without a branch: it reads as main.
    other = Aggregate("orders", "of main only")
    await append(other, numbered(3), expected=NEW)
    await store.positions.put("projector", other.on("what-if"), 1)
    await store.snapshots.put(other.on("what-if"), sequence=1, state="as main")
    await put_snapshots(store, ONE)
    await store.snapshots.put(WHAT_IF, sequence=4, state={"deep": [1.5]}, schema_version=3)


async def put_snapshots(store: Store, place: Aggregate) -> None:
    put = store.snapshots.put
    await put(place, sequence=0, state="kept", retention=Retention.PERSIST, schema_version=1)
    await put(place, sequence=1, state=b"\x00raw", retention=Retention.PERSIST)
    for sequence in (2, 3):
        await put(place, sequence=sequence, state={"n": sequence})
    await put(place, sequence=5, state=None, retention=Retention.TRANSIENT)


@pytest.fixture
async def old(one_server: Server, prefix: str) -> AsyncIterator[Store]:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as opened:
        yield opened


@pytest.fixture
async def new(small_cluster: SmallCluster) -> AsyncIterator[Store]:
    prefix = f"test-{uuid.uuid4().hex}:"
    async with asyncstore.open(urls=small_cluster.urls, key_prefix=prefix) as opened:
        yield opened


@pytest.fixture
async def other(one_server: Server, prefix: str) -> AsyncIterator[Store]:
    async with asyncstore.open(one_server.url, key_prefix=prefix + "other:") as opened:
        yield opened


async def compared(one: Store, other: Store) -> list[Difference]:
    return await listed(comparing.differences(one, other))


async def copied(store: Store, to: Store) -> transfer.ImportReport:
    report = await load(to, await listed(transfer.export_lines(store)))
    assert (report.bad_lines, report.held_back) == ([], 0)
    return report


class TestFromOneServerToACluster:
    async def test_everything_arrives(self, old: Store, new: Store) -> None:
        await fill(old)
        report = await copied(old, new)
        assert (report.stored, report.branches) == (31 * 8 + 3, 31 + 2)
        assert (report.positions, report.snapshots) == (31 * 3 + 2, 7)
        assert await compared(old, new) == []
        assert await new.snapshots.get(ONE) == await old.snapshots.get(ONE)
        for at in range(7):
            assert await new.snapshots.get(ONE, at=at) == await old.snapshots.get(ONE, at=at)
        assert await new.positions.get("projector", WHAT_IF) == 3
        again = await copied(old, new)
        assert (again.stored, again.branches, again.positions) == (0, 0, 0)
        assert await compared(old, new) == []

    async def test_the_rights_of_a_user_of_the_store_are_enough(self) -> None:
        with redis_server(str(embedded.find_binary())) as server:
            url = as_user(server.url)
            async with (
                asyncstore.open(url, key_prefix="test-1:") as one,
                asyncstore.open(url, key_prefix="test-2:") as two,
            ):
                await fill(one, 3)
                await copied(one, two)
                assert await compared(one, two) == []

    async def test_and_back(self, old: Store, new: Store, other: Store) -> None:
        await fill(old, 3)
        await copied(old, new)
        await copied(new, other)
        assert await compared(old, other) == []


class TestLines:
    async def test_the_form_of_positions_and_snapshots(self, old: Store) -> None:
        await old.events.append(ONE, numbered(4), expected=NEW)
        await old.positions.put("projector", ONE, 2)
        moment = datetime(2024, 1, 1, 12, 0, 0, 5, tzinfo=UTC)
        await old.snapshots.put(ONE, sequence=1, state={"n": 1}, time=moment, schema_version=2)
        await old.snapshots.put(
            ONE, sequence=3, state=b"\xff", time=moment, retention=Retention.PERSIST
        )
        lines = [json.loads(text) for text in await listed(transfer.export_lines(old))]
        place = {"domain": "orders", "edition": "main", "root": "1"}
        about = {"retention": "default", "time": "2024-01-01T12:00:00.000005+00:00"}
        assert lines[4:] == [
            {**place, "snapshot": 1, **about, "schema_version": 2, "state": {"n": 1}},
            {
                **place,
                "snapshot": 3,
                **about,
                "retention": "persist",
                "schema_version": 0,
                "state_base64": "/w==",
            },
            {**place, "handler": "projector", "position": 2},
        ]

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            ({"position": 1}, "no 'handler'"),
            ({"handler": "a:b", "position": 1}, "handler 'a:b'"),
            ({"handler": "a", "position": -1}, "position: -1 is negative"),
            ({"handler": "a", "position": None}, "position: a whole number"),
            ({"handler": "a", "position": 1, "data": 1}, "both 'position' and 'data'"),
            ({"handler": "a", "type": "A", "data": 1}, "unknown key 'handler'"),
            ({"snapshot": 1}, "either 'state' or 'state_base64'"),
            ({"snapshot": "1", "state": 1}, "snapshot: a whole number"),
            ({"snapshot": 1, "state_base64": "?"}, "not base64"),
            ({"snapshot": 1, "state": 1, "retention": "ever"}, "none of default, persist"),
            ({"snapshot": 1, "state": 1, "schema_version": -1}, "schema_version"),
            ({"snapshot": 1, "state": 1, "time": "x"}, "ISO 8601"),
            ({"snapshot": 1, "state": 1, "time": "1969-01-01T00:00:00Z"}, "before 1970"),
            ({"snapshot": 1, "state": 2**70}, "can't be written as JSON"),
            ({"snapshot": 1, "state": 1, "position": 1}, "both 'snapshot' and 'position'"),
        ],
    )
    async def test_a_bad_line_holds_its_aggregate_back(
        self, old: Store, bad: dict[str, Any], why: str
    ) -> None:
        place = {"domain": "orders", "root": "1"}
        event = {**place, "type": "A", "data": 0}
        position = {**place, "handler": "projector", "position": 0}
        elsewhere = {**position, "root": "2"}
        report = await load(old, [event, {**place, **bad}, position, elsewhere])
        assert [line.number for line in report.bad_lines] == [2]
        assert why in report.bad_lines[0].why
        assert (report.stored, report.positions, report.held_back) == (1, 1, 1)

    async def test_what_has_gone_on_is_not_put_back(self, old: Store) -> None:
        place = {"domain": "orders", "root": "1"}
        earlier = "2024-01-01T00:00:00Z"
        lines = [
            {**place, "handler": "projector", "position": 3},
            {**place, "snapshot": 1, "state": "mine", "time": earlier},
        ]
        await old.positions.put("projector", ONE, 5)
        await old.snapshots.put(ONE, sequence=1, state="newer")
        report = await load(old, lines)
        assert (report.positions, report.snapshots, report.present) == (0, 0, 2)
        assert await old.positions.get("projector", ONE) == 5
        await old.snapshots.put(
            ONE, sequence=1, state="older", time=datetime(2023, 1, 1, tzinfo=UTC)
        )
        assert (await load(old, lines)).snapshots == 1
        found = await old.snapshots.get(ONE)
        assert found is not None
        assert (found.state, found.time) == ("mine", datetime(2024, 1, 1, tzinfo=UTC))

    async def test_positions_and_snapshots_are_never_further_than_the_events(
        self, old: Store, new: Store
    ) -> None:
        await old.events.append(ONE, numbered(3), expected=NEW)
        await old.positions.put("projector", ONE, 1)
        await old.snapshots.put(ONE, sequence=1, state=1)
        export = transfer.export_lines(old)
        lines = [await anext(export)]
        await old.events.append(ONE, numbered(3), expected=3)
        await old.positions.put("projector", ONE, 5)
        await old.snapshots.put(ONE, sequence=5, state=5)
        lines += [line async for line in export]
        assert (await load(new, lines)).stored == 3
        assert await new.positions.get("projector", ONE) == 1
        found = await new.snapshots.get(ONE)
        assert found is not None
        assert found.sequence == 1

    async def test_gaps_move_positions_and_snapshots(
        self, old: Store, new: Store, one_server: Server
    ) -> None:
        await old.events.append(ONE, numbered(6), expected=NEW)
        await old.events.append(WHAT_IF, numbered(2), expected=4)
        for handler, position in (("first", 0), ("second", 2), ("third", 5), ("none", 1)):
            await old.positions.put(handler, ONE, position)
        await old.positions.put("second", WHAT_IF, 5)
        await old.snapshots.put(ONE, sequence=3, state=3)
        keys = one_server.keys(old._keys.prefix)
        with one_server.client() as client:
            for sequence in (0, 2):
                client.zremrangebyscore(keys.events(ONE), sequence, sequence)
                client.zadd(keys.events(ONE), {f"garbage {sequence}": sequence})
            client.set(keys.position("none", ONE), "nonsense")
        errors: list[Any] = []
        lines = await listed(transfer.export_lines(old, on_corrupt=errors.append))
        assert [getattr(error, "sequence", None) for error in errors] == [None, 0, 2]
        await load(new, lines)
        get = new.positions.get
        assert [await get(name, ONE) for name in ("first", "second", "third", "none")] == (
            [None, 0, 3, None]
        )
        assert await get("second", WHAT_IF) == 3
        found = await new.snapshots.get(ONE)
        assert found is not None
        assert (found.sequence, found.state) == (1, 3)

    async def test_a_damaged_snapshot_is_left_out_alone(
        self, old: Store, new: Store, one_server: Server
    ) -> None:
        await old.events.append(ONE, numbered(6), expected=NEW)
        await put_snapshots(old, ONE)
        newest, kept, _ = old._keys.snapshots(ONE)
        with one_server.client() as client:
            client.hset(newest, "state", "{")
            client.zremrangebyscore(kept, 0, 0)
            client.zadd(kept, {"[0,": 0})
        await copied(old, new)
        found = [await new.snapshots.get(ONE, at=n) for n in range(6)]
        assert [snapshot and snapshot.sequence for snapshot in found] == [None, 1, 2, 3, 3, 3]
        assert await compared(old, new) == []


class TestDifferences:
    @pytest.fixture
    async def both(self, old: Store, new: Store) -> tuple[Store, Store]:
        await fill(old, 3)
        await copied(old, new)
        return old, new

    async def only(self, both: tuple[Store, Store]) -> Difference:
        (difference,) = await compared(*both)
        return difference

    async def test_an_event_more(self, both: tuple[Store, Store]) -> None:
        old, new = both
        await old.events.append(ONE, numbered(2), expected=6)
        found = await self.only(both)
        assert (found.kind, found.aggregate, found.sequence) == ("event", ONE, 6)
        assert "only the old one" in found.text
        (found,) = await compared(new, old)
        assert "only the new one" in found.text

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"data": {"n": "s3cret"}}, "data"),
            ({"type": "Other"}, "type"),
            ({"metadata": {"by": 1}}, "metadata"),
            ({"id": uuid.uuid4()}, "id"),
            ({"time": datetime(2024, 1, 1, tzinfo=UTC)}, "time"),
        ],
    )
    async def test_an_event_that_differs(
        self, old: Store, new: Store, change: dict[str, Any], field: str
    ) -> None:
        fields: dict[str, Any] = {
            "type": "A",
            "data": {"n": 1},
            "id": uuid.uuid4(),
            "time": datetime(2020, 1, 1, tzinfo=UTC),
        }
        for store, own in ((old, fields), (new, {**fields, **change})):
            await store.events.append(ONE, [Event(**own), *numbered(3)], expected=NEW)
        found = await self.only((old, new))
        assert (found.kind, found.sequence) == ("event", 0)
        assert found.text == f"the events differ in {field}"

    @pytest.mark.parametrize("field", ["idempotency_key", "correlation_id", "source"])
    async def test_a_trace_that_differs(self, old: Store, new: Store, field: str) -> None:
        event = Event("A", 1, time=datetime(2020, 1, 1, tzinfo=UTC))
        value: Any = Source("a", "b", "main", 1) if field == "source" else "x"
        await old.events.append(ONE, [event], expected=NEW)
        await new.events.append(ONE, [event], expected=NEW, **{field: value})
        assert (await self.only((old, new))).text == f"the events differ in {field}"

    async def test_an_aggregate_that_only_one_has(self, both: tuple[Store, Store]) -> None:
        old, new = both
        place = Aggregate("new", "1")
        await new.events.append(place, numbered(1), expected=NEW)
        found = await self.only(both)
        assert (found.aggregate, found.sequence) == (place, 0)
        await new.events.delete(place)
        assert await compared(old, new) == []

    async def test_a_branch_that_leaves_elsewhere(self, both: tuple[Store, Store]) -> None:
        old, new = both
        for store, at in ((old, 2), (new, 3)):
            await store.events.branch(ONE.on("elsewhere"), at=at)
        found = await self.only(both)
        assert (found.kind, found.aggregate) == ("branch", ONE.on("elsewhere"))
        assert found.text == "it leaves main at 2 in the old one, at 3 in the new"

    async def test_a_position(self, both: tuple[Store, Store]) -> None:
        old, new = both
        await new.positions.put("projector", WHAT_IF, 1)
        found = await self.only(both)
        assert (found.kind, found.aggregate) == ("position", WHAT_IF)
        assert found.text == "projector is at 3 in the old one, at 1 in the new"
        await new.positions.put("projector", WHAT_IF, 3)
        await old.positions.put("another", ONE, 0)
        assert (await self.only(both)).text == (
            "another is at 0 in the old one, at nowhere in the new"
        )

    async def test_a_snapshot(self, both: tuple[Store, Store]) -> None:
        old, new = both
        found = await old.snapshots.get(ONE, at=3)
        assert found is not None
        moment = found.time
        for change, text in (
            ({"state": "other"}, "the snapshots differ"),
            ({"schema_version": 9}, "the snapshots differ"),
            ({"retention": Retention.PERSIST}, "the snapshots differ"),
            ({"time": datetime(2024, 1, 1, tzinfo=UTC)}, "the snapshots differ"),
        ):
            same: dict[str, Any] = {"state": {"n": 3}, "time": moment}
            await new.snapshots.put(ONE, sequence=3, **{**same, **change})
            difference = await self.only(both)
            assert (difference.kind, difference.sequence) == ("snapshot", 3)
            assert difference.text == text
            await new.snapshots.put(ONE, sequence=3, **same)
            assert await compared(old, new) == []
        await new.snapshots.delete(WHAT_IF)
        assert (await self.only(both)).text == "only the old one has the snapshot"

    async def test_what_can_not_be_read_is_one(
        self, both: tuple[Store, Store], one_server: Server
    ) -> None:
        with one_server.client() as client:
            client.zremrangebyscore(both[0]._keys.events(ONE), 2, 2)
        found = await self.only(both)
        assert (found.kind, found.sequence) == ("unreadable", 2)

    async def test_the_order_and_the_names_in_memory(
        self, both: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = both
        for root in range(20):
            await old.events.append(Aggregate("orders", f"a{root}"), numbered(1), expected=NEW)
            await new.events.append(Aggregate("orders", f"b{root}"), numbered(1), expected=NEW)
        whole = await listed(comparing.aggregates_of(old, new))
        named = [(place.domain, place.edition, place.root) for place in whole]
        assert named == sorted(set(named))
        assert len([place for place in whole if place.edition == "main"]) == 45
        monkeypatch.setattr(comparing, "_NAMES_AT_ONCE", 3)
        assert await listed(comparing.aggregates_of(old, new)) == whole
        found = [difference.aggregate for difference in await compared(old, new)]
        assert found == [place for place in whole if place.root[0] in "ab"]

    async def test_only_some_domains(self, both: tuple[Store, Store]) -> None:
        old, new = both
        await old.events.append(ONE, numbered(2), expected=6)
        assert await listed(comparing.differences(old, new, ["carts"])) == []
        assert len(await listed(comparing.differences(old, new, ["carts", "orders"]))) == 1


class TestCommandLine:
    async def test_it_all(
        self, old: Store, one_server: Server, small_cluster: SmallCluster
    ) -> None:
        await fill(old, 3)
        prefix = old._keys.prefix
        there, name = ",".join(small_cluster.urls), f"test-{uuid.uuid4().hex}:"
        out = run("export", "--url", one_server.url, "--key-prefix", prefix)
        done = run(
            *("import", "-", "--url", f"{small_cluster.urls[0]}?cluster=true"),
            *("--key-prefix", name),
            given=out.stdout,
        )
        assert done.returncode == 0, done.stderr
        assert b"7 snapshots, 14 positions" in done.stderr
        compare = ["compare", one_server.url, there, "--key-prefix", prefix]
        compare += ["--new-key-prefix", name]
        done = run(*compare)
        assert (done.returncode, done.stdout) == (0, b""), done.stderr
        assert b"they hold the same" in done.stderr
        await old.events.append(ONE, numbered(1), expected=6)
        await old.positions.put("projector", ONE, 6)
        done = run(*compare)
        assert done.returncode == 1
        assert done.stdout.decode().splitlines() == [
            "event: orders/1, 6: only the old one has the event, and what follows",
            "position: orders/1: projector is at 6 in the old one, at 4 in the new",
        ]
        done = run(*compare, "--json", "--most", "1")
        assert done.returncode == 1
        assert json.loads(done.stdout) == {
            "kind": "event",
            "domain": "orders",
            "edition": "main",
            "root": "1",
            "sequence": 6,
            "text": "only the old one has the event, and what follows",
        }
        assert b"1 differences, and maybe more" in done.stderr
        assert run("compare", one_server.url, "redis://127.0.0.1:1").returncode == 2
        assert run("compare", one_server.url, "nonsense").returncode == 2
