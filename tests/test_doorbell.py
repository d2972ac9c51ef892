"""The connection that hears appends: cut, silent, refused, and what listeners are told of that."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

import asyncstore
from asyncstore import NEW, Aggregate, ListenerLagged, StoreUnavailable, UnexpectedReply, doorbell
from asyncstore.doorbell import Ring
from asyncstore.keys import Keys
from tests.builders import numbered, sequences
from tests.polling import eventually
from tests.proxy import proxy_to
from tests.servers import Server, redis_server

ORDER = Aggregate("orders", "1")
SECONDS = 20


def socket_of(server: Server) -> Path:
    return Path(urlsplit(server.url).path)


async def test_a_cut_connection_is_told_and_comes_back(one_server: Server, prefix: str) -> None:
    async with (
        asyncstore.open(one_server.url, key_prefix=prefix) as writer,
        proxy_to(socket_of(one_server)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
        store.listen() as live,
    ):
        proxy.replies.cut()  # the message is lost, and its connection with it
        await writer.events.append(ORDER, numbered(1), expected=NEW)
        async with asyncio.timeout(SECONDS):
            assert await until_lagged(live) == []
        await writer.events.append(ORDER, numbered(1, 1), expected=1)
        async with asyncio.timeout(SECONDS):
            assert (await anext(live)).sequence == 1


async def until_lagged(live: asyncstore.Listener) -> list[int]:
    """What was heard before the listener was told that something may be missing."""
    heard: list[int] = []

    async def listen() -> None:
        async for event in live:
            heard.append(event.sequence)  # noqa: PERF401 - it ends with an error

    with pytest.raises(ListenerLagged, match="gone for a while") as lagged:
        await listen()
    assert lagged.value.missed is None
    return heard


async def test_a_half_open_connection_is_noticed(
    one_server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "_HEARTBEAT", 0.05)
    async with (
        asyncstore.open(one_server.url, key_prefix=prefix) as writer,
        proxy_to(socket_of(one_server)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix, timeout=1) as store,
        store.listen() as live,
    ):
        before = proxy.connections
        proxy.replies.swallow()
        await writer.events.append(ORDER, numbered(1), expected=NEW)
        await eventually(lambda: proxy.connections > before, "it is dialled again")
        proxy.replies.pass_on()
        async with asyncio.timeout(SECONDS):
            assert await until_lagged(live) == []
        await writer.events.append(ORDER, numbered(1, 1), expected=1)
        async with asyncio.timeout(SECONDS):
            assert sequences([await anext(live)]) == [1]


async def test_it_is_hung_up_when_nobody_listens(one_server: Server, prefix: str) -> None:
    async with (
        proxy_to(socket_of(one_server)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
    ):
        assert proxy.open_connections == 1
        for _ in range(2):
            async with store.listen(), store.listen("orders"):
                assert proxy.open_connections == 2
            await eventually(lambda: proxy.open_connections == 1, "it is hung up")


async def test_a_store_that_closes_ends_its_listeners(one_server: Server, prefix: str) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store:
        live = store.listen()
        await live.__aenter__()
    await live.__aexit__(None, None, None)


async def test_a_server_that_is_away(one_server: Server, prefix: str) -> None:
    async with (
        proxy_to(socket_of(one_server)) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.5) as store,
    ):
        proxy.replies.swallow()
        with pytest.raises(StoreUnavailable):
            async with store.listen():
                pass
        proxy.replies.pass_on()
        async with store.listen():
            pass


async def test_a_server_that_loads_its_data(caplog: pytest.LogCaptureFixture) -> None:
    slowly = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    with redis_server(str(asyncstore.embedded.find_binary()), *slowly) as server:
        async with asyncstore.open(server.url) as store, store.listen() as live:
            with redis.Redis.from_url(server.url) as client:
                client.mset({f"{n}": "x" * 100 for n in range(500)})
                client.save()
                server.stop()
                server.start()
                await eventually(lambda: is_loading(client), "it was loading")
            async with asyncio.timeout(SECONDS):
                assert await until_lagged(live) == []
                await store.events.append(ORDER, numbered(1), expected=NEW)
                assert sequences([await anext(live)]) == [0]
    assert "appends are not heard for now" in caplog.text
    assert "protocol" not in caplog.text


def is_loading(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.exceptions.BusyLoadingError:
        return True
    except redis.ConnectionError:
        return False
    raise AssertionError("it had nothing to load")


async def test_a_user_without_channels() -> None:
    binary = str(asyncstore.embedded.find_binary())
    with redis_server(binary) as server:
        with redis.Redis.from_url(server.url) as client:
            client.acl_setuser("mute", enabled=True, nopass=True, keys="*", categories=["+@all"])
        url = server.url.replace("://", "://mute:x@", 1)
        async with asyncstore.open(url) as store:
            done = await store.events.append(ORDER, numbered(1), expected=NEW)
            assert done.first_sequence == 0  # though it could not be told
            with pytest.raises(UnexpectedReply, match="NOPERM"):
                async with store.listen():
                    pass


async def test_what_others_publish_is_passed_over(one_server: Server, prefix: str) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as store, store.listen() as live:
        with one_server.client() as client:
            for message in (b"", b"orders\nmain\nx", b"\xff\n\n", b"orders\nmain\n0 1 {}"):
                client.execute_command("SPUBLISH", Keys(prefix).live("all"), message)
        await store.events.append(ORDER, numbered(1), expected=NEW)
        async with asyncio.timeout(SECONDS):
            assert sequences([await anext(live)]) == [0]


def test_a_ring() -> None:
    ring = Ring.of("orders\nmain\n3 2 a b\n0 1 ☃".encode())
    assert (ring.domain, ring.edition) == ("orders", "main")
    assert [(c.root, c.first, c.length) for c in ring.changes()] == [("a b", 3, 2), ("☃", 0, 1)]
