"""A store in web applications: what both frameworks do with it, over real connections."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import fields
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import fastapi
import httpx
import pytest

import asyncstore
from asyncstore import ANY, NEW, Aggregate, Durability, Event, embedded, errors
from asyncstore.integrations import fastapi as on_fastapi
from asyncstore.integrations import http
from asyncstore.integrations.http import LiveEvents, expected_of, key_of, problem_of
from tests.builders import numbered
from tests.polling import eventually
from tests.servers import Server, redis_server
from tests.web import APPS, App, AppOptions, Sent, Served, events_of, first

ORDER = Aggregate("notes", "1")


@pytest.fixture(params=APPS)
def app(request: pytest.FixtureRequest) -> App:
    return APPS[request.param]


@pytest.fixture
async def served(app: App, one_server: Server, prefix: str) -> AsyncIterator[Served]:
    async with app(one_server.url, prefix, heartbeat=0.2) as running:
        yield running


@pytest.fixture
async def client(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url) as opened:
        yield opened


@pytest.fixture
async def store(one_server: Server, prefix: str) -> AsyncIterator[asyncstore.Store]:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as opened:
        yield opened


async def all_of(served: Served, request: bytes) -> bytes:
    """All bytes that come back until the connection is closed."""
    place = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    writer.write(request)
    async with asyncio.timeout(20):
        came = await reader.read()
    writer.close()
    return came


# Requests


async def test_a_mounted_application_has_the_same_store(client: httpx.AsyncClient) -> None:
    await client.post("/notes/1", content="a")
    assert (await client.get("/part/next/1")).json() == 1


async def test_the_expected_sequence_comes_in_if_match(client: httpx.AsyncClient) -> None:
    new = await client.post("/notes/1", content="a", headers={"If-None-Match": "*"})
    assert new.json() == {"first": 0, "duplicate": False}
    for header, status in (('"1"', 200), ('"1"', 409), ("2", 200), ('"7"', 409)):
        answer = await client.post("/notes/1", content="b", headers={"If-Match": header})
        assert answer.status_code == status, header
    refused = await client.post("/notes/1", content="secret", headers={"If-None-Match": "*"})
    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    body = refused.json()
    assert (body["expected"], body["actual"]) == (0, 3)
    assert body["type"] == "urn:asyncstore:problem:sequence-conflict"
    assert body["status"] == 409
    assert "secret" not in refused.text
    assert (await client.post("/notes/1", content="c")).json()["first"] == 3


async def test_the_idempotency_key_stores_once(client: httpx.AsyncClient) -> None:
    for key, found in (("k1", [0, False]), ('"k1"', [0, True]), ("k2", [1, False])):
        answer = await client.post("/notes/1", content="a", headers={"Idempotency-Key": key})
        assert list(answer.json().values()) == found


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("If-Match", "*"),
        ("If-Match", 'W/"3"'),
        ("If-Match", '"3", "4"'),
        ("If-Match", '"3'),
        ("If-Match", '"03"'),
        ("If-Match", '"9999999999999999"'),
        ("If-None-Match", '"3"'),
        ("Idempotency-Key", ""),
        ("Idempotency-Key", '""'),
        ("Idempotency-Key", "a b"),
        ("Idempotency-Key", "x" * 256),
    ],
)
async def test_headers_that_are_none(client: httpx.AsyncClient, header: str, value: str) -> None:
    answer = await client.post("/notes/1", content="a", headers={header: value})
    assert answer.status_code == 422
    assert answer.json()["argument"] == header


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("If-Match", ['"0"', '"9"']),
        ("If-Match", ['"9"', '"0"']),
        ("If-Match", ['"0"', "*"]),
        ("If-None-Match", ["*", '"0"']),
        ("Idempotency-Key", ["a", "b"]),
    ],
)
async def test_none_of_several_headers_is_passed_over(
    client: httpx.AsyncClient, store: asyncstore.Store, header: str, values: list[str]
) -> None:
    headers = [(header, value) for value in values]
    answer = await client.post("/notes/1", content="a", headers=headers)
    assert (answer.status_code, answer.json()["argument"]) == (422, header)
    both = await client.get("/live/1", headers=[("Last-Event-ID", "1"), ("Last-Event-ID", "2")])
    assert (both.status_code, both.json()["argument"]) == (422, "Last-Event-ID")
    assert await store.events.read(ORDER) == []


def test_headers_are_documented_alike_whoever_reads_them() -> None:
    app = fastapi.FastAPI()
    names = ["If-Match", "If-None-Match", "Idempotency-Key", "Last-Event-ID"]

    @app.get("/read", openapi_extra=on_fastapi.header_parameters(*names))
    async def read() -> None: ...

    @app.get("/declared")
    async def declared(
        expected: on_fastapi.Expected,
        key: on_fastapi.IdempotencyKey,
        last: on_fastapi.LastEventId,
    ) -> None: ...

    paths = app.openapi()["paths"]
    by_hand, by_type = (paths[path]["get"]["parameters"] for path in ("/read", "/declared"))
    assert [header["name"] for header in by_hand] == names
    for header in by_type:  # FastAPI says these twice
        del header["schema"]["title"], header["schema"]["description"]
    assert by_hand == by_type
    with pytest.raises(asyncstore.InvalidValue, match="'ETag' is none of If-Match, If-None-Match"):
        on_fastapi.header_parameters("ETag")


async def test_headers_that_contradict_one_another() -> None:
    with pytest.raises(asyncstore.InvalidValue, match="not both"):
        expected_of('"3"', "*")
    assert (expected_of(None), expected_of(' "0" '), expected_of(None, "*")) == (ANY, 0, NEW)
    assert key_of(None) is None


async def test_bad_names_and_large_events(client: httpx.AsyncClient) -> None:
    bad = await client.post("/notes/a%01b", content="a")
    assert (bad.status_code, bad.json()["part"]) == (422, "root")
    large = await client.post("/notes/1", content="secret" * 1000)
    assert large.status_code == 413
    assert (large.json()["setting"], large.json()["limit"]) == ("max_event_bytes", 1000)
    assert "secret" not in large.text


# Errors


SECRET = "s3cret"
ERRORS: list[tuple[errors.AsyncStoreError, int]] = [
    (errors.InvalidName("root", SECRET, "it is empty"), 422),
    (errors.InvalidValue("limit", "it is negative"), 422),
    (errors.InvalidType("data", "it can't be written as JSON"), 422),
    (errors.EventTooLarge("max_event_bytes", 10, 11, 0), 413),
    (errors.ConfigurationError("url", SECRET), 500),
    (errors.SequenceConflict(ORDER, 1, 2), 409),
    (errors.HistoryRegressed(ORDER, 5, 2), 409),
    (errors.BranchExists(ORDER, 1, 2), 409),
    (errors.ProtectedEdition("main", "it can't be deleted"), 422),
    (errors.CorruptEvent(f"events:{SECRET}", 1, "it is not JSON"), 500),
    (errors.CorruptPosition(SECRET), 500),
    (errors.MoveRefused(ORDER, SECRET), 500),
    (errors.ListenerLagged(1, 2), 500),
    (errors.LeaseLost(SECRET, ORDER, 1), 500),
    (errors.StillBehind(SECRET, ORDER, 1, None), 503),
    (errors.InvalidEvent("Moved", 1, SECRET), 500),
    (errors.UnreadableEvent(ORDER, 3, "Moved", 1, SECRET), 500),
    (errors.UnknownEvent(ORDER, 3, "Moved", 2, 1), 500),
    (errors.ForgottenEvent(ORDER, 3, "Moved", 1, SECRET), 500),
    (errors.UnsafeServer(SECRET, "allkeys-lru"), 500),
    (errors.StoreUnavailable(SECRET, "gone"), 503),
    (errors.DurabilityUnavailable(SECRET, Durability.FSYNC, "no AOF"), 503),
    (errors.DurabilityNotReached(ORDER, 3, 4, Durability.FSYNC, False, 0), 504),
    (errors.OutcomeUnknown(SECRET, "no answer"), 504),
    (errors.StoreFull(SECRET), 507),
    (errors.UnexpectedReply(SECRET, "append", "ERR"), 500),
    (errors.StoreClosed("closed"), 503),
]


def test_every_error_is_known_here() -> None:
    assert {type(error) for error, _ in ERRORS} == set(errors.AsyncStoreError.__subclasses__())


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda e: type(e).__name__)
def test_errors_become_problems(error: errors.AsyncStoreError, status: int) -> None:
    problem = problem_of(error)
    assert problem.status == status
    body = json.loads(problem.body())
    assert body["status"] == status
    assert body.keys() >= {"type", "title", "detail"}
    assert SECRET not in problem.body().decode()
    assert ("Retry-After" in problem.headers) == (status == 503)
    if isinstance(error, errors.DurabilityNotReached):
        assert (body["first_sequence"], body["last_sequence"]) == (3, 4)


@pytest.mark.parametrize(("error", "status"), [ERRORS[5], ERRORS[15], ERRORS[18], ERRORS[19]])
async def test_errors_are_answered(
    app: App, one_server: Server, prefix: str, error: errors.AsyncStoreError, status: int
) -> None:
    values = [getattr(error, field.name) for field in fields(error)]
    async with (
        app(one_server.url, prefix, lambda: type(error)(*values)) as served,
        httpx.AsyncClient(base_url=served.url) as client,
    ):
        answer = await client.get("/fail")
    assert answer.status_code == status
    assert answer.headers["content-type"] == http.PROBLEM_JSON
    assert answer.headers.get("Retry-After") == ("1" if status == 503 else None)


async def test_mistakes_of_the_application_are_problems_that_say_nothing(
    app: App, one_server: Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = AppOptions(own_errors=True)
    async with (
        app(one_server.url, prefix, lambda: ZeroDivisionError(SECRET), own) as served,
        httpx.AsyncClient(base_url=served.url) as client,
    ):
        answers = [await client.get("/fail"), await client.get("/nowhere")]
    assert [answer.status_code for answer in answers] == [500, 404]
    for answer in answers:
        assert answer.headers["content-type"] == http.PROBLEM_JSON
        assert answer.json().keys() == {"type", "title", "status", "detail"}
        assert SECRET not in answer.text
    # uvicorn logs it by itself, and is told not to here.
    assert app is APPS["fastapi"] or "ZeroDivisionError" in caplog.text


async def test_nothing_is_answered_into_a_stream(
    app: App, one_server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def frames(self: LiveEvents) -> AsyncIterator[bytes]:
        yield b":\n\n"
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(LiveEvents, "frames", frames)
    async with app(one_server.url, prefix, options=AppOptions(own_errors=True)) as served:
        came = await all_of(served, b"GET /live/1 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert came.count(b"HTTP/1.1 ") == 1
    assert came.endswith(b"3\r\n:\n\n\r\n"), "the stream is cut off, not ended"


# Health


async def test_health(served: Served, client: httpx.AsyncClient) -> None:
    assert (await client.get("/health/live")).status_code == 200
    ready = await client.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert ".sock" not in ready.text
    for probe in ("live", "ready"):  # what watches from outside often asks for the head alone
        head = await client.head(f"/health/{probe}")
        assert (head.status_code, head.content) == (200, b"")
    await served.store.__aexit__(None, None, None)
    gone = await client.get("/health/ready")
    assert (gone.status_code, gone.json()["status"]) == (503, "unavailable")
    assert (await client.head("/health/ready")).status_code == 503
    assert (await client.get("/health/live")).status_code == 200
    assert (await client.post("/notes/1", content="a")).status_code == 503


class CountingStore:
    """Says what `check` would, and counts how often it is asked."""

    def __init__(self, level: str) -> None:
        self.asked = 0
        self.level = level
        self.gate = asyncio.Event()

    async def check(self) -> asyncstore.Report:
        self.asked += 1
        await self.gate.wait()
        finding = asyncstore.Finding("eviction", self.level, "found", "means")  # type: ignore[arg-type]
        return asyncstore.Report("redis://host", (finding,))


async def test_many_probes_are_one_check() -> None:
    store: Any = CountingStore("bad")
    health = http.Health(http.HealthOptions(max_age=60))
    asking = [asyncio.ensure_future(health.ready(store)) for _ in range(50)]
    await eventually(lambda: store.asked > 0, "it was asked")
    store.gate.set()
    assert {ready.status for ready in await asyncio.gather(*asking)} == {200}
    assert (await health.ready(store)).fields()["findings"] == [
        {"name": "eviction", "level": "bad"}
    ]
    assert store.asked == 1
    strict = await http.Health(http.HealthOptions(strict=True)).ready(store)
    assert (strict.status, strict.fields()["status"]) == (503, "unfit")


async def test_a_check_that_takes_long_is_not_waited_for() -> None:
    store: Any = CountingStore("good")
    health = http.Health(http.HealthOptions(max_age=0, timeout=0.05))
    assert not (await health.ready(store)).is_ready
    assert not (await health.ready(store)).is_ready
    assert store.asked == 1, "the one under way goes on"
    store.gate.set()
    assert (await health.ready(store)).is_ready


# The store of an application


async def test_a_store_that_is_away_at_the_start(
    app: App, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_RETRY", 0.01)
    with redis_server(str(embedded.find_binary())) as server:
        server.stop()
        async with (
            app(server.url, prefix, options=AppOptions(start_without_store=True)) as served,
            httpx.AsyncClient(base_url=served.url, timeout=20) as client,
        ):

            async def is_ready() -> bool:
                return (await client.get("/health/ready")).status_code == 200

            assert (await client.get("/health/live")).status_code == 200
            assert not await is_ready()
            for refused in (
                await client.post("/notes/1", content="a"),
                await client.get("/live/1"),
            ):
                assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
                assert refused.json()["type"] == "urn:asyncstore:problem:store-unavailable"
            server.start()
            await eventually(is_ready, "the store was found")
            assert (await client.post("/notes/1", content="a")).status_code == 200


@pytest.mark.parametrize("start_without_store", [False, True])
async def test_what_is_wrong_with_a_store_is_said_at_the_start(start_without_store: bool) -> None:
    away = partial(asyncstore.open, "unix:///nowhere", timeout=0.1)
    if not start_without_store:
        with pytest.raises(errors.StoreUnavailable):
            async with http.held_store(away, start_without_store=start_without_store):
                pass
    with redis_server(str(embedded.find_binary()), "--maxmemory-policy", "allkeys-lru") as server:
        unsafe = partial(asyncstore.open, server.url)
        with pytest.raises(errors.UnsafeServer):
            async with http.held_store(unsafe, start_without_store=start_without_store):
                pass


async def test_waiting_for_a_store_ends_with_the_application() -> None:
    away = partial(asyncstore.open, "unix:///nowhere", timeout=0.1)
    before = asyncio.all_tasks()
    async with http.held_store(away, start_without_store=True) as held:
        with pytest.raises(errors.StoreUnavailable):
            held.get()
    assert asyncio.all_tasks() == before
    with pytest.raises(errors.StoreClosed):
        held.get()


# Live events


async def test_live_events_go_on_where_a_client_was(
    served: Served,
    client: httpx.AsyncClient,
    store: asyncstore.Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await store.events.append(ORDER, numbered(3), expected=NEW)
    async with client.stream("GET", "/live/1") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        came = events_of(answer.aiter_lines())
        found = await first(3, came)
        await store.events.append(ORDER, numbered(2, 3), expected=3)
        found += await first(2, came)
    assert [json.loads(sent.data)["data"]["n"] for sent in found] == [0, 1, 2, 3, 4]
    recorded = await store.events.read(ORDER)
    assert [sent.id for sent in found] == [f"{e.sequence}-{e.id.hex}" for e in recorded]
    for last in (found[2].id, "2"):
        async with client.stream("GET", "/live/1", headers={"Last-Event-ID": last}) as answer:
            rest = await first(2, events_of(answer.aiter_lines()))
        assert rest == found[3:]
    await eventually(lambda: served.listeners == 0, "nobody listens for clients that are gone")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_whose_last_event_is_gone_is_told(
    client: httpx.AsyncClient, store: asyncstore.Store
) -> None:
    await store.events.append(ORDER, numbered(3), expected=NEW)
    known = (await store.events.read(ORDER))[2]
    mark = f"2-{known.id.hex}"
    async with client.stream("GET", "/live/1", headers={"Last-Event-ID": mark}) as open_one:
        await store.events.delete(ORDER)
        await store.events.append(ORDER, numbered(4, 10), expected=NEW)
        told = await first(5, events_of(open_one.aiter_lines()))
    assert [sent.event for sent in told] == ["reset"] + ["message"] * 4
    for last in (mark, "9"):
        async with client.stream("GET", "/live/1", headers={"Last-Event-ID": last}) as answer:
            assert (await first(5, events_of(answer.aiter_lines())))[1:] == told[1:]


async def test_what_a_stream_refuses_before_it_begins(
    served: Served, client: httpx.AsyncClient
) -> None:
    bad = await client.get("/live/1", headers={"Last-Event-ID": "x"})
    assert (bad.status_code, bad.json()["argument"]) == (422, "Last-Event-ID")
    await served.store.__aexit__(None, None, None)
    closed = await client.get("/live/1")
    assert (closed.status_code, closed.headers["Retry-After"]) == (503, "1")


async def test_the_head_of_a_stream_has_an_end(
    served: Served, client: httpx.AsyncClient, store: asyncstore.Store
) -> None:
    await store.events.append(ORDER, numbered(3), expected=NEW)
    request = b"HEAD /live/1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    head, _, rest = (await all_of(served, request)).partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert (head.split()[1], rest) == (b"200", b"")


async def test_clients_that_hang_up_at_any_moment(served: Served) -> None:
    place = urlsplit(served.url)
    alone = asyncio.all_tasks()

    async def hang_up(turns: int) -> None:
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(b"GET /live/1 HTTP/1.1\r\nHost: a\r\n\r\n")
        await writer.drain()
        for _ in range(turns):
            await asyncio.sleep(0)
        writer.transport.abort()

    await asyncio.gather(*(hang_up(turns) for turns in range(60)))
    await eventually(lambda: served.listeners == 0, "nobody listens for clients that are gone")
    await eventually(lambda: asyncio.all_tasks() <= alone, "nothing is left running")


async def test_heartbeats(client: httpx.AsyncClient) -> None:
    async with client.stream("GET", "/live/1") as answer:
        lines = answer.aiter_lines()
        async with asyncio.timeout(20):
            while await anext(lines) != ":":
                pass


async def test_a_client_that_takes_nothing_is_hung_up_on(
    app: App, one_server: Server, prefix: str
) -> None:
    async with app(one_server.url, prefix, send_timeout=0.2) as served:
        big = [Event("Noted", "x" * 900) for _ in range(10_000)]
        await served.store.events.append(ORDER, big, expected=NEW)
        place = urlsplit(served.url)
        with socket.create_connection((place.hostname, place.port)) as stuck:
            stuck.sendall(b"GET /live/1 HTTP/1.1\r\nHost: a\r\n\r\n")
            await eventually(lambda: served.listeners == 1, "the stream is there")
            await eventually(lambda: served.listeners == 0, "it was given up")


async def test_open_streams_do_not_hold_up_the_end(
    app: App, one_server: Server, prefix: str
) -> None:
    async with httpx.AsyncClient() as client:
        async with asyncio.timeout(15):
            async with app(one_server.url, prefix) as served:
                request = client.build_request("GET", f"{served.url}/live/1")
                answer = await client.send(request, stream=True)
                await eventually(lambda: served.listeners == 1, "the stream is there")
        await answer.aclose()


async def frames(live: LiveEvents, count: int) -> list[Sent]:
    """The first events of a stream that is entered."""

    async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
        async for frame in chunks:
            for line in frame.decode().split("\n")[:-1]:
                yield line

    async with aclosing(live.frames()) as chunks:  # type: ignore[type-var]
        return await first(count, events_of(lines(chunks)))


def numbers(found: list[Sent]) -> list[Any]:
    return [json.loads(sent.data)["data"]["n"] for sent in found]


async def appended_meanwhile(store: asyncstore.Store, live: LiveEvents, count: int) -> list[Sent]:
    async def write() -> None:
        for n in range(count):
            await store.events.append(ORDER, numbered(1, n), expected=ANY)

    async with live:
        _, found = await asyncio.gather(write(), frames(live, count))
    return found


async def test_none_is_left_out_and_none_comes_twice(store: asyncstore.Store) -> None:
    for _ in range(5):
        live = LiveEvents(store, ORDER)
        assert numbers(await appended_meanwhile(store, live, 200)) == list(range(200))
        await store.events.delete(ORDER)


@pytest.mark.parametrize("lose", [lambda n: True, lambda n: n % 3, lambda n: n > 5])
async def test_rings_that_are_lost(
    store: asyncstore.Store, monkeypatch: pytest.MonkeyPatch, lose: Callable[[int], Any]
) -> None:
    live = LiveEvents(store, ORDER, heartbeat=0.05)
    heard, count = live._live._inbox.heard, iter(range(10**6))
    monkeypatch.setattr(live._live._inbox, "heard", lambda ring: lose(next(count)) or heard(ring))
    assert numbers(await appended_meanwhile(store, live, 50)) == list(range(50))


async def test_a_listener_that_lags(store: asyncstore.Store) -> None:
    live = LiveEvents(store, ORDER)
    async with live:
        await store.events.append(ORDER, numbered(3000), expected=NEW)
        await store.events.append(ORDER, numbered(3, 3000), expected=3000)
        found = await frames(live, 3003)
    assert numbers(found) == list(range(3003))


async def test_a_connection_that_was_gone(store: asyncstore.Store) -> None:
    live = LiveEvents(store, ORDER)
    async with live:
        collecting = asyncio.ensure_future(frames(live, 2))
        await store.events.append(ORDER, numbered(1), expected=NEW)
        live._live._inbox.missed([])
        await store.events.append(ORDER, numbered(1, 1), expected=1)
        assert numbers(await collecting) == [0, 1]


async def test_a_store_that_is_away_is_waited_for(
    store: asyncstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, away = store.events.stream, [3]

    def stream(*args: Any, **options: Any) -> Any:
        if away[0]:
            away[0] -= 1
            raise errors.StoreUnavailable("redis://host", "it is away")
        return read(*args, **options)

    monkeypatch.setattr(type(store.events), "stream", lambda self, *a, **o: stream(*a, **o))
    await store.events.append(ORDER, numbered(1), expected=NEW)
    async with LiveEvents(store, ORDER, heartbeat=0.05) as live:
        assert numbers(await frames(live, 1)) == [0]
    assert away == [0]


async def test_an_error_ends_the_stream_with_a_problem(
    store: asyncstore.Store, one_server: Server, prefix: str
) -> None:
    await store.events.append(ORDER, numbered(1), expected=NEW)
    key = one_server.keys(prefix).events(ORDER)
    with one_server.client() as outside:
        outside.zadd(key, {b"broken": 1})
    async with LiveEvents(store, ORDER) as live:
        found = await frames(live, 2)
    assert [sent.event for sent in found] == ["message", "problem"]
    assert json.loads(found[1].data)["type"].endswith("corrupt-event")
    assert prefix not in found[1].data


async def test_an_edition_shows_main_until_it_diverges(store: asyncstore.Store) -> None:
    what_if = ORDER.on("what-if")
    await store.events.append(ORDER, numbered(2), expected=NEW)
    async with LiveEvents(store, what_if) as live:
        collecting = asyncio.ensure_future(frames(live, 3 + 1 + 3))
        await store.events.append(ORDER, numbered(1, 2), expected=2)
        await asyncio.sleep(0)
        await eventually(lambda: live._last is not None and live._last.sequence == 2, "3 came")
        await store.events.append(what_if, [Event("Asked", {"n": "other"})], expected=2)
        found = await collecting
    assert found[3].event == "reset"
    assert numbers(found[:3]) == [0, 1, 2]
    assert numbers(found[4:]) == [0, 1, "other"]


def test_bytes_are_base64() -> None:
    event = asyncstore.RecordedEvent(
        aggregate=ORDER,
        sequence=3,
        type="Seen",
        data=b"\x00\xff",
        metadata={"user": "ü"},
        id=Event("x", 1).id,
        time=datetime(2026, 1, 2, tzinfo=UTC),
        idempotency_key="secret",
    )
    fields_ = json.loads(http.event_json(event))
    assert fields_["data_base64"] == "AP8="
    assert fields_["time"] == "2026-01-02T00:00:00+00:00"
    assert "secret" not in str(fields_)
