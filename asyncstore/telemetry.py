"""OpenTelemetry: spans and metrics of a store, and the trace context in its events.

    from asyncstore import telemetry

    async with asyncstore.open() as store:
        telemetry.instrument(store, propagate=True)

The only module that knows opentelemetry, and only its API (the extra `telemetry`): which SDK and
which exporters there are is for the application to choose. Names follow version 1.45 of the
semantic conventions, those of databases (stable) for calls, those of messaging (in development) for
handlers; what they have no name for begins with `asyncstore.`.

A span never has an event's data, metadata, keys or correlation ids, nor the message of an error,
which may have anything in it: `error.type` is the name of its class. Roots may be personal data:
they are told with `roots=True` only. Domains, editions, handlers and types are names in the code of
the application, and are told.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Observation
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from asyncstore import __version__
from asyncstore.deliveries import Delivery
from asyncstore.errors import (
    AsyncStoreError,
    InvalidType,
    InvalidValue,
    SequenceConflict,
    StoreClosed,
    UnexpectedReply,
)
from asyncstore.names import MAIN, check_seconds
from asyncstore.observing import (
    ATTEMPT,
    DESTINATION,
    DOMAIN,
    EDITION,
    ERROR,
    EVENT_COUNT,
    HANDLER,
    ROOT,
    SEQUENCE,
    SERVER_ADDRESS,
    STATUS_CODE,
)
from asyncstore.recorded import Loaded
from asyncstore.settings import EMBEDDED, servers_of
from asyncstore.store import Store
from asyncstore.values import Aggregate, Appended

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from asyncstore.observing import Tally
    from asyncstore.recorded import RecordedEvent
    from asyncstore.settings import Settings
    from asyncstore.values import Event

R = TypeVar("R")
Attributes = dict[str, Any]

TRACEPARENT: Final = "traceparent"
"""The key of an event's metadata that has the trace context of its append, as W3C spells it."""

_SCHEMA: Final = "https://opentelemetry.io/schemas/1.45.0"
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_SETTLING: Final = frozenset({"ack", "nack"})
_OF_CALLS: Final = frozenset({"update"})  # made of other calls, which have their own spans
# The conventions' boundaries, and finer ones below: a call takes a tenth of a millisecond.
_SHORT: Final = (0.0001, 0.00025, 0.0005)
_CALLS: Final = (*_SHORT, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
_HANDLING: Final = (
    *_SHORT, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0,
)  # fmt: skip
_AGES: Final = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0, 3600.0, 86_400.0)

_log = logging.getLogger(__name__)


def instrument(
    store: Store,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    propagate: bool = False,
    roots: bool = False,
) -> Store:
    """Let OpenTelemetry see a store, and return it; before it is entered or while it is open.

    Without providers, the global ones are used: set them before. `propagate` puts the context of
    the append's span into the metadata of the events that are appended, under `traceparent`, some
    70 bytes an event; one that an event has already stays. Handlers' spans link to it whether this
    store propagates or not. `roots` tells the roots of aggregates in spans, never in metrics.
    """
    if not isinstance(store, Store):
        raise InvalidType("store", f"a Store is wanted, not {type(store).__name__}")
    meters = meter_provider or metrics.get_meter_provider()
    observer = _Telemetry(
        store, trace.get_tracer_provider() if tracer_provider is None else tracer_provider,
        _instruments_of(meters), propagate=propagate, roots=roots,
    )  # fmt: skip
    store._router.observer = observer
    return store


async def record_progress(store: Store) -> None:
    """Take down how far the handlers of a store are: events behind, age, dead letters.

    What `store.subscriptions.status()` says, and costs. It says the same in each process: one of
    them is enough.
    """
    observer = store._router.observer
    if not isinstance(observer, _Telemetry):
        raise InvalidValue("store", "call telemetry.instrument(store) first")
    instruments, now = observer.instruments, datetime.now(UTC)
    for progress in await store.subscriptions.status():
        place = {HANDLER: progress.handler, DESTINATION: progress.domain, EDITION: progress.edition}
        age = 0.0 if progress.oldest is None else (now - progress.oldest).total_seconds()
        instruments.behind.set(progress.events_behind, place)
        instruments.oldest.set(max(age, 0.0), place)
        instruments.dead.set(progress.dead_letters, place)


async def watch_progress(store: Store, *, every: float = 15.0) -> None:
    """Do `record_progress` every so many seconds, until it is cancelled or the store is closed."""
    check_seconds("every", every, least=0.1)
    while True:
        try:
            await record_progress(store)
        except StoreClosed:
            return
        except AsyncStoreError as error:
            _log.warning("how far the handlers are is not known: %s", error)
        await asyncio.sleep(every)


# Instruments


class _Instruments:
    """The instruments of one meter, which all stores that it sees share."""

    def __init__(self, meter: Meter) -> None:
        # Never changed, but replaced: a thread of the exporter goes through it.
        self._stores: tuple[weakref.ref[_Telemetry], ...] = ()
        self.duration = meter.create_histogram(
            "db.client.operation.duration", "s", "How long calls took.",
            explicit_bucket_boundaries_advisory=_CALLS,
        )  # fmt: skip
        self.process = meter.create_histogram(
            "messaging.process.duration", "s", "How long handlers took.",
            explicit_bucket_boundaries_advisory=_HANDLING,
        )  # fmt: skip
        self.settle = meter.create_histogram(
            "messaging.client.operation.duration", "s", "How long acks and nacks took.",
            explicit_bucket_boundaries_advisory=_HANDLING,
        )  # fmt: skip
        self.age = meter.create_histogram(
            "asyncstore.handler.event.age", "s", "How old events were when a handler got them.",
            explicit_bucket_boundaries_advisory=_AGES,
        )  # fmt: skip
        count = meter.create_counter
        self.appends = count("asyncstore.appends", "{append}", "Appends that stored events.")
        self.events = count("asyncstore.events", "{event}", "Events that were appended.")
        self.conflicts = count("asyncstore.conflicts", "{append}", "Appends refused at a sequence.")
        self.consumed = count(
            "messaging.client.consumed.messages", "{message}", "Events that handlers got."
        )
        gauge = meter.create_gauge
        self.behind = gauge("asyncstore.handler.lag", "{event}", "Events not handled yet.")
        self.oldest = gauge("asyncstore.handler.lag.age", "s", "The age of the oldest of them.")
        self.dead = gauge("asyncstore.handler.dead_letters", "{event}", "Events given up, now.")
        self._observe(meter)

    def _observe(self, meter: Meter) -> None:
        """Have read, when somebody looks, what stores count themselves."""
        many = meter.create_observable_counter
        many("asyncstore.update.retries", [self._read(lambda of: {"": of.retries})],
             "{decision}", "Decisions made again after a conflict.")  # fmt: skip
        many("asyncstore.reconnects", [self._read(lambda of: {"": of.reconnects})],
             "{connection}", "Connections made anew.")  # fmt: skip
        many("asyncstore.resends", [self._read(lambda of: of.resends, "db.operation.name")],
             "{request}", "Requests sent again as the answer was lost.")  # fmt: skip
        many("asyncstore.redirects", [self._read(lambda of: of.redirects, STATUS_CODE)],
             "{request}", "Requests that a node of a cluster did not take.")  # fmt: skip
        many("asyncstore.handler.redeliveries", [self._read(lambda of: of.redeliveries, HANDLER)],
             "{delivery}", "Deliveries of events that had been delivered before.")  # fmt: skip
        many("asyncstore.handler.buried", [self._read(lambda of: of.dead_letters, HANDLER)],
             "{event}", "Events that became dead letters.")  # fmt: skip
        meter.create_observable_up_down_counter(
            "asyncstore.requests.in_flight", [self._in_flight],
            "{request}", "Requests that wait for an answer, or to be sent.",
        )  # fmt: skip

    def add(self, store: _Telemetry) -> None:
        """Read from a store, too, as long as it is there."""
        self._stores = (*map(weakref.ref, self._living()), weakref.ref(store))

    def _living(self) -> list[_Telemetry]:
        return [store for known in self._stores if (store := known()) is not None]

    def _read(
        self, counts: Callable[[Tally], Mapping[str, int]], key: str = ""
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            return _summed(
                (value, {**store.server(), key: name} if key else store.server())
                for store in self._living()
                for name, value in dict(counts(store.router.tally)).items()
            )

        return read

    def _in_flight(self, _: CallbackOptions) -> Iterable[Observation]:
        return _summed((store.router.in_flight(), store.server()) for store in self._living())


def _summed(observed: Iterable[tuple[int, Attributes]]) -> list[Observation]:
    """Return one observation for all stores that have the same attributes."""
    total: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for value, attributes in observed:
        total[tuple(sorted(attributes.items()))] += value
    return [Observation(value, dict(attributes)) for attributes, value in total.items()]


_known: weakref.WeakKeyDictionary[MeterProvider, _Instruments] = weakref.WeakKeyDictionary()


def _instruments_of(provider: MeterProvider) -> _Instruments:
    if provider not in _known:
        meter = provider.get_meter("asyncstore", __version__, schema_url=_SCHEMA)
        _known[provider] = _Instruments(meter)
    return _known[provider]


# Spans


@dataclass(frozen=True, slots=True)
class _Call:
    """What is told of a call: its span's name, and the attributes of span and metrics."""

    name: str
    span_name: str
    kind: SpanKind
    facts: Attributes  # of the span only
    labels: Attributes


class _Telemetry:
    """The observer of one store."""

    def __init__(
        self,
        store: Store,
        tracers: TracerProvider,
        instruments: _Instruments,
        *,
        propagate: bool,
        roots: bool,
    ) -> None:
        self.router = store._router
        self.instruments = instruments
        self._tracer = tracers.get_tracer("asyncstore", __version__, schema_url=_SCHEMA)
        self._propagate = propagate
        self._roots = roots
        self._address = _address(store.settings)
        self._namespace = _namespace(store.settings)
        instruments.add(self)

    def server(self) -> Attributes:
        """Return what metrics say of the server."""
        return {"db.system.name": self.router.system() or "redis", **self._address}

    async def call(
        self, name: str, work: Callable[[], Awaitable[R]], about: tuple[object, ...]
    ) -> R:
        """Do a call in a span, and take down how it ended."""
        call = self._described(name, about)
        began, failure = perf_counter(), {}
        with self._span(call.span_name, call.kind, {**call.labels, **call.facts}) as span:
            try:
                result = await work()
            except BaseException as error:
                failure = _note_failure(span, error)
                self._count_failure(call, error)
                raise
            else:
                self._note_result(span, call, result)
                return result
            finally:
                self._note_duration(call, perf_counter() - began, failure)

    def outgoing(self, batch: list[Event]) -> list[Event]:
        """Return events with the context of the current span in their metadata."""
        carrier: dict[str, str] = {}
        if self._propagate:
            _PROPAGATOR.inject(carrier)
        context = carrier.get(TRACEPARENT)
        return batch if context is None else [_carrying(event, context) for event in batch]

    @contextmanager
    def process(self, deliveries: Sequence[Delivery]) -> Iterator[_Processing]:
        """See deliveries being handled, in a span that links to the appends of their events."""
        labels = self._of_deliveries("process", "process", deliveries)
        events = _events_of(deliveries)
        name, facts = _span_name("process", labels), self._of_events(deliveries)
        links = [link for event in events if (link := _link_to(event)) is not None]
        age = (datetime.now(UTC) - min(event.time for event in events)).total_seconds()
        self.instruments.age.record(max(age, 0.0), labels)
        self.instruments.consumed.add(len(events), labels)
        began = perf_counter()
        with self._span(name, SpanKind.CONSUMER, {**labels, **facts}, links) as span:
            processing = _Processing(span)
            try:
                yield processing
            except BaseException as error:
                processing.failed(error)
                raise
            finally:
                took = perf_counter() - began
                self.instruments.process.record(took, {**labels, **processing.failure})

    def _span(
        self, name: str, kind: SpanKind, facts: Attributes, links: Iterable[Link] = ()
    ) -> Any:
        return self._tracer.start_as_current_span(
            name, kind=kind, attributes=facts, links=list(links),
            record_exception=False, set_status_on_exception=False,
        )  # fmt: skip

    # What is told

    def _described(self, name: str, about: tuple[object, ...]) -> _Call:
        if name in _SETTLING:
            return self._of_settling(name, _deliveries_of(about[0]))
        aggregates = (argument for argument in about if isinstance(argument, Aggregate))
        return self._of_database(name, next(aggregates, None))

    def _of_settling(self, name: str, deliveries: Sequence[Delivery]) -> _Call:
        labels = self._of_deliveries(name, "settle", deliveries)
        facts = self._of_events(deliveries)
        return _Call(name, _span_name(name, labels), SpanKind.CLIENT, facts, labels)

    def _of_database(self, name: str, aggregate: Aggregate | None) -> _Call:
        labels: Attributes = {
            **self.server(), "db.namespace": self._namespace, "db.operation.name": name,
        }  # fmt: skip
        kind = SpanKind.INTERNAL if name in _OF_CALLS else SpanKind.CLIENT
        if aggregate is None:
            return _Call(name, name, kind, {}, labels)
        labels[DOMAIN] = aggregate.domain
        return _Call(name, f"{name} {aggregate.domain}", kind, self._place(aggregate), labels)

    def _place(self, aggregate: Aggregate) -> Attributes:
        facts = _edition(aggregate)
        return {**facts, ROOT: aggregate.root} if self._roots else facts

    def _of_deliveries(self, name: str, kind: str, deliveries: Sequence[Delivery]) -> Attributes:
        domains = {one.event.aggregate.domain for one in deliveries}
        return {
            "messaging.system": "asyncstore",
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
            **({DESTINATION: domains.pop()} if len(domains) == 1 else {}),
            HANDLER: deliveries[0].handler,
            **self._address,
        }

    def _of_events(self, deliveries: Sequence[Delivery]) -> Attributes:
        events, event = _events_of(deliveries), deliveries[0].event
        facts = self._place(event.aggregate) if len(deliveries) == 1 else _edition(event.aggregate)
        facts[ATTEMPT] = max(one.attempt for one in deliveries)
        if len(events) > 1:
            return {**facts, "messaging.batch.message_count": len(events)}
        about = {"messaging.message.id": str(event.id), "asyncstore.event.type": event.type}
        return {**facts, **about, SEQUENCE: event.sequence}

    # How it ended

    def _note_result(self, span: Span, call: _Call, result: object) -> None:
        if isinstance(result, Appended):
            count = result.last_sequence - result.first_sequence + 1
            span.set_attributes({SEQUENCE: result.first_sequence, EVENT_COUNT: count})
            if result.duplicate:
                span.set_attribute("asyncstore.duplicate", True)
            elif count and call.name not in _OF_CALLS:
                place = self._place_of(call)
                self.instruments.appends.add(1, place)
                self.instruments.events.add(count, place)
        elif isinstance(result, list | Loaded):
            events = result.events if isinstance(result, Loaded) else result
            span.set_attribute("db.response.returned_rows", len(events))

    def _count_failure(self, call: _Call, error: BaseException) -> None:
        if isinstance(error, SequenceConflict) and call.name not in _OF_CALLS:
            self.instruments.conflicts.add(1, self._place_of(call))

    def _place_of(self, call: _Call) -> Attributes:
        domain = call.labels.get(DOMAIN) or call.labels.get(DESTINATION)
        return self.server() if domain is None else {**self.server(), DOMAIN: domain}

    def _note_duration(self, call: _Call, seconds: float, failure: Attributes) -> None:
        labels = {**call.labels, **failure}
        if call.name in _SETTLING:
            self.instruments.settle.record(seconds, labels)
        elif call.name not in _OF_CALLS:
            self.instruments.duration.record(seconds, labels)


def _deliveries_of(argument: object) -> list[Delivery]:
    """Return what is settled: one delivery, or those of a bundle."""
    several = argument if isinstance(argument, list) else [argument]
    return [one for one in several if isinstance(one, Delivery)]


def _events_of(deliveries: Sequence[Delivery]) -> list[RecordedEvent]:
    return [event for one in deliveries for event in one.events]


def _edition(aggregate: Aggregate) -> Attributes:
    return {} if aggregate.edition == MAIN else {EDITION: aggregate.edition}


def _span_name(name: str, labels: Attributes) -> str:
    """Return the name of a span of a handler: without a domain where there are several."""
    return f"{name} {labels[DESTINATION]}" if DESTINATION in labels else name


class _Processing:
    """Deliveries that are handled in a span."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.failure: Attributes = {}

    def failed(self, error: BaseException) -> None:
        """Take down that the handler has failed."""
        self.failure = _note_failure(self._span, error)


def _note_failure(span: Span, error: BaseException) -> Attributes:
    """Let a span tell the class of an error, and return that; its message may hold anything."""
    failure = {ERROR: type(error).__qualname__}
    if isinstance(error, UnexpectedReply):
        failure[STATUS_CODE] = error.code
    span.set_attributes(failure)
    span.set_status(Status(StatusCode.ERROR))
    return failure


# Contexts


def _carrying(event: Event, context: str) -> Event:
    """Return an event with a trace context; one that it has already is its own."""
    metadata = {} if event.metadata is None else event.metadata
    try:
        if TRACEPARENT in metadata:
            return event
        return replace(event, metadata={**metadata, TRACEPARENT: context})
    except TypeError:
        return event  # its metadata are none, which the encoder tells


def _link_to(event: RecordedEvent) -> Link | None:
    """Return a link to the span in which an event was appended, if its metadata names one."""
    context = event.metadata.get(TRACEPARENT)
    if not isinstance(context, str):
        return None
    found = trace.get_current_span(_PROPAGATOR.extract({TRACEPARENT: context}, Context()))
    known = found.get_span_context()
    return Link(known) if known.is_valid else None


# Where the store is


def _address(settings: Settings) -> Attributes:
    """Return the address in the settings, without user and password."""
    if settings.backend == EMBEDDED:
        return {SERVER_ADDRESS: EMBEDDED}
    servers = servers_of(settings)
    ports = {port for _, port in servers}
    if len(ports) > 1:
        return {SERVER_ADDRESS: ",".join(f"{host}:{port}" for host, port in servers)}
    address: Attributes = {SERVER_ADDRESS: ",".join(dict.fromkeys(host for host, _ in servers))}
    port = ports.pop()
    return address if port is None else {**address, "server.port": port}


def _namespace(settings: Settings) -> str:
    """Return the number of the database in the settings."""
    parts = urlsplit(settings.url or "")
    in_path = "" if settings.backend == EMBEDDED or parts.scheme == "unix" else parts.path[1:]
    return parse_qs(parts.query).get("db", [in_path])[0] or "0"
