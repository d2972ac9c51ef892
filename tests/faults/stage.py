"""What a fault acts on: one or two servers, the link to them, and stores under load."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import asyncstore
from asyncstore import Durability, Store
from asyncstore.testing import FaultProxy, fault_proxy
from tests.faults.history import History
from tests.faults.preload import Preload
from tests.polling import eventually

ADMIN_SECONDS = 20
PATIENT = 30.0  # seconds that calls have, where they should not run out of time


@dataclass(frozen=True)
class Level:
    """What "stored" means: the server's settings, and what an append says of it."""

    name: str
    settings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


MEMORY = Level("MEMORY", ("--appendonly", "no"))
EVERYSEC = Level("MEMORY, everysec", ("--appendonly", "yes", "--appendfsync", "everysec"))
FSYNC = Level(
    "FSYNC",
    ("--appendonly", "yes", "--appendfsync", "always"),
    {"durability": Durability.FSYNC},
)
REPLICA = Level("replicas(1)", ("--appendonly", "no"), {"durability": Durability.replicas(1)})


@dataclass(frozen=True)
class Size:
    """How much of everything: the short form is for `make test`, the long one for `make faults`."""

    name: str
    writers: int
    rounds: int
    appends: int  # that are acknowledged before, between and after faults
    silence: float
    timeout: float  # of calls, where a fault lets them run into it
    events: int  # that a server has to load
    load_delay: int  # microseconds that it takes longer for each key of them
    slots: int  # that are moved key by key


SHORT = Size(
    name="short",
    writers=32,
    rounds=2,
    appends=250,
    silence=2.0,
    timeout=0.5,
    events=5_000,
    load_delay=2_000,
    slots=4,
)
LONG = Size(
    name="long",
    writers=48,
    rounds=5,
    appends=1200,
    silence=30.0,
    timeout=1.0,
    events=1_000_000,
    load_delay=0,
    slots=30,
)


@dataclass
class Node:
    """One server process, that listens on a unix socket."""

    binary: str
    directory: Path
    settings: list[str]
    preload: Preload | None
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.directory / "socket"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        own = ["--dir", str(self.directory), "--unixsocket", str(self.socket), "--save", ""]
        where = ["--port", "0", "--repl-diskless-sync-delay", "0"]
        environment = self.preload.environment() if self.preload else None
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, *own, *where, *self.settings],
                stdout=log,
                stderr=log,
                env=environment,
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def client(self) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self.socket),
            socket_timeout=ADMIN_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )

    def tell(self, *command: Any) -> Any:
        """Run a command as an operator would, on a connection of its own."""
        with self.client() as client:
            return client.execute_command(*command)

    async def ask(self, *command: Any) -> Any:
        return await asyncio.to_thread(self.tell, *command)

    async def info(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("INFO", section)
        return found

    async def is_ready(self) -> bool:
        """Whether it answers, with its data; an error if it has ended instead."""
        assert not self.has_ended(), (self.directory / "log").read_text()[-2000:]
        try:
            return bool((await self.info("persistence"))["loading"] == 0)
        except redis.ConnectionError:
            return False

    async def ready(self) -> None:
        await eventually(self.is_ready, "the server was ready")


@contextmanager
def _node(binary: str, settings: Sequence[str], *, preload: bool) -> Iterator[Node]:
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    library = Preload.build(directory) if preload else None
    node = Node(binary, directory, list(settings), library)
    try:
        node.start()
        yield node
    finally:
        node.kill()
        shutil.rmtree(directory)


@dataclass(kw_only=True)
class Scene:
    """Stores under load, and what is known of it."""

    history: History
    stores: list[Store]
    size: Size
    dice: random.Random
    level: Level

    async def more(self, appends: int | None = None) -> None:
        """Wait until so many more appends were acknowledged: the load is on."""
        wanted = self.history.acknowledged + (appends or self.size.appends)
        await eventually(lambda: self.history.acknowledged >= wanted, "they wrote more")

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await eventually(condition, what)

    async def until_error(self, name: str, times: int = 32) -> None:
        """Wait until writers were told so, so many times more than before."""
        before = self.count(name)
        await eventually(lambda: self.count(name) >= before + times, f"{name} was raised")

    def count(self, name: str) -> int:
        return sum(times for error, times in self.history.errors.items() if error.startswith(name))

    async def read_more(self, times: int = 5) -> None:
        """Wait until readers have read: reads go on."""
        wanted = self.history.reads + times
        await eventually(lambda: self.history.reads >= wanted, "they read on")


@dataclass(kw_only=True)
class Stage(Scene):
    """All that a fault may touch.

    `node` serves, by way of `link`; `spare` is its replica, where there is one, by way of
    `replication`.
    """

    node: Node
    spare: Node | None
    link: FaultProxy
    replication: FaultProxy


@asynccontextmanager
async def staged(
    binary: str,
    level: Level,
    size: Size,
    seed: int,
    *,
    settings: Sequence[str] = (),
    replica: bool = False,
    preload: bool = False,
    patience: float = PATIENT,
) -> AsyncIterator[Stage]:
    """Set the servers, the link and two stores up; all are gone afterwards."""
    arguments = (*level.settings, *settings)
    start = partial(_node, binary, arguments, preload=preload)
    async with AsyncExitStack() as stack:
        node = stack.enter_context(start())
        await node.ready()
        spare = stack.enter_context(start()) if replica else None
        replication = await stack.enter_async_context(fault_proxy(f"unix://{node.socket}"))
        if spare is not None:
            await spare.ready()
            await follow(spare, node, replication)
        link = await stack.enter_async_context(fault_proxy(f"unix://{node.socket}"))
        dice = link.dice = random.Random(seed)
        stores = [
            await stack.enter_async_context(asyncstore.open(link.url, timeout=patience))
            for _ in range(2)
        ]
        yield Stage(
            node=node,
            spare=spare,
            link=link,
            replication=replication,
            history=History(),
            stores=stores,
            size=size,
            dice=dice,
            level=level,
        )


async def follow(replica: Node, primary: Node, replication: FaultProxy) -> None:
    """Make a node a replica, and wait until it has what its primary has."""
    replication.switch(f"unix://{primary.socket}")
    await replica.ask("REPLICAOF", "127.0.0.1", replication.port)

    async def is_in_step() -> bool:
        with contextlib.suppress(redis.ConnectionError):  # it may be loading
            state = await replica.info("replication")
            return bool(state.get("master_link_status") == "up")
        return False

    await eventually(is_in_step, "the replica was in step")
