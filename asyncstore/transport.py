"""Carries requests to one server and answers back; the only file that knows redis-py.

redis-py dials: URL, TLS, login. Then the connection is ours (`wire`), and all callers share it.
Decided here and nowhere else: what becomes of requests whose connection broke. What was not sent is
sent on the next one. Reads are sent again. An append is sent again with a mark, by which its script
tells a second arrival from the first, but only once the server has confirmed that the old
connection is gone: or its first sending, still under way, could arrive after the second. What can't
be known when its time is over is `OutcomeUnknown`. In a cluster there is another way for requests
that this server does not serve, or not any more: the `Detour`.

A call has `timeout` seconds from its beginning, wherever it waits. One timer looks after all calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from urllib.parse import urlsplit

import anyio
from redis import exceptions
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from asyncstore.answers import NOT_NOW, Answers
from asyncstore.errors import (
    AsyncStoreError,
    ConfigurationError,
    OutcomeUnknown,
    StoreUnavailable,
)
from asyncstore.observing import SERVER_ADDRESS, Tally
from asyncstore.sharing import running_loop
from asyncstore.wire import AGAIN, ELSEWHERE, Repeat, ReplyError, Request, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncstore.forms import Form
    from asyncstore.scripts import Script
    from asyncstore.wire import Argument, Reply

_log = logging.getLogger(__name__)

_PING_SECONDS: Final = 5.0
_FIRST_PAUSE: Final = 0.01  # seconds between two dials; doubled each time
_LONGEST_PAUSE: Final = 1.0
_SILENCE: Final = 0.2  # of a call's time, after which a server that owes an answer is in trouble

_UNREACHABLE: Final = {
    socket.gaierror: "its host name is not known",
    ConnectionRefusedError: "nobody listens there",
    FileNotFoundError: "there is no such socket",
    ssl.SSLCertVerificationError: "its certificate can't be trusted",
    ssl.SSLError: "it does not speak TLS as we do",
    exceptions.TimeoutError: "it did not answer in time",
    TimeoutError: "it did not answer in time",
    exceptions.InvalidResponse: "what answers there does not speak the protocol of Redis",
}
_ANSWERED: Final = (
    exceptions.ResponseError,
    exceptions.BusyLoadingError,
    exceptions.AuthenticationError,
)


class _Unreachable(Exception):
    """There is no connection now; another try may get one."""


class _Dialled(Protocol):
    """What is used of redis-py's connection, which has no complete types of its own."""

    db: int
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    async def connect(self) -> None: ...


class Detour(Protocol):
    """Where requests go that this server can't serve: to another node of its cluster."""

    def refused(self, request: Request, error: ReplyError) -> bool:
        """Take a request that was refused; False if that is the answer to it."""

    def left(self, request: Request) -> None:
        """Take a request of a server that is no node of use any more."""

    def in_trouble(self) -> None:
        """Hear that the server does not answer, or can't be reached."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a call may take, in seconds, and what may be under way on one connection."""

    timeout: float
    max_commands: int
    max_bytes: int


class Transport:
    """The connection to one server, for the event loop in which it was opened.

    `where` names the server in errors, without a password. A connection that is `read_only` may
    lead to a replica of a cluster. `tally` counts what happens to it. `system` is what the server
    is, "redis" or "valkey", as far as it tells.
    """

    def __init__(
        self,
        url: str,
        where: str,
        bounds: Bounds,
        *,
        detour: Detour | None = None,
        read_only: bool = False,
        tally: Tally | None = None,
    ) -> None:
        self._url = url
        self.where = where
        self.host = urlsplit(url).hostname or ""
        self._timeout = bounds.timeout
        self._bounds = bounds
        self._detour = detour
        self._read_only = read_only
        self._tally = tally or Tally()
        self.system = "redis"
        self._answers = Answers(where)
        self._is_left = False
        self._backlog: deque[Request] = deque()  # waits for room, or for a connection
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._pool: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._trouble = "it did not answer in time"
        self._pause = 0.0  # before the next dial
        self._is_broken = False  # it was connected, and is not yet again
        self._identity: tuple[str, int] | None = None  # of the connection: server run, client id
        self._lost_identity: tuple[str, int] | None = None

    # Opening and closing

    async def open(self) -> None:
        """Make the first connection, or raise why that can't be done."""
        self._prepare_dialling()
        try:
            self._wire = await self._dial()
        except _Unreachable as error:
            raise StoreUnavailable(self.where, str(error)) from None
        self._begin()

    def start(self) -> None:
        """Take requests; the first one makes the connection."""
        self._prepare_dialling()
        self._begin()

    def _prepare_dialling(self) -> None:
        try:
            keepalive = {} if self._url.startswith("unix:") else {"socket_keepalive": True}
            self._pool = ConnectionPool.from_url(self._url, **self._options(), **keepalive)
            self._pool.make_connection()
        except (TypeError, ValueError, exceptions.RedisError):
            # Their messages may show the password.
            why = f"{self.where} has an option that can't be used"
            raise ConfigurationError("url", why, "the settings") from None

    def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick()

    def _options(self) -> dict[str, Any]:
        return {
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "protocol": 2,  # unless the URL asks for 3
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            "driver_info": None,  # it would cost two round trips
            "retry": Retry(NoBackoff(), 0),
        }

    def leave(self) -> None:
        """Give the server up: it is no node of use any more. The detour gets what is open."""
        self._is_left = True
        if self._timer is not None:
            self._timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        self._hand_over(list(self._backlog))
        self._backlog.clear()
        if self._wire is not None:
            self._wire.abort("it has left the cluster")  # which hands over what is under way

    def _hand_over(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self._detour is not None and not request.is_over():
                self._detour.left(request)

    async def aclose(self) -> None:
        """Close the connection; calls in flight fail."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
        for request in self._backlog:
            self._give_up(request, "the store was closed")
        self._backlog.clear()
        ends: list[asyncio.Future[None]] = []
        if self._connecting is not None:
            self._connecting.cancel()
            ends.append(self._connecting)
        if self._wire is not None:
            self._wire.abort("the store was closed")
            ends.append(self._wire.closed)
        with anyio.CancelScope(shield=True):
            if ends:
                await asyncio.wait(ends)

    # Calls

    async def run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Reply:
        """Run a script by its digest; a server that does not have it yet gets the source."""
        loop = self.loop()
        caller = loop.create_future()
        self.send(script.request(keys, arguments, [caller], loop.time()))
        return self._answers.believed(await caller, script.name, script.form)

    async def command(self, form: Form, *command: Argument) -> Reply:
        """Send one command that changes nothing, and whose reply has this form."""
        loop = self.loop()
        caller = loop.create_future()
        name = str(command[0])
        self.send(Request(list(command), name, Repeat.FREELY, [caller], loop.time()))
        return self._answers.believed(await caller, name, form)

    def send(self, request: Request) -> None:
        """Send a request, as soon as there is room for it; its callers get the reply."""
        wire = self._wire
        if wire is not None and not self._backlog and wire.has_room():
            wire.push(request)
        elif self._is_left:
            self._hand_over([request])
        elif self._loop is None:
            self._give_up(request, "the store was closed")
        else:
            self._backlog.append(request)
            self._connect_if_needed()

    def flush(self) -> None:
        """Send at once what would leave at the end of this turn of the event loop."""
        if self._wire is not None:
            self._wire.flush()

    def in_flight(self) -> int:
        """Return how many callers wait for an answer, or for their requests to be sent."""
        wire = self._wire
        backlog = sum(len(request.callers) for request in tuple(self._backlog))
        return backlog if wire is None else backlog + wire.in_flight()

    def is_at_work(self) -> bool:
        """Whether there is a connection with requests under way."""
        wire = self._wire
        return wire is not None and wire.is_alive() and bool(wire.waiting or wire.outbox)

    def is_idle(self) -> bool:
        """Whether a request would leave at once, with nothing else under way before it."""
        wire = self._wire
        return wire is not None and wire.is_idle() and not self._backlog

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop of the store, or raise StoreClosed if this is not it."""
        return running_loop(self._loop)

    def _give_up(self, request: Request, why: str) -> None:
        is_closed = self._loop is None
        request.fail(
            self._answers.closed(request) if is_closed else self._answers.missing(request, why)
        )

    # What the wire and the timer call

    def _heard(self, wire: Wire) -> None:
        """Go on sending: replies have made room, and the connection is good for something."""
        if wire is self._wire:
            self._pause = 0.0
            self._drain()

    def _refusal(self, wire: Wire, request: Request, error: ReplyError) -> bool:
        """Send a request another way if the server could not take it this way."""
        if error.code == "NOSCRIPT" and request.name_source():
            wire.push(request)
            return True
        return self._detour is not None and self._detour.refused(request, error)

    def _drain(self) -> None:
        """Send what waited, as far as there is room."""
        wire = self._wire
        while self._backlog and wire is not None and wire.has_room():
            request = self._backlog.popleft()
            if not request.is_over():
                wire.push(request)

    def _lost(self, wire: Wire, reason: str) -> None:
        """Sort what was under way on a connection that is gone."""
        if wire is not self._wire:
            return  # it broke while it was made; whoever makes it knows
        self._wire = None
        self._trouble = reason
        self._lost_identity = self._identity
        if self._is_left:
            self._hand_over([*wire.waiting, *wire.outbox])
            return
        again: list[Request] = []
        for request in wire.waiting:
            if self._loop is None or request.is_hopeless or request.repeat is Repeat.NEVER:
                self._give_up(request, reason)
                continue
            if request.repeat is Repeat.FREELY:
                request.pack()  # a part of its answer may have come
                self._tally.resends[request.name] += 1
            again.append(request)
        if self._loop is None:
            for request in wire.outbox:
                self._give_up(request, reason)
            return
        self._is_broken = True
        _log.warning(
            "the connection to %s is lost: %s", self.where, reason, extra=self._about_server()
        )
        self._backlog.extendleft(reversed([*again, *wire.outbox]))
        self._tell_trouble()
        self._connect_if_needed()

    def _tick(self) -> None:
        """Look after deadlines, and after a server that has gone silent."""
        loop, wire = self._loop, self._wire
        if loop is None:
            return
        too_old = loop.time() - self._timeout
        in_flight = [*wire.waiting, *wire.outbox] if wire is not None else []
        for request in (*in_flight, *self._backlog):
            if request.born <= too_old:
                self._give_up(request, self._late())
        self._forget_the_answered()
        if wire is not None and wire.waiting:
            self._look_after_silence(wire, loop.time() - max(wire.last_heard, wire.waiting[0].born))
        elif wire is None and self._backlog:
            self._look_after_absence(loop.time() - self._backlog[0].born)
        elif wire is not None and wire.last_heard < loop.time() - _PING_SECONDS:
            wire.push(Request(["PING"], "PING", Repeat.FREELY, [_own(loop)], loop.time()))
        if not self._is_left:
            self._timer = loop.call_later(min(self._timeout / 10, 1.0), self._tick)

    def _look_after_silence(self, wire: Wire, seconds: float) -> None:
        if seconds >= _SILENCE * self._timeout:
            self._tell_trouble()
        if seconds >= self._timeout:
            wire.abort("it has gone silent")

    def _look_after_absence(self, seconds: float) -> None:
        # To find out that nobody answers a dial may take as long as a call has.
        if seconds >= _SILENCE * self._timeout:
            self._tell_trouble()

    def _forget_the_answered(self) -> None:
        """Let go of what nobody waits for any more."""
        if self._backlog:
            live = [request for request in self._backlog if not request.is_over()]
            self._backlog = deque(live)

    def _late(self) -> str:
        if self._wire is None:
            return f"no connection in {self._timeout} s ({self._trouble})"
        return f"no answer in {self._timeout} s"

    # Connections

    def _tell_trouble(self) -> None:
        if self._detour is not None:
            self._detour.in_trouble()

    def _connect_if_needed(self) -> None:
        if self._wire is None and self._connecting is None and self._backlog:
            self._connecting = asyncio.ensure_future(self._reconnect())

    async def _reconnect(self) -> None:
        """Dial as long as somebody waits, with growing pauses until a connection has answered."""
        try:
            while self._wire is None and self._backlog:
                await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311
                self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
                try:
                    self._wire = await self._dial()
                    self._note_connection()
                except _Unreachable as error:
                    self._trouble = str(error)
                    self._tell_trouble()
                self._forget_the_answered()
        except AsyncStoreError as error:
            # The server answered, and said no. It is not asked again until the next call.
            self._refuse_all(error)
        finally:
            self._connecting = None
        self._drain()
        self._connect_if_needed()

    def _note_connection(self) -> None:
        if self._is_broken:
            self._is_broken = False
            self._tally.reconnects += 1
            _log.info("connected to %s again", self.where, extra=self._about_server())

    def _about_server(self) -> dict[str, str]:
        return {SERVER_ADDRESS: self.where}

    def _refuse_all(self, error: AsyncStoreError) -> None:
        for request in self._backlog:
            if request.may_have_changed_something:
                self._give_up(request, str(error))
            else:
                request.fail(error)
        self._backlog.clear()

    async def dial(self) -> asyncio.StreamWriter:
        """Return a new connection, logged in, for a protocol of its own. Whoever asks closes it."""
        self.loop()
        try:
            return await self._connect()
        except _Unreachable as error:
            raise StoreUnavailable(self.where, str(error)) from None

    async def _connect(self) -> asyncio.StreamWriter:
        """Return a new connection, logged in, with nothing unread on it."""
        connection = cast(_Dialled, self._pool.make_connection())
        before = _cancellations()
        try:
            await connection.connect()
        except _ANSWERED as error:
            raise self._refused_login(error, connection.db) from None
        except (exceptions.RedisError, OSError) as error:
            reason = error.__cause__ or error.__context__ or error
            if isinstance(reason, _ANSWERED):
                raise self._refused_login(reason, connection.db) from None
            raise _Unreachable(self._why_unreachable(reason)) from None
        except Exception as error:
            # What answers there made redis-py stumble; it is no reason to stop trying.
            raise _Unreachable(self._why_unreachable(error)) from None
        writer = connection._writer
        # redis-py must not close what is ours now.
        connection._reader = connection._writer = None  # type: ignore[assignment]
        if _cancellations() > before:
            writer.transport.abort()
            raise asyncio.CancelledError
        return writer

    async def _dial(self) -> Wire:
        """Return a new connection, ready for requests."""
        writer = await self._connect()
        wire = Wire(
            max_commands=self._bounds.max_commands,
            max_bytes=self._bounds.max_bytes,
            on_reply=self._heard,
            on_room=self._drain,
            on_refusal=self._refusal,
            on_lost=self._lost,
        )
        wire.take(writer)
        try:
            async with asyncio.timeout(self._timeout):
                await self._prepare(wire)
            if not wire.is_alive():
                raise _Unreachable("the server closed the connection")
        except BaseException as error:
            wire.abort("it was not needed")
            with anyio.CancelScope(shield=True):
                await wire.closed
            if isinstance(error, (_Unreachable, TimeoutError)):
                why = str(error) or "it did not answer in time"
                raise _Unreachable(f"no connection ({why})") from None
            raise
        return wire

    async def _prepare(self, wire: Wire) -> None:
        """Learn who we are on the server, and end the connection that was lost."""
        if self._read_only:
            await self._ask(wire, "READONLY")
        hello = await self._ask(wire, "HELLO")
        info = await self._ask(wire, "INFO", "server", "persistence")
        if isinstance(info, bytes) and b"\nloading:1" in info:
            raise _Unreachable(NOT_NOW["LOADING"])
        if isinstance(info, bytes) and b"\nvalkey_version:" in info:
            self.system = "valkey"
        identity = _identity(hello, info)
        await self._settle_appends(wire, identity)
        self._identity = identity

    async def _settle_appends(self, wire: Wire, identity: tuple[str, int] | None) -> None:
        """Have the appends of the lost connection sent again, or tell that it can't be done."""
        in_doubt = [
            request
            for request in self._backlog
            if request.sent and request.may_have_changed_something
        ]
        for request in in_doubt:
            if request.repeat is Repeat.ALIKE:
                self._send_again(request, AGAIN)
        unsettled = [request for request in in_doubt if request.repeat is Repeat.MARKED]
        if not unsettled:
            return
        if await self._is_ended(wire, identity):
            # Another process may have less of the history than the one that was asked first.
            lost = self._lost_identity
            is_same = identity is not None and lost is not None and identity[0] == lost[0]
            for request in unsettled:
                self._send_again(request, AGAIN if is_same else ELSEWHERE)
        else:
            for request in unsettled:
                self._give_up(request, "the connection broke, and may still be read by the server")

    def _send_again(self, request: Request, mark: str) -> None:
        why = f"{request.name}: its answer was lost, and it was refused when sent again"
        request.send_again(mark, OutcomeUnknown(self.where, why))
        self._tally.resends[request.name] += 1

    async def _is_ended(self, wire: Wire, identity: tuple[str, int] | None) -> bool:
        """Whether the server will read nothing more from the connection that was lost."""
        if identity is None or self._lost_identity is None:
            return False
        lost_run, lost_client = self._lost_identity
        if lost_run != identity[0]:
            return True  # it is another server process, the old one's connections are gone
        reply = await self._ask(wire, "CLIENT", "KILL", "ID", lost_client)
        return type(reply) is int

    async def _ask(self, wire: Wire, *command: Argument) -> Reply:
        loop = asyncio.get_running_loop()
        future = _own(loop)
        wire.push(Request(list(command), "HELLO", Repeat.FREELY, [future], loop.time()))
        await asyncio.wait([future, wire.closed], return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise _Unreachable("the server closed the connection")
        return future.result()

    def _refused_login(self, error: BaseException, database: int) -> AsyncStoreError:
        code = getattr(error, "status_code", None) or str(error).split(" ", 1)[0]
        if code == "ERR" and database:
            why = f"{self.where} has no database {database}; a cluster has only 0"
            return ConfigurationError("url", why, "the settings")
        return self._answers.refused("the handshake", code)

    def _why_unreachable(self, reason: BaseException) -> str:
        known = [text for kind, text in _UNREACHABLE.items() if isinstance(reason, kind)]
        meaning = known[0] if known else type(reason).__name__
        if isinstance(reason, FileNotFoundError) and not self.where.startswith("unix:"):
            meaning = "a file that the URL names is not there"
        if not known and self.where.startswith(("redis:", "valkey:")):
            meaning = "it closed the connection; is it a port for TLS, which wants rediss://?"
        if self.where.startswith(("rediss:", "valkeys:")):
            meaning += "; is it a port for TLS?"
        return f"no connection ({meaning})"


def _cancellations() -> int:
    """Return how often this task was told to end; redis-py takes some of them for its own."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _own(loop: asyncio.AbstractEventLoop) -> asyncio.Future[Reply]:
    """Return a future of the driver's own, of which nobody has to hear how it ended."""
    future: asyncio.Future[Reply] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _identity(hello: Reply, info: Reply) -> tuple[str, int] | None:
    """Return the server's run and our client's id there; None where an ACL hides them."""
    if not isinstance(hello, dict | list) or not isinstance(info, bytes):
        return None
    runs = [line for line in info.splitlines() if line.startswith(b"run_id:")]
    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
        # RESP3 has maps; in RESP2 they are flat lists.
        pairs = zip(hello[::2], hello[1::2], strict=False) if isinstance(hello, list) else hello
        fields = dict(pairs)
        return runs[0].decode(), int(fields[b"id"])
    return None
