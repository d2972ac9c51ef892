"""The bus of a cluster, on which its nodes talk with each other, led through here to be cut.

Each node announces a port of ours as that of its bus, and calls the others from an address of its
own on the loopback interface, by which we know who calls. So what is cut is just what a partition
between nodes would cut; and with it their replication, by way of the user that it logs in as.
A node that is restarted knows nothing of it any more.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from asyncstore.embedded_cluster import Node
from tests.faults.admin import tell
from tests.polling import eventually

_BUS = 10_000  # how much higher the port of the bus is
_MAY_REPLICATE = ("ACL", "SETUSER", "replication", "on", ">copy", "+psync", "+replconf", "+ping")


def missing() -> str | None:
    """Say why it can't be done here; None if it can."""
    return None if sys.platform == "linux" else "127.0.0.2 and so on are addresses on Linux only"


class Bus:
    """The lines between nodes."""

    def __init__(self, nodes: list[Node]) -> None:
        self._callers = {f"127.0.0.{place}": node for place, node in enumerate(nodes, start=10)}
        self._isolated: set[Node] = set()
        self._lines: dict[asyncio.Task[None], tuple[Node, Node]] = {}
        self._pairs: set[tuple[Node, Node]] = set()  # who has called whom

    async def isolate(self, node: Node) -> None:
        """Cut a node off from all others, its replicas included; clients still reach it."""
        self._isolated.add(node)
        for task, ends in list(self._lines.items()):
            if node in ends:
                task.cancel()
        await tell(node, "ACL", "DELUSER", "replication")  # and its connections with it

    async def heal(self, node: Node) -> None:
        self._isolated.discard(node)
        await tell(node, *_MAY_REPLICATE)

    async def lay(self, stack: AsyncExitStack) -> None:
        """Have all nodes use these lines, and wait until they do."""
        for address, node in self._callers.items():
            server = await asyncio.start_server(partial(self._serve, node), "127.0.0.1", 0)
            stack.callback(server.close)
            await tell(node, *_MAY_REPLICATE)
            for name, value in {
                "bind-source-addr": address,
                "cluster-announce-bus-port": server.sockets[0].getsockname()[1],
                "protected-mode": "no",  # to Redis only 127.0.0.1 is loopback; nodes listen there
                "masteruser": "replication",
                "masterauth": "copy",
            }.items():
                await tell(node, "CONFIG", "SET", name, value)
        for node in self._callers.values():
            await tell(node, "CLIENT", "KILL", "TYPE", "replica")
        pairs = len(self._callers) * (len(self._callers) - 1)
        await eventually(lambda: len(self._pairs) == pairs, "all nodes call each other here")

    async def _serve(
        self, node: Node, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        caller = self._callers.get(writer.get_extra_info("peername")[0])
        if caller is None:  # it was not told yet from where to call, and will call again
            writer.transport.abort()
            return
        self._pairs.add((caller, node))
        self._lines[task] = (caller, node)
        try:
            if not self._isolated.intersection((caller, node)):
                await _connect(reader, writer, node.port + _BUS)
        except (OSError, asyncio.CancelledError):
            pass  # the node is down, or the line was cut
        finally:
            del self._lines[task]
            writer.transport.abort()

    async def close(self) -> None:
        for task in list(self._lines):
            task.cancel()
        while self._lines:
            await asyncio.wait(self._lines, timeout=0.1)


async def _connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    there, back = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_pump(reader, back))
            tasks.create_task(_pump(there, writer))
    except* OSError:
        pass
    finally:
        back.transport.abort()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        target.write(data)
        await target.drain()
    raise ConnectionResetError


@asynccontextmanager
async def bus_of(nodes: list[Node]) -> AsyncIterator[Bus]:
    """Lead the bus of a running cluster through here."""
    bus = Bus(nodes)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(bus.close)
        await bus.lay(stack)
        yield bus
