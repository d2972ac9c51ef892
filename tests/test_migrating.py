"""Moving from one server to a cluster while writers go on: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    ConfigurationError,
    Event,
    MoveRefused,
    Store,
    comparing,
    migrating,
)
from asyncstore.migrating import Migration
from tests.builders import listed, numbered
from tests.fix_clusters import SmallCluster
from tests.polling import eventually
from tests.servers import Server
from tests.test_comparing import ONE, WHAT_IF, fill, put_snapshots
from tests.test_transfer import run


@pytest.fixture
def new_prefix() -> str:
    return f"test-{uuid.uuid4().hex}:"


@pytest.fixture
async def old(one_server: Server, prefix: str) -> AsyncIterator[Store]:
    async with asyncstore.open(one_server.url, key_prefix=prefix) as opened:
        yield opened


@pytest.fixture
async def new(small_cluster: SmallCluster, new_prefix: str) -> AsyncIterator[Store]:
    async with asyncstore.open(urls=small_cluster.urls, key_prefix=new_prefix) as opened:
        yield opened


async def differences(old: Store, new: Store) -> list[comparing.Difference]:
    return await listed(comparing.differences(old, new))


@dataclass
class Load:
    """Writers that go on until they are stopped; `acked` are the ids of what was acknowledged."""

    store: Store
    acked: dict[Aggregate, list[uuid.UUID]] = field(default_factory=dict)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    writing: int = 0

    async def write(self, number: int) -> None:
        """Append to some aggregates and an edition of each, with positions and snapshots."""
        turn = 0
        self.writing += 1
        while not self.stopping.is_set():
            turn += 1
            place = Aggregate("orders", f"w{number}-{turn % 7}")
            if turn % 3 == 0 and await self.store.events.next_sequence(place):
                place = place.on("what-if")
            event = Event("Told", {"n": turn})
            done = await self.store.events.append(
                place, [event], expected=ANY, idempotency_key=f"{number}-{turn}"
            )
            self.acked.setdefault(place, []).append(event.id)
            await self.store.positions.put("projector", place, done.last_sequence)
            if turn % 5 == 0:
                await self.store.snapshots.put(place, sequence=done.last_sequence, state=turn)
        self.writing -= 1

    async def check(self, new: Store) -> None:
        """Each that was acknowledged is there once, and the last one last."""
        for place, ids in self.acked.items():
            events = await new.events.read(place)
            found, acked = [event.id for event in events], set(ids)
            assert len(set(found)) == len(found)
            assert [i for i in found if i in acked] == ids
            assert await new.positions.get("projector", place) == events[-1].sequence


@asynccontextmanager
async def loaded(store: Store, writers: int = 12) -> AsyncIterator[Load]:
    load = Load(store)
    async with asyncio.TaskGroup() as tasks:
        for number in range(writers):
            tasks.create_task(load.write(number))
        try:
            await eventually(lambda: len(load.acked) > writers, "all of them have begun")
            yield load
        finally:
            load.stopping.set()


class TestMigration:
    async def test_while_others_write(self, old: Store, new: Store) -> None:
        await fill(old)
        migration = Migration(old, new)
        assert not await migration.begin()
        async with loaded(old) as load:
            first = await migration.catch_up()
            assert first.events >= 31 * 8
            for _ in range(3):
                count = sum(map(len, load.acked.values()))
                more: Callable[[], bool] = lambda c=count: sum(map(len, load.acked.values())) > c  # type: ignore[misc]  # noqa: E731
                await eventually(more, "others write")
                caught = await migration.catch_up()
                assert 0 < caught.aggregates <= 12 * 7 * 2
        switch = await migration.finish()
        assert (switch.is_done, switch.differences) == (True, [])
        assert await differences(old, new) == []
        await load.check(new)

    async def test_only_what_has_changed_is_copied(self, old: Store, new: Store) -> None:
        await fill(old)
        migration = Migration(old, new)
        assert (await migration.catch_up()).aggregates == 31 * 2 + 3
        assert await migration.catch_up() == migrating.Caught(0, 0)
        await old.events.append(ONE, numbered(4), expected=6)
        assert await migration.catch_up() == migrating.Caught(1, 4)

    async def test_pages_of_changes(
        self, old: Store, new: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(migrating, "_PAGE", 3)
        await fill(old)
        migration = Migration(old, new)
        await migration.catch_up()
        switch = await migration.finish()
        # Commits do not tell of what is beside events on an edition that reads as main.
        assert (switch.is_done, switch.mended) == (True, 1)
        assert await differences(old, new) == []

    async def test_what_no_commit_tells_of(self, old: Store, new: Store) -> None:
        await fill(old, 4)
        await old.events.append(Aggregate("gone", "1"), numbered(1), expected=NEW)
        migration = Migration(old, new)
        await migration.catch_up()
        await old.positions.put("projector", ONE, 1)  # back
        await old.subscriptions.reset("saga", "orders")  # away
        await old.snapshots.put(ONE, sequence=5, state="another", schema_version=7)
        await old.snapshots.delete(WHAT_IF)
        await old.events.delete(Aggregate("orders", "2"))
        await old.events.delete(Aggregate("orders", "2", "what-if"))
        await old.events.delete_edition("orders", "empty")
        await old.events.delete(Aggregate("gone", "1"))
        assert (await migration.catch_up()).aggregates == 0
        switch = await migration.finish()
        assert switch.is_done
        assert switch.mended >= 4
        assert await differences(old, new) == []
        assert await listed(new.events.domains()) == ["carts", "orders"]

    async def test_what_was_deleted_and_made_anew(self, old: Store, new: Store) -> None:
        place, longer = ONE, Aggregate("orders", "2")
        for one in (place, longer):
            await old.events.append(one, numbered(4), expected=NEW, idempotency_key="k")
            await old.events.append(one.on("what-if"), numbered(2), expected=3)
        await put_snapshots(old, place)
        migration = Migration(old, new)
        await migration.catch_up()
        for one, count in ((place, 2), (longer, 9)):
            for edition in ("what-if", "main"):
                await old.events.delete(one.on(edition))
            await old.events.append(one, numbered(count), expected=NEW, idempotency_key="k")
            await old.events.append(one.on("what-if"), numbered(1), expected=1)
        await migration.catch_up()
        assert await differences(old, new) == []

    async def test_main_may_have_grown_when_a_branch_is_copied(
        self, old: Store, new: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await old.events.append(ONE, numbered(2), expected=NEW)
        await old.events.branch(WHAT_IF, at=1)
        migration = Migration(old, new)
        copy = Migration._copy

        async def then_it_grows(self: Migration, aggregate: Aggregate) -> int:
            count = await copy(self, aggregate)
            if aggregate == ONE:
                await old.events.delete(WHAT_IF)
                await old.events.append(ONE, numbered(3), expected=2)
                await old.events.branch(WHAT_IF, at=5)
            return count

        monkeypatch.setattr(Migration, "_copy", then_it_grows)
        await migration._copy(ONE)
        await migration._copy(WHAT_IF)
        assert await differences(old, new) == []

    async def test_a_writer_that_was_not_stopped_is_noticed(
        self, old: Store, new: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await fill(old, 2)
        migration = Migration(old, new)
        await migration.begin()
        mend = Migration._mend

        async def then_it_grows(self: Migration, switch: migrating.Switch) -> None:
            await mend(self, switch)
            await old.events.append(ONE, numbered(1), expected=ANY)

        with monkeypatch.context() as patch:
            patch.setattr(Migration, "_mend", then_it_grows)
            switch = await migration.finish()
        assert (switch.is_quiet, switch.is_done) == (False, False)
        assert (await migration.finish()).is_done
        assert await differences(old, new) == []

    async def test_what_can_not_be_stored_there_is_named(
        self, old: Store, small_cluster: SmallCluster, new_prefix: str
    ) -> None:
        await old.events.append(ONE, [Event("A", "s3cret" * 100)], expected=NEW)
        async with asyncstore.open(
            urls=small_cluster.urls, key_prefix=new_prefix, max_event_bytes=100
        ) as new:
            with pytest.raises(MoveRefused, match=r"orders/1 can't be .*max_event_bytes") as caught:
                await Migration(old, new).catch_up()
        assert "s3cret" not in str(caught.value)


class TestTheMark:
    async def test_a_store_that_has_something_is_left_alone(self, old: Store, new: Store) -> None:
        await new.events.append(ONE, numbered(1), expected=NEW)
        with pytest.raises(ConfigurationError, match="it has events already, of domain 'orders'"):
            await Migration(old, new).begin()

    async def test_it_stays_until_all_has_arrived(self, old: Store, new: Store) -> None:
        await fill(old, 2)
        assert not await Migration(old, new).begin()
        await Migration(old, new).catch_up()
        migration = Migration(old, new)
        assert await migration.begin()
        assert (await migration.finish()).is_done
        # What is only there was written after the switch, and must not be deleted.
        await new.events.append(ONE, numbered(1), expected=6)
        with pytest.raises(ConfigurationError, match="it has events already"):
            await Migration(old, new).begin()

    async def test_it_names_where_it_comes_from(
        self, old: Store, new: Store, one_server: Server, prefix: str
    ) -> None:
        await Migration(old, new).begin()
        async with asyncstore.open(one_server.url, key_prefix=prefix + "x:") as another:
            with pytest.raises(ConfigurationError, match="it is being filled from .*" + prefix):
                await Migration(another, new).begin()


class TestCommandLine:
    @pytest.fixture
    def arguments(
        self, one_server: Server, prefix: str, small_cluster: SmallCluster, new_prefix: str
    ) -> list[str]:
        places = [one_server.url, ",".join(small_cluster.urls)]
        return ["migrate", *places, "--key-prefix", prefix, "--new-key-prefix", new_prefix]

    @asynccontextmanager
    async def migrating(self, arguments: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncstore", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def said(self, process: asyncio.subprocess.Process, text: str) -> list[str]:
        """Read until it has said something."""
        lines: list[str] = []
        assert process.stderr is not None
        while not any(text in line for line in lines):
            line = await asyncio.wait_for(process.stderr.readline(), 30)
            assert line, lines
            lines.append(line.decode())
        return lines

    async def test_killed_in_the_middle_and_run_again_under_load(
        self, old: Store, new: Store, arguments: list[str]
    ) -> None:
        await fill(old, 100)
        async with loaded(old) as load:
            async with self.migrating(arguments) as process:
                await eventually(lambda: has_some(new), "it has begun")
                process.kill()
                await process.wait()
            copied = len(await listed(new.events.roots("orders")))
            assert 0 < copied < len(await listed(old.events.roots("orders")))
            async with self.migrating(arguments) as process:
                lines = await self.said(process, "then press Enter")
                assert "going on with what was begun\n" in lines
                await self.said(process, "copied ")
                load.stopping.set()
                await eventually(lambda: load.writing == 0, "the writers have stopped")
                assert process.stdin is not None
                process.stdin.write(b"\n")
                lines = await self.said(process, "the new store has everything")
                assert await process.wait() == 0
        (took,) = [line for line in lines if line.startswith("the switch took")]
        assert re.match(
            r"the switch took \d+\.\d\d s: catching up \d+\.\d\d s, comparing \d+\.\d\d s", took
        )
        assert await differences(old, new) == []
        await load.check(new)

    async def test_nobody_who_could_press_enter(
        self, old: Store, new: Store, arguments: list[str]
    ) -> None:
        await fill(old, 2)
        done = await asyncio.to_thread(run, *arguments)
        assert done.returncode == 1
        assert b"not switched: run it again to go on" in done.stderr
        done = await asyncio.to_thread(run, *arguments, "--stopped")
        assert done.returncode == 0, done.stderr
        assert await differences(old, new) == []
        done = await asyncio.to_thread(run, *arguments, "--stopped")
        assert done.returncode == 2
        assert b"it has events already" in done.stderr


async def has_some(store: Store) -> bool:
    return len(await listed(store.events.roots("orders"))) > 3
