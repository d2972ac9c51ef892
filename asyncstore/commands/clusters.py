"""`cluster start` and `cluster stats`: a cluster on this machine, and what is where on any."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from asyncstore import balance, embedded_cluster
from asyncstore.commands.exits import run, stop_signals
from asyncstore.commands.options import AsJson, KeyPrefix, Url, options_at, settings_of_a_store
from asyncstore.commands.output import (
    Columns,
    Rows,
    numbers,
    print_json,
    print_line,
    print_rows,
    say,
)
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
    as_json: AsJson = False,
) -> None:
    """Run a cluster of embedded servers on free local ports, until Ctrl-C.

    Started again in the same directory, the same cluster comes back.
    """
    run(lambda: _cluster_start(primaries, replicas, directory, as_json))


@app.command("stats")
def cluster_stats(
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds to count appends.")
    ] = 2.0,
    hottest: Annotated[int, typer.Option(min=0, help="How many slots are shown.")] = 10,
    as_json: AsJson = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say how events, memory and appends are spread over the nodes of a cluster, and its slots.

    Walks through all keys (SCAN), so it needs a user who may do that. Nothing is changed.
    """
    run(lambda: _cluster_stats(interval, hottest, as_json, options_at(url, key_prefix)))


async def _cluster_start(
    primaries: int, replicas: int, directory: Path | None, as_json: bool
) -> int:
    started = time.perf_counter()
    with _until_stopped():
        async with embedded_cluster.running(
            primaries=primaries, replicas=replicas, directory=directory
        ) as cluster:
            _describe(cluster, as_json)
            say(f"ready in {time.perf_counter() - started:.1f} s; Ctrl-C stops it")
            await anyio.sleep_forever()
    say("stopped")
    return 0


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Leave the block in good order when a signal says stop, also when it comes again and again."""
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:
        for number in (signal.SIGINT, *stop_signals()):
            loop.add_signal_handler(number, scope.cancel)
        yield


def _describe(cluster: Cluster, as_json: bool) -> None:
    if as_json:
        nodes = [
            {
                "url": node.url,
                "pid": node.pid,
                "directory": str(node.directory),
                "primary": node.is_primary,
            }
            for node in cluster.nodes
        ]
        print_json({"urls": cluster.urls, "nodes": nodes})
        return
    for node in cluster.nodes:
        role = "primary" if node.is_primary else "replica"
        print_line(f"{role}  {node.url}  pid {node.pid}  {node.directory}")
    urls = ", ".join(f'"{url}"' for url in cluster.urls)
    print_line("")
    print_line(f"asyncstore.open(urls=[{urls}])")
    print_line(f"export {URLS_VARIABLE}={','.join(cluster.urls)}")


async def _cluster_stats(interval: float, hottest: int, as_json: bool, options: Options) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        found = await balance.measure(store, interval, hottest)
    if as_json:
        print_json(asdict(found))
    else:
        print_rows(_nodes(found), *([_slots(found)] if found.hottest else []))
        say(f"appends were counted for {found.seconds:.1f} s")
    return 0


def _nodes(found: Balance) -> Rows:
    columns: Columns = ["node", *numbers("slots", "aggregates", "events", "memory", "appends/s")]
    return Rows(
        columns,
        [
            [
                *(node.where, f"{node.slots:,}", f"{node.aggregates:,}", f"{node.events:,}"),
                "not known" if node.memory is None else f"{node.memory / 2**20:,.1f} MiB",
                f"{node.appends_a_second:,.1f}",
            ]
            for node in found.nodes
        ],
    )


def _slots(found: Balance) -> Rows:
    columns: Columns = ["hottest slots", "node", *numbers("aggregates", "events", "appends/s")]
    return Rows(
        columns,
        [
            [
                *(f"{slot.slot}", slot.where, f"{slot.aggregates:,}", f"{slot.events:,}"),
                f"{slot.appends_a_second:,.1f}",
            ]
            for slot in found.hottest
        ],
    )
