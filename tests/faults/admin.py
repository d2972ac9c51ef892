"""What an operator does to the nodes of a cluster: ask, move slots, promote."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from asyncstore.embedded_cluster import Cluster, Node
from tests.polling import eventually

_SECONDS = 20
_KEYS_AT_ONCE = 10


def _tell(node: Node, *command: Any) -> Any:
    # By its socket, on which none of the clients are that a fault cuts off.
    url, retry = node._home.url, Retry(NoBackoff(), 0)
    with redis.Redis.from_url(url, socket_timeout=_SECONDS, retry=retry, protocol=2) as client:
        client.response_callbacks.clear()  # answers as they come
        return client.execute_command(*command)


async def tell(node: Node, *command: Any) -> Any:
    """Run a command as an operator would, on a connection of its own."""
    return await asyncio.to_thread(_tell, node, *command)


async def owners(asked: Node, nodes: Iterable[Node]) -> dict[Node, list[int]]:
    """Return the slots that each primary has, as one node sees it."""
    by_port = {node.port: node for node in nodes}
    found: dict[Node, list[int]] = {}
    for first, last, (_, port, *_), *_ in await tell(asked, "CLUSTER", "SLOTS"):
        if port in by_port:
            found.setdefault(by_port[port], []).extend(range(first, last + 1))
    return found


async def replica_of(cluster: Cluster, primary: Node) -> Node:
    """Return a replica that is in step with a primary."""

    async def find() -> Node | None:
        for node in cluster.nodes:
            with contextlib.suppress(redis.ConnectionError):
                role = await tell(node, "ROLE")
                if role[0] == b"slave" and role[2:4] == [primary.port, b"connected"]:
                    return node
        return None

    found: list[Node] = []

    async def is_found() -> bool:
        found.extend(filter(None, [await find()]))
        return bool(found)

    await eventually(is_found, f"{primary} has a replica in step")
    return found[0]


async def promote(replica: Node) -> None:
    """Let a replica take its primary's place, in good order."""

    async def is_promoted() -> bool:
        if (await tell(replica, "ROLE"))[0] == b"master":
            return True
        with contextlib.suppress(redis.ResponseError):  # it may be too early, or under way
            await tell(replica, "CLUSTER", "FAILOVER")
        await asyncio.sleep(0.1)
        return bool((await tell(replica, "ROLE"))[0] == b"master")

    await eventually(is_promoted, "the replica was promoted")


async def move_by_keys(nodes: Iterable[Node], source: Node, target: Node, slots: list[int]) -> int:
    """Move slots key by key, as `redis-cli --cluster reshard` does; return how many keys went."""
    others = [node for node in nodes if node not in (source, target)]
    return await asyncio.to_thread(_move_by_keys, others, source, target, slots)


def _move_by_keys(others: list[Node], source: Node, target: Node, slots: list[int]) -> int:
    moved = 0
    with (
        redis.Redis.from_url(source._home.url) as here,
        redis.Redis.from_url(target._home.url) as there,
    ):
        for slot in slots:
            there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
            here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
            while keys := _keys_in(here, slot):
                to: list[Any] = ["MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys]
                here.execute_command(*to)
                moved += len(keys)
            for client in (there, here):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target.id)
            for node in others:
                with contextlib.suppress(redis.ResponseError):  # a replica takes no such order
                    _tell(node, "CLUSTER", "SETSLOT", slot, "NODE", target.id)
    return moved


def _keys_in(client: Any, slot: int) -> list[bytes]:
    keys: list[bytes] = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, _KEYS_AT_ONCE)
    return keys


async def move_at_once(source: Node, target: Node, first: int, last: int) -> None:
    """Move a range of slots atomically, as Valkey 9 can."""
    await tell(source, *("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", first, last, "NODE", target.id))

    async def is_over() -> bool:
        (latest, *_) = await tell(source, "CLUSTER", "GETSLOTMIGRATIONS")
        said = dict(zip(latest[::2], latest[1::2], strict=True))
        assert said[b"state"] not in (b"failed", b"cancelled"), said
        return bool(said[b"state"] == b"success")

    await eventually(is_over, f"slots {first}-{last} moved")
