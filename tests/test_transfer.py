"""Import and export: every event once, in order, whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    Durability,
    DurabilityNotReached,
    DurabilityUnavailable,
    Event,
    Source,
    Store,
    embedded,
    transfer,
)
from asyncstore.events import Events
from tests.builders import KeysOfOne as Keys
from tests.builders import listed, numbered, sequences
from tests.polling import eventually
from tests.proxy import proxy_to
from tests.servers import RedisServer, Server, redis_server, rewrite_member, without_end
from tests.test_durability import can_replicate, events_of, paused, replica_of

SOURCE = {"domain": "payments", "root": "p1", "edition": "main", "sequence": 7}


def line(root: str = "1", **fields: Any) -> dict[str, Any]:
    return {"domain": "orders", "root": root, "type": "Counted", "data": None, **fields}


def lines_of(records: Iterable[Any]) -> list[tuple[int, bytes]]:
    texts = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    return list(enumerate(texts, start=1))


def branch_line(at: Any, edition: str = "what-if", **fields: Any) -> dict[str, Any]:
    return {"domain": "orders", "root": "1", "edition": edition, "diverges_at": at, **fields}


async def load(store: Store, records: Iterable[Any]) -> transfer.ImportReport:
    loading = transfer.Import(store)
    await loading.load(lines_of(records))
    return loading.report


async def numbers(store: Store, root: str = "1") -> list[Any]:
    return [event.data for event in await store.events.read(Aggregate("orders", root))]


def run(*arguments: str, given: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "asyncstore", *arguments],
        input=given,
        capture_output=True,
        check=False,
        env={**os.environ, **environ},
    )


class TestImport:
    async def test_every_event_once_in_order(self, store: Store) -> None:
        records = [line(f"{n % 7}", data=n, time="2024-01-01T12:00:00+02:00") for n in range(500)]
        report = await load(store, records)
        assert (report.stored, report.present, report.aggregates) == (500, 0, 7)
        assert await numbers(store, "3") == list(range(3, 500, 7))
        (first, *_) = await store.events.read(Aggregate("orders", "0"))
        assert first.time == datetime(2024, 1, 1, 10, tzinfo=UTC)
        assert first.type == "Counted"

    async def test_again_it_adds_nothing(self, store: Store) -> None:
        records = [line(f"{n % 7}", data=n) for n in range(100)]
        await load(store, records)
        report = await load(store, records)
        assert (report.stored, report.present) == (0, 100)
        grown = [*records, line("1", data="more"), line("new", data="more")]
        report = await load(store, grown)
        assert (report.stored, report.present) == (2, 100)
        assert (await numbers(store))[-1] == "more"

    async def test_equal_lines_are_two_events(self, store: Store) -> None:
        report = await load(store, [line(data=1)] * 3)
        assert report.stored == 3
        assert (await load(store, [line(data=1)] * 4)).stored == 1

    async def test_another_file_goes_on_where_the_first_ended(self, store: Store) -> None:
        january, february = [line(data="jan"), line(data="jan 2")], [line(data="feb")]
        for records, stored in ((january, 2), (february, 1), (january, 0), (february, 0)):
            assert (await load(store, records)).stored == stored
        assert await numbers(store) == ["jan", "jan 2", "feb"]

    async def test_chunks_are_one_import(self, store: Store) -> None:
        records = lines_of(line(f"{n % 3}", data=n) for n in range(90))
        for loading in (transfer.Import(store), transfer.Import(store)):
            for first in range(0, 90, 8):
                await loading.load(records[first : first + 8])
            assert loading.report.stored + loading.report.present == 90
        assert await numbers(store, "2") == list(range(2, 90, 3))

    async def test_more_lines_than_an_append_takes(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix, max_append_events=3) as store:
            assert (await load(store, [line(data=n) for n in range(10)])).stored == 10
            assert await numbers(store) == list(range(10))

    async def test_what_a_line_can_have(self, store: Store) -> None:
        full = line(
            edition="main",
            sequence=0,
            id="0193a4c7-f2e0-7cc3-8e1d-2f3a4b5c6d7e",
            metadata={"by": "u1"},
            time="2024-01-01T00:00:00.000001Z",
        )
        raw = line(data_base64="AP8K")
        del raw["data"]
        await load(store, [full, raw])
        one, two = await store.events.read(Aggregate("orders", "1"))
        assert (str(one.id), one.metadata) == (full["id"], {"by": "u1"})
        assert one.time == datetime(2024, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
        assert two.data == b"\x00\xff\n"

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            ({"type": ""}, "empty"),
            ({"type": None}, "str"),
            ({"time": "yesterday"}, "ISO 8601"),
            ({"time": "2024-01-01T00:00:00"}, "time zone"),
            ({"time": 5}, "ISO 8601"),
            ({"id": "5"}, "UUID"),
            ({"id": None}, "UUID"),
            ({"metadata": []}, "metadata"),
            ({"data_base64": "AA=="}, "either"),
            ({"sequence": -1}, "negative"),
            ({"sequence": 5}, "sequence is 5"),
            ({"sequence": True}, "whole number"),
            ({"tpye": "Counted"}, "'tpye'"),
            ({"edition": "what-if"}, "does not say where its edition diverges"),
            ({"correlation_id": 5}, "correlation_id: a str"),
            ({"correlation_id": "a\nb"}, "correlation_id: it has a control character"),
            ({"idempotency_key": ["k"]}, "idempotency_key: a str"),
            ({"idempotency_key": "k" * 600}, "idempotency_key: it has 600 bytes"),
            ({"source": "orders/1"}, "'source' is not an object"),
            ({"source": {"domain": "orders", "root": "1", "edition": "main"}}, "'source' is not"),
            ({"source": dict(SOURCE, extra=1)}, "'source' is not"),
            ({"source": dict(SOURCE, domain="a:b")}, "'source' is none: domain 'a:b'"),
            ({"source": dict(SOURCE, root=5)}, "'source' is none: root"),
            ({"source": dict(SOURCE, sequence="1")}, "'source' is none: sequence"),
            ({"source": dict(SOURCE, sequence=-1)}, "'source' is none: sequence"),
            ({"append_continues": 1, "idempotency_key": "k"}, "not true or false"),
            ({"append_continues": True}, "no 'idempotency_key'"),
            ({"diverges_at": 0}, "the edition 'main' diverges from nothing"),
        ],
    )
    async def test_a_bad_line_holds_its_aggregate_back(
        self, store: Store, bad: dict[str, Any], why: str
    ) -> None:
        records = [line(data=0), line("2", data=0), line(data=1, **bad), line(data=2)]
        records += [line("2", data=1), line(data=3)]
        report = await load(store, records)
        assert [problem.number for problem in report.bad_lines] == [3]
        assert why in report.bad_lines[0].why
        assert await numbers(store, "2") == [0, 1]
        if "edition" not in bad:
            assert report.held_back == 2
            assert await numbers(store) == [0]
            records[2] = line(data=1)
            assert (await load(store, records)).stored == 3
            assert await numbers(store) == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            (b'{"domain": "orders", "ro', "not JSON"),
            (b"5", "not a JSON object"),
            ({"root": "1", "type": "A", "data": 1}, "'domain'"),
            ({"domain": "orders", "type": "A", "data": 1}, "'root'"),
            ({"domain": "a:b", "root": "1", "type": "A", "data": 1}, "domain"),
            ({"domain": "orders", "root": 5, "type": "A", "data": 1}, "root"),
        ],
    )
    async def test_a_line_of_no_aggregate_stops_everything(
        self, store: Store, bad: Any, why: str
    ) -> None:
        report = await load(store, [line(data=0), b"  ", bad, line(data=1), line("2", data=0)])
        assert report.stopped
        assert [problem.number for problem in report.bad_lines] == [3]
        assert why in report.bad_lines[0].why
        assert (await numbers(store), await numbers(store, "2")) == ([0], [])

    async def test_a_line_that_is_too_large(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix, max_event_bytes=200) as store:
            records = [line(data=0), line(data="x" * 300), line(data=2), line("2", data=0)]
            report = await load(store, records)
            assert [problem.number for problem in report.bad_lines] == [2]
            assert "max_event_bytes" in report.bad_lines[0].why
            assert (report.stored, report.held_back) == (2, 1)
            assert (await numbers(store), await numbers(store, "2")) == ([0], [0])

    async def test_a_file_that_was_changed_is_noticed(self, store: Store) -> None:
        await load(store, [line(data=0), line(data=1), line(data=2)])
        report = await load(store, [line(data=0), line(data="changed"), line(data=2)])
        assert [problem.number for problem in report.bad_lines] == [2]
        assert "later lines of its aggregate, but not this one" in report.bad_lines[0].why
        assert await numbers(store) == [0, 1, 2]

    async def test_one_id_is_one_event(self, store: Store) -> None:
        ids = [str(uuid.uuid4()) for _ in range(3)]
        records = [line(data=n, id=ids[n % 3]) for n in range(6)]
        for stored, present in ((3, 3), (0, 6)):
            loading = transfer.Import(store)
            for numbered_line in lines_of(records):
                await loading.load([numbered_line])
            assert (loading.report.stored, loading.report.present) == (stored, present)
        assert await numbers(store) == [0, 1, 2]

    @pytest.mark.parametrize(
        "text", ["18446744073709551616", "1" * 400, '"\\ud800"', "1e999", "[" * 300 + "]" * 300]
    )
    async def test_what_can_not_be_stored_exactly_is_a_bad_line(
        self, store: Store, text: str
    ) -> None:
        for more in ("", f', "id": "{uuid.uuid4()}"'):
            bad = f'{{"domain": "orders", "root": "1", "type": "A", "data": {text}{more}}}'
            report = await load(store, [line(data=0), bad.encode(), line(data=1), line("2")])
            assert [problem.number for problem in report.bad_lines] == [2]
            assert "can't be written as JSON" in report.bad_lines[0].why or "NaN" in (
                report.bad_lines[0].why
            )
            assert await numbers(store) == [0]

    async def test_a_byte_order_mark_is_no_part_of_a_line(self, store: Store) -> None:
        text = b"\xef\xbb\xbf" + json.dumps(line(data=0)).encode() + b"\r\n"
        assert (await load(store, [text])).bad_lines == []
        assert await numbers(store) == [0]

    async def test_lines_larger_than_an_append_takes(self, one_server: Server, prefix: str) -> None:
        async with asyncstore.open(
            one_server.url, key_prefix=prefix, max_append_bytes=10_000
        ) as store:
            records = [line(data="x" * 3000) for _ in range(20)]
            assert (await load(store, records)).stored == 20

    async def test_events_of_others_stay_before(self, store: Store) -> None:
        await store.events.append(Aggregate("orders", "1"), [Event("Other", "x")], expected=NEW)
        assert (await load(store, [line(data=0), line(data=1)])).stored == 2
        assert await numbers(store) == ["x", 0, 1]
        report = await load(store, [line("1", data="y", sequence=1)])
        assert "its place is 3" in report.bad_lines[0].why

    async def test_others_that_write_at_the_same_time(self, store: Store) -> None:
        async def others() -> None:
            for n in range(30):
                event = Event("Other", f"other {n}")
                await store.events.append(Aggregate("orders", "1"), [event], expected=ANY)

        async def import_in_chunks() -> None:
            loading = transfer.Import(store)
            for numbered_line in lines_of(line(data=n) for n in range(30)):
                await loading.load([numbered_line])

        await asyncio.gather(others(), import_in_chunks())
        found = await numbers(store)
        assert [n for n in found if isinstance(n, int)] == list(range(30))
        assert len(found) == 60

    async def test_a_lost_reply_stores_nothing_twice(self) -> None:
        with redis_server(str(embedded.find_binary())) as server:
            path = Path(urlsplit(server.url).path)
            async with proxy_to(path) as proxy, asyncstore.open(proxy.url) as store:
                loading = transfer.Import(store)
                records = lines_of(line(data=n) for n in range(40))
                for first in range(0, 40, 10):
                    proxy.replies.cut()
                    await loading.load(records[first : first + 10])
                assert proxy.cuts == 4
                assert await numbers(store) == list(range(40))
                assert loading.report.stored + loading.report.present == 40


ONE = Aggregate("orders", "1")
WHAT_IF = ONE.on("what-if")


class TestImportOfEditions:
    @pytest.fixture
    def main(self) -> list[dict[str, Any]]:
        return [line(data=n, sequence=n) for n in range(4)]

    async def data(self, store: Store, aggregate: Aggregate = WHAT_IF) -> list[Any]:
        return [event.data for event in await store.events.read(aggregate)]

    async def test_branches_before_main_in_the_same_chunk(
        self, store: Store, main: list[dict[str, Any]]
    ) -> None:
        own = [line(data=f"own {n}", sequence=n, edition="what-if") for n in (2, 3, 4)]
        records = [*own, branch_line(4, "empty"), branch_line(0, "bare"), *main]
        report = await load(store, records)
        assert report.bad_lines == []
        assert (report.stored, report.branches, report.present) == (7, 2, 0)
        assert await self.data(store) == [0, 1, "own 2", "own 3", "own 4"]
        assert await self.data(store, ONE.on("empty")) == [0, 1, 2, 3]
        assert await self.data(store, ONE.on("bare")) == []
        report = await load(store, records)
        assert (report.stored, report.branches, report.present) == (0, 0, 9)

    async def test_a_branch_goes_on_without_sequences(
        self, store: Store, main: list[dict[str, Any]]
    ) -> None:
        own = [line(data=f"own {n}", edition="what-if") for n in range(3)]
        records = [*main, branch_line(1), *own]
        loading = transfer.Import(store)
        for numbered_line in lines_of([*records, branch_line(1)]):
            await loading.load([numbered_line])
        assert (loading.report.bad_lines, loading.report.branches) == ([], 1)
        assert (loading.report.stored, loading.report.present) == (7, 1)
        assert await self.data(store) == [0, "own 0", "own 1", "own 2"]
        report = await load(store, [*records, line(data="more", edition="what-if")])
        assert (report.stored, report.present) == (1, 8)

    async def test_an_event_of_main_is_not_one_of_the_branch(self, store: Store) -> None:
        same = str(uuid.uuid4())
        records = [line(data=n, id=i) for n, i in enumerate([str(uuid.uuid4()), same])]
        records.append(line(data="own", id=same, sequence=1, edition="what-if"))
        for stored, present in ((3, 0), (0, 3)):
            report = await load(store, records)
            assert (report.stored, report.present, report.bad_lines) == (stored, present, [])
        assert await self.data(store) == [0, "own"]

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            (branch_line(5), "main has only 4 events"),
            (branch_line("3"), "diverges_at: a whole number"),
            (branch_line(None), "diverges_at: a whole number"),
            (branch_line(True), "diverges_at: a whole number"),
            (branch_line(-1), "diverges_at: -1 is negative"),
            (branch_line(3, type="Counted", data=1), "both 'diverges_at' and 'data'"),
            (branch_line(3, sequence=3), "both 'diverges_at' and 'sequence'"),
            (branch_line(3, tpye=3), "both 'diverges_at' and 'tpye'"),
            (line(edition="what-if", sequence=5), "main has only 4 events"),
            (line(edition="what-if"), "does not say where its edition diverges"),
        ],
    )
    async def test_a_bad_line_holds_its_branch_back(
        self, store: Store, main: list[dict[str, Any]], bad: dict[str, Any], why: str
    ) -> None:
        after = [line(edition="what-if", sequence=3), branch_line(3)]
        report = await load(store, [*main, bad, *after, branch_line(2, "other")])
        assert [problem.number for problem in report.bad_lines] == [5]
        assert why in report.bad_lines[0].why
        assert (report.stored, report.branches, report.held_back) == (4, 1, 2)
        assert [e async for e in store.events.editions("orders")] == ["main", "other"]

    async def test_a_branch_that_has_left_elsewhere(
        self, store: Store, main: list[dict[str, Any]]
    ) -> None:
        await load(store, [*main, branch_line(2)])
        own = line(data="own", edition="what-if")
        report = await load(store, [branch_line(3), own])
        assert report.bad_lines == [
            transfer.BadLine(1, "it diverges at 3, but it has diverged at 2 already")
        ]
        assert report.held_back == 1
        report = await load(store, [branch_line(2), dict(own, sequence=1)])
        assert "its sequence is 1, but its place is 2" in report.bad_lines[0].why
        report = await load(store, [branch_line(2), own, branch_line(1), own])
        assert [problem.number for problem in report.bad_lines] == [3]
        assert (report.stored, report.present, report.held_back) == (1, 1, 1)

    async def test_a_bad_line_of_main_holds_its_branches_back(self, store: Store) -> None:
        records = [line(data=0), line(data=1, sequence=5), branch_line(1), line("2", data=0)]
        report = await load(store, records)
        assert [problem.number for problem in report.bad_lines] == [2]
        assert (report.stored, report.branches, report.held_back) == (2, 0, 1)

    async def test_nothing_comes_after_a_bad_line_in_a_later_append(
        self, one_server: Server, prefix: str
    ) -> None:
        async with asyncstore.open(
            one_server.url, key_prefix=prefix, max_append_events=2, max_event_bytes=200
        ) as store:
            records = [line(data=n) for n in range(8)]
            records[2] = line(data="x" * 300)
            report = await load(store, records)
            assert (report.stored, report.held_back) == (2, 5)
            assert await numbers(store) == [0, 1]


class TestImportOfTraces:
    async def test_each_trace_is_an_append(self, store: Store) -> None:
        records = [
            line(data=0),
            line(data=1, idempotency_key="k1", correlation_id="c"),
            line(data=2, idempotency_key="k1", correlation_id="c"),
            line(data=3, idempotency_key="k2", source=SOURCE),
            line(data=4, source=SOURCE),
            line(data=5, correlation_id=None, idempotency_key="", source=None),
        ]
        assert (await load(store, records)).stored == 6
        await self.check(store)
        assert (await load(store, records)).present == 6
        await self.check(store)

    async def check(self, store: Store) -> None:
        source = Source(**SOURCE)  # type: ignore[arg-type]
        find = store.events.find_idempotency_key
        assert sequences(await find(ONE, "k1")) == [1, 2]
        assert sequences(await find(ONE, "k2")) == [3]
        assert sequences(await store.events.find_source(ONE, source)) == [3, 4]
        (book,) = await store.events.correlated("c")
        assert sequences(book.events) == [1, 2]
        first, *_, last = await store.events.read(ONE)
        assert (first.idempotency_key, first.correlation_id, first.source) == (None, None, None)
        assert (last.idempotency_key, last.correlation_id, last.source) == (None, None, None)

    async def test_a_key_that_others_have_used(self, store: Store) -> None:
        await store.events.append(ONE, [Event("Other", "x")], expected=NEW, idempotency_key="k")
        records = [line(data=0), line(data=1, idempotency_key="k"), line(data=2)]
        for present in (0, 1):
            report = await load(store, records)
            assert report.bad_lines == [
                transfer.BadLine(2, "its idempotency key is in the store, with other events")
            ]
            assert (report.present, report.held_back) == (present, 1)
            assert await numbers(store) == ["x", 0]

    async def test_a_key_that_the_same_events_have_used(self, store: Store) -> None:
        records = [line(data=n, idempotency_key=f"k{n}") for n in range(3)]
        await load(store, records)
        report = await load(store, [*records, line(data=3, idempotency_key="k1")])
        assert (report.stored, report.present) == (0, 3)
        assert [problem.number for problem in report.bad_lines] == [4]

    async def test_an_append_with_a_key_is_whole_or_not_there(
        self, one_server: Server, prefix: str
    ) -> None:
        def keyed(data: Any) -> dict[str, Any]:
            return line(data=data, idempotency_key="k")

        async with asyncstore.open(
            one_server.url, key_prefix=prefix, max_append_events=3, max_event_bytes=300
        ) as store:
            report = await load(store, [line(data=0), *map(keyed, range(4))])
            assert "max_append_events" in report.bad_lines[0].why
            assert (report.stored, report.held_back) == (1, 3)
            report = await load(store, [line(data=0), keyed(1), keyed("x" * 400), keyed(3)])
            assert [problem.number for problem in report.bad_lines] == [3]
            assert (report.present, report.held_back) == (1, 2)
            assert await numbers(store) == [0]
            assert (await load(store, [line(data=0), *map(keyed, range(3))])).stored == 3

    async def test_an_append_that_goes_on_waits_for_its_end(self, store: Store) -> None:
        keyed = [line(data=n, idempotency_key="k", append_continues=n < 3) for n in range(4)]
        report = await load(store, keyed[:3])
        assert (report.stored, report.held_back, report.bad_lines) == (0, 3, [])
        assert await numbers(store) == []
        loading = transfer.Import(store)
        for numbered_line in lines_of(keyed):
            await loading.load([numbered_line])
        assert (loading.report.stored, loading.report.held_back) == (4, 0)
        assert len(await store.events.find_idempotency_key(ONE, "k")) == 4
        report = await load(store, [*keyed, line("2", data=0, **keyed_on("a")), line("2")])
        assert (report.present, report.held_back) == (4, 1)
        assert "of another" in report.bad_lines[0].why

    async def test_a_changed_line_among_many_traces_is_noticed(self, store: Store) -> None:
        records = [line(data=n, correlation_id=f"c{n}") for n in range(6)]
        await load(store, records)
        records[2] = line(data="changed", correlation_id="c2")
        report = await load(store, records)
        assert [problem.number for problem in report.bad_lines] == [3]
        assert "later lines of its aggregate, but not this one" in report.bad_lines[0].why
        assert await numbers(store) == list(range(6))


def keyed_on(key: str) -> dict[str, Any]:
    return {"idempotency_key": key, "append_continues": True}


async def fill(store: Store) -> None:
    """Put in what there can be: branches with and without events, all traces, bytes."""
    append, source = store.events.append, Source("payments", "p 1", "what-if", 7)
    for root in ("1", "☃"):
        one = Aggregate("orders", root)
        await append(one, numbered(2), expected=NEW)
        await append(one, numbered(3), expected=2, idempotency_key="k1", correlation_id="checkout")
        await append(one, [Event("Raw", b"\x00\xff")], expected=5, source=source)
        await append(one, numbered(2), expected=6, idempotency_key="k2", source=source)
        await append(one.on("what-if"), numbered(3), expected=3, idempotency_key="k1")
        await append(one.on("what-if"), numbered(1), expected=6, correlation_id="checkout")
        await append(one.on("another"), [Event("Raw", b"\n", metadata={"a": 1})], expected=0)
        await store.events.branch(one.on("empty"), at=8)
    await store.events.branch(Aggregate("carts", "none").on("early"), at=0)


async def exported(store: Store) -> list[bytes]:
    """Aggregates come in no particular order."""
    return sorted(await listed(transfer.export_lines(store)))


@pytest.fixture
async def copy(server: Server, prefix: str) -> AsyncIterator[Store]:
    async with asyncstore.open(server.url, key_prefix=prefix + "copy:") as opened:
        yield opened


class TestExportOfEditionsAndTraces:
    async def test_there_and_back(self, store: Store, copy: Store) -> None:
        await fill(store)
        lines = await listed(transfer.export_lines(store))
        for times in range(2):
            report = await load(copy, lines)
            assert (report.bad_lines, report.held_back) == ([], 0)
            assert (report.stored, report.branches) == ((26, 7) if times == 0 else (0, 0))
            assert await exported(copy) == sorted(lines)
        for root in ("1", "☃"):
            for edition in ("main", "what-if", "another", "empty"):
                place = Aggregate("orders", root, edition)
                assert await copy.events.read(place) == await store.events.read(place)
                for key in ("k1", "k2"):
                    there = await store.events.find_idempotency_key(place, key)
                    assert await copy.events.find_idempotency_key(place, key) == there
        books = await store.events.correlated("checkout")
        assert await copy.events.correlated("checkout") == books

    async def test_the_order_and_the_form_of_lines(self, store: Store) -> None:
        await fill(store)
        lines = [json.loads(text) for text in await listed(transfer.export_lines(store))]
        assert lines[0] == {"domain": "carts", "edition": "early", "root": "none", "diverges_at": 0}
        shown = [
            (fields["edition"], fields.get("diverges_at"), fields.get("sequence"))
            for fields in lines
            if fields["root"] == "1"
        ]
        assert shown == [
            *(("main", None, n) for n in range(8)),
            ("another", 0, None),
            ("another", None, 0),
            ("empty", 8, None),
            ("what-if", 3, None),
            *(("what-if", None, n) for n in range(3, 7)),
        ]
        main = [fields for fields in lines if (fields["root"], fields["edition"]) == ("1", "main")]
        assert [fields.get("append_continues") for fields in main] == (
            [None, None, True, True, None, None, True, None]
        )
        assert [fields.get("idempotency_key") for fields in main] == (
            [None, None, "k1", "k1", "k1", None, "k2", "k2"]
        )
        assert [fields.get("correlation_id") for fields in main[1:6]] == (
            [None, "checkout", "checkout", "checkout", None]
        )
        assert main[7]["source"] == {
            "domain": "payments",
            "root": "p 1",
            "edition": "what-if",
            "sequence": 7,
        }
        assert "source" not in main[4]

    async def test_cut_off_anywhere_it_completes_the_next_time(
        self, one_server: Server, prefix: str
    ) -> None:
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            await fill(store)
            lines = await listed(transfer.export_lines(store))
        for cut in range(len(lines)):
            async with asyncstore.open(one_server.url, key_prefix=f"{prefix}{cut}:") as other:
                await load(other, [*lines[:cut], lines[cut][:20]])
                loading = transfer.Import(other)
                numbered_lines = lines_of(lines)
                for first in range(0, len(lines), 4):
                    await loading.load(numbered_lines[first : first + 4])
                assert (loading.report.bad_lines, loading.report.held_back) == ([], 0)
                assert await exported(other) == sorted(lines)

    async def test_branches_are_those_from_before_main_was_read(
        self, store: Store, copy: Store
    ) -> None:
        await store.events.append(ONE, numbered(2), expected=NEW)
        export = transfer.export_lines(store)
        lines = [await anext(export)]
        await store.events.append(ONE, numbered(2), expected=2)
        await store.events.branch(WHAT_IF, at=4)
        lines += [text async for text in export]
        assert (await load(copy, lines)).bad_lines == []

    async def test_a_branch_that_is_made_anew_elsewhere_does_not_end_it(
        self, store: Store, copy: Store
    ) -> None:
        await store.events.append(ONE, numbered(3), expected=NEW)
        await store.events.append(WHAT_IF, numbered(2), expected=2)
        later = ONE.on("what-then")
        await store.events.append(later, numbered(1, 100), expected=1)
        export = transfer.export_lines(store)
        lines = [await anext(export)]
        await store.events.delete(WHAT_IF)
        await store.events.append(WHAT_IF, numbered(1), expected=1)
        lines += [text async for text in export]
        assert (await load(copy, lines)).bad_lines == []
        assert await copy.events.next_sequence(ONE) == 3
        assert [event.data["n"] for event in await copy.events.read(later)] == [0, 100]

    async def test_branches_close_the_gaps_of_main(
        self, server: Server, prefix: str, store: Store, copy: Store
    ) -> None:
        await store.events.append(ONE, numbered(6), expected=NEW)
        await store.events.append(WHAT_IF, numbered(3, 100), expected=4)
        await store.events.append(ONE.on("early"), numbered(1, 200), expected=1)
        keys = Keys(prefix)
        rewrite_member(server, keys.events(ONE), 2, without_end)
        rewrite_member(server, keys.events(WHAT_IF), 5, without_end)
        errors: list[Any] = []
        lines = await listed(transfer.export_lines(store, on_corrupt=errors.append))
        assert [(error.key, error.sequence) for error in errors] == [
            (keys.events(ONE), 2),
            (keys.events(WHAT_IF), 5),
        ]
        assert (await load(copy, lines)).bad_lines == []
        read = copy.events.read
        assert [event.data["n"] for event in await read(ONE)] == [0, 1, 3, 4, 5]
        assert [event.data["n"] for event in await read(WHAT_IF)] == [0, 1, 3, 100, 102]
        assert [event.data["n"] for event in await read(ONE.on("early"))] == [0, 200]

    async def test_a_branch_whose_reply_is_lost(self) -> None:
        with redis_server(str(embedded.find_binary())) as server:
            path = Path(urlsplit(server.url).path)
            async with proxy_to(path) as proxy, asyncstore.open(proxy.url) as store:
                await load(store, [line(data=0)])
                proxy.replies.cut()
                report = await load(store, [branch_line(1)])
                assert proxy.cuts == 1
                assert (report.bad_lines, report.branches + report.present) == ([], 1)

    def test_the_command_line(self, tmp_path: Path) -> None:
        url, other = (f"embedded://{tmp_path / name}" for name in ("one", "other"))
        records = [line(data=0), branch_line(1), line(data=1, edition="what-if", **keyed_on("k"))]
        given = b"\n".join(json.dumps(record).encode() for record in records)
        done = run("import", "-", "--url", url, given=given)
        assert b"1 events stored, 1 branches made, 0 were there, 2 aggregates" in done.stderr
        assert b"1 lines held back: they follow a bad line, or the rest" in done.stderr
        assert done.returncode == 1
        records[2]["append_continues"] = False
        given = b"\n".join(json.dumps(record).encode() for record in records)
        assert run("import", "-", "--url", url, given=given).returncode == 0
        out = run("export", "--url", url)
        assert b"3 lines exported" in out.stderr
        assert run("import", "-", "--url", other, given=out.stdout).returncode == 0
        assert run("export", "--url", other).stdout == out.stdout


ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")
BRANCHED = [line(data=0), line(data=1), branch_line(1)]


class TestDurability:
    """What is there already has to be as durable as what is new."""

    @pytest.fixture
    def server_of_one(self) -> Iterator[RedisServer]:
        with redis_server(str(embedded.find_binary()), *ALWAYS) as server:
            yield server

    @pytest.mark.parametrize("again", [BRANCHED, BRANCHED[2:]], ids=["events", "a branch"])
    async def test_by_an_fsync(self, server_of_one: RedisServer, again: list[Any]) -> None:
        async with asyncstore.open(server_of_one.url) as store:
            await load(store, BRANCHED)
        async with asyncstore.open(server_of_one.url, durability="fsync") as store:
            assert (await load(store, again)).present == len(again)
            with redis.Redis.from_url(server_of_one.url) as client:
                client.config_set("appendfsync", "everysec")
                with pytest.raises((DurabilityNotReached, DurabilityUnavailable)):
                    await load(store, again)
                client.config_set("appendfsync", "always")
            await eventually(lambda: is_loaded(store, again), "it is seen that it syncs again")

    async def test_on_a_replica(self, monkeypatch: pytest.MonkeyPatch) -> None:
        binary, at_once = str(embedded.find_binary()), ("--repl-diskless-sync-delay", "0")
        with redis_server(binary, *at_once, tcp=True) as primary, replica_of(primary) as replica:
            options: Any = {"durability": "replicas(1)", "timeout": 1}
            async with asyncstore.open(primary.url) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
            async with asyncstore.open(primary.url, **options) as store:
                async with paused(replica):
                    with monkeypatch.context() as patch:
                        patch.setattr(Events, "append", stored_and_not_known)
                        with pytest.raises(DurabilityNotReached) as caught:
                            await load(store, [line(data=0), line(data=1)])
                    assert (caught.value.first_sequence, caught.value.last_sequence) == (0, 1)
                await eventually(lambda: can_replicate(store), "the replica goes on")
                assert (await load(store, [line(data=0), line(data=1)])).present == 2
                assert events_of(replica, ONE) == 2


async def is_loaded(store: Store, again: list[Any]) -> bool:
    try:
        return (await load(store, again)).present == len(again)
    except DurabilityUnavailable:  # what was seen a moment ago
        return False


async def stored_and_not_known(self: Events, *arguments: Any, **options: Any) -> Appended:
    """Append for the level of memory, and lose the answer."""
    options["durability"] = Durability.MEMORY
    append: Any = EVENTS_APPEND
    await append(self, *arguments, **options)
    raise asyncstore.OutcomeUnknown("a server", "the connection broke")


EVENTS_APPEND = Events.append


class TestExport:
    async def test_there_and_back(self, server: Server, prefix: str, store: Store) -> None:
        moment = datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
        events = [
            Event("Text", {"ü": [1, 2.5, None]}, metadata={"by": "u1"}, time=moment),
            Event("Raw", b"\x00\xff\n"),
            Event("Raw", b"\x00\xff\n"),
        ]
        places = [Aggregate("orders", "a b:*"), Aggregate("orders", "☃"), Aggregate("carts", "1")]
        for place in places:
            await store.events.append(place, events, expected=NEW)
        exported = await listed(transfer.export_lines(store))
        async with asyncstore.open(server.url, key_prefix=prefix + "copy:") as copy:
            report = await load(copy, exported)
            assert (report.stored, report.bad_lines) == (9, [])
            for place in places:
                assert await copy.events.read(place) == await store.events.read(place)
            only = await listed(transfer.export_lines(copy, ["carts"]))
            assert [json.loads(text)["domain"] for text in only] == ["carts"] * 3

    async def test_data_nested_as_deep_as_can_be(self, store: Store, prefix: str) -> None:
        deepest: Any = None
        with contextlib.suppress(asyncstore.InvalidType):
            for _ in range(1000):
                deepest = [deepest]
                event = Event("Deep", deepest)
                await store.events.append(Aggregate("orders", "1"), [event], expected=ANY)
        count = await store.events.next_sequence(Aggregate("orders", "1"))
        assert len(await listed(transfer.export_lines(store))) == count > 200

    async def test_importing_again_tells_of_data_that_were_damaged(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        await store.events.append(Aggregate("orders", "1"), numbered(3), expected=NEW)
        lines = await listed(transfer.export_lines(store))
        key = Keys(prefix).events(Aggregate("orders", "1"))
        rewrite_member(server, key, 1, without_end)
        with pytest.raises(asyncstore.CorruptEvent):
            await load(store, lines)

    async def test_corrupt_events_are_raised_or_handed_over(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        await store.events.append(Aggregate("orders", "1"), numbered(5), expected=NEW)
        key = Keys(prefix).events(Aggregate("orders", "1"))
        with server.client() as client:
            client.zremrangebyscore(key, 2, 2)
            client.zadd(key, {b"garbage": 2})
        rewrite_member(server, key, 4, without_end)
        with pytest.raises(asyncstore.CorruptEvent):
            await listed(transfer.export_lines(store))
        errors: list[Any] = []
        exported = await listed(transfer.export_lines(store, on_corrupt=errors.append))
        lines = [json.loads(text) for text in exported]
        assert [fields["data"]["n"] for fields in lines] == [0, 1, 3]
        async with asyncstore.open(server.url, key_prefix=prefix + "copy:") as copy:
            assert (await load(copy, exported)).stored == 3
        assert [fields["sequence"] for fields in lines[:2]] == [0, 1]
        assert [error.sequence for error in errors] == [2, 4]

    async def test_members_where_none_should_be_are_left_out(
        self, server: Server, prefix: str, store: Store
    ) -> None:
        await store.events.append(ONE, numbered(5), expected=NEW)
        with server.client() as client:
            twin = '[1,1,"%s","Twin"]\n{"n":1}' % ("f" * 32)  # behind the other
            client.zadd(Keys(prefix).events(ONE), {twin: 1, "garbage": "+inf"})
        errors: list[Any] = []
        lines = await listed(transfer.export_lines(store, on_corrupt=errors.append))
        assert [error.sequence for error in errors] == [1, 2**53 - 1]
        exported = [json.loads(text) for text in lines]
        assert [fields["sequence"] for fields in exported] == list(range(5))
        assert [fields["data"]["n"] for fields in exported] == list(range(5))


class TestCommandLine:
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"embedded://{tmp_path / 'store'}"

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "events.jsonl"
        records = [line(f"{n % 5}", data={"n": n}) for n in range(3000)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def test_import_export_files_and_pipes(self, file: Path, url: str, tmp_path: Path) -> None:
        done = run("import", str(file), "--url", url)
        assert done.returncode == 0, done.stderr
        assert b"3,000 events stored, 0 were there, 5 aggregates" in done.stderr
        assert done.stdout == b""
        packed = tmp_path / "out.jsonl.gz"
        assert run("export", str(packed), "--url", url).returncode == 0
        piped = run("export", "--url", url)
        assert piped.returncode == 0
        assert gzip.decompress(packed.read_bytes()) == piped.stdout
        assert piped.stdout.count(b"\n") == 3000
        for given in (piped.stdout, packed.read_bytes()):
            again = run("import", "-", "--url", url, given=given)
            assert b"0 events stored, 3,000 were there" in again.stderr
        other = f"embedded://{tmp_path / 'other'}"
        assert run("import", str(packed), "--url", other).returncode == 0
        assert sorted(run("export", "--url", other).stdout.splitlines()) == sorted(
            piped.stdout.splitlines()
        )
        assert [path.name for path in tmp_path.glob("*.part")] == []

    def test_bad_lines_are_named_and_change_the_exit_code(self, url: str) -> None:
        good, bad = json.dumps(line(data=1)).encode(), json.dumps(line("2", time="x")).encode()
        done = run("import", "-", "--url", url, given=b"\n".join([good, bad, good]))
        assert done.returncode == 1
        assert b"line 2: its 'time' is not one of ISO 8601" in done.stderr
        assert b"2 events stored" in done.stderr
        done = run("import", "-", "--url", url, given=good + b"\n[}\n" + good)
        assert done.returncode == 1
        assert b"line 2: it is not JSON" in done.stderr
        assert b"stopped: line 2 names no aggregate" in done.stderr

    def test_pipes_with_names_and_links(self, file: Path, url: str, tmp_path: Path) -> None:
        feeder = tmp_path / "feeder"
        os.mkfifo(feeder)
        with subprocess.Popen(["cp", str(file), str(feeder)]):  # noqa: S607
            done = run("import", str(feeder), "--url", url)
        assert b"3,000 events stored" in done.stderr, done.stderr
        real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
        link.symlink_to(real)
        assert run("export", str(link), "--url", url).returncode == 0
        assert link.is_symlink()
        assert real.read_bytes().count(b"\n") == 3000
        drain = tmp_path / "drain"
        os.mkfifo(drain)
        with subprocess.Popen(["wc", "-l", str(drain)], stdout=subprocess.PIPE) as counter:  # noqa: S607
            assert run("export", str(drain), "--url", url).returncode == 0
            assert counter.stdout is not None
            assert counter.stdout.read().split()[0] == b"3000"
        assert drain.is_fifo()

    def test_a_reader_that_has_seen_enough(self, file: Path, url: str) -> None:
        assert run("import", str(file), "--url", url).returncode == 0
        command = [sys.executable, "-m", "asyncstore", "export", "--url", url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as exporting:
            assert exporting.stdout is not None
            assert exporting.stderr is not None
            assert exporting.stdout.readline().startswith(b"{")
            exporting.stdout.close()
            assert exporting.stderr.read() == b""
        assert exporting.returncode == 141

    def test_a_store_that_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        done = run("export", "--url", f"embedded://{tmp_path}/none")
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"there is no store in" in done.stderr
        assert not (tmp_path / "none").exists()

    def test_the_version(self) -> None:
        assert run("--version").stdout.decode().split() == ["asyncstore", asyncstore.__version__]

    async def test_interrupted_while_it_waits_for_a_pipe(self, url: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncstore", "import", "-", "--url", url),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncstore.open(url) as store:
            assert process.stdin is not None
            assert process.stderr is not None
            records = (json.dumps(line(data=n)).encode() + b"\n" for n in range(2500))
            process.stdin.writelines(records)
            one = Aggregate("orders", "1")
            await eventually(lambda: reaches(store, one, 2000), "the first chunk is stored")
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 30) == 130
            said = await process.stderr.read()
            assert b"events stored" in said  # it may not have heard of the last ones yet
            assert b"interrupted" in said
            assert b"Traceback" not in said

    def test_what_is_wrong_is_said_without_a_traceback(self, url: str, tmp_path: Path) -> None:
        cut = tmp_path / "cut.gz"
        cut.write_bytes(gzip.compress(json.dumps(line()).encode() * 1000)[:-20])
        damaged = tmp_path / "damaged.gz"
        damaged.write_bytes(b"\x1f\x8b and what no gzip has")
        cases = {
            ("import", "missing.jsonl", "--url", url): (1, b"missing.jsonl"),
            ("import", str(cut), "--url", url): (1, b"end-of-stream"),
            ("import", str(damaged), "--url", url): (1, b"what is compressed is damaged"),
            ("import", str(tmp_path), "--url", url): (1, b"directory"),
            ("export", "--url", "nonsense"): (2, b"not a URL"),
            ("export", "--url", "redis://:s3cret@127.0.0.1:1"): (1, b"no connection"),
            ("export", str(tmp_path / "no" / "dir"), "--url", url): (1, b"No such file"),
            ("import",): (2, b"Missing argument"),
        }
        for arguments, (code, message) in cases.items():
            done = run(*arguments)
            assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr
            assert message in b" ".join(done.stderr.split()), done.stderr
            assert b"s3cret" not in done.stderr

    def test_settings_come_from_the_environment_too(self, file: Path, url: str) -> None:
        done = run("import", str(file), REDIS_URL=url, ASYNCSTORE_KEY_PREFIX="a:")
        assert done.returncode == 0
        assert run("export", REDIS_URL=url).stdout == b""
        assert run("export", "--key-prefix", "a:", REDIS_URL=url).stdout.count(b"\n") == 3000

    async def test_killed_in_the_middle_it_completes_the_next_time(
        self, file: Path, url: str, tmp_path: Path
    ) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncstore", "import", "-", "--url", url),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin is not None
        # The pipe stays open: the import is in the middle of its file when it is killed.
        process.stdin.write(file.read_bytes()[:-40])
        async with asyncstore.open(url) as store:
            one = Aggregate("orders", "1")
            started = lambda: reaches(store, one, 1)  # noqa: E731
            await eventually(started, "the import began")
            process.kill()
            await process.wait()
            process.stdin.close()
            assert 0 < await store.events.next_sequence(one) < 600
            done = await asyncio.to_thread(run, "import", str(file), "--url", url)
            assert done.returncode == 0, done.stderr
            for root in range(5):
                events = await store.events.read(Aggregate("orders", f"{root}"))
                assert sequences(events) == list(range(600))
                assert [event.data["n"] for event in events] == list(range(root, 3000, 5))

    def test_without_the_extra_it_says_what_to_install(self, tmp_path: Path) -> None:
        (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
        done = run("import", "x", PYTHONPATH=str(tmp_path))
        assert done.returncode == 1
        assert b"pip install 'asyncstore[cli]'" in done.stderr
        assert b"Traceback" not in done.stderr


async def reaches(store: Store, aggregate: Aggregate, count: int) -> bool:
    return await store.events.next_sequence(aggregate) >= count
