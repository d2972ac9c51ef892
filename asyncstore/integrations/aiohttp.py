"""A store in an aiohttp application.

app = web.Application()
setup(app, "redis://localhost:6379")
app.add_routes(health_routes())

async def note(request):
    place = Aggregate("orders", request.match_info["order"])
    await store_of(request).events.append(
        place, [Event("Noted", await request.text())], expected=expected_of(request), ...
    )
    return web.Response(status=201)

async def live(request):
    return await event_stream(request, Aggregate("orders", request.match_info["order"]))
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final, Unpack

from aiohttp import hdrs, web

import asyncstore
from asyncstore.errors import AsyncStoreError, StoreClosed
from asyncstore.integrations import http
from asyncstore.integrations.http import etag, event_json, events_json
from asyncstore.names import check_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiohttp.typedefs import Handler

    from asyncstore.settings import Options

_log = logging.getLogger(__name__)

__all__ = [  # noqa: RUF022 - grouped by topic
    "setup",
    "lifespan",
    "STORE",
    "store_of",
    # requests
    "expected_of",
    "idempotency_key_of",
    # responses
    "etag",
    "event_json",
    "events_json",
    "event_stream",
    "health_routes",
    # errors
    "install_error_handlers",
    "problem_response",
]

STORE: Final = web.AppKey("asyncstore", asyncstore.Store)
"""Where an application has its store, if it was there at the start: `request.app[STORE]`."""

_HELD: Final = web.AppKey("asyncstore_held", http.HeldStore)
_STREAMS: Final = web.AppKey("asyncstore_streams", set[asyncio.Timeout])


def setup(
    app: web.Application,
    where: str | asyncstore.Settings | None = None,
    *,
    own_errors: bool = False,
    start_without_store: bool = False,
    **options: Unpack[Options],
) -> None:
    """Give an application a store: `lifespan`, `install_error_handlers`, and a quick shutdown.

    The other arguments are those of `asyncstore.open`. When the application begins to shut down,
    streams of live events end, so that it need not wait for them.
    """
    app.cleanup_ctx.append(lifespan(where, start_without_store=start_without_store, **options))
    install_error_handlers(app, own=own_errors)
    app[_STREAMS] = set()
    app.on_shutdown.append(_end_streams)


def lifespan(
    where: str | asyncstore.Settings | None = None,
    *,
    start_without_store: bool = False,
    **options: Unpack[Options],
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return what opens a store with the application, and closes it: for `app.cleanup_ctx`.

    With `start_without_store` the application also starts while the server is away: until it is
    there, `ready` and whoever asks for `store_of` are answered with 503.
    """

    async def opened(app: web.Application) -> AsyncIterator[None]:
        make = partial(asyncstore.open, where, **options)
        async with http.held_store(make, start_without_store=start_without_store) as held:
            app[_HELD] = held
            if held.store is not None:
                app[STORE] = held.store
            yield

    return opened


def store_of(request: web.Request) -> asyncstore.Store:
    """Return the store of the application, also in one that was added to it."""
    held = request.config_dict.get(_HELD)
    if held is None:
        raise StoreClosed("the application has no store: app.cleanup_ctx.append(lifespan(…))")
    return held.get()


# Requests


def expected_of(request: web.Request) -> asyncstore.Expected:
    """Return the expected sequence that If-Match or If-None-Match names: `http.expected_of`."""
    return http.expected_of(_header(request, "If-Match"), _header(request, "If-None-Match"))


def idempotency_key_of(request: web.Request) -> str | None:
    """Return the key that the header Idempotency-Key names."""
    return http.key_of(_header(request, "Idempotency-Key"))


def _header(request: web.Request, name: str) -> str | None:
    return http.header_of(request.headers.getall(name, []))


# Errors


def install_error_handlers(app: web.Application, *, own: bool = False) -> None:
    """Let errors of the store become problems; `http.problem_of` says which.

    With `own` aiohttp's errors become problems, too: unknown paths, what raises HTTPException, and
    mistakes of the application, which are logged.
    """

    @web.middleware
    async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            problem = _problem_of(error, own=own)
            if problem is None or request.writer.output_size:  # an answer is on its way
                raise
            return _response(problem)

    app.middlewares.append(problems)


def _problem_of(error: Exception, *, own: bool) -> http.Problem | None:
    if isinstance(error, AsyncStoreError):
        return http.problem_of(error)
    if not own:
        return None
    if not isinstance(error, web.HTTPException):
        _log.error("a request failed", exc_info=error)
        return http.problem_of_status(500)
    allow = error.headers.get("Allow")
    headers = {} if allow is None else {"Allow": allow}
    return http.problem_of_status(error.status, headers=headers) if error.status >= 400 else None


def problem_response(status: int, detail: str) -> web.Response:
    """Return a problem of your own."""
    return _response(http.problem_of_status(status, detail))


def _response(problem: http.Problem) -> web.Response:
    return web.Response(
        body=problem.body(),
        status=problem.status,
        headers=problem.headers,
        content_type=http.PROBLEM_JSON,
    )


# Health


def health_routes(
    path: str = "/health", *, max_age: float = 5.0, timeout: float = 1.0, strict: bool = False
) -> list[web.RouteDef]:
    """Return the routes of probes, for `app.add_routes`: `{path}/live` and `{path}/ready`.

    `live` says that the process answers, and never asks the store: to restart a service does not
    mend its store. `ready` is 200 if the store has answered, else 503; the arguments are those of
    `http.HealthOptions`.
    """
    health = http.Health(http.HealthOptions(max_age, timeout, strict))

    async def live(request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(request: web.Request) -> web.Response:
        held = request.config_dict.get(_HELD)
        found = await health.ready(held.store if held else None)
        return web.json_response(found.fields(), status=found.status)

    return [web.get(f"{path}/live", live), web.get(f"{path}/ready", ready)]


# Live events


async def event_stream(
    request: web.Request,
    aggregate: asyncstore.Aggregate,
    *,
    heartbeat: float = 15.0,
    send_timeout: float = 30.0,
) -> web.StreamResponse:
    """Send the events of an aggregate as Server-Sent Events: see `http.LiveEvents`.

    Goes on from the header Last-Event-ID, until the client leaves. One that has taken nothing for
    `send_timeout` seconds is hung up on, and may come back.
    """
    check_seconds("send_timeout", send_timeout, least=0.01)
    last_event_id = _header(request, "Last-Event-ID")
    response = web.StreamResponse(headers=http.STREAM_HEADERS)
    response.content_type = http.EVENT_STREAM
    if request.method == hdrs.METH_HEAD:  # as the route of a GET takes it, too
        return response
    streams = request.config_dict.get(_STREAMS, set())
    until_shutdown = asyncio.timeout(None)
    try:
        async with (
            http.LiveEvents(store_of(request), aggregate, last_event_id, heartbeat) as live,
            until_shutdown,
        ):
            streams.add(until_shutdown)
            try:
                await response.prepare(request)
                async for frame in live.frames():
                    async with asyncio.timeout(send_timeout):
                        await response.write(frame)
            finally:
                streams.discard(until_shutdown)  # when it is over it can't be rescheduled
    except TimeoutError:
        if not until_shutdown.expired():
            _hang_up(request, send_timeout)
    except ConnectionError:
        pass  # the client has left
    return response


def _hang_up(request: web.Request, waited: float) -> None:
    _log.info("a client has taken nothing for %s seconds", waited)
    if request.transport is not None:
        request.transport.abort()


async def _end_streams(app: web.Application) -> None:
    now = asyncio.get_running_loop().time()
    for stream in app[_STREAMS]:
        stream.reschedule(now)
