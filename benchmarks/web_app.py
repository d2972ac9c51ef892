"""The FastAPI example, and twins of its notes on plain redis-py: what `benchmarks.web` measures.

Twins have the same framework, validation and answer, and the requests of the benchmark have no
precondition, which they would pass over; only what appends is another: redis-py's
`evalsha` of the store's own append script, or separate commands. Served under uvicorn as
`store_app`, `script_app`, `commands_app`; `BENCH_PROFILE` names a file for what the process did.
"""

# FastAPI reads annotations when it runs: no `from __future__ import` here.

import collections
import gc
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request, Response

from asyncstore import MAIN, Aggregate, Event, scripts
from asyncstore.integrations import fastapi as integration
from asyncstore.integrations.fastapi import (
    etag,
    expected_of,
    header_parameters,
    idempotency_key_of,
    problem_responses,
)
from benchmarks.sides import Append, client_of, script_call
from examples import orders
from examples.fastapi_orders.app import OnEdition
from examples.fastapi_orders.app import app as example
from examples.orders import Done, OrderId

_INTERVAL = 0.001  # seconds of CPU time between two samples


@asynccontextmanager
async def _redis(app: FastAPI) -> AsyncIterator[None]:
    client = client_of(os.environ["REDIS_URL"])
    await client.script_load(scripts.APPEND.source)
    app.state.redis = client
    gc.collect()  # as the example does
    gc.freeze()
    try:
        yield
    finally:
        await client.aclose()


async def by_script(client: Any, order: Aggregate, event: Event) -> int:
    """Append by the store's own script, and return the sequence."""
    append = Append(order, [event], 0)
    keys, arguments = script_call(append, anywhere=True)
    ((tag, sequence, *_),) = await client.evalsha(scripts.APPEND.sha, len(keys), *keys, *arguments)
    if tag != b"ok":
        raise RuntimeError("a note was not stored")
    return int(sequence)


async def by_commands(client: Any, order: Aggregate, event: Event) -> int:
    """Append as people do it by hand: not atomic, so two may get one sequence."""
    key = f"plain:orders:{order.edition}:{order.root}"
    sequence = int(await client.zcard(key))
    body = {"sequence": sequence, "id": str(event.id), "type": event.type, "data": event.data}
    await client.zadd(key, {json.dumps(body): sequence})
    await client.sadd("plain:roots:orders", order.root)
    return sequence


def twin(append: Callable[[Any, Aggregate, Event], Awaitable[int]]) -> FastAPI:
    """Return an application that adds notes as the example does, but in its own way."""
    app = FastAPI(
        title="Orders",
        lifespan=_redis,
        max_body_size=2**20,
        responses=problem_responses(400, 422, 500, 503),
    )
    integration.install_error_handlers(app, own=True)

    @app.post(
        "/orders/{order_id}/notes",
        status_code=201,
        openapi_extra=header_parameters("If-Match", "Idempotency-Key"),
    )
    async def add_note(
        order_id: OrderId,
        body: orders.Note,
        request: Request,
        response: Response,
        edition: OnEdition = MAIN,
    ) -> Done:
        expected_of(request)  # what can't be understood is refused
        idempotency_key_of(request)
        noted = Event("NoteAdded", {"text": body.text})
        order = orders.aggregate(order_id, edition)
        sequence = await append(request.app.state.redis, order, noted)
        response.headers["ETag"] = etag(sequence + 1)
        return Done(first_sequence=sequence, last_sequence=sequence, duplicate=False)

    return app


class Sampler:
    """Counts in which package the process was, each millisecond of its CPU time.

    Code in C counts for the Python code that has called it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packages: collections.Counter[str] = collections.Counter()
        self._began = 0.0

    def start(self) -> None:
        """Begin, for as long as the process runs."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL, _INTERVAL)
        self._began = time.process_time()

    def _sample(self, number: int, frame: FrameType | None) -> None:
        self._packages[_package_of(frame)] += 1

    def write(self) -> None:
        """Write what was counted."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = {"cpu": time.process_time() - self._began, "packages": self._packages}
        self._path.write_text(json.dumps(found))


def _package_of(frame: FrameType | None) -> str:
    """Return the package of the innermost code that is none of the standard library's."""
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for place in ("site-packages", "asyncstore", "benchmarks", "examples"):
            if place in parts:
                here = len(parts) - 1 - parts[::-1].index(place)
                return parts[here + 1] if place == "site-packages" else place
        frame = frame.f_back
    return "the event loop"


def _profiled(app: FastAPI) -> FastAPI:
    path = os.environ.get("BENCH_PROFILE")
    if path is None:
        return app
    opened = app.router.lifespan_context

    @asynccontextmanager
    async def sampled(app: FastAPI) -> AsyncIterator[None]:
        sampler = Sampler(Path(path))
        async with opened(app):
            sampler.start()
            yield
            sampler.write()

    app.router.lifespan_context = sampled
    return app


store_app = _profiled(example)
script_app = _profiled(twin(by_script))
commands_app = _profiled(twin(by_commands))
