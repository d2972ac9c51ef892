"""A store's metrics for Prometheus: an endpoint, and something to see there.

    python examples/prometheus_metrics.py [--port 9464]

Appends orders, some of them at a sequence that is taken, while a handler works on them, until it is
stopped. Then point a browser, curl or Prometheus at the address that it prints.

What an application needs of it are the four lines of `provide_metrics`, and `instrument`.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Annotated

import typer
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import start_http_server

import asyncstore
from asyncstore import ANY, Aggregate, Event, SequenceConflict, Store, telemetry


def provide_metrics(port: int) -> tuple[MeterProvider, int]:
    """Serve what is measured, in a thread of its own; 0 takes a free port."""
    meters = MeterProvider([PrometheusMetricReader()])
    server, _ = start_http_server(port, addr="127.0.0.1")
    return meters, server.server_port


async def shop(store: Store) -> None:
    """Append orders, now and then one that somebody else was faster with."""
    while True:
        order = Aggregate("orders", f"{random.randrange(20)}")  # noqa: S311
        next_sequence = await store.events.next_sequence(order)
        await store.events.append(order, [Event("OrderPlaced", {})], expected=ANY)
        with suppress(SequenceConflict):
            await store.events.append(order, [Event("OrderPaid", {})], expected=next_sequence)
        await asyncio.sleep(0.01)


async def serve(port: int) -> None:
    meters, port = provide_metrics(port)
    async with asyncstore.open("embedded://") as store, asyncio.TaskGroup() as tasks:
        telemetry.instrument(store, meter_provider=meters)

        @store.handler("mailer", "orders")
        async def send_mail(_: asyncstore.RecordedEvent) -> None:
            await asyncio.sleep(0.005)

        working = [
            tasks.create_task(shop(store)),
            tasks.create_task(telemetry.watch_progress(store, every=1.0)),
        ]
        print(f"http://127.0.0.1:{port}/metrics", flush=True)
        await store.run_handlers()  # until a SIGTERM
        for task in working:
            task.cancel()


def main(
    port: Annotated[int, typer.Option(help="Where to serve; 0 takes a free one.")] = 9464,
) -> None:
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(port))


if __name__ == "__main__":
    typer.run(main)
