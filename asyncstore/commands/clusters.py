"""`cluster start` and `cluster stats`: a cluster on this machine, and what is where on any."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from asyncstore import balance, embedded_cluster
from asyncstore.commands.exits import run
from asyncstore.commands.options import KeyPrefix, Url, options_at, options_of, settings_of_a_store
from asyncstore.commands.output import say, show, table
from asyncstore.settings import URLS_VARIABLE
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncstore.balance import Balance
    from asyncstore.embedded_cluster import Cluster
    from asyncstore.settings import Options

app = typer.Typer(no_args_is_help=True, help="A cluster on this machine, and what is where on any.")


@app.command("start")
def cluster_start(
    primaries: Annotated[int, typer.Option(help="How many share the slots.")] = 3,
    replicas: Annotated[int, typer.Option(help="How many each primary has.")] = 1,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the data last; without it, they go with the cluster."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
) -> None:
    """Run a cluster of embedded servers on free local ports, until Ctrl-C.

    Started again in the same directory, the same cluster comes back.
    """
    run(lambda: _cluster_start(primaries, replicas, directory, as_json))


@app.command("stats")
def cluster_stats(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds to count appends.")] = 2.0,
    hottest: Annotated[int, typer.Option(min=0, help="How many slots are shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say how events, memory and appends are spread over the nodes of a cluster, and its slots.

    Walks through all keys (SCAN), so it needs a user who may do that. Nothing is changed.
    """
    options = options_of(None, key_prefix) if url is None else options_at(url, key_prefix)
    run(lambda: _cluster_stats(interval, hottest, as_json, options))


async def _cluster_start(
    primaries: int, replicas: int, directory: Path | None, as_json: bool
) -> int:
    started = time.perf_counter()
    with _until_stopped():
        async with embedded_cluster.running(
            primaries=primaries, replicas=replicas, directory=directory
        ) as cluster:
            print(_described(cluster, as_json), flush=True)
            say.print(f"ready in {time.perf_counter() - started:.1f} s; Ctrl-C stops it")
            await anyio.sleep_forever()
    say.print("stopped")
    return 0


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Leave the block in good order when a signal says stop, also when it comes again and again."""
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, scope.cancel)
        yield


def _described(cluster: Cluster, as_json: bool) -> str:
    nodes = cluster.nodes
    if as_json:
        shown = [
            {
                "url": node.url,
                "pid": node.pid,
                "directory": str(node.directory),
                "primary": node.is_primary,
            }
            for node in nodes
        ]
        return json.dumps({"urls": cluster.urls, "nodes": shown})
    urls = ", ".join(f'"{url}"' for url in cluster.urls)
    roles = (("primary" if node.is_primary else "replica", node) for node in nodes)
    return "\n".join(
        [
            *(f"{role}  {node.url}  pid {node.pid}  {node.directory}" for role, node in roles),
            "",
            f"asyncstore.open(urls=[{urls}])",
            f"export {URLS_VARIABLE}={','.join(cluster.urls)}",
        ]
    )


async def _cluster_stats(interval: float, hottest: int, as_json: bool, options: Options) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        found = await balance.measure(store, interval, hottest)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print_balance(found)
    return 0


def _print_balance(found: Balance) -> None:
    nodes = table("node", "slots", "aggregates", "events", "memory", "appends/s")
    for node in found.nodes:
        memory = "not known" if node.memory is None else f"{node.memory / 2**20:,.1f} MiB"
        counts = (f"{node.slots:,}", f"{node.aggregates:,}", f"{node.events:,}", memory)
        nodes.add_row(node.where, *counts, f"{node.appends_a_second:,.1f}")
    slots = table("hottest slots", "node", "aggregates", "events", "appends/s")
    for slot in found.hottest:
        sizes = (f"{slot.aggregates:,}", f"{slot.events:,}")
        slots.add_row(f"{slot.slot}", slot.where, *sizes, f"{slot.appends_a_second:,.1f}")
    show(nodes)
    if found.hottest:
        show(slots)
    say.print(f"appends were counted for {found.seconds:.1f} s")
