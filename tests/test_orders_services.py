"""The example services, each as two real processes on one store."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import pytest

from examples.aiohttp_orders import app as aiohttp_orders
from examples.fastapi_orders import app as fastapi_orders
from tests import servers
from tests.polling import eventually
from tests.web import events_of, first

ROOT = Path(__file__).parent.parent
ITEM = {"sku": "tea", "quantity": 2, "cents": 5}


@dataclass(frozen=True)
class Service:
    """Two workers of a service."""

    urls: list[str]
    processes: list[subprocess.Popen[bytes]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def command(kind: str, port: int) -> list[str]:
    if kind == "aiohttp":
        return [sys.executable, "-m", "examples.aiohttp_orders.app", "--port", str(port)]
    where = ["examples.fastapi_orders.app:app", "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", *where, "--timeout-graceful-shutdown", "1"]


@contextmanager
def running(kind: str, port: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command(kind, port), cwd=ROOT, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


async def ready(url: str) -> None:
    async def is_ready() -> bool:
        try:
            return (await client.get(f"{url}/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async with httpx.AsyncClient() as client:
        await eventually(is_ready, f"{url} is ready")


@contextmanager
def serving(kind: str, server: servers.Server, prefix: str, workers: int) -> Iterator[Service]:
    environment = {"REDIS_URL": server.url, "ASYNCSTORE_KEY_PREFIX": prefix}
    ports = [free_port() for _ in range(workers)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        processes = [stack.enter_context(running(kind, port, environment)) for port in ports]
        for url in urls:
            anyio.run(ready, url)
        yield Service(urls, processes)


KINDS = ["fastapi", "aiohttp"]


@pytest.fixture(scope="module", params=KINDS)
def service(request: pytest.FixtureRequest, one_server: servers.Server) -> Iterator[Service]:
    with serving(request.param, one_server, f"test-{uuid.uuid4().hex}:", workers=2) as both:
        yield both


@pytest.fixture
async def clients(service: Service) -> AsyncIterator[list[httpx.AsyncClient]]:
    one, two = (httpx.AsyncClient(base_url=url, timeout=20) for url in service.urls)
    async with one, two:
        yield [one, two]


@pytest.fixture
def path() -> str:
    return f"/orders/{uuid.uuid4().hex}"


async def test_an_order(clients: list[httpx.AsyncClient], path: str) -> None:
    one, two = clients
    assert (await one.get(path)).status_code == 404
    body = {"customer": "ada", "items": [ITEM]}
    placed = await one.put(path, json=body, headers={"Idempotency-Key": "place"})
    assert (placed.status_code, placed.headers["ETag"]) == (201, '"2"')
    assert (await two.put(path, json=body)).status_code == 409
    again = await two.put(path, json=body, headers={"Idempotency-Key": "place"})
    assert again.json() == {"first_sequence": 0, "last_sequence": 1, "duplicate": True}

    read = await two.get(path)
    assert read.json() == {
        "status": "placed",
        "customer": "ada",
        "items": 2,
        "cents": 10,
        "sequence": 2,
    }
    etag = read.headers["ETag"]
    assert (await one.post(f"{path}/items", json=ITEM)).status_code == 200
    stale = await two.post(f"{path}/items", json=ITEM, headers={"If-Match": etag})
    assert stale.status_code == 409
    assert (stale.json()["expected"], stale.json()["actual"]) == (2, 3)

    wrong = await two.post(f"{path}/payment", json={"cents": 1})
    assert (wrong.status_code, wrong.json()["detail"]) == (409, "the order is 20 cents")
    assert (await two.post(f"{path}/payment", json={"cents": 20})).status_code == 200
    assert (await one.post(f"{path}/cancellation")).status_code == 409
    assert (await one.post(f"{path}/notes", json={"text": "ring twice"})).status_code == 201

    events = (await one.get(f"{path}/events")).json()
    types = ["OrderPlaced", "ItemAdded", "ItemAdded", "OrderPaid", "NoteAdded"]
    assert [event["type"] for event in events] == types
    assert (await one.get(f"{path}/events", params={"start": 3, "limit": 1})).json() == [events[3]]
    until = {"until": events[1]["time"]}
    assert (await two.get(path, params=until)).json()["items"] in (2, 4)
    assert (await two.get(path, params=until)).json()["status"] == "placed"
    assert path.split("/")[-1] in (await one.get("/orders", params={"limit": 1000})).json()


async def test_what_if(clients: list[httpx.AsyncClient], path: str) -> None:
    one, two = clients
    await one.put(path, json={"customer": "ada", "items": [ITEM]})
    await one.post(f"{path}/payment", json={"cents": 10})
    edition = f"{path}/editions/what-if-cancelled"
    assert (await one.put(edition, json={"at": 2})).status_code == 201
    assert (await two.put(edition, json={"at": 1})).status_code == 409
    on = {"edition": "what-if-cancelled"}
    assert (await two.post(f"{path}/cancellation", params=on)).status_code == 200
    assert (await one.get(path, params=on)).json()["status"] == "cancelled"
    assert (await one.get(path)).json()["status"] == "paid"
    assert (await two.delete(edition)).status_code == 204
    assert (await one.get(path, params=on)).json()["status"] == "paid"


async def test_a_key_stands_for_one_request(clients: list[httpx.AsyncClient], path: str) -> None:
    one, two = clients
    key = {"Idempotency-Key": "k"}
    for client in clients:
        for _ in range(2):
            placed = await client.put(path, json={"customer": "ada", "items": [ITEM]}, headers=key)
            assert placed.status_code == 201
    for other in (
        await one.put(path, json={"customer": "bob", "items": [ITEM]}, headers=key),
        await one.put(path, json={"customer": "ada"}, headers=key),
        await two.post(f"{path}/items", json=ITEM, headers=key),
        await two.post(f"{path}/payment", json={"cents": 10}, headers=key),
        await one.post(f"{path}/notes", json={"text": "ring"}, headers=key),
    ):
        assert (other.status_code, "this Idempotency-Key" in other.text) == (409, True)
    assert len((await one.get(f"{path}/events")).json()) == 2
    noted = [
        await one.post(f"{path}/notes", json={"text": t}, headers={"Idempotency-Key": "n"})
        for t in "aab"
    ]
    assert [answer.status_code for answer in noted] == [201, 201, 409]


async def test_each_change_heeds_what_it_expects(
    clients: list[httpx.AsyncClient], path: str
) -> None:
    one, two = clients
    body = {"customer": "ada"}
    assert (await one.put(path, json=body, headers={"If-Match": '"3"'})).status_code == 409
    assert (await one.put(path, json=body, headers={"If-None-Match": "*"})).status_code == 201
    for header in ({"If-Match": '"7"'}, {"If-Match": '"0"'}, {"If-None-Match": "*"}):
        for change, sent in (
            ("items", ITEM),
            ("notes", {"text": "ring"}),
            ("payment", {"cents": 0}),
        ):
            answer = await two.post(f"{path}/{change}", json=sent, headers=header)
            assert answer.status_code == 409, (change, header)
    noted = await two.post(f"{path}/notes", json={"text": "ring"}, headers={"If-Match": '"1"'})
    assert noted.status_code == 201


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_is_bounded(
    clients: list[httpx.AsyncClient], path: str, is_chunked: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield b"x" * 2**16

    content = chunks() if is_chunked else b"x" * 2**21
    headers = {"Content-Type": "application/json"}
    answer = await clients[0].post(f"{path}/notes", content=content, headers=headers)
    assert answer.status_code == 413


async def test_many_at_once(clients: list[httpx.AsyncClient], path: str) -> None:
    """Each request is sent to both workers under one key, and all without an ETag."""
    await clients[0].put(path, json={"customer": "ada"})
    answers = await asyncio.gather(
        *(
            client.post(f"{path}/items", json=ITEM, headers={"Idempotency-Key": f"k{n}"})
            for n in range(15)
            for client in clients
        )
    )
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(answer.json()["duplicate"] for answer in answers) == [False] * 15 + [True] * 15
    order = await clients[0].get(path)
    assert order.json()["items"] == 30

    etag = {"If-Match": order.headers["ETag"]}
    answers = await asyncio.gather(
        *(clients[n % 2].post(f"{path}/items", json=ITEM, headers=etag) for n in range(10))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9


async def test_live(clients: list[httpx.AsyncClient], path: str) -> None:
    one, two = clients
    await one.put(path, json={"customer": "ada"})
    async with one.stream("GET", f"{path}/live") as live:
        came = events_of(live.aiter_lines())
        found = await first(1, came)
        for n in range(10):
            await two.post(f"{path}/notes", json={"text": f"{n}"})
        found += await first(5, came)
    async with two.stream("GET", f"{path}/live", headers={"Last-Event-ID": found[-1].id}) as live:
        found += await first(5, events_of(live.aiter_lines()))
    stored = (await one.get(f"{path}/events")).json()
    assert [json.loads(sent.data) for sent in found] == stored


async def test_what_is_not_valid_is_not_repeated(
    clients: list[httpx.AsyncClient], path: str
) -> None:
    for body in (b'{"customer": "s3cret!"}', b'{"s3cret": ', b"\xff"):
        json_ = {"Content-Type": "application/json"}
        answer = await clients[0].put(path, content=body, headers=json_)
        assert answer.status_code in (400, 422)
        assert answer.headers["content-type"] == "application/problem+json"
        assert "s3cret!" not in answer.text


async def test_what_is_not_valid_is_named(clients: list[httpx.AsyncClient], path: str) -> None:
    for query, name in (("until=soon", "until"), ("edition=", "edition")):
        answer = await clients[0].get(f"{path}?{query}")
        assert (answer.status_code, name in answer.text) == (422, True), answer.text
    answer = await clients[0].put(f"{path}!", json={"customer": "ada"})
    assert (answer.status_code, "order_id" in answer.text) == (422, True), answer.text
    answer = await clients[0].put(path, content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, "body" in answer.text) == (422, True), answer.text


@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_while_somebody_listens(
    kind: str, one_server: servers.Server, prefix: str
) -> None:
    with serving(kind, one_server, prefix, workers=1) as service:
        (process,) = service.processes
        with httpx.stream("GET", f"{service.urls[0]}/orders/1/live"):
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        assert process.returncode in (0, -signal.SIGTERM)


# OpenAPI


def test_the_document_is_the_one_that_fastapi_makes() -> None:
    assert json.loads(aiohttp_orders.OPENAPI.read_text()) == fastapi_orders.app.openapi(), (
        "python -m examples.fastapi_orders > examples/aiohttp_orders/openapi.json"
    )


def test_the_document_has_all_routes_of_aiohttp() -> None:
    document = json.loads(aiohttp_orders.OPENAPI.read_text())
    documented = {(m.upper(), path) for path, ops in document["paths"].items() for m in ops}
    routes = aiohttp_orders.make_app().router.routes()
    served = {(r.method, r.resource.canonical) for r in routes if r.resource and r.method != "HEAD"}
    assert served == documented | {("GET", "/openapi.json")}


def test_schemathesis_finds_no_fault(service: Service, tmp_path: Path) -> None:
    # A stream that never ends is nothing that it could read.
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", str(aiohttp_orders.OPENAPI), "--url", service.urls[0]),
            *("--exclude-path-regex", "order_id}/live$", "--max-examples", "20"),
            *("--generation-deterministic", "--no-color"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Tested: +12", done.stdout), done.stdout
