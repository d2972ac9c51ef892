"""Orders as a service, on aiohttp: the same as the FastAPI example, request by request.

    python -m examples.aiohttp_orders.app --port 8000

Where its events are: `REDIS_URL`, `asyncstore.toml`, or an embedded server in `.asyncstore`.
`openapi.json` beside this file says what there is; `python -m examples.fastapi_orders` prints it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, TypeAdapter, ValidationError

from asyncstore import MAIN, Aggregate, Appended, Expected, InvalidValue
from asyncstore.integrations.aiohttp import (
    etag,
    event_stream,
    events_json,
    expected_of,
    health_routes,
    idempotency_key_of,
    problem_response,
    setup,
    store_of,
)
from examples import orders

OPENAPI = Path(__file__).with_name("openapi.json")

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

# Making one takes longer than a request.
ORDER_ID = TypeAdapter[str](orders.OrderId)
EDITION = TypeAdapter[str](orders.Edition)
WHAT_IF = TypeAdapter[str](orders.WhatIf)
MOMENT = TypeAdapter[Any](orders.Moment)
SEQUENCE = TypeAdapter[int](orders.Sequence)
LIMIT = TypeAdapter[int](orders.Limit)

routes = web.RouteTableDef()


# What a request says


@web.middleware
async def refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except orders.Refused as error:
        return problem_response(409, str(error))
    except orders.Unknown as error:
        return problem_response(404, str(error))
    except ValidationError as error:
        whys = [(".".join(map(str, e["loc"])) or "body", e["msg"]) for e in error.errors()]
        return problem_response(422, "; ".join(f"{where}: {why}" for where, why in whys))


def value_of(name: str, text: str, type_: TypeAdapter[T]) -> T:
    try:
        return type_.validate_python(text)
    except ValidationError as error:
        raise InvalidValue(name, error.errors()[0]["msg"]) from None


def in_query(request: web.Request, name: str, type_: TypeAdapter[T], default: T) -> T:
    text = request.query.get(name)
    return default if text is None else value_of(name, text, type_)


def order_of(request: web.Request) -> Aggregate:
    order_id = value_of("order_id", request.match_info["order_id"], ORDER_ID)
    return orders.aggregate(order_id, in_query(request, "edition", EDITION, MAIN))


def branch_of(request: web.Request) -> Aggregate:
    edition = value_of("edition", request.match_info["edition"], WHAT_IF)
    return order_of(request).on(edition)


async def body_of(request: web.Request, model: type[B]) -> B:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType
    return model.model_validate_json(await request.read())


# Commands


async def change(
    request: web.Request, decide: orders.Decide, expected: Expected, status: int = 200
) -> web.Response:
    """Carry out what has been decided on the order that the path names."""
    key = idempotency_key_of(request)
    store = store_of(request)
    return done(await orders.carry_out(store, order_of(request), decide, expected, key), status)


def done(appended: Appended, status: int) -> web.Response:
    body = orders.Done.model_validate(appended, from_attributes=True).model_dump_json()
    headers = {"ETag": etag(appended.last_sequence + 1)}
    return web.Response(text=body, status=status, headers=headers, content_type="application/json")


@routes.put("/orders/{order_id}")
async def place_order(request: web.Request) -> web.Response:
    decide = orders.place(await body_of(request, orders.Place))
    return await change(request, decide, expected_of(request), 201)


@routes.post("/orders/{order_id}/items")
async def add_item(request: web.Request) -> web.Response:
    decide = orders.add(await body_of(request, orders.Item))
    return await change(request, decide, expected_of(request))


@routes.post("/orders/{order_id}/payment")
async def pay_order(request: web.Request) -> web.Response:
    decide = orders.pay(await body_of(request, orders.Pay))
    return await change(request, decide, expected_of(request))


@routes.post("/orders/{order_id}/cancellation")
async def cancel_order(request: web.Request) -> web.Response:
    return await change(request, orders.cancel, expected_of(request))


@routes.post("/orders/{order_id}/notes")
async def add_note(request: web.Request) -> web.Response:
    note = await body_of(request, orders.Note)
    key, expected = idempotency_key_of(request), expected_of(request)
    store = store_of(request)
    return done(await orders.add_note(store, order_of(request), note, expected, key), 201)


# Reads


@routes.get("/orders")
async def list_orders(request: web.Request) -> web.Response:
    limit = in_query(request, "limit", LIMIT, 100)
    return web.json_response(await orders.order_ids(store_of(request), limit))


@routes.get("/orders/{order_id}")
async def read_order(request: web.Request) -> web.Response:
    until = in_query(request, "until", MOMENT, None)
    order = await orders.order_at(store_of(request), order_of(request), until)
    body = orders.OrderView.model_validate(order, from_attributes=True).model_dump_json()
    headers = {"ETag": etag(order.sequence)}
    return web.Response(text=body, headers=headers, content_type="application/json")


@routes.get("/orders/{order_id}/events")
async def read_events(request: web.Request) -> web.Response:
    found = await store_of(request).events.read(
        order_of(request),
        start=in_query(request, "start", SEQUENCE, 0),
        limit=in_query(request, "limit", LIMIT, 100),
        until=in_query(request, "until", MOMENT, None),
    )
    return web.Response(body=events_json(found), content_type="application/json")


@routes.get("/orders/{order_id}/live", allow_head=False)
async def live_events(request: web.Request) -> web.StreamResponse:
    return await event_stream(request, order_of(request))


# What if


@routes.put("/orders/{order_id}/editions/{edition}")
async def branch(request: web.Request) -> web.Response:
    at = (await body_of(request, orders.Branch)).at
    await store_of(request).events.branch(branch_of(request), at=at)
    return web.json_response(None, status=201)


@routes.delete("/orders/{order_id}/editions/{edition}")
async def drop_branch(request: web.Request) -> web.Response:
    await store_of(request).events.delete(branch_of(request))
    return web.Response(status=204)


@routes.get("/openapi.json")
async def openapi(request: web.Request) -> web.Response:
    return web.Response(text=OPENAPI.read_text(), content_type="application/json")


def make_app() -> web.Application:
    app = web.Application()
    setup(app, own_errors=True, start_without_store=True)
    app.middlewares.append(refusals)
    app.add_routes(health_routes())
    app.add_routes(routes)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    web.run_app(make_app(), host=arguments.host, port=arguments.port, print=None)


if __name__ == "__main__":
    main()
