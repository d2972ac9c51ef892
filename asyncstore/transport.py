"""Carries scripts and commands to the server and answers back; the only file that knows redis-py.

Two things are decided here and nowhere else: what an error of the server or the network means for
the caller, and that nothing is ever sent twice. redis-py would resend a script whose reply was
lost, and store an append again; so its retries are off.

This transport takes one connection for each call in flight. What is above it only knows `run`,
`command`, `open` and `aclose`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any, Protocol, cast

import anyio
from redis import exceptions
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from asyncstore.errors import (
    AsyncStoreError,
    ConfigurationError,
    OutcomeUnknown,
    StoreClosed,
    StoreFull,
    StoreUnavailable,
    UnexpectedReply,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.scripts import Script

Argument = str | bytes | int
Reply = Any

_BROKEN = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
_UNREACHABLE = {
    socket.gaierror: "its host name is not known",
    ConnectionRefusedError: "nobody listens there",
    FileNotFoundError: "there is no such socket",
    ssl.SSLCertVerificationError: "its certificate can't be trusted",
    ssl.SSLError: "it does not speak TLS as we do",
    exceptions.TimeoutError: "it did not answer in time",
    TimeoutError: "it did not answer in time",
}
_ANSWERED = (
    exceptions.ResponseError,
    exceptions.BusyLoadingError,
    exceptions.AuthenticationError,
)

# The first words of errors after which nothing was done, and what they say of the server.
_NOT_NOW = {
    "BUSY": "another client's script keeps it busy",
    "CLUSTERDOWN": "its cluster is down",
    "LOADING": "it is loading its data after a start",
    "MASTERDOWN": "it is a replica that lost its primary",
    "MISCONF": "it can't write to its disk and refuses changes",
    "NOAUTH": "it wants a login: give a user and a password in the URL",
    "NOREPLICAS": "it has fewer replicas than it wants for a change",
    "READONLY": "it is a replica and takes no changes",
    "TRYAGAIN": "it is moving this slot",
    "WRONGPASS": "it refused the user or the password",
}


class _Connection(Protocol):
    """What is used of redis-py's connection, which has no complete types of its own."""

    async def send_command(self, *command: Argument) -> None: ...
    async def read_response(self) -> Reply: ...
    async def disconnect(self) -> None: ...


class _Pool(Protocol):
    """What is used of redis-py's pool."""

    def make_connection(self) -> _Connection: ...
    async def get_connection(self) -> _Connection: ...
    async def release(self, connection: _Connection) -> None: ...
    async def disconnect(self) -> None: ...


class Transport:
    """A pool of connections to one server, for the event loop in which it was opened."""

    def __init__(self, *, timeout: float, max_connections: int) -> None:
        self._timeout = timeout
        self._max_connections = max_connections
        self._pool: _Pool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._where = ""

    async def open(self, url: str, where: str) -> None:
        """Make the first connection. `where` names the server in errors, without a password."""
        try:
            pool = cast(_Pool, BlockingConnectionPool.from_url(url, **self._options()))
            pool.make_connection()
        except (TypeError, ValueError, exceptions.RedisError):
            # Their messages may show the password.
            why = f"{where} has an option that can't be used"
            raise ConfigurationError("url", why, "the settings") from None
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._where = where
        await self.command("PING")

    def _options(self) -> dict[str, Any]:
        return {
            "timeout": None,
            "max_connections": self._max_connections,
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "protocol": 2,
            "driver_info": None,  # it would cost two round trips a connection
            "retry": Retry(NoBackoff(), 0),
        }

    async def aclose(self) -> None:
        """Close all connections; calls in flight fail."""
        pool, self._pool = self._pool, None
        if pool is not None:
            with anyio.CancelScope(shield=True):
                await pool.disconnect()

    async def run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Reply:
        """Run a script by its digest; a server that does not have it yet gets the source."""
        rest = (len(keys), *keys, *arguments)
        try:
            return await self._exchange(script.name, script.writes, "EVALSHA", script.sha, *rest)
        except exceptions.NoScriptError:
            return await self._exchange(script.name, script.writes, "EVAL", script.source, *rest)

    async def command(self, *command: Argument) -> Reply:
        """Send one command that changes nothing."""
        return await self._exchange(str(command[0]), False, *command)

    async def _exchange(self, name: str, writes: bool, *command: Argument) -> Reply:
        pool = self._usable_pool()
        connection = await self._connect(pool)
        try:
            if self._pool is not pool:  # the store was closed while we waited for a connection
                await connection.disconnect()
                raise StoreClosed("the store was closed; nothing was sent")
            await connection.send_command(*command)
            return await connection.read_response()
        except (exceptions.NoScriptError, StoreClosed):
            raise
        except _ANSWERED as error:
            raise self._refused(name, error) from None
        except Exception as error:
            # Whatever it is: the first byte may have left.
            why = f"the connection broke during {name} ({type(error).__name__})"
            if writes:
                raise OutcomeUnknown(self._where, why) from None
            raise StoreUnavailable(self._where, why) from None
        finally:
            with anyio.CancelScope(shield=True):
                await pool.release(connection)

    def _usable_pool(self) -> _Pool:
        if self._pool is None:
            raise StoreClosed("the store is not open: use it inside `async with asyncstore.open()`")
        if asyncio.get_running_loop() is not self._loop:
            raise StoreClosed(
                "the store was opened in another event loop: open one in each loop and process"
            )
        return self._pool

    async def _connect(self, pool: _Pool) -> _Connection:
        try:
            return await pool.get_connection()
        except _ANSWERED as error:
            raise self._refused("the handshake", error) from None
        except _BROKEN as error:
            reason = error.__cause__ or error.__context__ or error
            if isinstance(reason, _ANSWERED):
                raise self._refused("the handshake", reason) from None
            raise StoreUnavailable(self._where, self._why_unreachable(reason)) from None

    def _why_unreachable(self, reason: BaseException) -> str:
        known = [text for kind, text in _UNREACHABLE.items() if isinstance(reason, kind)]
        meaning = known[0] if known else type(reason).__name__
        if self._where.startswith(("rediss:", "valkeys:")):
            meaning += "; is it a port for TLS?"
        return f"no connection ({meaning}); nothing was sent"

    def _refused(self, name: str, error: exceptions.RedisError) -> AsyncStoreError:
        code = error.status_code or str(error).split(" ", 1)[0]
        if code == "OOM":
            return StoreFull(self._where)
        if code in _NOT_NOW:
            return StoreUnavailable(self._where, _NOT_NOW[code])
        return UnexpectedReply(self._where, name, code)
