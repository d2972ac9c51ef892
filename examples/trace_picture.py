"""A picture of a trace: from an append to the handler of its event, and what that appends.

    python examples/trace_picture.py [--output build/trace.png]

Two services, each with a store of its own on one server. The shop appends an order within the span
of a request. The payments service handles its event: that is another trace, which links to the
append, as the event's metadata names it. Needs matplotlib: `pip install '.[bench]'`.
"""

from __future__ import annotations

import asyncio
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
ORDER = Aggregate("orders", "8f1c")


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
            with shop.get_tracer("shop").start_as_current_span("POST /orders"):
                await ours.load(ORDER)
                await ours.events.append(ORDER, [Event("OrderPlaced", {})], expected=NEW)
            await ours.positions.wait("payments", ORDER, 0, timeout=10)
            running.cancel()


def milliseconds(moment: int | None, since: int) -> float:
    return ((moment or 0) - since) / 1e6


def draw(spans: list[ReadableSpan], output: Path) -> None:
    """Draw a bar for each span, and an arrow from what a span links to."""
    spans = sorted(spans, key=lambda span: span.start_time or 0)
    begin = spans[0].start_time or 0
    rows = {span.context.span_id: row for row, span in enumerate(spans)}
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(spans) + 1.2), layout="constrained")
    for row, span in enumerate(spans):
        start, end = (milliseconds(at, begin) for at in (span.start_time, span.end_time))
        name = str(span.resource.attributes["service.name"])
        axes.barh(row, end - start, left=start, color=COLOURS[name], height=0.6)
        axes.text(end, row, f"  {name}: {span.name}", va="center", fontsize=9)
        for link in span.links:
            origin = rows[link.context.span_id]
            left = milliseconds(spans[origin].end_time, begin)
            arrow = {"arrowstyle": "->", "linestyle": "--"}
            axes.annotate("", (start, row), (left, origin + 0.3), arrowprops=arrow)
            axes.text((left + start) / 2, (origin + row) / 2 + 0.3, "link", fontsize=8)
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
    spans = list(exporter.get_finished_spans())
    draw(spans, output)
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        links = "".join(f" -> {link.context.span_id:016x}" for link in span.links)
        print(f"{span.context.trace_id:032x} {span.context.span_id:016x} {span.name}{links}")
    print(f"drawn: {output}")


if __name__ == "__main__":
    typer.run(main)
