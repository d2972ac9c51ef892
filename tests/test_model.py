"""Random work on a store and on the plainest model of it, side by side, on each server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import asyncstore
from asyncstore import ANY, Aggregate, Event, RecordedEvent, Retention, SequenceConflict, Snapshot
from tests import servers
from tests.builders import listed

T = TypeVar("T")

AGGREGATES = [Aggregate(domain, root) for domain in ("orders", "carts") for root in ("1", "a b:*")]
small = st.integers(0, 12)
aggregates = st.sampled_from(AGGREGATES)
handlers = st.sampled_from(["projector", "saga"])
bounds = st.none() | small


@dataclass
class Model:
    """One aggregate as the documentation has it."""

    events: list[Event] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    newest: tuple[int, Any, Retention] | None = None
    kept: dict[int, Any] = field(default_factory=dict)
    recent: dict[int, Any] = field(default_factory=dict)

    def put_snapshot(self, put: tuple[int, Any, Retention]) -> None:
        if self.newest is not None and put[0] < self.newest[0]:
            self.file(put)
            return
        if self.newest is not None and put[0] > self.newest[0]:
            self.file(self.newest)
        self.newest = put

    def file(self, old: tuple[int, Any, Retention]) -> None:
        if old[2] is Retention.TRANSIENT:
            return
        self.kept.pop(old[0], None)
        self.recent.pop(old[0], None)
        if old[2] is Retention.PERSIST:
            self.kept[old[0]] = old
        else:
            self.recent[old[0]] = old
            for sequence in sorted(self.recent)[:-2]:
                del self.recent[sequence]

    def snapshot(self, at: int | None) -> Any:
        if self.newest is None or at is None or self.newest[0] <= at:
            return self.newest
        older = {**self.recent, **self.kept}
        found = [sequence for sequence in older if sequence <= at]
        return older[max(found)] if found else None


class StoreMachine(RuleBasedStateMachine):
    """Each rule does one thing to both, and compares the answers."""

    server: servers.Server

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.prefix = f"model-{uuid.uuid4().hex}:"
        self.store = asyncstore.open(self.server.url, key_prefix=self.prefix)
        self.models = {aggregate: Model() for aggregate in AGGREGATES}
        self.wait(self.store.__aenter__())

    def wait(self, awaitable: Awaitable[T]) -> T:
        async def run() -> T:
            return await awaitable

        return self.runner.run(run())

    def teardown(self) -> None:
        for aggregate in AGGREGATES:
            self.wait(self.store.events.delete(aggregate))
        assert self.wait(listed(self.store.events.domains())) == []
        self.wait(self.store.__aexit__(None, None, None))
        self.runner.close()
        servers.sweep(self.server, self.prefix)

    @rule(aggregate=aggregates, count=st.integers(0, 5), off=st.sampled_from([0, 0, 0, -1, 1, 7]))
    def append(self, aggregate: Aggregate, count: int, off: int) -> None:
        model = self.models[aggregate].events
        events = [Event("Happened", {"n": n}) for n in range(count)]
        expected = max(0, len(model) + off)
        first = len(model)
        append = self.store.events.append(aggregate, events, expected=expected)
        if count > 0 and expected != first:
            with pytest.raises(SequenceConflict) as caught:
                self.wait(append)
            assert caught.value.actual == first
            return
        done = self.wait(append)
        assert (done.first_sequence, done.last_sequence) == (first, first + count - 1)
        model += events

    @rule(aggregate=aggregates, count=st.integers(1, 300))
    def append_any(self, aggregate: Aggregate, count: int) -> None:
        events = [Event("Counted", b"%d" % n) for n in range(count)]
        self.wait(self.store.events.append(aggregate, events, expected=ANY))
        self.models[aggregate].events += events

    @rule(aggregate=aggregates, start=small, length=bounds, limit=bounds, reverse=st.booleans())
    def read(
        self,
        aggregate: Aggregate,
        start: int,
        length: int | None,
        limit: int | None,
        reverse: bool,
    ) -> None:
        stop = None if length is None else start + length
        model = list(enumerate(self.models[aggregate].events))[start:stop]
        if reverse:
            model.reverse()
        found = self.wait(
            self.store.events.read(aggregate, start=start, stop=stop, limit=limit, reverse=reverse)
        )
        assert [as_pair(event) for event in found] == [
            (n, event.id, event.data) for n, event in model[:limit]
        ]

    @rule(aggregate=aggregates)
    def load(self, aggregate: Aggregate) -> None:
        model = self.models[aggregate]
        loaded = self.wait(self.store.load(aggregate))
        start = 0 if model.newest is None else model.newest[0] + 1
        assert as_triple(loaded.snapshot) == model.newest
        assert [event.id for event in loaded.events] == [e.id for e in model.events[start:]]
        assert loaded.next_sequence == len(model.events)
        assert self.wait(self.store.events.next_sequence(aggregate)) == len(model.events)

    @rule(aggregate=aggregates, handler=handlers, sequence=small)
    def advance(self, aggregate: Aggregate, handler: str, sequence: int) -> None:
        positions = self.models[aggregate].positions
        moved = self.wait(self.store.positions.advance(handler, aggregate, sequence))
        assert moved == (sequence > positions.get(handler, -1))
        positions[handler] = max(sequence, positions.get(handler, -1))

    @rule(aggregate=aggregates, handler=handlers, sequence=small)
    def put_position(self, aggregate: Aggregate, handler: str, sequence: int) -> None:
        self.wait(self.store.positions.put(handler, aggregate, sequence))
        self.models[aggregate].positions[handler] = sequence

    @rule(aggregate=aggregates, handler=handlers)
    def get_position(self, aggregate: Aggregate, handler: str) -> None:
        found = self.wait(self.store.positions.get(handler, aggregate))
        assert found == self.models[aggregate].positions.get(handler)

    @rule(aggregate=aggregates, sequence=small, retention=st.sampled_from(Retention), n=small)
    def put_snapshot(
        self, aggregate: Aggregate, sequence: int, retention: Retention, n: int
    ) -> None:
        self.wait(
            self.store.snapshots.put(aggregate, sequence=sequence, state=n, retention=retention)
        )
        self.models[aggregate].put_snapshot((sequence, n, retention))

    @rule(aggregate=aggregates, at=bounds)
    def get_snapshot(self, aggregate: Aggregate, at: int | None) -> None:
        found = self.wait(self.store.snapshots.get(aggregate, at=at))
        assert as_triple(found) == self.models[aggregate].snapshot(at)

    @rule(aggregate=aggregates)
    def delete_snapshots(self, aggregate: Aggregate) -> None:
        self.wait(self.store.snapshots.delete(aggregate))
        model = self.models[aggregate]
        model.newest = None
        model.kept.clear()
        model.recent.clear()

    @rule(aggregate=aggregates)
    def delete(self, aggregate: Aggregate) -> None:
        count = self.wait(self.store.events.delete(aggregate))
        assert count == len(self.models[aggregate].events)
        self.models[aggregate] = Model()

    @rule()
    def list_what_there_is(self) -> None:
        there = [aggregate for aggregate, model in self.models.items() if model.events]
        domains = sorted({aggregate.domain for aggregate in there})
        assert self.wait(listed(self.store.events.domains())) == domains
        for domain in ("orders", "carts"):
            roots = sorted(a.root for a in there if a.domain == domain)
            assert sorted(self.wait(listed(self.store.events.roots(domain)))) == roots
            editions = self.wait(listed(self.store.events.editions(domain)))
            assert editions == (["main"] if roots else [])


def as_pair(event: RecordedEvent) -> tuple[int, uuid.UUID, Any]:
    return event.sequence, event.id, event.data


def as_triple(snapshot: Snapshot | None) -> tuple[int, Any, Retention] | None:
    if snapshot is None:
        return None
    return snapshot.sequence, snapshot.state, snapshot.retention


@pytest.mark.timeout(300)
def test_the_store_is_its_model(server: servers.Server) -> None:
    class Machine(StoreMachine):
        pass

    Machine.server = server
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
