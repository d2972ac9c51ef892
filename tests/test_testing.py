"""What `asyncstore.testing` gives to the tests of an application."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    Event,
    InvalidValue,
    OutcomeUnknown,
    SequenceConflict,
    Settings,
    Store,
    StoreUnavailable,
)
from asyncstore.errors import ConfigurationError
from asyncstore.testing import (
    Clock,
    Cut,
    FaultProxy,
    fault_proxy,
    history,
    listed,
    numbered,
    remove_all,
    sequences,
)
from tests.polling import eventually
from tests.proxy import serving
from tests.servers import Server, keys_with, redis_server

pytest_plugins = ["pytester"]

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


# The fixtures, in suites of their own: the settings of this one are not theirs.

CONFTEST = 'pytest_plugins = ["asyncstore.testing"]'

CASES = """
import asyncio
import pytest
from asyncstore import Aggregate, open
from asyncstore.testing import history, sequences

ORDER = Aggregate("orders", "1")

@FIXTURE
async def filled(event_store):
    await history(event_store, ORDER, 3)
    return event_store

@MARK
async def test_what_a_fixture_has_put_there(filled):
    assert sequences(await filled.events.read(ORDER)) == [0, 1, 2]

@MARK
async def test_nothing_of_that_is_in_the_next(event_store):
    assert await event_store.events.next_sequence(ORDER) == 0

@MARK
async def test_it_is_open_in_the_loop_of_the_test(event_store):
    # Many at once: what runs in another loop would not answer here.
    done = [event_store.events.next_sequence(ORDER) for _ in range(50)]
    assert await asyncio.gather(*done) == [0] * 50
"""

LOOPS = """
@pytest.mark.asyncio(loop_scope="{scope}")
async def test_in_a_loop_of_the_{scope}(event_store):
    assert await event_store.events.next_sequence(ORDER) == 0
"""

WITHOUT_A_LOOP = """
def test_an_application_elsewhere(event_store_settings):
    async def application():
        async with open(event_store_settings) as store:
            return await history(store, ORDER, 3)
    assert len(asyncio.run(application())) == 3
"""

SCOPES = ("function", "class", "module", "package", "session")


def play(pytester: pytest.Pytester, cases: str, *options: str) -> pytest.RunResult:
    """Run cases, in a process of their own, in which every warning is an error."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(cases)
    settings = (
        ["asyncio_default_fixture_loop_scope=function"] if "no:asyncio" not in options else []
    )
    return pytester.runpytest_subprocess(
        *("-p", "no:valkey", "-rs", "-W", "error", *options),
        *(f"--override-ini={setting}" for setting in settings),
    )


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_with_pytest_asyncio(pytester: pytest.Pytester, mode: str) -> None:
    fixture = "pytest.fixture" if mode == "auto" else "pytest_asyncio.fixture"
    mark = "pytest.mark.asyncio" if mode == "strict" else "pytest.mark.filterwarnings()"
    cases = "import pytest_asyncio" + CASES.replace("FIXTURE", fixture).replace("MARK", mark)
    cases += "".join(LOOPS.format(scope=scope) for scope in SCOPES) + WITHOUT_A_LOOP
    play(pytester, cases, f"--asyncio-mode={mode}").assert_outcomes(passed=3 + len(SCOPES) + 1)


@pytest.mark.parametrize("other", ["no:asyncio", "asyncio"])
def test_with_anyio(pytester: pytest.Pytester, other: str) -> None:
    cases = CASES.replace("FIXTURE", "pytest.fixture").replace("MARK", "pytest.mark.anyio")
    done = play(pytester, cases, "-p", other)
    done.assert_outcomes(passed=3, skipped=3)
    done.stdout.fnmatch_lines(["*asyncstore runs on asyncio, not on trio*"])


def test_with_neither_it_says_what_is_needed(pytester: pytest.Pytester) -> None:
    done = play(pytester, "def test_it(event_store): ...", "-p", "no:asyncio")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*event_store needs pytest-asyncio, or a test*"])


def test_a_server_that_is_not_there_is_a_reason_to_skip(pytester: pytest.Pytester) -> None:
    done = play(pytester, "def test_it(event_store_settings): ...", "--event-store-server=url")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*ASYNCSTORE_TEST_URL is not set*"])


async def test_only_what_a_test_has_made_is_removed(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    one_server: Server,
    prefix: str,
) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as theirs:
        await history(theirs, Aggregate("orders", "1"), 3)
        before = keys_with(one_server, prefix)
        monkeypatch.setenv("ASYNCSTORE_TEST_URL", one_server.url)
        cases = CASES.replace("FIXTURE", "pytest.fixture").replace("MARK", "pytest.mark.asyncio")
        tell = "    print(event_store.settings.url, event_store.settings.key_prefix)\n"
        cases = cases.replace("(filled):\n", "(filled, event_store):\n" + tell)
        done = play(pytester, cases, "--asyncio-mode=auto", "-s")
        done.assert_outcomes(passed=3)
        used = re.findall(rf"{re.escape(one_server.url)} (test-\w+:)\n", done.stdout.str())
        assert len(used) == 1
        assert keys_with(one_server, used[0]) == set()
        assert keys_with(one_server, prefix) == before
        await remove_all(theirs.settings)
        assert keys_with(one_server, prefix) <= {one_server.keys(prefix).layout()}


async def test_no_prefix_is_refused_before_anything_is_removed() -> None:
    with pytest.raises(ConfigurationError, match="prefix"):
        await remove_all(Settings(url="redis://127.0.0.1:1"))


def test_clock_builders_and_proxy_need_no_pytest() -> None:
    code = "import sys, asyncstore.testing; assert 'pytest' not in sys.modules"
    root = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# Builders


async def test_a_history_is_what_is_stored(store: Store, order: Aggregate) -> None:
    events = await history(store, order, 3)
    assert [(e.sequence, e.type, e.data) for e in events] == [
        (n, "Counted", {"n": n}) for n in range(3)
    ]
    assert events == await store.events.read(order)
    with pytest.raises(SequenceConflict):
        await history(store, order, 1)


async def test_a_history_of_events(store: Store, order: Aggregate) -> None:
    clock = Clock(NOON, step=MINUTE)
    events = await history(store, order, [Event("Placed", 1), Event("Paid", 2)], clock=clock)
    assert [(e.type, e.time) for e in events] == [("Placed", NOON), ("Paid", NOON + MINUTE)]
    assert sequences(await listed(store.events.stream(order))) == [0, 1]


# The clock


async def test_times_of_the_clock_are_what_is_stored(store: Store, order: Aggregate) -> None:
    clock = Clock(NOON.astimezone(timezone(timedelta(hours=5))), step=MINUTE)
    await store.events.append(
        order, [clock.event("Placed", 1), clock.event("Paid", 2)], expected=NEW
    )
    clock.advance(timedelta(hours=1))
    given = Event("Happened", 3, time=NOON - MINUTE)
    await store.events.append(order, clock.stamp([Event("Shipped", 4), given]), expected=2)
    events = await store.events.read(order)
    wanted = [NOON, NOON + MINUTE, NOON + 62 * MINUTE, NOON - MINUTE]
    assert [event.time for event in events] == wanted
    assert [e.type for e in await store.events.read(order, until=NOON + MINUTE)] == [
        "Placed",
        "Paid",
        "Happened",
    ]


def test_a_clock_stands_still_unless_it_is_told() -> None:
    clock = Clock(NOON)
    assert [clock(), clock(), clock.now] == [NOON] * 3
    clock.advance(-MINUTE)
    assert clock() == NOON - MINUTE


def test_ids_are_known_and_in_order() -> None:
    ids = [event.id for event in Clock(NOON).stamp(numbered(3))]
    assert [f"{made}" for made in ids] == [
        "018cc4e5-2200-7000-8000-000000000000",
        "018cc4e5-2200-7000-8000-000000000001",
        "018cc4e5-2200-7000-8000-000000000002",
    ]
    assert [event.id for event in numbered(3, clock=Clock(NOON))] == ids
    going = Clock(NOON, step=timedelta(microseconds=300))
    ids = [going.event("Ticked", n).id for n in range(20)]
    assert all(one < other for one, other in pairwise(ids))
    assert {(made.version, made.variant) for made in ids} == {(7, uuid.RFC_4122)}


def test_ids_of_two_clocks_are_apart() -> None:
    clocks = [Clock(NOON, seed=seed) for seed in range(3)]
    assert len({clock.new_id() for clock in clocks for _ in range(5)}) == 15


def test_what_is_no_clock() -> None:
    with pytest.raises(InvalidValue, match="time zone"):
        Clock(datetime(2024, 1, 1))
    with pytest.raises(InvalidValue, match="seed"):
        Clock(NOON, seed=4096)
    with pytest.raises(InvalidValue, match="1970"):
        Clock(datetime(1969, 1, 1, tzinfo=UTC)).new_id()


# The proxy


async def appended(store: Store, order: Aggregate, sequence: int) -> None:
    done = await store.events.append(order, numbered(1, sequence), expected=sequence)
    assert (done.first_sequence, done.duplicate) == (sequence, False)


@pytest.mark.parametrize("how", Cut, ids=lambda how: how.name)
@pytest.mark.parametrize("way", ["requests", "replies"])
async def test_a_cut_costs_no_event(
    one_server: Server, prefix: str, order: Aggregate, way: str, how: Cut
) -> None:
    async with (
        fault_proxy(one_server.url) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
    ):
        await appended(store, order, 0)
        getattr(proxy, way).cut(how)
        await appended(store, order, 1)
        await eventually(lambda: proxy.cuts == 1, "the connection was cut")
        await appended(store, order, 2)
        assert sequences(await store.events.read(order)) == [0, 1, 2]
        assert proxy.connections > 1


@pytest.mark.parametrize(
    ("how", "stored"),
    [(Cut.BEFORE, False), (Cut.IN, False), (Cut.AFTER, True)],
    ids=lambda each: each.name if isinstance(each, Cut) else "",
)
async def test_what_arrives_of_a_request(
    one_server: Server, prefix: str, order: Aggregate, how: Cut, stored: bool
) -> None:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as beside:
        async with (
            fault_proxy(one_server.url) as proxy,
            asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.5) as store,
        ):
            await appended(store, order, 0)  # so that the server knows the script
            proxy.requests.cut(how, times=None, having=b"OrderPlaced")
            assert await store.events.next_sequence(order) == 1
            assert proxy.cuts == 0, "that had no order in it"
            with pytest.raises((OutcomeUnknown, StoreUnavailable)):
                await store.events.append(order, [Event("OrderPlaced", 1)], expected=1)
        assert len(await beside.events.read(order, start=1)) == stored


async def sent_through(proxy: FaultProxy, data: bytes) -> None:
    """Send bytes and hang up, as a client of no protocol."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(data)
    writer.write_eof()
    await reader.read()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("how", "arrives"),
    [(Cut.BEFORE, 0), (Cut.IN, 1000), (Cut.AFTER, 2000)],
    ids=["BEFORE", "IN", "AFTER"],
)
async def test_how_much_arrives_one_byte_at_a_time(how: Cut, arrives: int) -> None:
    pieces: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while piece := await reader.read(4000):
            pieces.append(piece)

    async with serving(listen) as url, fault_proxy(url) as proxy:
        proxy.requests.piece = 1
        proxy.requests.cut(how)
        await sent_through(proxy, bytes(range(200)) * 10)
        assert proxy.cuts == 1
    assert b"".join(pieces) == (bytes(range(200)) * 10)[:arrives]
    assert len(pieces) >= arrives / 100, "what is sent at once comes at once"


async def test_half_open_then_all_arrives(
    one_server: Server, prefix: str, order: Aggregate
) -> None:
    async with (
        fault_proxy(one_server.url) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
    ):
        await appended(store, order, 0)
        proxy.hold()
        waiting = asyncio.create_task(appended(store, order, 1))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        proxy.release()
        await waiting
        assert (proxy.cuts, proxy.connections) == (0, 1)


async def test_a_server_that_seems_silent(
    one_server: Server, prefix: str, order: Aggregate
) -> None:
    async with (
        fault_proxy(one_server.url) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix, timeout=0.3) as store,
    ):
        proxy.replies.swallow()
        with pytest.raises(OutcomeUnknown):
            await store.events.append(order, numbered(1), expected=NEW)
        proxy.replies.pass_on()
        assert sequences(await store.events.read(order)) == [0]


async def test_slow_and_in_bytes(one_server: Server, prefix: str, order: Aggregate) -> None:
    async with (
        fault_proxy(one_server.url) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
    ):
        loop = asyncio.get_running_loop()
        proxy.requests.piece = proxy.replies.piece = 1
        await appended(store, order, 0)
        proxy.replies.delay = 0.05
        began = loop.time()
        await appended(store, order, 1)
        assert loop.time() - began >= 0.05


async def at_random(proxy: FaultProxy, store: Store, order: Aggregate) -> int:
    proxy.replies.cut_at_random(0.2)
    for _ in range(40):
        await store.events.append(order, numbered(1), expected=ANY)
    proxy.replies.mend()
    return proxy.cuts


async def test_at_random_each_event_is_stored_once(
    one_server: Server, prefix: str, order: Aggregate
) -> None:
    async with (
        fault_proxy(one_server.url) as proxy,
        asyncstore.open(proxy.url, key_prefix=prefix) as store,
    ):
        assert await at_random(proxy, store, order) > 2
        assert sequences(await store.events.read(order)) == list(range(40))


async def test_an_address_that_leads_to_another_server(order: Aggregate) -> None:
    binary = str(asyncstore.embedded.find_binary())
    with redis_server(binary, tcp=True) as first, redis_server(binary) as second:
        async with fault_proxy(first.url + "/0") as proxy:
            assert proxy.url == f"redis://127.0.0.1:{proxy.port}/0"
            async with asyncstore.open(proxy.url) as store:
                await history(store, order, 2)
                proxy.switch(second.url)
                await eventually(lambda: proxy.open_connections < 2, "the old one is cut")
                assert await store.events.read(order) == []


async def test_the_user_stays_in_the_url_and_nowhere_else() -> None:
    async with fault_proxy("redis://app:s3cret@127.0.0.1:1/2?protocol=3") as proxy:
        assert proxy.url == f"redis://app:s3cret@127.0.0.1:{proxy.port}/2?protocol=3"
        assert "s3cret" not in repr(proxy)


@pytest.mark.parametrize("url", ["rediss://s3cret@host", "embedded://", "host:6379"])
async def test_no_proxy_can_read_along(url: str) -> None:
    with pytest.raises(ConfigurationError, match="proxy is for") as caught:
        async with fault_proxy(url):
            pass
    assert "s3cret" not in str(caught.value)
