"""What an append is answered with when it asks to be fsynced, or on replicas."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Appended,
    ConfigurationError,
    Durability,
    DurabilityNotReached,
    DurabilityUnavailable,
    Event,
    HistoryRegressed,
    InvalidType,
    InvalidValue,
    OutcomeUnknown,
    SequenceConflict,
    Settings,
    Store,
    embedded,
    scripts,
)
from asyncstore.keys import Keys
from asyncstore.wire import ReplyError, Shipment
from tests import servers
from tests.builders import numbered
from tests.polling import eventually
from tests.proxy import proxy_to
from tests.servers import RedisServer, redis_server

ORDER = Aggregate("orders", "1")
REPLICA = Durability.replicas(1)
ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")
AT_ONCE = ("--repl-diskless-sync-delay", "0")  # a replica is not kept waiting for others

BINARIES = {
    name: find
    for name, find in {
        "redis-on-path": lambda: shutil.which("redis-server") or "",
        "redis-8.2": servers._wheel_binary,
    }.items()
    if not {"redis-on-path": servers._path_missing, "redis-8.2": servers._wheel_missing}[name]()
}


@pytest.fixture(params=BINARIES)
def binary(request: pytest.FixtureRequest) -> str:
    return BINARIES[request.param]()


@contextmanager
def replica_of(primary: RedisServer, *arguments: str) -> Iterator[RedisServer]:
    parts = urlsplit(primary.url)
    where = ("--replicaof", str(parts.hostname), str(parts.port))

    with redis_server(primary.binary, *where, *arguments, tcp=True) as server:
        yield server


@asynccontextmanager
async def paused(server: RedisServer) -> AsyncIterator[None]:
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


async def can_replicate(store: Store) -> bool:
    try:
        await store.events.append(
            Aggregate("probes", "1"), numbered(1), expected=ANY, durability=REPLICA
        )
    except (DurabilityUnavailable, DurabilityNotReached):
        return False
    return True


def events_of(server: RedisServer, aggregate: Aggregate) -> int:
    with servers.Server("", server.url).client() as client:
        return int(client.zcard(Keys().events(aggregate)))


class TestLevels:
    @pytest.mark.parametrize(
        ("level", "text"),
        [
            (Durability.MEMORY, "memory"),
            (Durability.FSYNC, "fsync"),
            (Durability.replicas(2), "replicas(2)"),
            (Durability.fsync_and_replicas(1), "fsync_and_replicas(1)"),
        ],
    )
    def test_have_a_text(self, level: Durability, text: str) -> None:
        assert str(level) == text
        assert Durability.parse(text) == level
        assert pickle.loads(pickle.dumps(level)) == level  # noqa: S301
        settings = Settings(url="redis://h", durability=text)
        assert settings == Settings(url="redis://h", durability=level)
        assert f'durability = "{text}"' in settings.to_toml()
        environ = {"REDIS_URL": "redis://h", "ASYNCSTORE_DURABILITY": text}
        assert Settings.from_env(environ).durability == level

    @pytest.mark.parametrize(
        "text", ["", "FSYNC", "replicas", "replicas()", "replicas(0)", "replicas(-1)", "fsync(1)"]
    )
    def test_of_another_text_are_refused(self, text: str) -> None:
        with pytest.raises(InvalidValue, match=r"durability|replicas"):
            Durability.parse(text)
        with pytest.raises(ConfigurationError, match="durability"):
            Settings(url="redis://h", durability=text)

    @pytest.mark.parametrize(
        ("count", "error"),
        [(0, InvalidValue), (-1, InvalidValue), (True, InvalidType), ("1", InvalidType)],
    )
    def test_of_no_replicas_are_refused(self, count: Any, error: type[Exception]) -> None:
        for level in (Durability.replicas, Durability.fsync_and_replicas):
            with pytest.raises(error, match="replicas"):
                level(count)

    async def test_of_another_type_are_refused_before_anything_is_sent(self) -> None:
        store = Store(Settings(url="redis://127.0.0.1:1"))
        for level in ("fsync", 1, True):
            with pytest.raises(InvalidType, match="durability"):
                await store.events.append(
                    ORDER,
                    numbered(1),
                    expected=NEW,
                    durability=level,  # type: ignore[arg-type]
                )


class TestFsync:
    async def test_is_what_the_server_does(self, binary: str) -> None:
        with redis_server(binary, *ALWAYS) as server:
            async with asyncstore.open(server.url) as store:
                for n in range(3):
                    done = await store.events.append(
                        ORDER, numbered(1), expected=n, durability=Durability.FSYNC
                    )
                    assert done == Appended(n, n)
                with pytest.raises(SequenceConflict):
                    await store.events.append(
                        ORDER, numbered(1), expected=0, durability=Durability.FSYNC
                    )

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            (("--appendonly", "no"), "appendonly is no"),
            (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync is everysec"),
            ((*ALWAYS, "--no-appendfsync-on-rewrite", "yes"), "no-appendfsync-on-rewrite is yes"),
        ],
    )
    async def test_is_refused_where_the_server_does_not(
        self, binary: str, settings: tuple[str, ...], why: str
    ) -> None:
        with redis_server(binary, *settings) as server:
            async with asyncstore.open(server.url) as store:
                with pytest.raises(DurabilityUnavailable, match=why) as caught:
                    await store.events.append(
                        ORDER, numbered(1), expected=NEW, durability=Durability.FSYNC
                    )
                assert caught.value.wanted == Durability.FSYNC
                assert await store.events.next_sequence(ORDER) == 0
            with pytest.raises(DurabilityUnavailable, match=why):
                async with asyncstore.open(server.url, durability="fsync"):
                    pass

    async def test_that_is_switched_off_is_noticed_by_the_appends_it_concerns(
        self, binary: str
    ) -> None:
        with redis_server(binary, *ALWAYS) as server:
            async with asyncstore.open(server.url, durability="fsync") as store:
                await store.events.append(ORDER, numbered(2), expected=NEW)
                with servers.Server("", server.url).client() as client:
                    client.config_set("appendfsync", "everysec")
                with pytest.raises(DurabilityNotReached) as caught:
                    await store.events.append(ORDER, numbered(3), expected=2)
                error = caught.value
                assert (error.first_sequence, error.last_sequence) == (2, 4)
                assert (error.wanted, error.fsynced) == (Durability.FSYNC, False)
                with pytest.raises(DurabilityUnavailable):
                    await store.events.append(ORDER, numbered(1), expected=5)
                memory = Durability.MEMORY
                await store.events.append(ORDER, numbered(1), expected=5, durability=memory)

    async def test_of_a_hundred_at_once_is_not_a_hundred(self, binary: str) -> None:
        with redis_server(binary, *ALWAYS) as server:
            async with asyncstore.open(server.url, durability="fsync") as store:
                await store.events.append(ORDER, numbered(1), expected=NEW)
                before = server_writes(server)
                await asyncio.gather(
                    *(store.events.append(ORDER, numbered(1), expected=ANY) for _ in range(100))
                )
                # A turn of the server's loop writes to its file once, and to its clients once.
                assert server_writes(server) - before < 60

    async def test_of_an_embedded_server_is_a_setting(self, tmp_path: Path) -> None:
        url = f"embedded://{tmp_path}"
        async with asyncstore.open(url) as store:
            with pytest.raises(DurabilityUnavailable, match="everysec"):
                await store.events.append(
                    ORDER, numbered(1), expected=NEW, durability=Durability.FSYNC
                )
            async with asyncstore.open(url, durability="fsync") as other:
                assert await other.events.append(ORDER, numbered(1), expected=NEW) == Appended(0, 0)
        with pytest.raises(DurabilityUnavailable, match="appendonly"):
            async with asyncstore.open("embedded://", durability="fsync"):
                pass

    async def test_may_be_the_operators_word(self, binary: str) -> None:
        with redis_server(binary, *ALWAYS) as server:
            with servers.Server("", server.url).client() as client:
                client.execute_command(
                    "ACL", "SETUSER", "app", "on", ">s3cret", "~*", "+@all", "-config"
                )
            url = f"{server.url}?username=app&password=s3cret"
            async with asyncstore.open(url) as store:
                with pytest.raises(DurabilityUnavailable, match="appendfsync_always"):
                    await store.events.append(
                        ORDER, numbered(1), expected=NEW, durability=Durability.FSYNC
                    )
            async with asyncstore.open(url, appendfsync_always=True, durability="fsync") as store:
                assert await store.events.append(ORDER, numbered(1), expected=NEW) == Appended(0, 0)


def server_writes(server: RedisServer) -> int:
    assert server.process is not None
    lines = Path(f"/proc/{server.process.pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("syscw:")).split()[1])


@pytest.mark.skipif("redis-on-path" not in BINARIES, reason="for Redis 7.0")
async def test_an_aof_whose_first_rewrite_goes_on_is_not_trusted_without_waitaof() -> None:
    binary = shutil.which("redis-server") or ""
    with redis_server(binary, "--appendonly", "no", "--appendfsync", "always") as server:
        async with asyncstore.open(server.url) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            with servers.Server("", server.url).client() as client:
                if not client.info("server")["redis_version"].startswith("7.0"):
                    pytest.skip("this server has WAITAOF")
                client.config_set("rdb-key-save-delay", 300_000)  # the rewrite takes a while
                client.config_set("appendonly", "yes")
                with pytest.raises(DurabilityUnavailable, match="for the first time"):
                    await store.events.append(
                        ORDER, numbered(1), expected=1, durability=Durability.FSYNC
                    )
                client.config_set("rdb-key-save-delay", 0)

            async def is_fsynced() -> bool:
                try:
                    await store.events.append(
                        ORDER, numbered(1), expected=1, durability=Durability.FSYNC
                    )
                except DurabilityUnavailable:
                    return False
                return True

            await eventually(is_fsynced, "the AOF is there")


@pytest.mark.skipif("redis-8.2" not in BINARIES, reason="WAITAOF, which tells, is not in Redis 7.0")
async def test_an_aof_that_is_being_switched_on_has_nothing_yet() -> None:
    with redis_server(BINARIES["redis-8.2"](), *ALWAYS) as server:
        async with asyncstore.open(server.url, durability="fsync") as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            with servers.Server("", server.url).client() as client:
                client.config_set("rdb-key-save-delay", 300_000)  # the rewrite takes a while
                client.config_set("appendonly", "no")
                client.config_set("appendonly", "yes")
            with pytest.raises((DurabilityNotReached, DurabilityUnavailable)):
                await store.events.append(ORDER, numbered(1), expected=1)


async def test_an_embedded_server_that_was_killed_syncs_again(tmp_path: Path) -> None:
    async with asyncstore.open(f"embedded://{tmp_path}", durability="fsync") as store:
        await store.events.append(ORDER, numbered(1), expected=NEW)
        with servers.Server("", f"unix://{tmp_path}/server.sock").client() as client:
            pid = client.info("server")["process_id"]
        os.kill(pid, signal.SIGKILL)

        async def goes_on() -> bool:
            try:
                await store.events.append(ORDER, numbered(1), expected=ANY)
            except (DurabilityUnavailable, DurabilityNotReached, asyncstore.StoreUnavailable):
                return False
            return True

        await eventually(goes_on, "appends are fsynced again")


class TestReplicas:
    async def test_have_the_events_when_the_append_returns(self, binary: str) -> None:
        with redis_server(binary, *AT_ONCE, tcp=True) as primary, replica_of(primary) as replica:
            async with asyncstore.open(primary.url) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                for n in range(20):
                    await store.events.append(ORDER, numbered(1), expected=n, durability=REPLICA)
                    assert events_of(replica, ORDER) == n + 1
                places = [Aggregate("orders", f"at once {n}") for n in range(300)]
                await asyncio.gather(
                    *(
                        store.events.append(place, numbered(1), expected=NEW, durability=REPLICA)
                        for place in places
                    )
                )
                assert [events_of(replica, place) for place in places] == [1] * 300

    async def test_that_are_not_there_are_refused(self, binary: str) -> None:
        with redis_server(binary, *AT_ONCE, tcp=True) as primary, replica_of(primary):
            async with asyncstore.open(primary.url) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                two = Durability.replicas(2)
                with pytest.raises(DurabilityUnavailable, match="1 replicas are online"):
                    await store.events.append(ORDER, numbered(1), expected=NEW, durability=two)
                assert await store.events.next_sequence(ORDER) == 0

    async def test_that_hang_are_told_of_and_the_events_are_stored(self, binary: str) -> None:
        with redis_server(binary, *AT_ONCE, tcp=True) as primary, replica_of(primary) as replica:
            async with asyncstore.open(primary.url, timeout=2) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                async with paused(replica):
                    outcomes = await asyncio.gather(
                        *(
                            store.events.append(
                                Aggregate("orders", f"at once {n}"),
                                numbered(2),
                                expected=NEW,
                                durability=REPLICA,
                            )
                            for n in range(5)
                        ),
                        return_exceptions=True,
                    )
                    for n, outcome in enumerate(outcomes):
                        assert isinstance(outcome, DurabilityNotReached)
                        assert (outcome.first_sequence, outcome.last_sequence) == (0, 1)
                        assert (outcome.wanted, outcome.on_replicas) == (REPLICA, 0)
                        place = Aggregate("orders", f"at once {n}")
                        assert len(await store.events.read(place)) == 2
                    # Others are not kept waiting.
                    await store.events.append(ORDER, numbered(1), expected=NEW)

    async def test_that_hang_are_told_of_to_all_that_came_meanwhile(self, binary: str) -> None:
        levels = [REPLICA, Durability.replicas(2)]
        with (
            redis_server(binary, *AT_ONCE, tcp=True) as primary,
            replica_of(primary) as replica,
            replica_of(primary) as other,
        ):
            async with asyncstore.open(primary.url, timeout=2) as store:

                async def append(name: str, n: int) -> Appended:
                    return await store.events.append(
                        Aggregate(f"domain-{n % 7}", name, edition=("main", "what-if")[n % 2]),
                        numbered(1),
                        expected=NEW,
                        durability=levels[n % 2],
                    )

                async def can_replicate_twice() -> bool:
                    try:
                        await append(f"probe {next(numbers)}", 1)
                    except (DurabilityUnavailable, DurabilityNotReached):
                        return False
                    return True

                numbers = itertools.count()
                await eventually(can_replicate_twice, "both replicas have come")
                async with paused(replica), paused(other):
                    with servers.Server("", primary.url).client() as client:
                        client.script_flush()  # to ask again would take twice the time
                    first = asyncio.ensure_future(append("first", 0))
                    await store.events.next_sequence(ORDER)  # so that it leaves by itself
                    held = [asyncio.ensure_future(append(f"held {n}", n)) for n in range(500)]
                    await store.events.next_sequence(ORDER)
                    held[-1].cancel()
                    outcomes = await asyncio.gather(first, *held[:-1], return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} == {DurabilityNotReached}
                assert {await append(f"later {n}", 0) for n in range(3)} == {Appended(0, 0)}

    async def test_take_no_longer_than_the_timeout_to_be_found_out(
        self, binary: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "server.sock"
        arguments = (*AT_ONCE, "--unixsocket", str(path))
        with redis_server(binary, *arguments, tcp=True) as primary, replica_of(primary):
            async with asyncstore.open(primary.url) as direct:
                await eventually(lambda: can_replicate(direct), "the replica has come")
            async with (
                proxy_to(path) as proxy,
                asyncstore.open(proxy.url, timeout=1) as store,
            ):
                await store.events.append(ORDER, numbered(1), expected=NEW)
                proxy.is_deaf = True  # the lane of the waits is dialled, and nobody answers
                loop = asyncio.get_running_loop()
                began = loop.time()
                outcomes = await asyncio.gather(
                    *(
                        store.events.append(ORDER, numbered(1), expected=ANY, durability=REPLICA)
                        for _ in range(20)
                    ),
                    return_exceptions=True,
                )
                assert {type(outcome) for outcome in outcomes} == {asyncstore.StoreUnavailable}
                assert loop.time() - began < 5  # 20 of them, one after the other, would take 20
                # The store's, and one lane for all of them, which may be dialled once more by then.
                assert 2 <= proxy.connections <= 3
                assert await store.events.next_sequence(ORDER) == 1

    async def test_that_are_waited_for_do_not_outlive_the_store(self, binary: str) -> None:
        with (
            redis_server(binary, *AT_ONCE, tcp=True) as primary,
            replica_of(primary) as replica,
        ):
            async with asyncstore.open(primary.url, timeout=5) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                async with paused(replica):
                    places = [Aggregate("orders", f"held {n}") for n in range(3)]
                    held = []
                    for place in places:
                        append = store.events.append(
                            place, numbered(1), expected=NEW, durability=REPLICA
                        )
                        held.append(asyncio.ensure_future(append))
                        await store.events.next_sequence(ORDER)  # so that each leaves by itself
                    await store.__aexit__(None, None, None)
                    outcomes = await asyncio.gather(*held, return_exceptions=True)
            assert all(isinstance(outcome, asyncstore.AsyncStoreError) for outcome in outcomes)

    async def test_have_what_a_duplicate_answers_with(self, binary: str) -> None:
        with redis_server(binary, *AT_ONCE, tcp=True) as primary, replica_of(primary) as replica:
            async with asyncstore.open(primary.url, timeout=2) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                how: Any = {"expected": ANY, "idempotency_key": "k"}
                async with paused(replica):
                    await store.events.append(ORDER, numbered(1), **how)
                    with pytest.raises(DurabilityNotReached):
                        await store.events.append(ORDER, numbered(1), durability=REPLICA, **how)
                await eventually(lambda: can_replicate(store), "the replica goes on")
                done = await store.events.append(ORDER, numbered(1), durability=REPLICA, **how)
                assert done == Appended(0, 0, duplicate=True)

    async def test_on_disks_need_all_of_it(self, binary: str) -> None:
        both = Durability.fsync_and_replicas(1)
        with (
            redis_server(binary, *ALWAYS, *AT_ONCE, tcp=True) as primary,
            replica_of(primary, *ALWAYS),
        ):
            async with asyncstore.open(primary.url) as store:
                await eventually(lambda: can_replicate(store), "the replica has come")
                append = store.events.append(ORDER, numbered(1), expected=NEW, durability=both)
                with servers.Server("", primary.url).client() as client:
                    version = client.info("server")["redis_version"]
                if version.startswith("7.0"):
                    with pytest.raises(DurabilityUnavailable, match="WAITAOF"):
                        await append
                else:
                    assert await append == Appended(0, 0)


class TestHistory:
    async def test_that_went_back_is_told_to_a_resent_append(
        self, binary: str, tmp_path: Path
    ) -> None:
        with redis_server(binary) as first, redis_server(binary) as second:
            path = Path(urlsplit(first.url).path)
            async with (
                proxy_to(path) as proxy,
                asyncstore.open(proxy.url) as store,
                asyncstore.open(second.url) as other,
            ):
                await store.events.append(ORDER, numbered(5), expected=NEW)
                await other.events.append(ORDER, numbered(2), expected=NEW)
                proxy.target = second.url  # a failover
                proxy.replies.cut()
                with pytest.raises(HistoryRegressed) as caught:
                    await store.events.append(ORDER, [Event("Told", 1)], expected=5)
                assert (caught.value.expected, caught.value.actual) == (5, 2)
                assert await other.events.next_sequence(ORDER) == 2

    async def test_of_the_same_server_is_a_plain_conflict(self, binary: str) -> None:
        with redis_server(binary) as server:
            async with (
                proxy_to(Path(urlsplit(server.url).path)) as proxy,
                asyncstore.open(proxy.url) as store,
            ):
                await store.events.append(ORDER, numbered(2), expected=NEW)
                proxy.replies.cut()
                with pytest.raises(SequenceConflict):
                    await store.events.append(ORDER, numbered(1), expected=5)


async def test_the_embedded_server_still_answers_waitaof_without_an_fsync(tmp_path: Path) -> None:
    """A canary: when it fails, WAITAOF has been mended there; then see durability and checks.

    With `everysec` the file is synced once a second, so at most a few of these could be answered
    with an fsync within their 50 ms.
    """
    async with embedded.running(tmp_path) as url:
        with servers.Server("", url).client() as client:
            assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
            acknowledged = 0
            for n in range(50):
                client.set("written", n)
                local, _ = client.execute_command("WAITAOF", 1, 0, 50)
                acknowledged += local
    assert acknowledged > 25


async def test_an_answer_whose_proof_is_lost_is_not_lost_with_it() -> None:
    loop = asyncio.get_running_loop()
    callers = [loop.create_future() for _ in range(3)]
    groups = [
        scripts.APPEND.request([], [""], [caller], loop.time(), is_group=True) for caller in callers
    ]
    shipment = Shipment(groups, lambda _: [["WAIT", 1, 100]])
    assert not shipment.is_answered_by([[b"ok", 7]])
    assert not shipment.is_answered_by(ReplyError("NOSCRIPT"))
    shipment.fail(OutcomeUnknown("here", "no answer"))
    assert await callers[0] == ([b"ok", 7], [None])
    for caller in callers[1:]:
        with pytest.raises(OutcomeUnknown):
            await caller
    assert shipment.is_over()
