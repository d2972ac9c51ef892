"""`events.confirm`: whether what is stored is as durable as one wants, whoever has stored it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Durability,
    DurabilityNotReached,
    DurabilityUnavailable,
    InvalidType,
    Store,
)
from tests.builders import KeysOfOne as Keys
from tests.builders import numbered, sequences
from tests.polling import eventually
from tests.servers import RedisServer, Server, redis_server
from tests.test_durability import (
    ALWAYS,
    AT_ONCE,
    BINARIES,
    REPLICA,
    can_replicate,
    events_of,
    paused,
    replica_of,
)

ORDER = Aggregate("orders", "1")
WHAT_IF = ORDER.on("what-if")


@pytest.fixture(params=BINARIES)
def binary(request: pytest.FixtureRequest) -> str:
    return BINARIES[request.param]()


@contextmanager
def client_of(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


async def test_of_memory_it_is_the_next_sequence(server: Server, prefix: str, store: Store) -> None:
    assert await store.events.confirm(ORDER) == 0
    await store.events.append(ORDER, numbered(3), expected=NEW)
    with server.client() as client:
        before = client.get(Keys(prefix).commits())
        assert await store.events.confirm(ORDER) == 3
        assert await store.events.confirm(WHAT_IF, durability=Durability.MEMORY) == 3
        assert client.get(Keys(prefix).commits()) == before, "nothing was written"
    with pytest.raises(InvalidType):
        await store.events.confirm(ORDER, durability="fsync")  # type: ignore[arg-type]


async def test_by_an_fsync_it_writes_no_event(binary: str) -> None:
    with redis_server(binary, *ALWAYS) as server:
        async with asyncstore.open(server.url) as store:
            await store.events.append(ORDER, numbered(3), expected=NEW)
            await store.events.branch(WHAT_IF, at=1)
            for place, end in ((ORDER, 3), (WHAT_IF, 1), (Aggregate("orders", "none"), 0)):
                assert await store.events.confirm(place, durability=Durability.FSYNC) == end
            assert sequences(await store.events.read(ORDER)) == [0, 1, 2]
            assert [root async for root in store.events.roots("orders")] == ["1"]
            await store.events.append(ORDER, numbered(1), expected=3)


async def test_what_the_server_does_not_sync_is_not_confirmed(binary: str) -> None:
    with redis_server(binary, *ALWAYS) as server, client_of(server) as client:
        async with asyncstore.open(server.url, durability="fsync") as store:
            await store.events.append(ORDER, numbered(3), expected=NEW)
            client.config_set("appendfsync", "everysec")
            with pytest.raises(DurabilityNotReached) as caught:
                await store.events.confirm(ORDER)
            assert (caught.value.first_sequence, caught.value.last_sequence) == (0, 2)
            with pytest.raises(DurabilityUnavailable):
                await store.events.confirm(ORDER)


async def test_a_replica_has_what_others_have_written(binary: str) -> None:
    options: Any = {"timeout": 1}
    with redis_server(binary, *AT_ONCE, tcp=True) as primary, replica_of(primary) as replica:
        async with (
            asyncstore.open(primary.url) as other,
            asyncstore.open(primary.url, **options) as store,
        ):
            await eventually(lambda: can_replicate(store), "the replica has come")
            async with paused(replica):
                await other.events.append(ORDER, numbered(3), expected=ANY)
                with pytest.raises(DurabilityNotReached) as caught:
                    await store.events.confirm(ORDER, durability=REPLICA)
                assert caught.value.on_replicas == 0
            await eventually(lambda: can_replicate(store), "the replica goes on")
            assert await store.events.confirm(ORDER, durability=REPLICA) == 3
            assert events_of(replica, ORDER) == 3
