"""A store in a FastAPI application.

app = FastAPI(lifespan=lifespan("redis://localhost:6379"))
install_error_handlers(app)
app.include_router(health_router())

@app.post("/orders/{order}/notes", status_code=201)
async def note(order: str, text: str, store: Store, expected: Expected, key: IdempotencyKey):
    place = Aggregate("orders", order)
    await store.events.append(place, [Event("Noted", text)], expected=expected, ...)

@app.get("/orders/{order}/live")
async def live(order: str, store: Store, last: LastEventId):
    return event_stream(store, Aggregate("orders", order), last_event_id=last)
"""
# FastAPI reads the annotations of dependencies when it runs: no `from __future__ import` here.

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Annotated, Any, Final, TypeAlias, Unpack

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

import asyncstore
from asyncstore.errors import AsyncStoreError, InvalidValue, StoreClosed
from asyncstore.integrations import http
from asyncstore.integrations.http import etag, event_json, events_json
from asyncstore.names import check_seconds
from asyncstore.settings import Options

_log = logging.getLogger(__name__)

__all__ = [  # noqa: RUF022 - grouped by topic
    "lifespan",
    "store_of",
    "Store",
    # requests
    "Expected",
    "IfMatch",
    "IdempotencyKey",
    "LastEventId",
    "expected_of",
    "idempotency_key_of",
    "header_parameters",
    # responses
    "etag",
    "event_json",
    "events_json",
    "event_stream",
    "EventStream",
    "health_router",
    # errors
    "install_error_handlers",
    "problem_response",
    "problem_responses",
    "etag_responses",
    "Problem",
]


_STATE: Final = "asyncstore"  # the name of it in the state of applications and requests


def lifespan(
    where: str | asyncstore.Settings | None = None,
    *,
    start_without_store: bool = False,
    **options: Unpack[Options],
) -> Callable[[FastAPI], AbstractAsyncContextManager[dict[str, Any]]]:
    """Return a lifespan that opens a store with the application, and closes it with it.

    The other arguments are those of `asyncstore.open`. In a lifespan of your own:
    `async with lifespan(…)(app) as state: yield state`; what is yielded lets applications that are
    mounted have the same store. Each worker process has a store of its own. With
    `start_without_store` the application also starts while the server is away: until it is there,
    `ready` and whoever wants the store are answered with 503.
    """

    @asynccontextmanager
    async def opened(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        make = partial(asyncstore.open, where, **options)
        async with http.held_store(make, start_without_store=start_without_store) as held:
            setattr(app.state, _STATE, held)
            yield {_STATE: held}

    return opened


async def store_of(request: Request) -> asyncstore.Store:
    """Return the store of the application: the dependency behind `Store`."""
    held = _held(request)
    if held is None:
        raise StoreClosed("the application has no store: FastAPI(lifespan=lifespan(…)) opens one")
    return held.get()


def _held(request: Request) -> http.HeldStore | None:
    """Return what the application has, or the one in which it is mounted."""
    return getattr(request.app.state, _STATE, None) or getattr(request.state, _STATE, None)


Store: TypeAlias = Annotated[asyncstore.Store, Depends(store_of)]
"""The store of the application."""


# Requests


# What OpenAPI says of a header is checked where the header is understood, not by FastAPI, which
# also passes over all but one where a header comes several times.

_HEADERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "If-Match": (
        "The ETag that was read: the change is made only if nothing is new since.",
        {"type": "string", "pattern": http.IF_MATCH_PATTERN},
    ),
    "If-None-Match": (
        "`*`: the change is made only if there are no events yet.",
        {"type": "string", "const": "*"},
    ),
    "Idempotency-Key": (
        "Sent again with the same key, the change is made once, and answered so.",
        {"type": "string", "pattern": http.KEY_PATTERN},
    ),
    "Last-Event-ID": (
        "The id of the last event that came; those after it follow.",
        {"type": "string", "pattern": http.LAST_EVENT_ID_PATTERN},
    ),
}


def _documented(name: str) -> Any:
    description, schema = _HEADERS[name]
    return Header(alias=name, description=description, json_schema_extra={**schema})


# Any: FastAPI has nothing to check, and takes longer for each type that a union has.
_IfMatch: TypeAlias = Annotated[Any, _documented("If-Match")]
_IfNoneMatch: TypeAlias = Annotated[Any, _documented("If-None-Match")]
_IdempotencyKey: TypeAlias = Annotated[Any, _documented("Idempotency-Key")]
_LastEventId: TypeAlias = Annotated[Any, _documented("Last-Event-ID")]


def _header(request: Request, name: str) -> str | None:
    return http.header_of(request.headers.getlist(name))


def expected_of(request: Request) -> asyncstore.Expected:
    """Return the expected sequence that If-Match or If-None-Match names: `http.expected_of`."""
    return http.expected_of(_header(request, "If-Match"), _header(request, "If-None-Match"))


def idempotency_key_of(request: Request) -> str | None:
    """Return the key that the header Idempotency-Key names."""
    return http.key_of(_header(request, "Idempotency-Key"))


def header_parameters(*names: str) -> dict[str, Any]:
    """Return what `openapi_extra=` of a route says of headers that it reads from the request.

    Those are If-Match, If-None-Match, Idempotency-Key and Last-Event-ID. What reads them by
    `Expected`, `IfMatch`, `IdempotencyKey` and `LastEventId` has them documented by itself.
    """
    unknown = [name for name in names if name not in _HEADERS]
    if unknown:
        raise InvalidValue("names", f"{unknown[0]!r} is none of {', '.join(_HEADERS)}")
    return {"parameters": [_parameter(name, *_HEADERS[name]) for name in names]}


def _parameter(name: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    where = {"name": name, "in": "header", "required": False}
    return {**where, "description": description, "schema": {**schema}}


async def _if_match(request: Request, if_match: _IfMatch = None) -> asyncstore.Expected:
    return expected_of(request)


async def _expected(
    request: Request, if_match: _IfMatch = None, if_none_match: _IfNoneMatch = None
) -> asyncstore.Expected:
    return expected_of(request)


async def _idempotency_key(request: Request, idempotency_key: _IdempotencyKey = None) -> str | None:
    return idempotency_key_of(request)


async def _last_event_id(request: Request, last_event_id: _LastEventId = None) -> str | None:
    return _header(request, "Last-Event-ID")


Expected: TypeAlias = Annotated[asyncstore.Expected, Depends(_expected)]
"""The expected sequence that If-Match or If-None-Match names: see `http.expected_of`."""

IfMatch: TypeAlias = Annotated[asyncstore.Expected, Depends(_if_match)]
"""The same for what there is already: OpenAPI speaks of If-Match only."""

IdempotencyKey: TypeAlias = Annotated[str | None, Depends(_idempotency_key)]
"""The key that the header Idempotency-Key names."""

LastEventId: TypeAlias = Annotated[str | None, Depends(_last_event_id)]
"""The header Last-Event-ID, for `event_stream`."""


# Errors


class Problem(BaseModel):
    """The body of a problem (RFC 9457), for OpenAPI; some have more members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what `responses=` of a route or an application says of problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {http.PROBLEM_JSON: {"schema": schema}}
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": "A problem", "content": content} for status in statuses
    }
    if 503 in found:
        found[503]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return found


def etag_responses(status: int) -> dict[int | str, dict[str, Any]]:
    """Return what `responses=` of a route says of an ETag that comes with an answer."""
    schema = {"type": "string", "pattern": http.ETAG_PATTERN}
    header = {"description": "To be sent back as If-Match.", "schema": schema}
    return {status: {"headers": {"ETag": header}}}


def install_error_handlers(app: FastAPI, *, own: bool = False) -> None:
    """Let errors of the store become problems; `http.problem_of` says which.

    With `own` FastAPI's errors become problems, too: requests that are not valid, unknown paths,
    what raises HTTPException, and mistakes of the application. FastAPI answers with what was sent;
    a problem does not.
    """

    async def of_store(request: Request, error: Exception) -> Response:
        assert isinstance(error, AsyncStoreError)  # noqa: S101 - for type checkers
        return _response(http.problem_of(error))

    app.add_exception_handler(AsyncStoreError, of_store)
    if own:
        app.add_exception_handler(RequestValidationError, _of_validation)
        app.add_exception_handler(HTTPException, _of_http)
        app.add_exception_handler(Exception, _of_mistake)
        _document_problems(app)


async def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - for type checkers
    found = [
        {"where": ".".join(map(str, entry["loc"])), "why": str(entry["msg"])}
        for entry in error.errors()
    ]
    return _response(http.unusable(found))


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - for type checkers
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    return _response(http.problem_of_status(error.status_code, str(error.detail), headers))


async def _of_mistake(request: Request, error: Exception) -> Response:
    return _response(http.problem_of_status(500))  # the server logs it


def _methods_of(request: Request) -> set[str]:
    """Return what a path can be asked for; FastAPI names the methods of one of its routes."""
    found: set[str] = set()
    for route in request.app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return found


def _document_problems(app: FastAPI) -> None:
    """Let the application's OpenAPI have the schema that `problem_responses` names."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault("Problem", Problem.model_json_schema())
        return document

    app.openapi = openapi  # type: ignore[method-assign] # how FastAPI says that it is extended


def problem_response(status: int, detail: str) -> Response:
    """Return a problem of your own."""
    return _response(http.problem_of_status(status, detail))


def _response(problem: http.Problem) -> Response:
    return Response(
        problem.body(),
        problem.status,
        headers=dict(problem.headers),
        media_type=http.PROBLEM_JSON,
    )


# Health


class Finding(BaseModel):
    """A finding of `Store.check` that is not good."""

    name: str
    level: str


class Readiness(BaseModel):
    """Whether the service can serve."""

    status: str
    level: str
    findings: list[Finding]


def health_router(
    path: str = "/health", *, max_age: float = 5.0, timeout: float = 1.0, strict: bool = False
) -> APIRouter:
    """Return the routes of probes: `{path}/live` and `{path}/ready`.

    `live` says that the process answers, and never asks the store: to restart a service does not
    mend its store. `ready` is 200 if the store has answered, else 503; the arguments are those of
    `http.HealthOptions`.
    """
    health = http.Health(http.HealthOptions(max_age, timeout, strict))
    router = APIRouter(prefix=path, tags=["health"])

    @router.head("/live", include_in_schema=False)
    @router.get("/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready(request: Request) -> Response:
        """Whether the store answers, and what is not good about it."""
        held = _held(request)
        found = await health.ready(held.store if held else None)
        return JSONResponse(found.fields(), found.status)

    return router


# Live events


class EventStream(StreamingResponse):
    """A response that never ends: the events of an aggregate, made by `event_stream`."""

    media_type: Final = http.EVENT_STREAM  # type: ignore[misc] # a constant here

    # FastAPI looks for a default of `status_code`, to document it.
    def __init__(self, live: http.LiveEvents, send_timeout: float, status_code: int = 200) -> None:
        super().__init__(live.frames(), status_code, headers=dict(http.STREAM_HEADERS))
        self._live = live
        self._send_timeout = check_seconds("send_timeout", send_timeout, least=0.01)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. What the store says before the first byte is a problem like all others."""
        gave_up = False

        async def send_in_time(message: Message) -> None:
            nonlocal gave_up
            try:
                async with asyncio.timeout(self._send_timeout):
                    await send(message)
            except TimeoutError:
                gave_up = True
                raise

        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body"})
            return
        try:
            async with self._live:
                await super().__call__(scope, receive, send_in_time)
        except Exception:  # whatever the framework has made of it
            if not gave_up:
                raise
            _log.info("a client has taken nothing for %s seconds", self._send_timeout)


def event_stream(
    store: asyncstore.Store,
    aggregate: asyncstore.Aggregate,
    *,
    last_event_id: str | None = None,
    heartbeat: float = 15.0,
    send_timeout: float = 30.0,
) -> EventStream:
    """Return the events of an aggregate as Server-Sent Events: see `http.LiveEvents`.

    A client that has taken nothing for `send_timeout` seconds is hung up on, and may come back
    with its Last-Event-ID. Streams never end by themselves: run uvicorn with
    `--timeout-graceful-shutdown`, or it waits for them.
    """
    live = http.LiveEvents(store, aggregate, last_event_id, heartbeat)
    return EventStream(live, send_timeout)
