"""Random work on a store and on the plainest model of it, side by side, on each server."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import asyncstore
from asyncstore import (
    ANY,
    MAIN,
    Aggregate,
    Appended,
    BranchExists,
    Event,
    RecordedEvent,
    Retention,
    SequenceConflict,
    Snapshot,
    Source,
)
from tests import servers
from tests.builders import listed

T = TypeVar("T")

DOMAINS = ["orders", "carts"]
EDITIONS = [MAIN, "what-if", "why-not"]
AGGREGATES = [
    Aggregate(domain, root, edition)
    for domain, root in (("orders", "a b:*"), ("orders", "1"), ("carts", "1"))
    for edition in EDITIONS
]
SOURCES = [Source("orders", "1", MAIN, 1), Source("orders", "1", MAIN, 11)]
small = st.integers(0, 12)
aggregates = st.sampled_from(AGGREGATES)
# Most of the work is on one root, or little would ever meet.
busy = st.one_of(*[st.sampled_from(AGGREGATES[:2])] * 3, aggregates)
handlers = st.sampled_from(["projector", "saga"])
bounds = st.none() | small
keys = st.sampled_from([None, None, None, "", "k", "k1"])
correlations = st.sampled_from([None, None, "c", "c1"])
snapshots = st.tuples(small, small, st.sampled_from(Retention))
sources = st.sampled_from([None, None, *SOURCES])


@dataclass
class Stored:
    """An event as the model has it."""

    event: Event
    key: str | None = None
    correlation: str | None = None
    source: Source | None = None


@dataclass
class Model:
    """One aggregate on one edition, as the documentation has it."""

    events: list[Stored] = field(default_factory=list)  # its own
    diverges_at: int | None = None  # 0 on main
    positions: dict[str, tuple[int, bool]] = field(default_factory=dict)
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

    def diverge(self, at: int) -> None:
        self.diverges_at = at
        for older in (self.kept, self.recent):
            for sequence in [sequence for sequence in older if sequence >= at]:
                del older[sequence]
        if self.newest is not None and self.newest[0] >= at:
            event(f"diverge: snapshots go, {len(self.recent) + len(self.kept)} are left")
            rest = {**self.recent, **self.kept}
            self.newest = rest[max(rest)] if rest else None
            for older in (self.kept, self.recent):
                older.pop(self.newest[0] if self.newest else -1, None)

    def position(self, handler: str) -> int | None:
        sequence, was_main = self.positions.get(handler, (-1, False))
        if was_main and self.diverges_at is not None:
            sequence = min(sequence, self.diverges_at - 1)
        return sequence if sequence >= 0 else None

    def is_known(self) -> bool:
        return bool(self.events) or self.diverges_at is not None


class StoreMachine(RuleBasedStateMachine):
    """Each rule does one thing to both, and compares the answers."""

    server: servers.Server

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.prefix = f"test-model-{uuid.uuid4().hex}:"
        self.store = asyncstore.open(self.server.url, key_prefix=self.prefix)
        self.models: defaultdict[Aggregate, Model] = defaultdict(Model)
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
        roots = {aggregate.root for aggregate in AGGREGATES}
        left = servers.keys_with(self.server, self.prefix)
        assert left <= self.server.lasting(self.prefix, *roots)
        self.runner.close()
        servers.sweep(self.server, self.prefix)

    # The model

    def timeline(self, aggregate: Aggregate, diverge_at: int | None = None) -> list[Stored]:
        """Return main[< d] + edition[>= d]."""
        model, main = self.models[aggregate], self.models[aggregate.on(MAIN)]
        if aggregate.edition == MAIN:
            return model.events
        d = model.diverges_at if diverge_at is None else diverge_at
        return main.events[:d] + model.events

    # The rules

    @rule(
        aggregate=busy,
        count=st.integers(0, 4),
        off=st.sampled_from([0, 0, 0, -1, -2, 1, 7]),
        key=keys,
        correlation=correlations,
        source=sources,
    )
    def append(
        self,
        aggregate: Aggregate,
        count: int,
        off: int,
        key: str | None,
        correlation: str | None,
        source: Source | None,
    ) -> None:
        model, before = self.models[aggregate], list(self.timeline(aggregate))
        stored = [
            Stored(Event("Happened", {"n": n}), key or None, correlation, source)
            for n in range(count)
        ]
        expected = max(0, len(before) + off)
        is_new = aggregate.edition != MAIN and model.diverges_at is None
        append = self.store.events.append(
            aggregate,
            [each.event for each in stored],
            expected=expected,
            idempotency_key=key,
            correlation_id=correlation,
            source=source,
            missed=True,
        )
        if not stored:
            assert self.wait(append) == Appended(len(before), len(before) - 1)
            return
        offset = model.diverges_at or 0
        used = [offset + n for n, each in enumerate(model.events) if key and each.key == key]
        if used:
            event("append: a key again")
            assert self.wait(append) == Appended(used[0], used[-1], duplicate=True)
            return
        if expected != len(before) and not (is_new and expected < len(before)):
            event("append: a conflict")
            with pytest.raises(SequenceConflict) as caught:
                self.wait(append)
            assert caught.value.actual == len(before)
            assert caught.value.missed is not None
            missed = [each.event.id for each in before[expected:]]
            assert [each.id for each in caught.value.missed] == missed
            return
        assert self.wait(append) == Appended(expected, expected + count - 1)
        if is_new:
            event("append: an edition diverges")
            model.diverge(expected)
        model.events += stored

    @rule(aggregate=aggregates, count=st.integers(1, 300))
    def append_any(self, aggregate: Aggregate, count: int) -> None:
        events = [Event("Counted", b"%d" % n) for n in range(count)]
        end = len(self.timeline(aggregate))
        done = self.wait(self.store.events.append(aggregate, events, expected=ANY))
        assert done == Appended(end, end + count - 1)
        model = self.models[aggregate]
        if aggregate.edition != MAIN and model.diverges_at is None:
            model.diverge(end)
        model.events += [Stored(event) for event in events]

    @rule(aggregate=busy, at=small)
    def branch(self, aggregate: Aggregate, at: int) -> None:
        if aggregate.edition == MAIN:
            return
        model = self.models[aggregate]
        branch = self.store.events.branch(aggregate, at=at)
        if model.diverges_at is not None:
            with pytest.raises(BranchExists) as caught:
                self.wait(branch)
            assert (caught.value.at, caught.value.diverged_at) == (at, model.diverges_at)
        elif at > len(self.timeline(aggregate)):
            with pytest.raises(SequenceConflict):
                self.wait(branch)
        else:
            event("branch: an edition diverges")
            self.wait(branch)
            model.diverge(at)

    @rule(
        aggregate=busy,
        start=small,
        length=bounds,
        limit=bounds,
        reverse=st.booleans(),
        diverge_at=bounds,
    )
    def read(
        self,
        aggregate: Aggregate,
        start: int,
        length: int | None,
        limit: int | None,
        reverse: bool,
        diverge_at: int | None,
    ) -> None:
        if aggregate.edition == MAIN or self.models[aggregate].diverges_at is not None:
            diverge_at = None
        stop = None if length is None else start + length
        model = list(enumerate(self.timeline(aggregate, diverge_at)))[start:stop]
        if reverse:
            model.reverse()
        found = self.wait(
            self.store.events.read(
                aggregate,
                start=start,
                stop=stop,
                limit=limit,
                reverse=reverse,
                diverge_at=diverge_at,
            )
        )
        assert [as_pair(recorded) for recorded in found] == [
            (n, stored.event.id, stored.event.data) for n, stored in model[:limit]
        ]

    @rule(aggregate=busy)
    def load(self, aggregate: Aggregate) -> None:
        timeline = self.timeline(aggregate)
        loaded = self.wait(self.store.load(aggregate))
        snapshot = self.models[aggregate].newest
        if snapshot is None and aggregate.edition != MAIN:
            main, diverges_at = self.models[aggregate.on(MAIN)], self.models[aggregate].diverges_at
            if diverges_at != 0:
                snapshot = main.snapshot(None if diverges_at is None else diverges_at - 1)
        start = 0 if snapshot is None else snapshot[0] + 1
        assert as_triple(loaded.snapshot) == snapshot
        assert [each.id for each in loaded.events] == [s.event.id for s in timeline[start:]]
        assert loaded.next_sequence == len(timeline)
        assert self.wait(self.store.events.next_sequence(aggregate)) == len(timeline)

    @rule(aggregate=busy, source=st.sampled_from(SOURCES), key=st.sampled_from(["", "k", "k1"]))
    def find(self, aggregate: Aggregate, source: Source, key: str) -> None:
        own = self.models[aggregate].events
        found = self.wait(self.store.events.find_source(aggregate, source))
        assert [each.id for each in found] == [s.event.id for s in own if s.source == source]
        assert all(each.source == source for each in found)
        found = self.wait(self.store.events.find_idempotency_key(aggregate, key))
        wanted = [s.event.id for s in own if key and s.key == key]
        assert [each.id for each in found] == wanted
        assert all(each.idempotency_key == key for each in found)

    @rule(correlation=st.sampled_from(["c", "c1", "c2"]))
    def find_correlated(self, correlation: str) -> None:
        books = self.wait(self.store.events.correlated(correlation))
        found = {book.aggregate: [each.id for each in book.events] for book in books}
        assert len(found) == len(books)
        model = {
            aggregate: [s.event.id for s in model.events if s.correlation == correlation]
            for aggregate, model in self.models.items()
        }
        assert found == {aggregate: ids for aggregate, ids in model.items() if ids}

    @rule(aggregate=busy, handler=handlers, sequence=small)
    def advance(self, aggregate: Aggregate, handler: str, sequence: int) -> None:
        current = self.models[aggregate].position(handler)
        moved = self.wait(self.store.positions.advance(handler, aggregate, sequence))
        assert moved == (current is None or sequence > current)
        if moved:
            self.keep_position(aggregate, handler, sequence)

    @rule(aggregate=busy, handler=handlers, sequence=small)
    def put_position(self, aggregate: Aggregate, handler: str, sequence: int) -> None:
        self.wait(self.store.positions.put(handler, aggregate, sequence))
        self.keep_position(aggregate, handler, sequence)

    def keep_position(self, aggregate: Aggregate, handler: str, sequence: int) -> None:
        model = self.models[aggregate]
        was_main = aggregate.edition != MAIN and model.diverges_at is None
        model.positions[handler] = sequence, was_main

    @rule(aggregate=busy, handler=handlers)
    def get_position(self, aggregate: Aggregate, handler: str) -> None:
        found = self.wait(self.store.positions.get(handler, aggregate))
        assert found == self.models[aggregate].position(handler)

    @rule(aggregate=busy, puts=st.lists(snapshots, min_size=1, max_size=4))
    def put_snapshots(self, aggregate: Aggregate, puts: list[tuple[int, int, Retention]]) -> None:
        for sequence, n, retention in puts:
            put = self.store.snapshots.put(
                aggregate, sequence=sequence, state=n, retention=retention
            )
            assert self.wait(put)
            self.models[aggregate].put_snapshot((sequence, n, retention))

    @rule(aggregate=busy, at=bounds)
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

    @rule(aggregate=busy)
    def delete(self, aggregate: Aggregate) -> None:
        # Editions that have diverged can't be read without the main history before them.
        gone = [aggregate] if aggregate.edition != MAIN else [aggregate.on(e) for e in EDITIONS]
        for each in gone:
            count = self.wait(self.store.events.delete(each))
            assert count == len(self.models.pop(each, Model()).events)

    @rule(domain=st.sampled_from(DOMAINS), edition=st.sampled_from(EDITIONS[1:]))
    def delete_edition(self, domain: str, edition: str) -> None:
        count = self.wait(self.store.events.delete_edition(domain, edition))
        gone = [a for a in self.models if (a.domain, a.edition) == (domain, edition)]
        assert count == sum(len(self.models.pop(each).events) for each in gone)

    @rule(domain=st.sampled_from(DOMAINS), edition=st.sampled_from(EDITIONS))
    def list_what_there_is(self, domain: str, edition: str) -> None:
        # A cluster is asked for all of its slots each time: one domain and edition is enough.
        is_dear = self.server.is_cluster
        self.list_names([domain] if is_dear else DOMAINS, [edition] if is_dear else EDITIONS)

    def list_names(self, of_domains: list[str], of_editions: list[str]) -> None:
        there = [aggregate for aggregate, model in self.models.items() if model.is_known()]
        domains = sorted({aggregate.domain for aggregate in there})
        assert self.wait(listed(self.store.events.domains())) == domains
        for domain in of_domains:
            editions = {a.edition for a in there if a.domain == domain}
            assert self.wait(listed(self.store.events.editions(domain))) == sorted(editions)
            for edition in of_editions:
                roots = sorted(a.root for a in there if (a.domain, a.edition) == (domain, edition))
                found = self.wait(listed(self.store.events.roots(domain, edition=edition)))
                assert sorted(found) == roots


def as_pair(recorded: RecordedEvent) -> tuple[int, uuid.UUID, Any]:
    return recorded.sequence, recorded.id, recorded.data


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
            # A cluster takes 20 times as long. Its 100 were played when this was written.
            max_examples=15 if server.is_cluster else 100,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
