"""One small application on both frameworks, served in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import fastapi
import uvicorn
from aiohttp import web

import asyncstore
from asyncstore import Aggregate, Event
from asyncstore.integrations import aiohttp as on_aiohttp
from asyncstore.integrations import fastapi as on_fastapi
from asyncstore.settings import Options
from tests.polling import eventually

Fail = Callable[[], Exception]
"""What /fail raises."""


@dataclass(frozen=True)
class Served:
    """A running application, and the store that it had at its start."""

    url: str
    at_start: asyncstore.Store | None

    @property
    def store(self) -> asyncstore.Store:
        assert self.at_start is not None
        return self.at_start

    @property
    def listeners(self) -> int:
        return len(self.store._doorbell._members)


async def append(store: asyncstore.Store, root: str, text: str, **options: Any) -> dict[str, Any]:
    done = await store.events.append(Aggregate("notes", root), [Event("Noted", text)], **options)
    return {"first": done.first_sequence, "duplicate": done.duplicate}


@dataclass(frozen=True)
class AppOptions:
    """What an application asks of its integration."""

    own_errors: bool = False
    start_without_store: bool = False


def options_of(prefix: str) -> Options:
    return {"key_prefix": prefix, "max_event_bytes": 1000, "timeout": 2}


def never() -> Exception:
    return AssertionError("nobody said what to raise")


@asynccontextmanager
async def fastapi_app(
    url: str, prefix: str, fail: Fail = never, options: AppOptions | None = None, **stream: float
) -> AsyncIterator[Served]:
    how = options or AppOptions()
    app = fastapi.FastAPI(
        lifespan=on_fastapi.lifespan(
            url, start_without_store=how.start_without_store, **options_of(prefix)
        )
    )
    on_fastapi.install_error_handlers(app, own=how.own_errors)
    app.include_router(on_fastapi.health_router(max_age=0))

    @app.post("/notes/{root}")
    async def note(
        root: str,
        request: fastapi.Request,
        store: on_fastapi.Store,
        expected: on_fastapi.Expected,
        key: on_fastapi.IdempotencyKey,
    ) -> dict[str, Any]:
        text = (await request.body()).decode()
        return await append(store, root, text, expected=expected, idempotency_key=key)

    @app.api_route("/live/{root}", methods=["GET", "HEAD"])
    async def live(
        root: str, store: on_fastapi.Store, last: on_fastapi.LastEventId
    ) -> fastapi.Response:
        place = Aggregate("notes", root)
        return on_fastapi.event_stream(store, place, last_event_id=last, **stream)

    @app.get("/fail")
    async def failing() -> None:
        raise fail()

    part = fastapi.FastAPI()
    app.mount("/part", part)

    @part.get("/next/{root}")
    async def next_sequence(root: str, store: on_fastapi.Store) -> int:
        return await store.events.next_sequence(Aggregate("notes", root))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serving = asyncio.ensure_future(server._serve([listening]))
        await eventually(lambda: server.started or serving.done(), "uvicorn has started")
        try:
            host, port = listening.getsockname()
            yield Served(f"http://{host}:{port}", app.state.asyncstore.store)
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def aiohttp_app(
    url: str, prefix: str, fail: Fail = never, options: AppOptions | None = None, **stream: float
) -> AsyncIterator[Served]:
    app = web.Application()
    how = options or AppOptions()
    on_aiohttp.setup(app, url, **asdict(how), **options_of(prefix))
    app.add_routes(on_aiohttp.health_routes(max_age=0))

    async def note(request: web.Request) -> web.Response:
        text = await request.text()
        expected = on_aiohttp.expected_of(request)
        key = on_aiohttp.idempotency_key_of(request)
        store, root = on_aiohttp.store_of(request), request.match_info["root"]
        found = await append(store, root, text, expected=expected, idempotency_key=key)
        return web.json_response(found)

    async def live(request: web.Request) -> web.StreamResponse:
        place = Aggregate("notes", request.match_info["root"])
        return await on_aiohttp.event_stream(request, place, **stream)

    async def failing(request: web.Request) -> web.Response:
        raise fail()

    async def next_sequence(request: web.Request) -> web.Response:
        place = Aggregate("notes", request.match_info["root"])
        return web.json_response(await on_aiohttp.store_of(request).events.next_sequence(place))

    part = web.Application()
    part.router.add_get("/next/{root}", next_sequence)
    app.add_subapp("/part", part)
    app.router.add_post("/notes/{root}", note)
    app.router.add_get("/live/{root}", live)
    app.router.add_get("/fail", failing)
    runner = web.AppRunner(app, shutdown_timeout=20)
    await runner.setup()
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            await web.SockSite(runner, listening).start()
            host, port = listening.getsockname()
            yield Served(f"http://{host}:{port}", app.get(on_aiohttp.STORE))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.cleanup(), 10)
    finally:
        await runner.cleanup()


App = Callable[..., AbstractAsyncContextManager[Served]]
APPS: dict[str, App] = {"fastapi": fastapi_app, "aiohttp": aiohttp_app}


@dataclass(frozen=True)
class Sent:
    """One Server-Sent Event, or a comment, as it came."""

    event: str
    id: str
    data: str


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[Sent]:
    """What a stream sends, comments and `retry` left out."""
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                yield Sent(fields.get("event", "message"), fields.get("id", ""), fields["data"])
            fields = {}


async def first(count: int, events: AsyncIterator[Sent]) -> list[Sent]:
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(count)]
