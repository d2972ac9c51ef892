"""Fixtures: OpenTelemetry's SDK, with exporters that keep what they get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    DataPointT,
    HistogramDataPoint,
    InMemoryMetricReader,
    NumberDataPoint,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asyncstore import Store, telemetry


class Seen:
    """What was told by the stores that are instrumented with it."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader])
        self.tracer = self.tracers.get_tracer("tests")

    def instrument(self, store: Store, **options: bool) -> Store:
        return telemetry.instrument(
            store, tracer_provider=self.tracers, meter_provider=self.meters, **options
        )

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """Return the spans that have ended, in that order; those of one name."""
        spans = self._exporter.get_finished_spans()
        return [span for span in spans if name in (None, span.name)]

    def span(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span

    def forget(self) -> None:
        self._exporter.clear()

    def points(self, name: str) -> list[DataPointT]:
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def measured(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """Return what a metric has: attributes, and the value or how often it was measured."""
        return [
            (
                dict(point.attributes or {}),
                point.value if isinstance(point, NumberDataPoint) else point.count,
            )
            for point in self.points(name)
        ]

    def boundaries(self, name: str) -> list[float]:
        """Return the boundaries of the buckets of a histogram."""
        (point,) = self.points(name)
        assert isinstance(point, HistogramDataPoint)
        return list(point.explicit_bounds)

    def value(self, name: str, **wanted: str) -> float:
        """Return the sum of a metric's points that have these attributes, `_` for each dot."""
        return sum(
            value
            for attributes, value in self.measured(name)
            if wanted.items() <= {k.replace(".", "_"): v for k, v in attributes.items()}.items()
        )

    def shutdown(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


@pytest.fixture
def make_seen() -> Iterator[Callable[[], Seen]]:
    made: list[Seen] = []

    def make() -> Seen:
        made.append(Seen())
        return made[-1]

    yield make
    for seen in made:
        seen.shutdown()


@pytest.fixture
def seen(make_seen: Callable[[], Seen]) -> Seen:
    return make_seen()
