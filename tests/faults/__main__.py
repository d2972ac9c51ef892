"""The command line of `make faults` and `make soak`."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import Awaitable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tests.faults import report
from tests.faults.clusters import CLUSTER_FAULTS, ClusterFault, play_on, theatre
from tests.faults.faults import FAULTS
from tests.faults.handling import CROWDS, play_crowd
from tests.faults.run import Row, play
from tests.faults.servers import binaries
from tests.faults.soak import MAX_GROWTH, soak
from tests.faults.stage import FSYNC, LONG, SHORT, Size

_BUILD = Path("build")

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Seed = Annotated[int | None, typer.Option(help="of the dice; printed when it is not given")]


@app.command()
def faults(
    only: Annotated[str, typer.Option(help="faults whose name holds this")] = "",
    server: Annotated[str, typer.Option(help="servers whose name holds this")] = "",
    *,
    short: Annotated[bool, typer.Option(help="as `make test` does it")] = False,
    seed: Seed = None,
) -> None:
    """Play all faults under load, print the table, and save it to build/faults.json."""
    dice = random.Random().randrange(1 << 32) if seed is None else seed
    size = SHORT if short else LONG
    say = report.console().print
    say(f"seed {dice}")
    started = time.perf_counter()
    rows: list[Row] = []
    for name, binary, is_first in binaries(server):
        for fault in FAULTS:
            if only not in fault.name or not (is_first or fault.is_of_the_server or server):
                continue
            if why := fault.missing():
                say(f"{fault.name}: left out, {why}")
                continue
            playing = play(fault, name, binary, size, dice)
            rows.append(asyncio.run(_told(fault.name, name, playing)))
        wanted = [
            fault
            for fault in CLUSTER_FAULTS
            if only in fault.name and (is_first or fault.is_of_the_server or server)
        ]
        rows += asyncio.run(_play_on_clusters(wanted, name, binary, size, dice))
        rows += [
            asyncio.run(_told(crowd.name, name, play_crowd(crowd, name, binary, size, dice)))
            for crowd in CROWDS
            if is_first and only in crowd.name
        ]
    seconds = time.perf_counter() - started
    report.show(rows)
    report.show_what_is_wrong(rows)
    say(f"{len(rows)} faults in {seconds:.0f} s, seed {dice}")
    content = {"seed": dice, "commit": _commit(), "form": size.name, "seconds": round(seconds)}
    report.save(_BUILD / "faults.json", **content, rows=[row.as_json() for row in rows])
    raise typer.Exit(1 if any(row.why for row in rows) else 0)


async def _told(what: str, server: str, playing: Awaitable[Row]) -> Row:
    """Wait for what is played, and say how it went."""
    started = time.perf_counter()
    row = await playing
    seconds = time.perf_counter() - started
    report.console().print(f"{what}, {server}: {len(row.why)} wrong, {seconds:.1f} s")
    return row


async def _play_on_clusters(
    wanted: list[ClusterFault], name: str, binary: str, size: Size, seed: int
) -> list[Row]:
    """Play faults on a cluster, and those of the bus on another one."""
    say = report.console().print
    rows: list[Row] = []
    for on_bus in (False, True):
        faults = [fault for fault in wanted if fault.on_bus == on_bus and not fault.missing()]
        faults = [fault for fault in faults if size is LONG or not fault.is_long]
        if not faults:
            continue
        async with theatre(name, binary, FSYNC, with_bus=on_bus) as place:
            for fault in faults:
                if not await place.has(fault.needs):
                    say(f"{fault.name}: left out, {name} has no {fault.needs}")
                    continue
                rows.append(await _told(fault.name, name, play_on(place, fault, size, seed)))
    return rows


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


@app.command(name="soak")
def soak_for_long(
    minutes: Annotated[float, typer.Option(help="how long")] = 10.0, seed: Seed = None
) -> None:
    """Mixed load and faults at random for so long: nothing lost, nothing leaked."""
    dice = random.Random().randrange(1 << 32) if seed is None else seed
    say = report.console().print
    say(f"seed {dice}")
    _, binary, _ = next(iter(binaries("")))
    result = asyncio.run(soak(binary, minutes * 60, dice, say))
    for fault, times in sorted(result.faults.items()):
        say(f"{times:5}  {fault}")
    say(
        f"{result.seconds:.0f} s, seed {dice}: {result.acknowledged:,} events acknowledged, "
        f"{result.lost} lost, {result.doubled} doubled, {result.unknown} unknown, "
        f"{result.calls:,} other calls; memory {result.growth() / (1 << 20):+.1f} MiB after the "
        f"warm-up (bound {MAX_GROWTH >> 20}), asyncstore's own {result.own_growth / 1024:+.0f} KiB"
    )
    for why in result.why:
        report.console().print(why, style="red", markup=False)
    report.save(_BUILD / "soak.json", commit=_commit(), **asdict(result))
    raise typer.Exit(1 if result.why else 0)


if __name__ == "__main__":
    app()
