"""A TCP proxy in front of a server, that loses replies on purpose."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


class Proxy:
    """Loses the next `lose` replies: the request goes through, then the connection is cut."""

    def __init__(self, socket_path: Path) -> None:
        self.lose = 0
        self.lost = 0
        self.url = ""
        self._socket_path = socket_path

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket_path)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._requests(reader, back))
                tasks.create_task(self._replies(there, writer))
        except* ConnectionError:
            pass
        finally:
            for end in (writer, back):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()

    async def _requests(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            back.write(data)
            await back.drain()
        raise ConnectionResetError

    async def _replies(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65536):
            if self.lose > 0:
                self.lose -= 1
                self.lost += 1
                break
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@asynccontextmanager
async def proxy_to(socket_path: Path) -> AsyncIterator[Proxy]:
    proxy = Proxy(socket_path)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    _, port = server.sockets[0].getsockname()
    proxy.url = f"redis://127.0.0.1:{port}"
    async with server:
        yield proxy
