"""A TCP proxy in front of a server, that loses replies on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path


class Proxy:
    """Loses the next `lose` replies: the request goes through, then the connection is cut.

    `odds` are those of any other reply to be lost in the same way.
    `push` is written before each chunk of replies.
    `doomed` is in the next reply to be lost besides.
    While `swallow` is set, replies are lost and the connection stays: the server seems silent.
    While `mute_new` is set, new connections are accepted, and nobody reads them.
    """

    def __init__(self, socket_path: Path) -> None:
        self.lose = 0
        self.odds = 0.0
        self.doomed = b""
        self.dice = random.Random(0)
        self.swallow = False
        self.mute_new = False
        self.push = b""
        self.pushed = 0
        self.lose_scripts = False  # the replies to scripts, and no others
        self.on_lost: Callable[[], object] = lambda: None
        self._asked_script = False
        self.connections = 0
        self.open_connections = 0
        self.lost = 0
        self.url = ""
        self._socket_path = socket_path

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.mute_new:
            await reader.read()  # until the other side gives up
            return
        there, back = await asyncio.open_unix_connection(self._socket_path)
        self.open_connections += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._requests(reader, back))
                tasks.create_task(self._replies(there, writer))
        except* ConnectionError:
            pass
        finally:
            self.open_connections -= 1
            for end in (writer, back):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()

    async def _requests(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            back.write(data)
            await back.drain()
            self._asked_script = b"EVALSHA" in data
        raise ConnectionResetError

    async def _replies(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65536):
            is_script = self.lose_scripts and self._asked_script
            is_doomed = bool(self.doomed) and self.doomed in data
            if is_doomed or is_script or self.lose > 0 or self.dice.random() < self.odds:
                self.lose = max(0, self.lose - 1)
                self.doomed = b"" if is_doomed else self.doomed
                self.lost += 1
                self.on_lost()
                break
            if not self.swallow:
                writer.write(self.push + data)
                self.pushed += bool(self.push)
                await writer.drain()
        raise ConnectionResetError


def handshake_answer(request: bytes) -> bytes:
    """Return what opens a store: to INFO a version, and to all else the one of the layout."""
    return b"$19\r\nredis_version:7.2.4\r\n" if b"INFO" in request else b"$1\r\n1\r\n"


@asynccontextmanager
async def serving(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    password: str = "",
) -> AsyncIterator[str]:
    """Run a server of our own making, that is none of Redis, and give its URL."""
    under_way: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        under_way.add(task)
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        _, port = server.sockets[0].getsockname()
        yield f"redis://{password}127.0.0.1:{port}"
        if under_way:
            await asyncio.wait(under_way)


@asynccontextmanager
async def proxy_to(socket_path: Path) -> AsyncIterator[Proxy]:
    """Run a proxy in front of the server that listens on a unix socket."""
    proxy = Proxy(socket_path)
    async with serving(proxy.serve) as proxy.url:
        yield proxy
