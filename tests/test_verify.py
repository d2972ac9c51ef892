"""`asyncstore verify` and `--repair-indexes`: sound stores, and stores that were broken by hand."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

import asyncstore
from asyncstore import ANY, NEW, Aggregate, Event, Retention, Source, Store, verify
from asyncstore.keys import TYPES
from asyncstore.verify import Problem
from tests.builders import KeysOfOne as Keys
from tests.builders import listed, numbered, sequences
from tests.servers import Server, rewrite_member, sweep, without_end

ORDER = Aggregate("orders", "1")
WHAT_IF = ORDER.on("what-if")
CART = Source("carts", "7", "main", 3)
TRACED: dict[str, Any] = {"correlation_id": "checkout", "source": CART}


async def fill(store: Store) -> None:
    """Put one of everything into a store."""
    await fill_histories(store)
    async with store.subscribe("mailer", "carts", retries=0) as sub:
        await (await anext(sub)).nack()
    async with store.subscribe("reader", "carts") as sub:
        await anext(sub)


async def fill_histories(store: Store) -> None:
    """Put one of everything that belongs to aggregates into a store."""
    await store.events.append(ORDER, numbered(3), expected=NEW, idempotency_key="pay", **TRACED)
    await store.events.append(ORDER, numbered(60), expected=3, **TRACED)
    await store.events.append(ORDER, [Event("Raw", b"\x00\xff")], expected=63)
    await store.positions.put("projector", ORDER, 5)
    for sequence in range(6):
        retention = Retention.PERSIST if sequence == 1 else Retention.DEFAULT
        await store.snapshots.put(ORDER, sequence=sequence, state={}, retention=retention)
    await store.positions.put("early", WHAT_IF, 60)  # as of main
    await store.events.append(WHAT_IF, numbered(4), expected=2, idempotency_key="p", **TRACED)
    await store.positions.put("projector", WHAT_IF, 5)
    await store.snapshots.put(WHAT_IF, sequence=4, state={})
    await store.events.branch(ORDER.on("explicit"), at=64)
    await store.events.branch(ORDER.on("explicit-0"), at=0)
    await store.positions.put("projector", ORDER.on("undiverged"), 63)
    await store.events.append(Aggregate("carts", "a:b c*☃"), numbered(1), expected=NEW)


def told(problems: list[Problem]) -> list[tuple[str, str, int | None]]:
    return sorted((problem.kind, problem.key, problem.sequence) for problem in problems)


async def problems_of(store: Store) -> list[Problem]:
    return await listed(verify.problems(store))


@dataclass
class World:
    """A store that has one of everything, and is sound."""

    store: Store
    server: Server
    keys: Keys
    client: redis.Redis


@pytest.fixture
async def world(one_server: Server, prefix: str) -> AsyncIterator[World]:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        await fill(store)
        with one_server.client() as client:
            yield World(store, one_server, Keys(prefix), client)
    sweep(one_server, prefix)


Break = Callable[[redis.Redis, Keys], object]


def claim(what: str, first: int, count: int) -> str:
    return f"{what}\n{first:016} {count}"


def drop(key: Callable[[Keys], str], member: str) -> Break:
    return lambda client, keys: client.zrem(key(keys), member)


def events(keys: Keys) -> str:
    return keys.events(ORDER)


def branch_events(keys: Keys) -> str:
    return keys.events(WHAT_IF)


def claims(keys: Keys) -> str:
    return keys.claims(ORDER)


SOURCE = "source:carts:main:3:7"

# What is broken, and what is told of it: kinds, keys, sequences.
NOT_OF_CORRELATION: tuple[str, Callable[[Keys], str], int | None] = (
    "correlated-too-much",
    lambda k: k.correlated("checkout"),
    None,
)
BROKEN: dict[str, tuple[Break, list[tuple[str, Callable[[Keys], str], int | None]]]] = {
    "a hole": (
        lambda c, k: c.zremrangebyscore(events(k), 63, 63),
        [
            ("divergence", lambda k: k.divergence(ORDER.on("explicit")), 64),
            ("position-ahead", lambda k: k.position("projector", ORDER.on("undiverged")), 63),
        ],
    ),
    "a hole in the middle": (
        lambda c, k: (
            c.zremrangebyscore(events(k), 20, 22),
            c.zremrangebyscore(claims(k), "-inf", "+inf"),
            c.zadd(claims(k), {claim("key:pay", 0, 3): 0}),
        ),
        [
            ("hole", events, 20),
            ("main-missing", events, None),
            ("claim-missing", claims, 0),
            ("claim-missing", claims, 0),
            ("claim-missing", claims, 23),
            ("claim-missing", claims, 23),
            NOT_OF_CORRELATION,
        ],
    ),
    "a hole that claims name": (
        lambda c, k: c.zremrangebyscore(branch_events(k), 3, 3),
        [
            ("hole", branch_events, 3),
            *[("claim", lambda k: k.claims(WHAT_IF), 3)] * 3,
        ],
    ),
    "a branch without its first event": (
        lambda c, k: (
            c.zremrangebyscore(branch_events(k), 2, 2),
            c.delete(k.claims(WHAT_IF)),
        ),
        [
            ("hole", branch_events, 2),
            *[("claim-missing", lambda k: k.claims(WHAT_IF), 3)] * 3,
            NOT_OF_CORRELATION,
        ],
    ),
    "an event below the divergence": (
        lambda c, k: c.set(k.divergence(WHAT_IF), 3),
        [("before-divergence", branch_events, 2)],
    ),
    "no divergence": (
        lambda c, k: c.delete(k.divergence(WHAT_IF)),
        [("divergence", lambda k: k.divergence(WHAT_IF), None)],
    ),
    "a divergence that is no number": (
        lambda c, k: c.set(k.divergence(WHAT_IF), "1e1"),
        [("divergence", lambda k: k.divergence(WHAT_IF), None)],
    ),
    "a divergence beyond main": (
        lambda c, k: c.set(k.divergence(ORDER.on("explicit")), 65),
        [("divergence", lambda k: k.divergence(ORDER.on("explicit")), 65)],
    ),
    "a divergence on main": (
        lambda c, k: c.set(k.divergence(ORDER), 1),
        [("divergence", lambda k: k.divergence(ORDER), None)],
    ),
    "garbage": (
        lambda c, k: (c.zremrangebyscore(events(k), 2, 2), c.zadd(events(k), {"garbage": 2})),
        [("undecodable", events, 2)],
    ),
    "two at one place": (
        lambda c, k: c.zadd(events(k), {'[63,1,"%s","A"]\n{}' % ("0" * 32): 63}),
        [("doubled", events, 63)],
    ),
    "scores that are no sequences": (
        lambda c, k: c.zadd(events(k), {"a": -1, "b": 2.5, "c": "+inf"}),
        [("score", events, None)] * 3,
    ),
    "a claim of nothing": (
        lambda c, k: c.zadd(claims(k), {claim("key:x", 70, 2): 0}),
        [("claim", claims, 70)],
    ),
    "a claim of an event that does not carry it": (
        lambda c, k: c.zadd(claims(k), {claim("key:x", 5, 1): 0}),
        [("claim", claims, 5)],
    ),
    "a claim of too much": (
        lambda c, k: (
            c.zrem(claims(k), claim("key:pay", 0, 3)),
            c.zadd(claims(k), {claim("key:pay", 0, 5): 0}),
        ),
        [("claim", claims, 3)],
    ),
    "a member that is no claim": (
        lambda c, k: c.zadd(claims(k), {"hm": 0}),
        [("claim", claims, None)],
    ),
    "a member that is no claim and no text": (
        lambda c, k: c.zadd(claims(k), {b"\xff\xfe": 0}),
        [("claim", claims, None)],
    ),
    "a claim of no events": (
        lambda c, k: c.zadd(claims(k), {claim("key:none", 5, 0): 0}),
        [("claim", claims, None)],
    ),
    "a second claim of the same events": (
        lambda c, k: c.zadd(claims(k), {claim(SOURCE, 5, 10): 0}),
        [("claim-twice", claims, 5)],
    ),
    "a shorter claim in the place of another": (
        lambda c, k: c.zadd(claims(k), {claim(SOURCE, 3, 9): 0}),
        [("claim-twice", claims, 3)],
    ),
    "claims out of order": (
        lambda c, k: c.zadd(claims(k), {claim("key:pay", 0, 3): 7, claim(SOURCE, 0, 3): -7}),
        [("scores", claims, None)],
    ),
    "indexes out of order": (
        lambda c, k: (
            c.zadd(k.domains(), {"orders": 1}),
            c.zadd(k.editions("orders"), {"main": -1}),
            c.zadd(k.attached("orders", "what-if"), {"1": "inf"}),
            c.zadd(k.correlated("checkout"), {"orders:main:1": 0.5}),
        ),
        [
            ("scores", lambda k: k.domains(), None),
            ("scores", lambda k: k.editions("orders"), None),
            ("scores", lambda k: k.attached("orders", "what-if"), None),
            ("scores", lambda k: k.correlated("checkout"), None),
        ],
    ),
    **{
        f"a root with the number {number}": (
            partial(lambda number, c, k: c.zadd(k.roots("orders", "main"), {"1": number}), number),
            [("root-number", lambda k: k.roots("orders", "main"), None)],
        )
        for number in ("inf", "-inf", "0", "0.5", "1e17")
    },
    "a claim that is missing": (
        drop(claims, claim("key:pay", 0, 3)),
        [("claim-missing", claims, 0)],
    ),
    "a claim of many that is missing": (
        drop(claims, claim(SOURCE, 3, 60)),
        [("claim-missing", claims, 3)],
    ),
    "no claims": (
        lambda c, k: c.delete(claims(k)),
        [
            *[("claim-missing", claims, 0)] * 3,
            NOT_OF_CORRELATION,
        ],
    ),
    "a root that is missing": (
        drop(lambda k: k.roots("orders", "main"), "1"),
        [
            ("root-missing", lambda k: k.roots("orders", "main"), None),
            ("edition-too-much", lambda k: k.editions("orders"), None),
        ],
    ),
    "a root without events": (
        lambda c, k: c.zadd(k.roots("orders", "main"), {"2": 1}),
        [("root-too-much", lambda k: k.roots("orders", "main"), None)],
    ),
    "a root of an edition without events": (
        lambda c, k: c.zadd(k.roots("orders", "else"), {"2": 1}),
        [
            ("root-too-much", lambda k: k.roots("orders", "else"), None),
            ("edition-missing", lambda k: k.editions("orders"), None),
        ],
    ),
    "an edition that is missing": (
        drop(lambda k: k.editions("orders"), "what-if"),
        [("edition-missing", lambda k: k.editions("orders"), None)],
    ),
    "an edition without roots": (
        lambda c, k: c.zadd(k.editions("orders"), {"else": 0}),
        [("edition-too-much", lambda k: k.editions("orders"), None)],
    ),
    "a domain that is missing": (
        drop(lambda k: k.domains(), "orders"),
        [("domain-missing", lambda k: k.domains(), None)],
    ),
    "a domain without editions": (
        lambda c, k: c.zadd(k.domains(), {"else": 0}),
        [("domain-too-much", lambda k: k.domains(), None)],
    ),
    "all indexes": (
        lambda c, k: c.delete(
            k.domains(),
            k.editions("orders"),
            k.editions("carts"),
            *(
                k.roots(d, e)
                for d, e in (("orders", "main"), ("orders", "what-if"), ("carts", "main"))
            ),
        ),
        [
            ("root-missing", lambda k: k.roots("orders", "main"), None),
            ("root-missing", lambda k: k.roots("orders", "what-if"), None),
            ("root-missing", lambda k: k.roots("carts", "main"), None),
            *[("edition-missing", lambda k: k.editions("orders"), None)] * 2,
        ],
    ),
    "an attached root that is missing": (
        lambda c, k: c.delete(k.attached("orders", "what-if")),
        [("attached-missing", lambda k: k.attached("orders", "what-if"), None)],
    ),
    "a handler that is missing": (
        lambda c, k: c.srem(k.handlers(ORDER), "projector"),
        [("handler-missing", lambda k: k.handlers(ORDER), None)],
    ),
    "handlers and attached that are missing": (
        lambda c, k: c.delete(
            k.handlers(ORDER.on("undiverged")), k.attached("orders", "undiverged")
        ),
        [("handler-missing", lambda k: k.handlers(ORDER.on("undiverged")), None)],
    ),
    "a handler without a position": (
        lambda c, k: c.sadd(k.handlers(ORDER), "nobody"),
        [("handler-too-much", lambda k: k.handlers(ORDER), None)],
    ),
    "a position ahead": (
        lambda c, k: c.set(k.position("projector", ORDER), 64),
        [("position-ahead", lambda k: k.position("projector", ORDER), 64)],
    ),
    "a position ahead on a branch": (
        lambda c, k: c.set(k.position("projector", WHAT_IF), 6),
        [("position-ahead", lambda k: k.position("projector", WHAT_IF), 6)],
    ),
    "a position that is none": (
        lambda c, k: c.set(k.position("projector", ORDER), "far"),
        [("position", lambda k: k.position("projector", ORDER), None)],
    ),
    "a position of main with the mark of an edition": (
        lambda c, k: c.set(k.position("projector", ORDER), "3*"),
        [("position", lambda k: k.position("projector", ORDER), None)],
    ),
    "a snapshot ahead": (
        lambda c, k: c.hset(k.snapshots(ORDER)[0], "sequence", 64),
        [("snapshot-ahead", lambda k: k.snapshots(ORDER)[0], 64)],
    ),
    "a snapshot that can't be decoded": (
        lambda c, k: c.hset(k.snapshots(ORDER)[0], "state", "{"),
        [("snapshot", lambda k: k.snapshots(ORDER)[0], None)],
    ),
    "an older snapshot that can't be decoded": (
        lambda c, k: c.zadd(k.snapshots(ORDER)[1], {"garbage": 2}),
        [("snapshot", lambda k: k.snapshots(ORDER)[1], 2)],
    ),
    "an older snapshot ahead, at another place": (
        lambda c, k: c.zadd(k.snapshots(ORDER)[2], {'[99,1,"default","json",0]\n{}': 2}),
        [
            ("snapshot", lambda k: k.snapshots(ORDER)[2], 2),
            ("snapshot-ahead", lambda k: k.snapshots(ORDER)[2], 99),
        ],
    ),
    "an index of a correlation id": (
        drop(lambda k: k.correlated("checkout"), "orders:main:1"),
        [("correlated-missing", lambda k: k.correlated("checkout"), 0)],
    ),
    "a correlation id of another": (
        lambda c, k: c.zadd(k.correlated("other"), {"orders:main:1": 0, "nonsense": 0}),
        [("correlated-too-much", lambda k: k.correlated("other"), None)] * 2,
    ),
    "the number of the last commit": (
        lambda c, k: c.set(k.commits(), "1 5"),
        [("commits", lambda k: k.commits(), None)] * 5,
    ),
    "commits that are no number": (
        lambda c, k: c.set(k.commits(), "many"),
        [("commits", lambda k: k.commits(), None)],
    ),
    "commits that are empty": (
        lambda c, k: c.set(k.commits(), ""),
        [("commits", lambda k: k.commits(), None)],
    ),
    "no layout": (lambda c, k: c.delete(k.layout()), [("layout", lambda k: k.layout(), None)]),
    "another layout": (lambda c, k: c.set(k.layout(), 7), [("layout", lambda k: k.layout(), None)]),
    "a key that is not ours": (
        lambda c, k: c.set(f"{k.prefix}events:orders", "x"),
        [("foreign-key", lambda k: f"{k.prefix}events:orders", None)],
    ),
}
NOT_REPAIRED = {
    "hole", "score", "undecodable", "doubled", "before-divergence", "divergence", "main-missing",
    "claim", "claim-twice", "position", "position-ahead", "snapshot", "snapshot-ahead", "layout",
}  # fmt: skip


async def test_a_sound_store(store: Store) -> None:
    await fill(store)
    counts: list[int] = []
    assert await listed(verify.problems(store, None, counts.append)) == []
    assert sum(counts) == 64 + 4 + 1


async def test_one_that_is_not(server: Server, prefix: str, store: Store) -> None:
    await fill(store)
    keys = Keys(prefix)
    with server.client() as client:
        client.delete(keys.roots("orders", "main"), keys.claims(ORDER), keys.handlers(WHAT_IF))
        client.zadd(keys.editions("orders"), {"else": 0})
        client.set(keys.commits(), "2 3")
    kinds = set()
    for problem in await problems_of(store):
        kinds.add(problem.kind)
        assert problem.is_note or await verify.repair(store, problem)
    assert kinds == {
        "root-missing", "claim-missing", "handler-missing", "edition-too-much", "commits",
        "correlated-too-much",
    }  # fmt: skip
    assert await problems_of(store) == []


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_broken_is_told_and_mended(world: World, name: str) -> None:
    break_it, expected = BROKEN[name]
    break_it(world.client, world.keys)
    found = await problems_of(world.store)
    assert told(found) == sorted((kind, key(world.keys), at) for kind, key, at in expected)
    before = await all_events(world)
    mended = [problem for problem in found if await verify.repair(world.store, problem)]
    assert await all_events(world) == before
    rest = [problem for problem in await problems_of(world.store) if not problem.is_note]
    unmended = [problem for problem in found if problem not in mended and not problem.is_note]
    assert told(rest) == told(unmended)
    is_lost = "no number" in name or "empty" in name
    left = {problem.kind for problem in rest} - {"commits" if is_lost else ""}
    assert left <= NOT_REPAIRED


async def all_events(world: World) -> dict[str, object]:
    keys = [world.keys.events(ORDER), world.keys.events(WHAT_IF)]
    return {key: world.client.zrange(key, 0, -1, withscores=True) for key in keys}


async def test_what_was_mended_is_as_it_was(world: World) -> None:
    def contents() -> dict[bytes, list[Any]]:
        found: dict[bytes, list[Any]] = {}
        for key in world.client.scan_iter(match=f"{world.keys.prefix}*", count=1000):
            if world.client.type(key) == b"zset" and b"events:" not in key:
                found[key] = sorted(world.client.zrange(key, 0, -1))
        return found

    before = contents()
    for key in before:
        if not any(word in key for word in (b"snapshots", b"carts")):
            world.client.delete(key)
    for _ in range(2):  # names of editions are told once there are roots again
        for problem in await problems_of(world.store):
            assert await verify.repair(world.store, problem), problem
    assert await problems_of(world.store) == []
    # What appends claimed one after the other is one claim now.
    claims = world.keys.claims(ORDER).encode()
    after = contents()
    assert len(before.pop(claims)) == 5
    assert len(after.pop(claims)) == 3
    assert after == before
    done = await world.store.events.append(ORDER, numbered(9), expected=ANY, idempotency_key="pay")
    assert (done.first_sequence, done.last_sequence, done.duplicate) == (0, 2, True)
    found = await world.store.events.find_source(ORDER, CART)
    assert sequences(found) == list(range(63))
    assert [len(book.events) for book in await world.store.events.correlated("checkout")] == [63, 4]


# An erasure leaves its key only where it was cut off, and is counted only on a cluster.
@pytest.mark.parametrize(
    "word", sorted(TYPES.keys() - {"layout", "commits", "erasing", "erasures", "migration"})
)
async def test_a_key_of_another_type(world: World, word: str) -> None:
    for key in world.client.scan_iter(match=f"{world.keys.prefix}{word}:*", count=1000):
        world.client.delete(key)
        world.client.rpush(key, "somebody else's")
        found = await problems_of(world.store)
        assert ("type", key.decode(), None) in told(found)
        for problem in found:
            await verify.repair(world.store, problem)
        assert ("type", key.decode(), None) in told(await problems_of(world.store))
        break
    else:
        pytest.fail("there is no such key")


async def test_bodies_and_headers(world: World) -> None:
    key = events(world.keys)
    rewrite_member(world.server, key, 4, without_end)
    rewrite_member(world.server, key, 6, lambda member: b"[9" + member[2:])
    found = await problems_of(world.store)
    assert told(found) == [("header", key, 6), ("undecodable", key, 4)]
    assert not any('"n"' in problem.text for problem in found)


async def test_main_was_deleted(world: World) -> None:
    await world.store.events.delete(ORDER)
    at = [(WHAT_IF, 2), (ORDER.on("explicit"), 64)]
    found = [entry for entry in told(await problems_of(world.store)) if entry[0] == "divergence"]
    assert found == sorted(
        ("divergence", world.keys.divergence(place), sequence) for place, sequence in at
    )


async def test_only_some_domains(world: World) -> None:
    world.client.zremrangebyscore(events(world.keys), 20, 20)
    world.client.zadd(world.keys.domains(), {"else": 0})
    world.client.zadd(world.keys.correlated("x"), {"orders:main:1": 0})
    assert await listed(verify.problems(world.store, ["carts"])) == []
    assert told(await listed(verify.problems(world.store, ["else"]))) == [
        ("domain-too-much", world.keys.domains(), None)
    ]
    kinds = {problem.kind for problem in await listed(verify.problems(world.store, ["orders"]))}
    assert kinds == {"hole", "claim", "main-missing", "correlated-too-much"}


async def test_neither_data_nor_keys_of_appends_are_told(world: World) -> None:
    for name, (break_it, _) in BROKEN.items():
        if name != "all indexes":
            break_it(world.client, world.keys)
    found = await problems_of(world.store)
    assert len(found) > 20
    for problem in found:
        shown = f"{problem!r} {problem.text}"
        assert "pay" not in shown
        assert "garbage" not in shown


async def test_an_aggregate_that_is_wrong_all_through_is_given_up(
    server: Server, prefix: str, store: Store
) -> None:
    key = Keys(prefix).events(ORDER)
    with server.client() as client:
        client.zadd(key, {f"garbage {n}": n for n in range(3000)})
        client.zadd(Keys(prefix).roots("orders", "main"), {"1": 0})
    found = await problems_of(store)
    assert "more" in {problem.kind for problem in found}
    assert len(found) < 1100


async def test_two_roots_of_one_number(world: World) -> None:
    store, roots = world.store, world.keys.roots("orders", "main")
    await store.events.append(Aggregate("orders", "2"), numbered(1), expected=NEW)
    number = world.client.zscore(roots, "1")
    assert number
    world.client.zadd(roots, {"2": number})
    found = await problems_of(store)
    assert told(found) == [("root-number", roots, None)] * 2
    for problem in found:
        assert await verify.repair(store, problem)
    assert await problems_of(store) == []
    first, second = world.client.zrange(roots, 0, -1, withscores=True)
    assert first[1] != second[1]


async def test_names_that_are_no_text(world: World) -> None:
    client, keys, name = world.client, world.keys, b"\xff\xfe"
    client.zadd(keys.domains(), {name: 0})
    client.zadd(keys.editions("orders"), {name: 0})
    client.zadd(keys.roots("orders", "main"), {name: 1})
    client.zadd(keys.correlated("checkout"), {name: 0})
    client.sadd(keys.handlers(ORDER), name)
    client.set(f"{keys.prefix}events:orders:main:".encode() + b"{%s}" % name, 1)
    found = await problems_of(world.store)
    assert sorted(problem.kind for problem in found) == [
        "correlated-too-much", "domain-too-much", "edition-too-much", "foreign-key",
        "handler-too-much", "root-too-much",
    ]  # fmt: skip
    for problem in found:
        assert not await verify.repair(world.store, problem)
        assert str(problem.text).encode()
    where = ("--url", world.server.url, "--key-prefix", keys.prefix)
    for options in ((), ("--json",)):
        done = run("verify", *where, *options)
        assert (done.returncode, len(done.stdout.splitlines())) == (1, 6), done


async def test_large_events(world: World) -> None:
    large, count = Event("Filmed", b"x" * 600_000), 40
    for _ in range(count):
        await world.store.events.append(ORDER, [large], expected=ANY)
    assert await problems_of(world.store) == []
    world.client.zremrangebyscore(events(world.keys), 80, 80)
    assert told(await problems_of(world.store)) == [("hole", events(world.keys), 80)]


async def test_large_appends_have_one_claim(store: Store, server: Server, prefix: str) -> None:
    done = await store.events.append(ORDER, numbered(1000), expected=NEW, idempotency_key="k")
    assert await problems_of(store) == []
    with server.client() as client:
        client.delete(Keys(prefix).claims(ORDER))
    (problem,) = await problems_of(store)
    assert await verify.repair(store, problem)
    again = await store.events.append(ORDER, numbered(1), expected=NEW, idempotency_key="k")
    assert (again.first_sequence, again.last_sequence) == (0, done.last_sequence)


class TestMeanwhile:
    async def test_others_append_branch_and_delete(self, one_server: Server, prefix: str) -> None:
        is_over = False

        async def write(store: Store, n: int) -> None:
            order = Aggregate("orders", f"{n}")
            what_if = order.on("what-if")
            count = 0
            while not is_over:
                count += 1
                trace = {"idempotency_key": f"{count}", "correlation_id": f"c{count % 7}"}
                end = (
                    await store.events.append(order, numbered(2), expected=ANY, **trace)  # type: ignore[arg-type]
                ).last_sequence
                await store.positions.put("p", order, end)
                await store.snapshots.put(order, sequence=end, state={})
                await store.events.append(what_if, numbered(1), expected=ANY, correlation_id="c")
                await store.positions.put("p", what_if, 0)
                if count % 5 == 0:
                    await store.events.delete(what_if)
                    await store.events.delete(order)

        async with (
            asyncstore.open(one_server.url, key_prefix=prefix) as store,
            asyncstore.open(one_server.url, key_prefix=prefix) as other,
            asyncio.TaskGroup() as tasks,
        ):
            for n in range(20):
                tasks.create_task(write(store, n))
            found = [problem for _ in range(4) for problem in await problems_of(other)]
            is_over = True
        assert found == []

    async def test_mending_does_not_undo_what_came_after(self, world: World) -> None:
        store, client, keys = world.store, world.client, world.keys
        new = Aggregate("new", "1")
        roots = keys.roots("new", "main")
        client.zadd(roots, {"1": 0})
        client.zadd(keys.domains(), {"new": 0})
        client.zrem(claims(keys), claim("key:pay", 0, 3))
        client.zrem(keys.roots("orders", "main"), "1")
        client.srem(keys.handlers(ORDER), "projector")
        client.zrem(keys.correlated("checkout"), "orders:main:1")
        client.sadd(keys.handlers(WHAT_IF), "late")
        found = await problems_of(store)
        assert len(found) == 9
        await store.events.append(new, numbered(1), expected=NEW)
        await store.positions.put("late", WHAT_IF, 3)
        await store.events.delete(ORDER)
        await store.events.append(ORDER, numbered(5), expected=NEW)
        for problem in found:
            await verify.repair(store, problem)
        assert await listed(store.events.roots("new")) == ["1"]
        assert "new" in await listed(store.events.domains())
        assert client.exists(claims(keys)) == 0, "the events that were claimed are gone"
        # Its deletion did not know of the handler, so the position is still there.
        assert client.smembers(keys.handlers(ORDER)) == {b"projector"}
        assert client.sismember(keys.handlers(WHAT_IF), "late")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncstore", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(Path(asyncstore.__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


class TestCommandLine:
    async def test_codes_and_lines(self, one_server: Server, prefix: str) -> None:
        keys = Keys(prefix)
        where = ("--url", one_server.url, "--key-prefix", prefix)
        async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
            await fill(store)
        done = run("verify", *where)
        assert (done.returncode, done.stdout) == (0, "")
        assert "69 events read: 0 problems" in done.stderr
        with one_server.client() as client:
            client.zrem(keys.roots("orders", "main"), "1")
            client.zadd(keys.correlated("other"), {"orders:main:1": 0})
        done = run("verify", *where)
        assert done.returncode == 1
        assert f"bad: root-missing: {keys.roots('orders', 'main')}: it does not" in done.stdout
        assert "2 problems, 1 notes" in done.stderr
        assert run("verify", *where, "--domain", "carts").returncode == 0
        done = run("verify", *where, "--json", "--repair-indexes")
        assert done.returncode == 0
        lines = {line["kind"]: line for line in map(json.loads, done.stdout.splitlines())}
        assert lines["root-missing"] == {
            "severity": "repaired",
            "kind": "root-missing",
            "key": keys.roots("orders", "main"),
            "sequence": None,
            "text": "it does not name orders/1, which is there",
            "repairable": True,
        }
        assert lines["correlated-too-much"]["severity"] == "note"
        with one_server.client() as client:
            client.zremrangebyscore(events(keys), 63, 63)
        done = run("verify", *where, "--repair-indexes")
        assert done.returncode == 1
        assert "sequence 63: the position is ahead of the history" in done.stdout

    def test_it_can_not_look(self, tmp_path: Path) -> None:
        for url in (f"embedded://{tmp_path}/none", f"unix://{tmp_path}/none", "nonsense://x"):
            done = run("verify", "--url", url)
            assert (done.returncode, done.stdout) == (2, ""), url
            assert "error: " in done.stderr
