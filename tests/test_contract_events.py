"""What every server must do with events. Runs on each server of the matrix."""

from __future__ import annotations

from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Event,
    Store,
    scripts,
)
from asyncstore.keys import Keys
from asyncstore.testing.conformance.events import *  # noqa: F403 - the cases of every store
from tests.builders import listed, numbered, roots_of_one_slot, sequences
from tests.servers import Server


class TestReadInTheServer:
    async def test_a_page_of_large_events_is_a_few(
        self, server: Server, store: Store, order: Aggregate
    ) -> None:
        small, large = numbered(60), [Event("Large", b"x" * 700_000)] * 80
        await store.events.append(order, [*small, *large], expected=NEW)
        with server.client() as client:
            keys = [Keys(store.settings.key_prefix).events(order)]
            reply = client.eval(scripts.READ.source, 1, *keys, 0, "+inf", 5000, "", "")
        assert isinstance(reply, list)
        assert 0 < sum(len(member) > 700_000 for member in reply) <= 32
        assert sequences(await store.events.read(order)) == list(range(140))
        assert sequences(await store.events.read(order, reverse=True)) == list(range(139, -1, -1))


class TestListingInTheServer:
    async def test_roots_come_least_recently_appended_to_first(self, store: Store) -> None:
        # On a cluster that is so within a slot.
        one, two, three = (Aggregate("orders", root) for root in roots_of_one_slot(3))
        for place in (three, one, two, one):
            await store.events.append(place, numbered(1), expected=ANY)
        roots = await listed(store.events.roots("orders"))
        assert roots == [three.root, two.root, one.root]

    async def test_roots_of_all_slots(self, server: Server, store: Store) -> None:
        places = [Aggregate("orders", f"{n}") for n in range(20)]
        for place in places:
            await store.events.append(place, numbered(1), expected=NEW)
        roots = await listed(store.events.roots("orders"))
        wanted = [place.root for place in places]
        assert sorted(roots) == sorted(wanted)
        # One server has one index of roots, and so one order; the slots of a cluster have none.
        assert server.is_cluster or roots == wanted
