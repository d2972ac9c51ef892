"""What was secret is in no file of a server, and nobody reads it once its subject is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

import asyncstore
from asyncstore import NEW, Aggregate
from asyncstore.typed import (
    Bodies,
    Forgotten,
    ForgottenEvent,
    Policy,
    Registry,
    StoredKeys,
    Typed,
    TypedStore,
)
from tests.polling import eventually
from tests.servers import RedisServer, redis_server
from tests.test_durability import AT_ONCE, can_replicate, replica_of

SECRET, PLAIN = "5ecret-marker", "plain-marker"
PERSON = Aggregate("people", "c-17")
FILES = ("--appendonly", "yes", "--rdbcompression", "no")


@dataclass(frozen=True)
class Moved:
    customer: str
    address: str


@dataclass(frozen=True)
class Noted:
    text: str


def registry(forgotten: Policy = Policy.KEEP) -> Registry:
    people = Registry(forgotten=forgotten)
    people.event("Moved", subject=lambda moved: moved.customer)(Moved)
    people.event("Noted")(Noted)
    return people


@contextmanager
def servers_of_events(binary: str) -> Iterator[tuple[RedisServer, RedisServer]]:
    with (
        redis_server(binary, *FILES, *AT_ONCE, tcp=True) as primary,
        replica_of(primary, *FILES) as replica,
    ):
        yield primary, replica


async def files_with(server: RedisServer, text: bytes) -> set[str]:
    """The kinds of a server's files that hold a text, once it has saved all that it has."""
    await eventually(lambda: has_saved(server), "it has saved")
    files = [path for path in server.directory.rglob("*") if path.is_file()]
    return {kind_of(path) for path in files if text in path.read_bytes()}


def has_saved(server: RedisServer) -> bool:
    with redis.Redis.from_url(server.url) as client:
        info = client.info("persistence")
        if info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]:
            return False
        with suppress(redis.ResponseError):  # it does already, by itself
            return bool(client.save())
    return False


def kind_of(path: Path) -> str:
    return "AOF" if ".aof" in path.name else path.suffix


async def test_what_was_secret_is_in_no_file(binary: str) -> None:
    async with asyncstore.open("embedded://") as apart:
        keys = StoredKeys(apart)
        bodies = Bodies(keys=keys)
        with servers_of_events(binary) as (primary, replica):
            async with asyncstore.open(primary.url) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                people = TypedStore(store, registry(), bodies)
                events = [Moved("c-17", SECRET), Noted(PLAIN), Moved("c-18", SECRET)]
                await people.append(
                    PERSON, events, expected=NEW, durability=asyncstore.Durability.replicas(1)
                )
                for server in (primary, replica):
                    assert await files_with(server, PLAIN.encode()) == {"AOF", ".rdb"}
                    assert await files_with(server, SECRET.encode()) == set()

                (secret,) = (await keys.find(["c-17"])).values()
                assert await keys.forget("c-17")
                for server in (primary, replica):
                    assert await files_with(server, secret.secret) == set()
                await assert_forgotten(store, bodies)
            with redis.Redis.from_url(replica.url) as client:
                client.replicaof("NO", "ONE")
            async with asyncstore.open(replica.url) as promoted:
                await assert_forgotten(promoted, bodies)


async def assert_forgotten(store: asyncstore.Store, bodies: Bodies) -> None:
    found = await TypedStore(store, registry(), bodies).read(PERSON)
    assert values(found) == [Forgotten("Moved", "c-17"), Noted(PLAIN), Moved("c-18", SECRET)]
    failing = TypedStore(store, registry(Policy.FAIL), bodies)
    with pytest.raises(ForgottenEvent, match="people/c-17, sequence 0: Moved"):
        await failing.read(PERSON)


def values(found: list[Typed]) -> list[object]:
    return [typed.value for typed in found]


async def test_a_forgotten_key_leaves_the_files_with_their_next_rewrite(binary: str) -> None:
    with redis_server(binary, *FILES) as server:
        async with asyncstore.open(server.url) as apart:
            keys = StoredKeys(apart)
            key = (await keys.make(["c-17"]))["c-17"]
            assert await files_with(server, key.secret) == {"AOF", ".rdb"}
            await keys.forget("c-17")
            assert await files_with(server, key.secret) == {"AOF"}, "as the docstring says"
            with redis.Redis.from_url(server.url) as client:
                client.bgrewriteaof()
            assert await files_with(server, key.secret) == set()
