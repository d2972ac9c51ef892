"""What OpenTelemetry's SDK is told of stores on real servers."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Bundle,
    Delivery,
    Event,
    InvalidType,
    InvalidValue,
    OutcomeUnknown,
    RecordedEvent,
    SequenceConflict,
    Store,
    StoreUnavailable,
    UnexpectedReply,
    forms,
    telemetry,
)
from asyncstore.nodes import Node
from asyncstore.slots import slot_of_tag
from asyncstore.testing import FaultProxy
from asyncstore.transport import Bounds, Transport
from tests import servers
from tests.builders import numbered
from tests.fix_clusters import SmallCluster
from tests.fix_telemetry import Seen
from tests.polling import eventually
from tests.proxy import proxy_to

CARD = "card 4111-1111"


@pytest.fixture
async def store(one_server: servers.Server, prefix: str, seen: Seen) -> AsyncIterator[Store]:
    opened = asyncstore.open(one_server.url, key_prefix=prefix)
    async with seen.instrument(opened, propagate=True) as instrumented:
        yield instrumented
    servers.sweep(one_server, prefix)


@pytest.fixture
async def proxy(one_server: servers.Server) -> AsyncIterator[FaultProxy]:
    async with proxy_to(Path(urlsplit(one_server.url).path)) as running:
        yield running


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def traceparent(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    ids = format_trace_id(context.trace_id), format_span_id(context.span_id)
    return f"00-{ids[0]}-{ids[1]}-{context.trace_flags:02x}"


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    context = parent.get_span_context()
    assert context is not None
    return child.parent is not None and child.parent.span_id == context.span_id


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def ids_of(spans: list[ReadableSpan]) -> list[int]:
    contexts = [span.get_span_context() for span in spans]
    return [context.span_id for context in contexts if context is not None]


async def no_handler(_: RecordedEvent) -> None:
    pass


# Spans of calls


async def test_an_append(store: Store, seen: Seen, order: Aggregate) -> None:
    with seen.tracer.start_as_current_span("request"):
        await store.events.append(order, numbered(3), expected=NEW)
    span, parent = seen.span("append orders"), seen.span("request")
    assert is_child(span, parent)
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    said = facts(span)
    assert said.pop("server.address")
    said.pop("server.port", None)  # of a unix socket there is none
    assert said == {
        "db.system.name": "valkey",
        "db.namespace": "0",
        "db.operation.name": "append",
        "db.collection.name": "orders",
        "asyncstore.event.count": 3,
        "asyncstore.sequence": 0,
    }
    assert seen.value("asyncstore.appends", db_collection_name="orders") == 1
    assert seen.value("asyncstore.events", db_collection_name="orders") == 3
    assert seen.value("db.client.operation.duration", db_operation_name="append") == 1
    assert "db.operation.batch.size" not in facts(span), "one operation that has three operands"


@pytest.mark.parametrize(
    ("name", "conventional"),
    [
        ("db.client.operation.duration", (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)),
        (
            "messaging.process.duration",
            (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
        ),
    ],
)
async def test_boundaries_are_those_of_the_conventions_and_finer_ones(
    store: Store, seen: Seen, order: Aggregate, name: str, conventional: tuple[float, ...]
) -> None:
    await store.events.append(order, numbered(1), expected=NEW)
    async with store.subscribe("mailer", "orders") as sub:
        with (await anext(sub)).observed():
            pass
    bounds = seen.boundaries(name)
    assert set(conventional) <= set(bounds)
    assert bounds[0] == 0.0001, "an append takes as long"


async def test_reading_and_loading(store: Store, seen: Seen, order: Aggregate) -> None:
    await store.events.append(order, numbered(2), expected=NEW)
    await store.events.read(order)
    await store.load(order.on("what-if"))
    assert facts(seen.span("read orders"))["db.response.returned_rows"] == 2
    loaded = facts(seen.span("load orders"))
    assert (loaded["asyncstore.edition"], loaded["db.response.returned_rows"]) == ("what-if", 2)
    await store.snapshots.put(order, sequence=1, state={})
    await store.positions.put("projector", order, 1)
    await store.events.correlated("checkout")
    puts = seen.spans("snapshots.put orders"), seen.spans("positions.put orders")
    assert list(map(len, puts)) == [1, 1]
    assert "checkout" not in str(facts(seen.span("correlated")))


async def test_a_conflict(store: Store, seen: Seen, order: Aggregate) -> None:
    await store.events.append(order, numbered(1), expected=NEW)
    seen.forget()
    with pytest.raises(SequenceConflict):
        await store.events.append(order, numbered(1), expected=NEW)
    span = seen.span("append orders")
    assert facts(span)["error.type"] == "SequenceConflict"
    assert span.status.status_code is StatusCode.ERROR
    assert seen.value("asyncstore.conflicts") == seen.value("asyncstore.appends") == 1
    failed = seen.value("db.client.operation.duration", error_type="SequenceConflict")
    assert failed == 1


async def test_an_error_of_the_server_has_its_code(
    store: Store, seen: Seen, order: Aggregate, one_server: servers.Server, prefix: str
) -> None:
    with one_server.client() as client:
        client.set(one_server.keys(prefix).events(order), "no sorted set")
    with pytest.raises(UnexpectedReply):
        await store.events.read(order)
    said = facts(seen.span("read orders"))
    assert said["error.type"] == "UnexpectedReply"
    assert said["db.response.status_code"] == "WRONGTYPE"
    assert seen.value("db.client.operation.duration", db_response_status_code="WRONGTYPE") == 1


async def test_an_update_that_decides_again(store: Store, seen: Seen, order: Aggregate) -> None:
    calls = 0

    async def decide(_: int) -> list[Event]:
        nonlocal calls
        calls += 1
        if calls == 1:
            await store.events.append(order, numbered(1), expected=ANY)
        return numbered(1)

    await store.update(order, decide, lambda count, _: count + 1, 0)
    update = seen.span("update orders")
    assert update.kind is SpanKind.INTERNAL
    assert update.status.status_code is StatusCode.UNSET
    appends = seen.spans("append orders")
    assert [facts(span).get("error.type") for span in appends] == [None, "SequenceConflict", None]
    assert all(is_child(span, update) for span in [*appends, seen.span("load orders")])
    assert seen.value("asyncstore.update.retries") == 1
    assert seen.value("asyncstore.appends") == 2
    assert seen.value("db.client.operation.duration", db_operation_name="update") == 0


async def test_a_duplicate_is_no_append(store: Store, seen: Seen, order: Aggregate) -> None:
    for _ in range(2):
        await store.events.append(order, numbered(1), expected=NEW, idempotency_key="k")
    first, second = map(facts, seen.spans("append orders"))
    assert "asyncstore.duplicate" not in first
    assert second["asyncstore.duplicate"] is True
    assert seen.value("asyncstore.appends") == seen.value("asyncstore.events") == 1


async def test_an_append_of_nothing(store: Store, seen: Seen, order: Aggregate) -> None:
    await store.events.append(order, [], expected=NEW)
    assert seen.value("asyncstore.appends") == 0
    assert is_child(seen.span("next_sequence orders"), seen.span("append orders"))


async def test_spans_belong_to_their_callers_not_to_the_group(store: Store, seen: Seen) -> None:
    orders = [Aggregate("orders", f"{n}") for n in range(50)]

    async def request(n: int) -> None:
        with seen.tracer.start_as_current_span(f"request {n}"):
            await store.events.append(orders[n], numbered(1), expected=NEW)
            await store.events.append(orders[n], numbered(1), expected=1)

    await asyncio.gather(*map(request, range(50)))
    for n, order in enumerate(orders):
        own = [s for s in seen.spans("append orders") if is_child(s, seen.span(f"request {n}"))]
        events = await store.events.read(order)
        carried = [event.metadata[telemetry.TRACEPARENT] for event in events]
        assert carried == [traceparent(span) for span in own]
        assert len(carried) == 2


async def test_a_timeout_and_an_unknown_outcome(
    proxy: FaultProxy, prefix: str, seen: Seen, order: Aggregate
) -> None:
    async with asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.5) as store:
        seen.instrument(store)  # one that is open already
        proxy.replies.swallow()
        with pytest.raises(OutcomeUnknown):
            await store.events.append(order, numbered(1), expected=NEW)
        with pytest.raises(StoreUnavailable):
            await store.events.read(order)
    assert facts(seen.span("append orders"))["error.type"] == "OutcomeUnknown"
    assert facts(seen.span("read orders"))["error.type"] == "StoreUnavailable"
    failed = seen.value("db.client.operation.duration", error_type="OutcomeUnknown")
    assert failed == 1


async def test_a_cancelled_call(store: Store, seen: Seen, order: Aggregate) -> None:
    append = asyncio.ensure_future(store.events.append(order, numbered(1), expected=NEW))
    await asyncio.sleep(0)  # it has begun
    append.cancel()
    with pytest.raises(asyncio.CancelledError):
        await append
    assert facts(seen.span("append orders"))["error.type"] == "CancelledError"


# What is not told


async def test_spans_are_silent_about_data_roots_and_passwords(
    store: Store, seen: Seen, order: Aggregate
) -> None:
    def decide(_: int) -> list[Event]:
        raise ValueError(CARD)

    event = Event("Paid", {"card": CARD}, metadata={"user": CARD})
    await store.events.append(order, [event], expected=NEW, idempotency_key=CARD)
    with pytest.raises(SequenceConflict):
        await store.events.append(order, [event], expected=NEW, correlation_id=CARD)
    with pytest.raises(ValueError, match=CARD):
        await store.update(order, decide, lambda count, _: count, 0)
    told = "".join(span.to_json() for span in seen.spans())
    assert "ValueError" in told
    assert "SequenceConflict" in told
    assert CARD not in told
    assert order.root not in told


async def test_roots_are_told_when_asked(store: Store, seen: Seen, order: Aggregate) -> None:
    seen.instrument(store, roots=True)
    await store.events.append(order, numbered(1), expected=NEW)
    assert facts(seen.span("append orders"))["asyncstore.root"] == order.root
    assert not any("asyncstore.root" in said for said, _ in seen.measured("asyncstore.appends"))


@pytest.mark.parametrize(
    ("url", "address", "namespace"),
    [
        ("redis://u:pw@h:7/3", {"server.address": "h", "server.port": 7}, "3"),
        ("rediss://u:pw@h", {"server.address": "h", "server.port": 6379}, "0"),
        ("unix:///run/r.sock?db=2&password=pw", {"server.address": "/run/r.sock"}, "2"),
        ("embedded:///srv/events", {"server.address": "embedded"}, "0"),
    ],
)
def test_the_address_is_that_of_the_settings(
    url: str, address: dict[str, Any], namespace: str
) -> None:
    settings = asyncstore.Settings(url=url)
    assert (telemetry._address(settings), telemetry._namespace(settings)) == (address, namespace)


def test_the_address_of_a_cluster() -> None:
    settings = asyncstore.Settings(urls=["redis://:pw@a:1", "redis://b:2"])
    assert telemetry._address(settings) == {"server.address": "a:1,b:2"}
    settings = asyncstore.Settings(urls=["redis://:pw@a", "redis://b:6379", "redis://a"])
    assert telemetry._address(settings) == {"server.address": "a,b", "server.port": 6379}


def test_nobody_pays_for_what_was_not_asked_for() -> None:
    assert asyncstore.open("embedded://")._router.observer is None
    # Of opentelemetry nothing can be said: redis-py imports it where it is installed.
    code = "import sys, asyncstore.commands; sys.exit('asyncstore.telemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Contexts in events


async def test_a_context_of_the_event_itself_stays(
    store: Store, seen: Seen, order: Aggregate
) -> None:
    mine = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "user": "u"}
    batch = [Event("Told", {}, metadata=mine), Event("Told", {}, metadata={"user": "u"})]
    await store.events.append(order, batch, expected=NEW)
    first, second = await store.events.read(order)
    assert first.metadata == mine
    context = traceparent(seen.span("append orders"))
    assert second.metadata == {"user": "u", "traceparent": context}
    assert [event.metadata for event in batch] == [mine, {"user": "u"}]


@pytest.mark.parametrize("metadata", ["text", ["traceparent"], 7])
async def test_wrong_metadata_have_the_same_error(
    store: Store, order: Aggregate, metadata: Any
) -> None:
    with pytest.raises(InvalidType, match="metadata"):
        await store.events.append(order, [Event("Told", {}, metadata=metadata)], expected=NEW)


async def test_contexts_travel_when_asked_only(store: Store, seen: Seen, order: Aggregate) -> None:
    seen.instrument(store)
    await store.events.append(order, numbered(1), expected=NEW)
    assert (await store.events.read(order))[0].metadata == {}


# Handlers


async def run_until(store: Store, condition: Callable[[], bool], what: str) -> None:
    running = asyncio.ensure_future(store.run_handlers())
    try:
        await eventually(condition, what)
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_handler_links_to_an_append_of_another_store(
    store: Store, seen: Seen, make_seen: Callable[[], Seen], one_server: servers.Server, prefix: str
) -> None:
    order = Aggregate("orders", "1")
    await store.events.append(order, numbered(1), expected=NEW)
    elsewhere = make_seen()  # as in another process
    async with asyncstore.open(one_server.url, key_prefix=prefix) as other:
        elsewhere.instrument(other)
        other.handler("mailer", "orders")(no_handler)
        await run_until(other, lambda: bool(elsewhere.spans("process orders")), "it is handled")
    span = elsewhere.span("process orders")
    assert span.kind is SpanKind.CONSUMER
    assert linked(span) == ids_of([seen.span("append orders")])
    said = facts(span)
    assert said.pop("messaging.message.id")
    assert said.pop("server.address")
    said.pop("server.port", None)
    assert said == {
        "messaging.system": "asyncstore",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "orders",
        "messaging.consumer.group.name": "mailer",
        "asyncstore.event.type": "Counted",
        "asyncstore.sequence": 0,
        "asyncstore.attempt": 1,
    }
    ack = elsewhere.span("ack orders")
    assert is_child(ack, span)
    assert facts(ack)["messaging.operation.type"] == "settle"
    name = {"messaging_consumer_group_name": "mailer"}
    assert elsewhere.value("messaging.process.duration", **name) == 1
    assert elsewhere.value("messaging.client.operation.duration", **name) == 1
    assert elsewhere.value("asyncstore.handler.event.age", **name) == 1
    assert elsewhere.value("messaging.client.consumed.messages", **name) == 1


async def test_a_handler_that_fails(
    store: Store, seen: Seen, order: Aggregate, caplog: pytest.LogCaptureFixture
) -> None:
    @store.handler("mailer", "orders", retries=1)
    async def fail(_: RecordedEvent) -> None:
        raise ValueError(CARD)

    await store.events.append(order, numbered(1), expected=NEW)
    await run_until(
        store, lambda: seen.value("asyncstore.handler.buried") == 1, "it is a dead letter"
    )
    first, second = seen.spans("process orders")
    assert [facts(span)["asyncstore.attempt"] for span in (first, second)] == [1, 2]
    for span in (first, second):
        assert facts(span)["error.type"] == "ValueError"
        assert span.status.status_code is StatusCode.ERROR
        assert CARD not in span.to_json()
    assert len(seen.spans("nack orders")) == 2
    assert seen.value("messaging.process.duration", error_type="ValueError") == 2
    assert seen.value("asyncstore.handler.redeliveries") == 1
    await telemetry.record_progress(store)
    place = {"messaging_consumer_group_name": "mailer", "messaging_destination_name": "orders"}
    assert seen.value("asyncstore.handler.dead_letters", **place) == 1

    extras = [vars(record) for record in caplog.records if "dead letter" in record.message]
    wanted = {
        "messaging.consumer.group.name": "mailer",
        "db.collection.name": "orders",
        "asyncstore.root": order.root,
        "asyncstore.sequence": 0,
        "error.type": "ValueError",
    }
    assert [wanted.items() <= extra.items() for extra in extras] == [True]


async def test_a_batch_links_to_each_append(store: Store, seen: Seen, order: Aggregate) -> None:
    for n in range(3):
        await store.events.append(order, numbered(1), expected=n)
    async with store.subscribe("projector", "orders") as sub:
        async for delivery in sub.batches():
            with delivery.observed(), seen.tracer.start_as_current_span("projecting"):
                await delivery.ack()
            break
    span = seen.span("process orders")
    assert linked(span) == ids_of(seen.spans("append orders"))
    assert facts(span)["messaging.batch.message_count"] == 3
    assert seen.value("messaging.client.consumed.messages") == 3
    assert "messaging.message.id" not in facts(span)
    assert is_child(seen.span("projecting"), span)


async def bundle_of(count: int, batches: AsyncIterator[Delivery]) -> Bundle:
    """Return a bundle of so many deliveries, whenever each is there."""
    deliveries = [await anext(batches) for _ in range(count)]
    return Bundle(deliveries[0]._subscription, deliveries)


async def test_a_bundle_links_to_each_append(store: Store, seen: Seen) -> None:
    for n in range(3):
        await store.events.append(Aggregate("orders", f"{n}"), numbered(2), expected=NEW)
    async with store.subscribe("projector", "orders") as sub:
        bundle = await bundle_of(3, sub.batches())
        with bundle.observed():
            await bundle.ack()
    span, ack = seen.span("process orders"), seen.span("ack orders")
    appends = ids_of(seen.spans("append orders"))
    assert sorted(linked(span)) == sorted(2 * appends)
    assert facts(span)["messaging.batch.message_count"] == 6
    assert not any("asyncstore.root" in facts(one) for one in (span, ack))
    assert is_child(ack, span)
    assert facts(ack)["messaging.operation.type"] == "settle"
    assert seen.value("messaging.client.operation.duration") == 1
    assert seen.value("messaging.client.consumed.messages") == 6


async def test_a_bundle_of_several_domains_names_none(store: Store, seen: Seen) -> None:
    for domain in ("orders", "payments"):
        await store.events.append(Aggregate(domain, "1"), numbered(1), expected=NEW)
    async with store.subscribe("projector", None) as sub:
        bundle = await bundle_of(2, sub.batches())
        with bundle.observed():
            await bundle.ack()
    span = seen.span("process")
    assert "messaging.destination.name" not in facts(span)
    assert is_child(seen.span("ack"), span)


async def test_a_loop_that_fails(store: Store, seen: Seen, order: Aggregate) -> None:
    await store.events.append(order, numbered(1), expected=NEW)
    async with store.subscribe("projector", "orders") as sub:
        delivery = await anext(sub)
        with pytest.raises(LookupError), delivery.observed():
            raise LookupError(CARD)
    assert facts(seen.span("process orders"))["error.type"] == "LookupError"
    assert CARD not in seen.span("process orders").to_json()


async def test_what_an_ack_appends_goes_on_with_the_trace(
    store: Store, seen: Seen, order: Aggregate
) -> None:
    await store.events.append(order, numbered(1), expected=NEW)
    async with store.subscribe("payments", "orders", types=["Counted"]) as sub:
        delivery = await anext(sub)
        with delivery.observed():
            await delivery.ack(append=[Event("Requested", {})])
    ack = seen.span("ack orders")
    assert is_child(ack, seen.span("process orders"))
    assert facts(ack)["asyncstore.sequence"] is not None
    events = await store.events.read(order)
    assert events[1].metadata == {"traceparent": traceparent(ack)}
    assert seen.value("asyncstore.events", db_collection_name="orders") == 2


@pytest.mark.parametrize("context", ["", "rubbish", "00-0-0-00", 7, None])
async def test_a_foreign_context_that_is_none(
    store: Store, seen: Seen, order: Aggregate, context: object
) -> None:
    told = Event("Told", {}, metadata={"traceparent": context})
    await store.events.append(order, [told], expected=NEW)
    async with store.subscribe("projector", "orders") as sub:
        with (await anext(sub)).observed():
            pass
    assert linked(seen.span("process orders")) == []


# Metrics


async def test_a_resend_after_a_cut_connection(
    proxy: FaultProxy, prefix: str, seen: Seen, order: Aggregate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncstore")
    async with seen.instrument(asyncstore.open(proxy.url, key_prefix=prefix)) as store:
        proxy.replies.cut()
        done = await store.events.append(order, numbered(1), expected=NEW)
        proxy.replies.cut()
        await store.events.read(order)
    assert done.first_sequence == 0
    assert facts(seen.span("append orders")).get("error.type") is None
    assert seen.value("asyncstore.reconnects") == 2
    assert seen.value("asyncstore.resends", db_operation_name="append") == 1
    assert seen.value("asyncstore.resends", db_operation_name="read") == 1
    told = [vars(record).get("server.address") for record in caplog.records]
    assert told == [store.settings.where()] * 4  # lost and made again, twice


async def test_what_is_in_flight(
    proxy: FaultProxy, prefix: str, seen: Seen, order: Aggregate
) -> None:
    def in_flight() -> float:
        return seen.value("asyncstore.requests.in_flight")

    opened = asyncstore.open(proxy.url, key_prefix=prefix, timeout=60)
    async with seen.instrument(opened) as store:
        assert in_flight() == 0
        proxy.replies.swallow()
        append = asyncio.ensure_future(store.events.append(order, numbered(1), expected=NEW))
        await eventually(lambda: in_flight() == 1, "a request waits for its answer")
    with pytest.raises(OutcomeUnknown):
        await append
    assert in_flight() == 0


async def test_a_redirect_on_a_cluster(
    small_cluster: SmallCluster, prefix: str, seen: Seen
) -> None:
    opened = asyncstore.open(urls=small_cluster.urls, key_prefix=prefix)
    async with seen.instrument(opened) as store:
        order = Aggregate("orders", "1")
        home, slot = store._router.home_of(order.root)
        servers_of_it: Any = store._router.servers()
        others = [node for node in servers_of_it.nodes() if node is not home]
        servers_of_it._owners[slot] = others[0]  # as if the slot had moved
        await store.events.append(order, numbered(1), expected=NEW)
        await store.events.delete(order)
    assert slot == slot_of_tag(order.root)
    assert facts(seen.span("append orders")).get("error.type") is None
    ((said, count),) = seen.measured("asyncstore.redirects")
    assert (said["db.response.status_code"], count) == ("MOVED", 1)


def is_under_way(name: str, node: Node) -> bool:
    wire = node.transport._wire
    return wire is not None and any(request.name == name for request in wire.waiting)


async def test_a_resend_to_another_node(
    small_cluster: SmallCluster, prefix: str, seen: Seen
) -> None:
    opened = asyncstore.open(urls=small_cluster.urls, key_prefix=prefix)
    async with seen.instrument(opened) as store:
        order = Aggregate("orders", "1")
        home, _ = store._router.home_of(order.root)
        cluster: Any = store._router.servers()
        admin = Transport(home.url, home.where, Bounds(5.0, 100, 1_000_000))
        await admin.open()
        await admin.command(forms.is_anything, "CLIENT", "PAUSE", 5_000, "WRITE")
        append = asyncio.ensure_future(store.events.append(order, numbered(1), expected=NEW))
        await eventually(lambda: is_under_way("append", home), "the append is on its way")
        for address, node in list(cluster._nodes.items()):
            if node is home:  # as if it had left the cluster, and another had come
                cluster._give_up(cluster._nodes.pop(address))
        cluster.look_again()
        await eventually(
            lambda: store._router.home_of(order.root)[0] is not home, "it has another node"
        )
        await admin.command(forms.is_anything, "CLIENT", "UNPAUSE")
        await admin.aclose()
        assert (await append).first_sequence == 0
        await store.events.delete(order)
    assert seen.value("asyncstore.resends", db_operation_name="append") == 1


async def test_lag(store: Store, seen: Seen, order: Aggregate) -> None:
    async with store.subscribe("projector", "orders") as sub:
        await store.events.append(order, numbered(3), expected=NEW)
        await (await anext(sub)).ack()
        await telemetry.record_progress(store)
        place = {"messaging_consumer_group_name": "projector", "asyncstore_edition": "main"}
        assert seen.value("asyncstore.handler.lag", **place) == 2
        assert seen.value("asyncstore.handler.lag.age", **place) > 0
        for _ in range(2):
            await (await anext(sub)).ack()
    await telemetry.record_progress(store)
    assert seen.value("asyncstore.handler.lag", **place) == 0
    assert seen.value("asyncstore.handler.lag.age", **place) == 0


async def test_watching_lag(
    proxy: FaultProxy, prefix: str, seen: Seen, order: Aggregate, caplog: pytest.LogCaptureFixture
) -> None:
    opened = asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.3)
    async with seen.instrument(opened) as store:
        async with store.subscribe("projector", "orders"):
            pass
        await store.events.append(order, numbered(1), expected=NEW)
        proxy.replies.swallow()
        watching = asyncio.ensure_future(telemetry.watch_progress(store, every=0.1))
        await eventually(lambda: "is not known" in caplog.text, "it goes on without an answer")
        proxy.replies.pass_on()
        await eventually(lambda: seen.value("asyncstore.handler.lag") == 1, "the lag is known")
    await asyncio.wait_for(watching, 5)


async def test_lag_of_a_store_that_is_not_instrumented(one_server: servers.Server) -> None:
    async with asyncstore.open(one_server.url) as store:
        with pytest.raises(InvalidValue, match="instrument"):
            await telemetry.record_progress(store)


def test_metrics_are_read_by_a_thread_of_the_exporter(
    seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.points("asyncstore.reconnects")

    reading = threading.Thread(target=read)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reading.start()
        kept = [seen.instrument(asyncstore.open("embedded://")) for _ in range(300)]
    finally:
        done.set()
        reading.join()
        sys.setswitchinterval(interval)
    assert kept
    assert not caplog.records, "the SDK logs what a callback raises"


@pytest.mark.parametrize("store", [None, "redis://h"])
def test_what_is_no_store_is_not_instrumented(store: Any) -> None:
    with pytest.raises(InvalidType, match="a Store is wanted, not"):
        telemetry.instrument(store)


async def test_stores_that_share_a_meter_are_summed(
    store: Store, seen: Seen, one_server: servers.Server, prefix: str
) -> None:
    async with seen.instrument(asyncstore.open(one_server.url, key_prefix=prefix)) as other:
        for one in (store, other):
            one._router.tally.reconnects += 2
        assert [value for _, value in seen.measured("asyncstore.reconnects")] == [4]
