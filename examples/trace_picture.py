"""A picture of a trace: from an append to the handler of its event, and what that appends.

    python examples/trace_picture.py [--output build/trace.png]

Two services, each with a store of its own on one server. The shop appends an order within the span
of a request (the second one: with the first, scripts are loaded). The payments service handles its
event: that is another trace, which links to the append, as the event's metadata names it. Needs
matplotlib: `pip install '.[bench]'`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import matplotlib as mpl
import typer
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import asyncstore
from asyncstore import NEW, Aggregate, Event, RecordedEvent, telemetry

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"shop": "#3b6ea5", "payments": "#c46a2b"}
REQUEST = "POST /orders"
WARM_UP, ORDER = Aggregate("orders", "first"), Aggregate("orders", "8f1c")


def service(name: str, exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(resource=Resource({"service.name": name}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


async def trade(exporter: InMemorySpanExporter, url: str) -> None:
    """Place an order in one service, and ask for its payment in the other."""
    shop, payments = (service(name, exporter) for name in COLOURS)
    async with asyncstore.open(url) as ours, asyncstore.open(url) as theirs:
        telemetry.instrument(ours, tracer_provider=shop, propagate=True)
        telemetry.instrument(theirs, tracer_provider=payments, propagate=True)

        @theirs.handler("payments", "orders", types=["OrderPlaced"])
        async def ask_for_payment(event: RecordedEvent) -> None:
            asked = [Event("PaymentRequested", event.data)]
            await theirs.events.append(event.aggregate, asked, expected=event.sequence + 1)

        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(theirs.run_handlers())
            for order in (WARM_UP, ORDER):
                with shop.get_tracer("shop").start_as_current_span(REQUEST):
                    await ours.load(order)
                    await ours.events.append(order, [Event("OrderPlaced", {})], expected=NEW)
                await ours.positions.wait("payments", order, 0, timeout=10)
            running.cancel()


def of_last_request(spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    """Return the spans from the last request on, in the order of their beginnings."""
    begin = max(span.start_time or 0 for span in spans if span.name == REQUEST)
    later = [span for span in spans if (span.start_time or 0) >= begin]
    return sorted(later, key=lambda span: span.start_time or 0)


def milliseconds(moment: int | None, since: int) -> float:
    return ((moment or 0) - since) / 1e6


def draw(spans: list[ReadableSpan], output: Path) -> None:
    """Draw a bar for each span, and an arrow from what a span links to."""
    begin = spans[0].start_time or 0
    rows = {span.context.span_id: row for row, span in enumerate(spans)}
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(spans) + 1.2), layout="constrained")
    for row, span in enumerate(spans):
        start, end = (milliseconds(at, begin) for at in (span.start_time, span.end_time))
        name = str(span.resource.attributes["service.name"])
        axes.barh(row, end - start, left=start, color=COLOURS[name], height=0.6)
        label = f"  {name}: {span.name}, {end - start:.2f} ms"
        axes.text(end, row, label, va="center", fontsize=9)
        for link in span.links:
            origin = rows[link.context.span_id]
            left = milliseconds(spans[origin].end_time, begin)
            arrow = {"arrowstyle": "->", "linestyle": "--"}
            axes.annotate("", (start, row), (left, origin + 0.3), arrowprops=arrow)
            middle = (left + start) / 2, (origin + 0.3 + row) / 2
            axes.text(*middle, "link", ha="center", va="center", fontsize=8, backgroundcolor="w")
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("milliseconds")
    axes.set_xmargin(0.35)
    axes.spines[["left", "top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def main(
    output: Annotated[Path, typer.Option(help="A .png or .svg.")] = Path("build/trace.png"),
) -> None:
    exporter = InMemorySpanExporter()
    with TemporaryDirectory() as directory:
        asyncio.run(trade(exporter, f"embedded://{directory}"))
    spans = of_last_request(exporter.get_finished_spans())
    draw(spans, output)
    for span in spans:
        links = "".join(f" -> {link.context.span_id:016x}" for link in span.links)
        print(f"{span.context.trace_id:032x} {span.context.span_id:016x} {span.name}{links}")
    print(f"drawn: {output}")


if __name__ == "__main__":
    typer.run(main)
