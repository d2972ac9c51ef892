"""Orders as a service, on FastAPI.

    uvicorn examples.fastapi_orders.app:app --timeout-graceful-shutdown 5

Where its events are: `REDIS_URL`, `asyncstore.toml`, or an embedded server in `.asyncstore`.

Read an order, and send its ETag back as If-Match to change just what was read. With an
Idempotency-Key a request can be sent again. `?edition=what-if` names another time line, `?until=`
a moment in the past.
"""

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response

from asyncstore import MAIN, Appended
from asyncstore.integrations import fastapi as integration
from asyncstore.integrations.fastapi import (
    IdempotencyKey,
    IfMatch,
    LastEventId,
    Store,
    etag,
    etag_responses,
    event_stream,
    events_json,
    expected_of,
    header_parameters,
    idempotency_key_of,
    problem_response,
    problem_responses,
    store_of,
)
from examples import orders
from examples.orders import Done, Edition, Limit, Moment, OrderId, Sequence


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    async with integration.lifespan(start_without_store=True)(app) as state:
        # What is there now stays. A full collection that looks at it again and again holds up all
        # requests for some 50 ms each time.
        gc.collect()
        gc.freeze()
        yield state


app = FastAPI(
    title="Orders",
    lifespan=lifespan,
    max_body_size=2**20,
    responses=problem_responses(400, 422, 500, 503, 504),
)
integration.install_error_handlers(app, own=True)
app.include_router(integration.health_router())

CHANGES = problem_responses(409, 413, 415, 507)
CHANGED, CREATED = CHANGES | etag_responses(200), CHANGES | etag_responses(201)
OnEdition = Annotated[Edition, Query(description="The time line.")]
Until = Annotated[Moment | None, Query(description="As of this moment.")]


@app.exception_handler(orders.Refused)
async def refused(request: Request, error: orders.Refused) -> Response:
    return problem_response(409, str(error))


@app.exception_handler(orders.Unknown)
async def unknown(request: Request, error: orders.Unknown) -> Response:
    return problem_response(404, str(error))


def done(appended: Appended, response: Response) -> Done:
    response.headers["ETag"] = etag(appended.last_sequence + 1)
    return Done.model_validate(appended, from_attributes=True)


# Commands


def change_of(
    order_id: OrderId,
    store: Store,
    expected: IfMatch,
    key: IdempotencyKey,
    response: Response,
    edition: OnEdition = MAIN,
) -> Callable[[orders.Decide], Awaitable[Done]]:
    """Return what carries out a command to an order that is there."""

    async def change(decide: orders.Decide) -> Done:
        order = orders.aggregate(order_id, edition)
        return done(await orders.carry_out(store, order, decide, expected, key), response)

    return change


Change = Annotated[Callable[[orders.Decide], Awaitable[Done]], Depends(change_of)]


@app.put("/orders/{order_id}", status_code=201, responses=CREATED)
async def place_order(body: orders.Place, change: Change) -> Done:
    """Place an order under an id of your own. There must not be one yet."""
    return await change(orders.place(body))


@app.post("/orders/{order_id}/items", responses=CHANGED)
async def add_item(body: orders.Item, change: Change) -> Done:
    """Add an item to an order."""
    return await change(orders.add(body))


@app.post("/orders/{order_id}/payment", responses=CHANGED)
async def pay_order(body: orders.Pay, change: Change) -> Done:
    """Pay an order."""
    return await change(orders.pay(body))


@app.post("/orders/{order_id}/cancellation", responses=CHANGED)
async def cancel_order(change: Change) -> Done:
    """Cancel an order that is not paid."""
    return await change(orders.cancel)


# Notes come often. The store and the headers as dependencies would cost FastAPI more time than the
# append costs the store: they are read from the request.
@app.post(
    "/orders/{order_id}/notes",
    status_code=201,
    responses=CREATED,
    openapi_extra=header_parameters("If-Match", "Idempotency-Key"),
)
async def add_note(
    order_id: OrderId,
    body: orders.Note,
    request: Request,
    response: Response,
    edition: OnEdition = MAIN,
) -> Done:
    """Add a note."""
    store, order = await store_of(request), orders.aggregate(order_id, edition)
    expected, key = expected_of(request), idempotency_key_of(request)
    return done(await orders.add_note(store, order, body, expected, key), response)


# Reads


@app.get("/orders")
async def list_orders(store: Store, limit: Limit = 100) -> list[str]:
    """List orders, those that have changed least recently first."""
    return await orders.order_ids(store, limit)


@app.get("/orders/{order_id}", responses=problem_responses(404) | etag_responses(200))
async def read_order(
    order_id: OrderId,
    store: Store,
    response: Response,
    edition: OnEdition = MAIN,
    until: Until = None,
) -> orders.OrderView:
    """Return an order as it is, as it was, or as it would be."""
    order = await orders.order_at(store, orders.aggregate(order_id, edition), until)
    response.headers["ETag"] = etag(order.sequence)
    return orders.OrderView.model_validate(order, from_attributes=True)


@app.get("/orders/{order_id}/events", response_model=list[orders.EventView])
async def read_events(
    order_id: OrderId,
    store: Store,
    edition: OnEdition = MAIN,
    until: Until = None,
    start: Annotated[Sequence, Query(description="The first sequence.")] = 0,
    limit: Limit = 100,
) -> Response:
    """Return what happened to an order."""
    order = orders.aggregate(order_id, edition)
    found = await store.events.read(order, start=start, limit=limit, until=until)
    return Response(events_json(found), media_type="application/json")


@app.get("/orders/{order_id}/live", response_class=integration.EventStream)
async def live_events(
    order_id: OrderId, store: Store, last: LastEventId, edition: OnEdition = MAIN
) -> Response:
    """Send what happened to an order, and then what happens, as Server-Sent Events."""
    return event_stream(store, orders.aggregate(order_id, edition), last_event_id=last)


# What if


@app.put("/orders/{order_id}/editions/{edition}", status_code=201, responses=CHANGES)
async def branch(
    order_id: OrderId, edition: orders.WhatIf, body: orders.Branch, store: Store
) -> None:
    """Begin another time line of an order: main until a sequence, then what you make of it."""
    await store.events.branch(orders.aggregate(order_id, edition), at=body.at)


@app.delete("/orders/{order_id}/editions/{edition}", status_code=204)
async def drop_branch(order_id: OrderId, edition: orders.WhatIf, store: Store) -> None:
    """Forget a time line of an order."""
    await store.events.delete(orders.aggregate(order_id, edition))
