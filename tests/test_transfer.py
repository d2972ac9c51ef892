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
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import asyncstore
from asyncstore import ANY, NEW, Aggregate, Event, Store, embedded, transfer
from asyncstore.keys import Keys
from tests.builders import listed, numbered, sequences
from tests.polling import eventually
from tests.proxy import proxy_to
from tests.servers import Server, redis_server, rewrite_member, without_end


def line(root: str = "1", **fields: Any) -> dict[str, Any]:
    return {"domain": "orders", "root": root, "type": "Counted", "data": None, **fields}


def lines_of(records: Iterable[Any]) -> list[tuple[int, bytes]]:
    texts = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    return list(enumerate(texts, start=1))


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
            ({"edition": "what-if"}, "edition"),
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
                    proxy.lose = 1
                    await loading.load(records[first : first + 10])
                assert proxy.lost == 4
                assert await numbers(store) == list(range(40))
                assert loading.report.stored + loading.report.present == 40


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
        errors: list[asyncstore.CorruptEvent] = []
        exported = await listed(transfer.export_lines(store, on_corrupt=errors.append))
        lines = [json.loads(text) for text in exported]
        assert [fields["data"]["n"] for fields in lines] == [0, 1, 3]
        async with asyncstore.open(server.url, key_prefix=prefix + "copy:") as copy:
            assert (await load(copy, exported)).stored == 3
        assert [fields["sequence"] for fields in lines[:2]] == [0, 1]
        assert [error.sequence for error in errors] == [2, 4]


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
        cases = {
            ("import", "missing.jsonl", "--url", url): (1, b"missing.jsonl"),
            ("import", str(cut), "--url", url): (1, b"end-of-stream"),
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
