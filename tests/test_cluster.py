"""The way to the right node of a cluster, whatever the nodes say, and wherever they go."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import cast

import anyio
import pytest

import asyncstore
from asyncstore import (
    ANY,
    Aggregate,
    Durability,
    OutcomeUnknown,
    Store,
    StoreClosed,
    StoreUnavailable,
)
from asyncstore.cluster import Address, Cluster, Span, View
from asyncstore.slots import COUNT, slot_of_tag
from tests.builders import numbered
from tests.fake_nodes import Call, FakeNode, Range, ask, fake_cluster, fake_node, moved
from tests.polling import eventually
from tests.servers import free_port

ORDER = Aggregate("orders", "1")
SLOT = slot_of_tag("1")
ASKED = [b"ASKING"]


@pytest.fixture(autouse=True)
def _nothing_goes_unheard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What asyncio logs as an error are exceptions that nobody caught."""
    yield
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [r.getMessage() for r in records if r.name == "asyncio" and r.levelname == "ERROR"] == []


def opened(*nodes: FakeNode, timeout: float = 5.0) -> Store:
    return asyncstore.open(urls=[node.url for node in nodes], timeout=timeout)


def router_of(store: Store) -> Cluster:
    return cast(Cluster, store._router.servers())


async def append(store: Store, place: Aggregate = ORDER) -> int:
    return (await store.events.append(place, numbered(1), expected=ANY)).first_sequence


def at_first(times: int, answer: bytes) -> Callable[[Call], bytes]:
    """Answer so for the first times, and well from then on."""
    left = [answer] * times

    def on_call(call: Call) -> bytes:
        return left.pop() if left else call.done()

    return on_call


def always(answer: bytes) -> Callable[[Call], bytes]:
    return lambda _: answer


class TestMoved:
    @pytest.mark.parametrize("place", ["127.0.0.1:{}", ":{}", "localhost:{}"])
    async def test_is_followed_and_remembered(self, place: str) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.on_call = always(moved(SLOT, place.format(two.port)))
            await append(store)
            one.view = two.view = [two.has()]
            assert await store.events.next_sequence(ORDER) == 7
            assert (one.calls, two.calls) == (1, 2)

    async def test_leads_to_another_host_by_ipv6(self) -> None:
        async with fake_node("::1") as one, fake_node("::1") as two:
            one.view = two.view = [one.has()]
            one.on_call = always(f"-MOVED {SLOT} ::1:{two.port}\r\n".encode())
            async with opened(one) as store:
                await append(store)
            assert two.calls == 1

    async def test_to_where_nobody_is_ends_in_time(self) -> None:
        async with fake_cluster() as (one, _), opened(one, timeout=0.5) as store:
            port = free_port()
            one.on_call = always(moved(SLOT, f"127.0.0.1:{port}"))
            # Which of these came last depends on when the map was looked up.
            last = r"nobody listens|do not agree|is gone"
            with pytest.raises(StoreUnavailable, match=last) as caught:
                await append(store)
            assert "nothing was changed" in str(caught.value)

    async def test_to_where_nobody_is_goes_on_when_the_map_is_mended(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.view = two.view = [two.has()]
            one.on_call = always(moved(SLOT, f"127.0.0.1:{free_port()}"))
            await append(store)
            assert two.calls == 1

    @pytest.mark.parametrize("words", ["", " ?:6379", " 127.0.0.1:0", " 127.0.0.1:99999", " a b c"])
    async def test_to_no_place_at_all_is_no_place_of_ours(self, words: str) -> None:
        async with fake_cluster() as (one, _), opened(one, timeout=1.0) as store:
            one.on_call = always(f"-MOVED {SLOT}{words}\r\n".encode())
            with pytest.raises(StoreUnavailable):
                await append(store)

    async def test_in_circles_is_no_storm(self) -> None:
        async with fake_cluster() as (one, two), opened(one, timeout=1.0) as store:
            one.on_call = always(moved(SLOT, f"127.0.0.1:{two.port}"))
            two.on_call = always(moved(SLOT, f"127.0.0.1:{one.port}"))
            with pytest.raises(StoreUnavailable, match="do not agree on who has the slot"):
                await append(store)
            assert 10 < one.calls + two.calls < 50


class TestAsk:
    async def test_asking_is_right_before_the_command_and_again_after_noscript(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.on_call = always(ask(SLOT, two))
            seen: list[tuple[bytes, bool]] = []

            def on_call(call: Call) -> bytes:
                seen.append((call.words[0], call.is_asking))
                return b"-NOSCRIPT\r\n" if call.words[0] == b"EVALSHA" else call.done()

            two.on_call = on_call
            await asyncio.gather(*(append(store) for _ in range(40)))
            assert await store.events.next_sequence(ORDER) == 7
            assert {name for name, _ in seen} == {b"EVALSHA", b"EVAL", b"ZCARD"}
            assert all(is_asking for _, is_asking in seen)
            assert router_of(store).lookups == 0  # the slot is where it was

    async def test_a_connection_cut_in_the_middle_stays_in_step(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.on_call = always(ask(SLOT, two))
            cuts = [1, 2]

            def on_call(call: Call) -> bytes | None:
                if cuts:  # +OK has gone, the rest has not
                    cuts.pop()
                    call.close()
                    return None
                return call.done()

            two.on_call = on_call
            outcomes = await asyncio.gather(*(store.events.next_sequence(ORDER) for _ in range(5)))
            assert outcomes == [7] * 5
            assert await append(store) == 0

    async def test_a_node_that_has_no_slots_yet_is_not_given_up_in_the_middle(self) -> None:
        async with fake_cluster() as (one, two), opened(one, timeout=1.5) as store:
            one.on_call = always(ask(SLOT, two))
            held: list[Call] = []
            two.on_call = held.append  # and no answer
            call = asyncio.ensure_future(append(store))
            await eventually(lambda: bool(held), "the append is at the other node")
            router = router_of(store)
            await router._look()
            held[0].answer(held[0].stored(3))
            assert await call == 3
            assert two.calls == 1
            assert two.connections == 1

            async def is_given_up() -> bool:
                await router._look()
                return not two.open_connections

            await eventually(is_given_up, "it is given up when it is idle")


NOT_NOW = {
    "TRYAGAIN Multiple keys": "moving this slot",
    "CLUSTERDOWN Hash slot not served": "cluster is down",
    "READONLY You can't write": "is a replica",
    "LOADING Redis is loading": "loading its data",
    "MASTERDOWN Link with MASTER is down": "lost its primary",
}


class TestNotNow:
    @pytest.mark.parametrize("error", NOT_NOW)
    async def test_a_call_waits_until_it_can_be_served(self, error: str) -> None:
        async with fake_cluster() as (one, _), opened(one) as store:
            one.on_call = at_first(4, f"-{error}\r\n".encode())
            await append(store)
            assert one.calls == 5

    @pytest.mark.parametrize(("error", "why"), NOT_NOW.items())
    async def test_but_no_longer_than_it_has_time(self, error: str, why: str) -> None:
        async with fake_cluster() as (one, _), opened(one, timeout=0.5) as store:
            one.on_call = always(f"-{error}\r\n".encode())
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(StoreUnavailable, match=why):
                await append(store)
            assert 0.3 < loop.time() - began < 1.0  # a sending at the very end is left out
            assert one.calls < 40
            assert not router_of(store)._limbo

    async def test_other_errors_are_answers(self) -> None:
        async with fake_cluster() as (one, _), opened(one) as store:
            for code, kind in (("OOM", asyncstore.StoreFull), ("NOREPLICAS", StoreUnavailable)):
                one.on_call = always(f"-{code} no\r\n".encode())
                with pytest.raises(kind):
                    await append(store)
            assert one.calls == 2


class TestLooking:
    async def test_four_thousand_callers_are_one_look_at_a_time(self) -> None:
        async with fake_cluster() as (one, two), opened(one, timeout=20) as store:
            before = one.asked["CLUSTER SLOTS"]
            one.on_call = always(b"-CLUSTERDOWN The cluster is down\r\n")
            loop = asyncio.get_running_loop()
            began = loop.time()
            places = [Aggregate("orders", f"{n}") for n in range(4000)]
            calls = [asyncio.ensure_future(append(store, place)) for place in places]
            await eventually(lambda: one.asked["CLUSTER SLOTS"] - before >= 4, "it looked")
            one.view = two.view = [two.has()]
            await asyncio.gather(*calls)
            looks = one.asked["CLUSTER SLOTS"] + two.asked["CLUSTER SLOTS"] - before
            print(f"4,000 callers noticed: {looks} looks in {loop.time() - began:.2f} s")
            assert looks <= 4 + 10 * (loop.time() - began)

    async def test_pauses_between_looks_grow_while_there_is_trouble(self) -> None:
        async with fake_cluster() as (one, _), opened(one, timeout=2.5) as store:
            before = one.asked["CLUSTER SLOTS"]
            one.on_call = always(b"-CLUSTERDOWN The cluster is down\r\n")
            with pytest.raises(StoreUnavailable):
                await append(store)
            assert 3 <= one.asked["CLUSTER SLOTS"] - before <= 12

    async def test_views_of_the_past_and_empty_ones_are_not_used(self) -> None:
        async with fake_cluster() as (one, two), opened(one, timeout=1.0) as store:
            for view, epoch in (([two.has()], 0), ([], 9)):
                one.view, one.epoch = view, epoch
                await router_of(store)._look()
                await append(store)
            assert one.calls == 2
            assert two.calls == 0

    async def test_another_cluster_at_the_same_place_is_found_out(self) -> None:
        async with fake_cluster() as (one, two), opened(one, timeout=1.0) as store:
            one.view = two.view = [two.has()]
            one.epoch = two.epoch = 0

            async def is_found() -> bool:
                if two.calls == 0:
                    await asyncio.gather(append(store), return_exceptions=True)
                return two.calls > 0

            one.on_call = always(b"-CLUSTERDOWN Hash slot not served\r\n")
            await eventually(is_found, "the new cluster is used")

    async def test_seeds_lead_to_nodes_that_all_came_back_elsewhere(self) -> None:
        async with fake_cluster(3) as (seed, old, new):
            seed.view = old.view = [old.has()]
            async with opened(seed) as store:
                await append(store)
                seed.view = new.view = [new.has()]
                old.is_silent = True
                old.cut()
                await append(store)
                assert (old.calls, new.calls) == (1, 1)

    async def test_a_dial_that_nobody_answers_is_cause_to_look(self) -> None:
        async with fake_cluster(3) as (one, two, other):
            half = COUNT // 2
            views = [[one.has(0, half), node.has(half + 1)] for node in (two, other)]
            for node in (one, two, other):
                node.view = views[0]
            place = next(p for p in _places() if slot_of_tag(p.root) > half)
            async with opened(one, timeout=3.0) as store:
                await append(store, place)
                two.is_silent = True
                two.cut()
                router = router_of(store)
                await eventually(lambda: router.lookups > 0 and not router._looks, "it looked")
                one.view = other.view = views[1]
                async with asyncio.timeout(1.5):  # the dial ends after 3 seconds
                    await append(store, place)
                assert other.calls == 1


def _places() -> Iterator[Aggregate]:
    n = 0
    while True:
        yield Aggregate("orders", f"{n}")
        n += 1


class TestNodesThatLeave:
    async def test_what_was_sent_goes_on_with_the_mark(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.on_call = lambda _: None
            marks: list[bytes] = []

            def on_call(call: Call) -> bytes:
                marks.append(call.mark)
                return call.stored(5)

            two.on_call = on_call
            call = asyncio.ensure_future(append(store))
            await eventually(lambda: one.calls == 1, "the append is at the first node")
            one.view = two.view = [two.has()]
            router_of(store).look_again()
            assert await call == 5
            assert marks == [b"elsewhere"]
            await eventually(lambda: one.open_connections == 0, "the first node is left")

    async def test_what_is_refused_there_does_not_deny_the_first(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.on_call = lambda _: None
            two.on_call = always(b"-OOM command not allowed\r\n")
            call = asyncio.ensure_future(append(store))
            await eventually(lambda: one.calls == 1, "the append is at the first node")
            one.view = two.view = [two.has()]
            router_of(store).look_again()
            with pytest.raises(OutcomeUnknown, match="refused when sent again"):
                await call

    async def test_what_was_never_sent_goes_on_without_a_mark(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            before, one.is_silent = one.connections, True
            one.cut()
            (node,) = router_of(store).nodes()
            await eventually(lambda: node.transport._wire is None, "it is cut off")
            call = asyncio.ensure_future(append(store))
            await eventually(lambda: one.connections > before, "it is dialled in vain")
            marks: list[bytes] = []

            def on_call(call: Call) -> bytes:
                marks.append(call.mark)
                return call.stored(5)

            two.on_call = on_call
            router_of(store)._take(View((Span(0, COUNT - 1, _address(two), ()),), True, 2))
            assert await call == 5
            assert marks == [b""]

    async def test_a_lane_that_is_made_after_that_is_left_too(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            (node,) = router_of(store).nodes()
            one.view = two.view = [two.has()]
            await router_of(store)._look()
            level = Durability.replicas(1)
            ways = node._make_appender(level).send
            keys = store._keys.timeline(ORDER)
            answer = await ways(ORDER, keys, ["1", "", 0, "d"], [], 0, SLOT)
            assert answer == ([b"ok", 0], [1])
            assert node._waiting is not None
            assert node._waiting._timer is not None
            assert node._waiting._timer.cancelled()

    async def test_nodes_that_come_and_go_leave_nothing(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            router = router_of(store)

            async def turn(owner: FakeNode) -> None:
                one.view = two.view = [owner.has()]
                other = two if owner is one else one
                other.on_call = always(moved(SLOT, f"127.0.0.1:{owner.port}"))
                owner.on_call = Call.done
                await append(store)
                await eventually(lambda: router.nodes()[0].where == owner.url, "it moved")
                await eventually(lambda: not other.open_connections, "the other one is left")

            async def held_after(owners: tuple[FakeNode, ...]) -> tuple[int, int]:
                for owner in owners:
                    await turn(owner)
                one.words.clear()
                two.words.clear()
                gc.collect()
                return tracemalloc.get_traced_memory()[0], len(asyncio.all_tasks())

            tracemalloc.start()
            try:
                memory, tasks = await held_after((two, one))
                more_memory, more_tasks = await held_after((two, one) * 6)
            finally:
                tracemalloc.stop()
            print(f"12 times another node: {(more_memory - memory) / 1024:.0f} KiB more")
            assert more_memory - memory < 30_000  # the map alone has 128 KiB
            assert more_tasks <= tasks
            assert len(router.nodes()) == 1


def _address(node: FakeNode) -> Address:
    return Address(node.host, node.port)


class TestNodesThatJoin:
    async def test_one_that_evicts_is_told_of_in_the_log(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            two.policy = "allkeys-lru"
            one.view = two.view = [two.has()]
            one.on_call = always(moved(SLOT, f"127.0.0.1:{two.port}"))
            await append(store)
            await eventually(lambda: errors_of(caplog) != [], "it is looked at")
            (error,) = errors_of(caplog)
            assert two.url in error
            assert "allkeys-lru" in error

    async def test_one_that_is_gone_again_is_not_looked_at_for_ever(self) -> None:
        async with fake_cluster() as (one, two), opened(one, timeout=0.2) as store:
            two.is_silent = True
            router_of(store)._node_at(Address("127.0.0.1", two.port))
            assert len(store._admission._late) == 1
            router_of(store).look_again()
            await eventually(lambda: not store._admission._late, "it is given up")


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [
        r for r in caplog.records if r.name.startswith("asyncstore") and r.levelname == "ERROR"
    ]
    return [record.getMessage() for record in found]


class TestReplicas:
    """Appends that wait for replicas: groups that travel together, and a wait behind them."""

    @asynccontextmanager
    async def _two(self) -> AsyncIterator[tuple[FakeNode, FakeNode, Store]]:
        async with fake_cluster() as (one, two), opened(one) as store:
            yield one, two, store

    async def test_one_group_of_a_shipment_is_refused_and_the_others_are_not(self) -> None:
        async with self._two() as (one, two, store):
            places = [Aggregate("orders", f"{n}") for n in range(6)]
            gone = slot_of_tag(places[2].root)

            def on_call(call: Call) -> bytes:
                if f"{{{places[2].root}}}".encode() in b" ".join(call.words):
                    return moved(gone, f":{two.port}")
                return call.stored(1)

            one.on_call = on_call
            two.on_call = lambda call: call.stored(2)
            level = Durability.replicas(1)
            done = await asyncio.gather(
                *(
                    store.events.append(place, numbered(1), expected=ANY, durability=level)
                    for place in places
                )
            )
            assert [found.first_sequence for found in done] == [1, 1, 2, 1, 1, 1]
            assert one.asked["WAIT"] - 1 <= 2  # the first is to see whether it may
            behind = [words[0] for words in two.words if words[0] in (b"EVALSHA", b"EVAL", b"WAIT")]
            assert behind == [b"EVALSHA", b"WAIT"]

    async def test_asking_noscript_and_a_wait_behind_it(self) -> None:
        async with self._two() as (one, two, store):
            one.on_call = always(ask(SLOT, two))

            def on_call(call: Call) -> bytes:
                assert call.is_asking
                return b"-NOSCRIPT\r\n" if call.words[0] == b"EVALSHA" else call.stored(4)

            two.on_call = on_call
            level = Durability.replicas(1)
            done = await store.events.append(ORDER, numbered(1), expected=ANY, durability=level)
            assert done.first_sequence == 4
            assert [w[0] for w in two.words if w[0] in (b"EVAL", b"WAIT")][-2:] == [
                b"EVAL",
                b"WAIT",
            ]

    async def test_a_node_that_leaves_hands_all_groups_over(self) -> None:
        async with self._two() as (one, two, store):
            level = Durability.replicas(1)
            await store.events.append(ORDER, numbered(1), expected=ANY, durability=level)
            one.on_call = lambda _: None
            places = [Aggregate("orders", f"{n}") for n in range(30)]
            calls = [
                asyncio.ensure_future(
                    store.events.append(place, numbered(1), expected=ANY, durability=level)
                )
                for place in places
            ]
            await eventually(lambda: one.calls >= 30, "all are at the first node")
            marks: list[bytes] = []

            def on_call(call: Call) -> bytes:
                marks.append(call.mark)
                return call.stored(9)

            two.on_call = on_call
            one.view = two.view = [two.has()]
            router_of(store).look_again()
            done = await asyncio.gather(*calls)
            assert {found.first_sequence for found in done} == {9}
            assert marks == [b"elsewhere"] * 30

    async def test_those_that_were_held_hear_that_the_store_was_closed(self) -> None:
        async with self._two() as (one, _, store):
            level = Durability.replicas(1)
            await store.events.append(ORDER, numbered(1), expected=ANY, durability=level)
            one.on_call = lambda _: None
            calls = []
            for n in range(3):
                place = Aggregate("orders", f"{n}")
                call = store.events.append(place, numbered(1), expected=ANY, durability=level)
                calls.append(asyncio.ensure_future(call))
                await asyncio.sleep(0)
                await eventually(lambda: one.calls >= 2, "the first is on its way")
            connections = one.connections
            await store.__aexit__(None, None, None)
            outcomes = await asyncio.wait_for(
                asyncio.gather(*calls, return_exceptions=True), timeout=1
            )
            assert [type(outcome) for outcome in outcomes] == [
                OutcomeUnknown,
                StoreClosed,
                StoreClosed,
            ]
            await eventually(lambda: one.open_connections == 0, "nobody is connected")
            assert one.connections == connections


class TestClosing:
    async def test_what_is_in_limbo_hears_it_at_once(self) -> None:
        async with fake_cluster() as (one, _), opened(one) as store:
            one.on_call = always(b"-CLUSTERDOWN The cluster is down\r\n")
            calls = [asyncio.ensure_future(append(store)) for _ in range(50)]
            reads = [asyncio.ensure_future(store.events.next_sequence(ORDER)) for _ in range(50)]
            router = router_of(store)
            await eventually(lambda: len(router._limbo) > 50, "they are in limbo")
            await store.__aexit__(None, None, None)
            outcomes = await asyncio.gather(*calls, *reads, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {StoreClosed}
            assert not router._limbo
            await eventually(lambda: one.open_connections == 0, "nobody is connected")
            assert len(asyncio.all_tasks()) == 1 + one.open_connections

    async def test_what_may_be_stored_is_unknown(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            one.on_call = lambda _: None
            two.on_call = always(b"-CLUSTERDOWN The cluster is down\r\n")
            call = asyncio.ensure_future(append(store))
            await eventually(lambda: one.calls == 1, "the append is at the first node")
            one.view = two.view = [two.has()]
            router_of(store).look_again()
            await eventually(lambda: two.calls > 2, "it is in limbo")
            await store.__aexit__(None, None, None)
            with pytest.raises(OutcomeUnknown):
                await call

    async def test_in_a_cancelled_scope_nothing_stays_open(self) -> None:
        async with fake_cluster() as (one, _):
            with anyio.CancelScope() as scope:
                async with opened(one) as store:
                    one.on_call = always(b"-CLUSTERDOWN The cluster is down\r\n")
                    call = asyncio.ensure_future(append(store))
                    await eventually(lambda: bool(router_of(store)._looks), "it looks")
                    scope.cancel()
            with pytest.raises(StoreClosed):
                await call
            await eventually(lambda: one.open_connections == 0, "nobody is connected")

    async def test_cancelled_callers_leave_limbo(self) -> None:
        async with fake_cluster() as (one, _), opened(one) as store:
            one.on_call = always(b"-CLUSTERDOWN The cluster is down\r\n")
            calls = [asyncio.ensure_future(append(store)) for _ in range(500)]
            router = router_of(store)
            await eventually(lambda: bool(router._limbo), "they are in limbo")
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await eventually(lambda: not router._limbo, "limbo is empty")
            sent = one.calls
            one.on_call = Call.done
            await append(store)
            assert one.calls == sent + 1


class TestMaps:
    async def test_a_slot_that_nobody_has_is_waited_for(self) -> None:
        async with fake_cluster() as (one, two), opened(one) as store:
            half = [Range(0, SLOT - 1, one.host, one.port), one.has(SLOT + 1)]
            one.view = two.view = half
            down = b"-CLUSTERDOWN Hash slot not served\r\n"
            one.on_call = always(down)
            router = router_of(store)
            router.look_again()
            await eventually(lambda: router._owners[SLOT] is None, "the gap is known")
            call = asyncio.ensure_future(append(store))
            await eventually(lambda: one.calls > 2, "somebody is asked")
            one.view = two.view = [two.has()]
            await call
            assert two.calls == 1

    async def test_a_node_without_a_host_is_where_it_was_asked(self) -> None:
        async with fake_cluster(1) as (one,):
            one.view = [Range(0, COUNT - 1, None, one.port)]
            async with opened(one) as store:
                await append(store)

    async def test_a_node_without_the_host_name_that_it_is_to_announce(self) -> None:
        async with fake_cluster(1) as (one,):
            one.view = [Range(0, COUNT - 1, "?", one.port)]
            with pytest.raises(StoreUnavailable, match=r"announce.*\?:.*host name is not known"):
                async with opened(one, timeout=0.5):
                    pass
            assert not one.asked["PING"]
