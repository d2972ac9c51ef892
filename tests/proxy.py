"""Servers that are none: a proxy in front of a real one, and some of the tests' own making."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from asyncstore.testing import FaultProxy, fault_proxy


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


def proxy_to(socket_path: Path) -> AbstractAsyncContextManager[FaultProxy]:
    """Run a proxy in front of the server that listens on a unix socket."""
    return fault_proxy(f"unix://{socket_path}")
