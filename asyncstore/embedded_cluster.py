"""A cluster of embedded servers, for development and tests: formed without a cli, in seconds.

Each node is an embedded server with a keeper of its own (`embedded`), which stops it when this
process ends, however it ends. What is particular to a cluster is here: ports, forming, coming back
in a directory, and what tests do to nodes.

A new cluster takes 2 seconds at least, whatever its size: so long a primary waits after its start
before it believes that the cluster is well.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
from asyncio import gather
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from asyncstore import embedded, slots
from asyncstore.answers import NOT_NOW
from asyncstore.errors import (
    ConfigurationError,
    InvalidValue,
    StoreUnavailable,
    UnexpectedReply,
)
from asyncstore.forms import Peer, fields_of, is_text, peers_of
from asyncstore.sharing import all_of
from asyncstore.transport import Bounds, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

    from asyncstore.wire import Argument

_HOST: Final = "127.0.0.1"
_MOST_NODES: Final = 64
# Outside of what Linux and macOS give to outgoing connections, so that a port stays free while its
# server is down. The bus takes another, this much higher; no port is the bus's of another node.
_PORTS: Final = range(12_000, 22_000)
_BUS: Final = 10_000
_MORE_PORTS: Final = 4
_POLL_SECONDS: Final = 0.02
_BOUNDS: Final = Bounds(timeout=5.0, max_commands=100, max_bytes=1 << 20)
_READY_SECONDS: Final = 60.0
_NODE_TIMEOUT: Final = 2.0
_RECORD: Final = "cluster.json"
_LOCK: Final = "lock"

_NODE_SETTINGS: Final = {
    "bind": _HOST,
    "cluster-enabled": "yes",
    "cluster-announce-ip": _HOST,  # or a cluster of one node does not know its own address
    "repl-diskless-sync-delay": "0",  # it would wait 5 seconds for more replicas
}


@contextlib.asynccontextmanager
async def running(
    *,
    primaries: int = 3,
    replicas: int = 1,
    directory: Path | None = None,
    binary: Path | None = None,
    node_timeout: float = _NODE_TIMEOUT,
    settings: Mapping[str, str] | None = None,
    seconds: float = _READY_SECONDS,
) -> AsyncIterator[Cluster]:
    """Run a cluster on free ports of the loopback interface; it is whole when it is given.

    Each of the primaries has an even share of the slots and that many `replicas`. With 1 or 2
    primaries nobody can be promoted: that takes a majority of primaries. A primary that is silent
    for `node_timeout` seconds is replaced.

    Without a `directory` the data go with the cluster, and a node that is restarted comes back
    without its own, unless `settings` say `{"appendonly": "yes"}`. In a directory the data last,
    and the same cluster comes back from there; a node whose port is taken by then gets another.
    `binary` is another server than the embedded one, `settings` go to each server.

    Raises `ConfigurationError` for arguments that can't be used, `StoreUnavailable` when the
    cluster is not whole in `seconds`, with the end of a server's log. Nothing is left running then.
    """
    embedded.check_platform()
    check(primaries, replicas)
    with _record_of(directory, primaries, replicas) as record:
        common = {**_NODE_SETTINGS, "cluster-node-timeout": str(int(node_timeout * 1000))}
        cluster = Cluster(record, _check_binary(binary), common | dict(settings or {}))
        try:
            with cluster._within(seconds):
                await cluster._start()
            yield cluster
        finally:
            with anyio.CancelScope(shield=True):
                await cluster._stop()


def check(primaries: int, replicas: int) -> None:
    """Raise `ConfigurationError` for numbers of which no cluster can be made."""
    if primaries < 1:
        raise ConfigurationError("primaries", f"{primaries}: a cluster has 1 at least")
    if replicas < 0:
        why = f"{replicas}: it is the number of replicas for each primary, 0 or more"
        raise ConfigurationError("replicas", why)
    nodes = primaries * (1 + replicas)
    if nodes > _MOST_NODES:
        why = f"{primaries} with replicas={replicas} are {nodes} servers on one machine"
        raise ConfigurationError("primaries", f"{why}; at most {_MOST_NODES} can be")


def _check_binary(binary: Path | None) -> Path:
    if binary is None:
        return embedded.find_binary()
    found = shutil.which(binary)
    if found is None:
        raise ConfigurationError("binary", f"{binary} is not a program that can be run")
    return Path(found)


class Node:
    """One server of the cluster. `is_primary` tells its role when the cluster became whole."""

    def __init__(self, name: str, home: embedded.Home) -> None:
        self.name = name
        self.directory = home.data
        self.url = ""
        self.port = 0
        self.pid = 0
        self.id = ""  # by which the nodes know each other
        self.is_primary = True
        self._home = home
        self._user = embedded.User(home)

    async def kill(self) -> None:
        """Kill the server (SIGKILL) and wait until it has ended; it stays down."""
        await self._user.end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop the server in good order and wait until it has ended; it stays down."""
        await self.resume()  # a paused one would not hear of it
        await self._user.end(signal.SIGTERM)

    async def restart(self) -> None:
        """Stop the server if it runs, and start it again: same port, same directory, new `pid`.

        It answers then; `Cluster.until_whole` waits for its part in the cluster.
        """
        await self.stop()
        await self._user.start_again()
        await self._meet()

    async def pause(self) -> None:
        """Have the server do nothing, and keep its connections (SIGSTOP), until `resume`."""
        await self._user.signal(signal.SIGSTOP)

    async def resume(self) -> None:
        """Have a paused server go on."""
        await self._user.signal(signal.SIGCONT)

    async def _meet(self) -> None:
        """Learn from the server itself who and where it is."""
        async with _lines_to([self]) as (line,):
            server = await line.info("server")
            self.id = await line.ask("CLUSTER", "MYID")
        self.pid, self.port = int(server["process_id"]), int(server["tcp_port"])
        self.url = f"redis://{_HOST}:{self.port}"

    def __str__(self) -> str:
        return f"{self.name} at {self.url}" if self.url else self.name

    def __repr__(self) -> str:
        return f"<Node {self}>"


class Cluster:
    """A running cluster: its `nodes`, primaries first, and the `urls` to open a store with."""

    def __init__(self, record: _Record, binary: Path, settings: Mapping[str, str]) -> None:
        self.nodes: list[Node] = []
        self._record = record
        self._binary = binary
        self._settings = settings
        self._lack: tuple[Node, str] | None = None  # what we are waiting for

    @property
    def directory(self) -> Path | None:
        """The directory of data that last, or None."""
        return self._record.directory

    @property
    def urls(self) -> list[str]:
        """The URLs of all nodes."""
        return [node.url for node in self.nodes]

    async def until_whole(self, seconds: float = _READY_SECONDS) -> None:
        """Wait until all nodes agree who has which slots, and all replicas are in step.

        All of them must be running. Raises `StoreUnavailable` if it takes longer than `seconds`.
        """
        with self._within(seconds):
            async with _lines_to(self.nodes) as lines:
                await self._until(lines, _lack_of_whole)

    async def add_node(self, seconds: float = _READY_SECONDS) -> Node:
        """Start one more node and make it known to all: a primary without slots."""
        with self._within(seconds):
            node = await self._launch(self._record.new_name())
            async with _lines_to(self.nodes) as lines:
                await _introduce(lines[-1:], self.nodes)
                await self._until(lines, _lack_of_whole)
        self._record.save()
        return node

    async def remove_node(self, node: Node, seconds: float = _READY_SECONDS) -> None:
        """Stop a node that has no slots and make all others forget it. Its data go."""
        others = [other for other in self.nodes if other is not node]
        with self._within(seconds):
            async with _lines_to(others) as lines:
                if any(peer.slots for peer in await lines[0].peers() if peer.id == node.id):
                    raise InvalidValue("node", f"{node} has slots; move them to other nodes first")
                self.nodes = others
                await node._user.go()
                await self._until_forgotten(lines, node)
        if self.directory is not None:
            shutil.rmtree(node.directory)
        del self._record.ports[node.name]
        self._record.save()

    # Starting and stopping

    async def _start(self) -> None:
        record = self._record
        known = dict(record.ports)
        await all_of(self._launch(name) for name in list(known) or record.names())
        self.nodes.sort(key=lambda node: _number(node.name))
        record.save()
        async with _lines_to(self.nodes) as lines:
            if not record.is_formed:
                await self._form(lines)
            elif record.ports != known:
                await _introduce(lines, self.nodes)
            await self._until(lines, _lack_of_whole)
        record.is_formed = True
        record.save()
        self.nodes.sort(key=lambda node: (not node.is_primary, _number(node.name)))

    async def _form(self, lines: list[_Line]) -> None:
        """Make a cluster of new servers: primaries first, then replicas, in turns."""
        primaries = self._record.primaries
        for epoch, line in enumerate(lines, start=1):
            await line.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        await _introduce(lines, self.nodes)
        bounds = [slots.COUNT * part // primaries for part in range(primaries + 1)]
        for place, line in enumerate(lines[:primaries]):
            await line.ask("CLUSTER", "ADDSLOTSRANGE", bounds[place], bounds[place + 1] - 1)
        await self._until(lines, _lack_of_links)
        for place, line in enumerate(lines[primaries:]):
            await line.ask("CLUSTER", "REPLICATE", self.nodes[place % primaries].id)

    async def _launch(self, name: str) -> Node:
        """Start the server of a node; where somebody has its port, at another one."""
        port = self._record.ports.get(name) or _free_port()
        for _ in range(_MORE_PORTS):
            # Whether it was the port, only words in its log would say: they are not asked.
            with contextlib.suppress(StoreUnavailable):
                return await self._launch_at(port, name)
            port = _free_port()
        return await self._launch_at(port, name)

    async def _launch_at(self, port: int, name: str) -> Node:
        home = embedded.prepare(
            self._record.directory_of(name),
            binary=self._binary,
            restarts=False,
            settings={**self._settings, "port": str(port)},
        )
        node = Node(name, home)
        try:
            await node._user.come()
            await node._meet()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await node._user.go()
            raise
        self._record.ports[name] = node.port
        self.nodes.append(node)
        return node

    async def _stop(self) -> None:
        ends = await gather(*(node._user.go() for node in self.nodes), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    # Waiting

    @contextlib.contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Say what was lacking when the time is over, or a node refuses what it is told."""
        self._lack = None
        try:
            with anyio.fail_after(seconds):
                yield
        except TimeoutError:
            why = f"it is not whole after {seconds:g} s"
            if self._lack is not None:
                node, lack = self._lack
                why += f": {node} {lack}; its log ends with: {node._home.log_end()}"
            raise StoreUnavailable(str(self), why) from None
        except UnexpectedReply as error:
            raise StoreUnavailable(str(self), str(error)) from None

    async def _until(
        self, lines: list[_Line], lack_of: Callable[[list[_View]], tuple[Node, str] | None]
    ) -> None:
        """Wait until nothing is lacking any more, and note the roles that the nodes have."""
        while True:
            views = await all_of(line.view() for line in lines)
            self._lack = lack_of(views)
            if self._lack is None:
                break
            await anyio.sleep(_POLL_SECONDS)
        for view in views:
            view.node.is_primary = view.myself.is_primary

    async def _until_forgotten(self, lines: list[_Line], node: Node) -> None:
        """Have each forget the node. Newer servers pass that on, and it may be known no more."""
        for line in lines:
            while any(peer.id == node.id for peer in await line.peers()):
                with contextlib.suppress(UnexpectedReply):
                    await line.ask("CLUSTER", "FORGET", node.id)

    def __str__(self) -> str:
        return f"the cluster in {self.directory}" if self.directory else "the cluster"


# What a directory keeps of its cluster


@dataclass
class _Record:
    """The shape of a cluster, and the port of each node by its name. None: it is not kept."""

    directory: Path | None
    primaries: int
    replicas: int
    is_formed: bool = False  # or forming it was cut off, and nobody has used it
    ports: dict[str, int] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of the nodes of a new cluster."""
        return [f"node-{n}" for n in range(1, self.primaries * (1 + self.replicas) + 1)]

    def new_name(self) -> str:
        return f"node-{max(map(_number, self.ports)) + 1}"

    def directory_of(self, name: str) -> Path | None:
        return None if self.directory is None else self.directory / name

    def save(self) -> None:
        if self.directory is None:
            return
        self.ports = {name: self.ports[name] for name in sorted(self.ports, key=_number)}
        kept = {name: value for name, value in asdict(self).items() if name != "directory"}
        part = self.directory / f"{_RECORD}.part"
        part.write_text(json.dumps(kept, indent=2) + "\n")
        part.replace(self.directory / _RECORD)


def _number(name: str) -> int:
    return int(name.removeprefix("node-"))


@contextlib.contextmanager
def _record_of(directory: Path | None, primaries: int, replicas: int) -> Iterator[_Record]:
    """Give the record of a directory, of which nobody else makes a cluster meanwhile."""
    if directory is None:
        yield _Record(None, primaries, replicas)
        return
    try:
        directory = embedded.make_directory(directory)
    except ConfigurationError as error:
        raise ConfigurationError("directory", error.why) from None
    with _locked(directory):
        yield _read_record(directory, primaries, replicas)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    import fcntl  # Windows has none

    try:
        lock = (directory / _LOCK).open("ab")
    except OSError as error:
        why = f"{directory} can't be the directory of a cluster: {error.strerror}"
        raise ConfigurationError("directory", why) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"the cluster in {directory} is running already, for another process"
            raise ConfigurationError("directory", why) from None
        yield


def _read_record(directory: Path, primaries: int, replicas: int) -> _Record:
    new = _Record(directory, primaries, replicas)
    try:
        record = _Record(directory, **json.loads((directory / _RECORD).read_text()))
    except FileNotFoundError:
        if {path.name for path in directory.iterdir()} - {_LOCK, ".gitignore"}:
            why = f"{directory} is neither empty nor the directory of a cluster"
            raise ConfigurationError("directory", why) from None
        new.save()
        return new
    except (OSError, TypeError, ValueError):
        why = f"{directory / _RECORD} can't be read: it is not what a cluster leaves there"
        raise ConfigurationError("directory", why) from None
    if not record.is_formed:
        for name in {*record.names(), *record.ports}:
            shutil.rmtree(directory / name, ignore_errors=True)
        new.save()
        return new
    if (record.primaries, record.replicas) != (primaries, replicas):
        why = (
            f"the cluster in {directory} has primaries={record.primaries} and "
            f"replicas={record.replicas}: give these numbers, or another directory"
        )
        raise ConfigurationError("directory", why)
    return record


def _free_port() -> int:
    """Return a port that nobody has now, nor the one of its bus."""
    for port in random.sample(_PORTS, 1000):
        if _is_free(port) and _is_free(port + _BUS):
            return port
    why = f"there are no free ports between {_PORTS.start} and {_PORTS.stop}"
    raise StoreUnavailable(f"a cluster on {_HOST}", why)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


# Talking to nodes


@dataclass(frozen=True, slots=True)
class _View:
    """What a node sees of the cluster."""

    node: Node
    peers: list[Peer]
    cluster: dict[str, str]  # CLUSTER INFO
    replication: dict[str, str]  # INFO replication
    is_loading: bool = False  # and tells nothing else meanwhile

    @property
    def myself(self) -> Peer:
        return next(peer for peer in self.peers if peer.is_asked)

    @property
    def shape(self) -> frozenset[tuple[str, str, tuple[str, ...]]]:
        """Who replicates whom, and who has which slots."""
        return frozenset((peer.id, peer.primary, peer.slots) for peer in self.peers)

    def lack_of_links(self, nodes: int) -> str:
        if self.is_loading:
            return "is loading its data"
        if len(self.peers) != nodes:
            return f"knows {len(self.peers)} of {nodes} nodes"
        return next(
            (f"sees {peer.id} as {peer.trouble}" for peer in self.peers if peer.trouble), ""
        )

    def lack_of_health(self) -> str:
        state, covered = self.cluster["cluster_state"], self.cluster["cluster_slots_ok"]
        if state != "ok" or int(covered) != slots.COUNT:
            return f"says that the cluster's state is {state}, with {covered} slots covered"
        if not self.myself.is_primary:
            link = self.replication.get("master_link_status")
            return "" if link == "up" else f"says that the link to its primary is {link}"
        replicas = sum(peer.primary == self.myself.id for peer in self.peers)
        in_step = sum("state=online" in value for value in self.replication.values())
        return "" if in_step == replicas else f"has {in_step} of {replicas} replicas in step"


def _lack_of_links(views: list[_View]) -> tuple[Node, str] | None:
    lacks = ((view.node, view.lack_of_links(len(views))) for view in views)
    return next((lack for lack in lacks if lack[1]), None)


def _lack_of_whole(views: list[_View]) -> tuple[Node, str] | None:
    lack = _lack_of_links(views)
    if lack is not None:
        return lack
    for view in views:
        if view.shape != views[0].shape:
            return view.node, f"does not agree with {views[0].node} who has which slots"
        if text := view.lack_of_health():
            return view.node, text
    return None


class _Line:
    """A connection to a node."""

    def __init__(self, node: Node, transport: Transport) -> None:
        self._node = node
        self._transport = transport

    async def ask(self, *command: Argument) -> str:
        """Return the answer to a command; one that changes something may be refused if sent twice.

        The transport sends it again when the connection breaks, which ends the forming anyway.
        """
        return (await self._told(*command)).decode()

    async def _told(self, *command: Argument) -> bytes:
        try:
            reply: bytes = await self._transport.command(is_text, *command)
        except StoreUnavailable as error:
            raise _with_log(self._node, error) from None
        return reply

    async def info(self, section: str) -> dict[str, str]:
        return fields_of(await self._told("INFO", section))

    async def peers(self) -> list[Peer]:
        return peers_of(await self.ask("CLUSTER", "NODES"))

    async def view(self) -> _View:
        try:
            cluster = fields_of(await self._told("CLUSTER", "INFO"))
            return _View(self._node, await self.peers(), cluster, await self.info("replication"))
        except StoreUnavailable as error:
            if NOT_NOW["LOADING"] not in error.why:
                raise
            return _View(self._node, [], {}, {}, is_loading=True)


def _with_log(node: Node, error: StoreUnavailable) -> StoreUnavailable:
    return StoreUnavailable(str(node), f"{error.why}; its log ends with: {node._home.log_end()}")


@contextlib.asynccontextmanager
async def _lines_to(nodes: Iterable[Node]) -> AsyncIterator[list[_Line]]:
    """Connect to nodes: by their sockets, as a port may have been another server's for a moment."""
    async with contextlib.AsyncExitStack() as stack:
        lines = []
        for node in nodes:
            transport = await _connected_to(node)
            stack.push_async_callback(transport.aclose)
            lines.append(_Line(node, transport))
        yield lines


async def _connected_to(node: Node) -> Transport:
    """Return a connection to a node, when it has loaded its data."""
    while True:
        transport = Transport(node._home.url, str(node), _BOUNDS)
        try:
            await transport.open()
        except StoreUnavailable as error:
            if NOT_NOW["LOADING"] not in error.why:
                raise _with_log(node, error) from None
        else:
            return transport
        await anyio.sleep(_POLL_SECONDS)


async def _introduce(lines: Iterable[_Line], nodes: Iterable[Node]) -> None:
    """Make nodes known to others, or where they are now.

    Each to each: word of mouth takes 1 to 2 seconds longer, and does not tell who has moved.
    """
    for line in lines:
        for node in nodes:
            if node is not line._node:
                await line.ask("CLUSTER", "MEET", _HOST, node.port)
