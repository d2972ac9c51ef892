"""`compare` and `migrate`: two stores, and the way from one to the other."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from asyncstore import comparing, migrating
from asyncstore.commands.exits import run
from asyncstore.commands.options import (
    AsJson,
    AsJsonLines,
    Domains,
    KeyPrefix,
    options_at,
    settings_of_a_store,
)
from asyncstore.commands.output import counting, print_json, print_line, say
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from asyncstore.comparing import Difference
    from asyncstore.settings import Options

_FOLLOW_SECONDS = 0.5
_GO_ON = "interrupted; what was copied is copied, run it again to go on"
_ONE_PLACE = "A store's URL; of a cluster, URLs of some nodes with commas in between."

NewKeyPrefix = Annotated[str | None, typer.Option(help="The same of the new store, if another.")]

app = typer.Typer()


@app.command("compare")
def compare_(
    old: Annotated[str, typer.Argument(help=_ONE_PLACE)],
    new: Annotated[str, typer.Argument(help="The other one.")],
    domain: Domains = None,
    most: Annotated[int, typer.Option(min=1, help="How many differences are told.")] = 20,
    as_json: AsJsonLines = False,
    key_prefix: KeyPrefix = None,
    new_key_prefix: NewKeyPrefix = None,
) -> None:
    """Say whether two stores hold the same: events, branches, positions, snapshots.

    Exit code: 0 they do; 1 they do not; 2 it could not look. Nothing is changed. What is written
    meanwhile may show as a difference.
    """
    places = _places(old, new, key_prefix, new_key_prefix)
    run(lambda: _compare(places, domain, most, as_json), failed=2)


@app.command("migrate")
def migrate_(
    old: Annotated[str, typer.Argument(help=_ONE_PLACE)],
    new: Annotated[str, typer.Argument(help="Where all of it goes: an empty store.")],
    stopped: Annotated[
        bool, typer.Option(help="Nobody writes to the old one any more: switch without asking.")
    ] = False,
    as_json: AsJson = False,
    key_prefix: KeyPrefix = None,
    new_key_prefix: NewKeyPrefix = None,
) -> None:
    """Move a store to another one, such as one server to a cluster, while it is written to.

    It copies all there is and goes on with what changes, until you have stopped all that writes to
    the old store and press Enter. Then it copies the rest, compares both, and says how long that
    took. If it is cut off, run it again. The exit code is 0 once the new store has everything.
    """
    places = _places(old, new, key_prefix, new_key_prefix)
    run(lambda: _migrate(places, stopped, as_json), interrupted=_GO_ON)


def _places(
    old: str, new: str, key_prefix: str | None, new_key_prefix: str | None
) -> tuple[Options, Options]:
    """Return the options of two stores."""
    new_key_prefix = key_prefix if new_key_prefix is None else new_key_prefix
    return options_at(old, key_prefix), options_at(new, new_key_prefix)


async def _compare(
    places: tuple[Options, Options], domains: list[str] | None, most: int, as_json: bool
) -> int:
    old, new = map(settings_of_a_store, places)
    count = 0
    async with open_store(old) as one, open_store(new) as other:
        with counting("comparing") as on_events:
            async for difference in comparing.differences(one, other, domains, on_events):
                _print_difference(difference, as_json)
                count += 1
                if count == most:
                    break
    say(_summary(count, most))
    return 1 if count else 0


def _summary(count: int, most: int) -> str:
    if not count:
        return "they hold the same"
    return f"{count:,} differences" + (", and maybe more" if count == most else "")


def _print_difference(difference: Difference, as_json: bool) -> None:
    place = difference.aggregate
    if not as_json:
        print_line(_line_of(difference))
        return
    print_json(
        {
            "kind": difference.kind,
            "domain": place.domain,
            "edition": place.edition,
            "root": place.root,
            "sequence": difference.sequence,
            "text": difference.text,
        }
    )


def _line_of(difference: Difference) -> str:
    place = difference.aggregate
    where = str(place) if difference.sequence is None else f"{place}, {difference.sequence}"
    return f"{difference.kind}: {where}: {difference.text}"


async def _migrate(places: tuple[Options, Options], stopped: bool, as_json: bool) -> int:
    old, new = places
    async with open_store(settings_of_a_store(old)) as one, open_store(**new) as other:
        with counting("copying") as on_events:
            migration = migrating.Migration(one, other, on_events)
            if await migration.begin():
                say("going on with what was begun")
            await _caught_up(migration)
        if not stopped and not await _follow(migration):
            say("not switched: run it again to go on")
            return 1
        switch = await migration.finish()
    if as_json:
        print_json({"done": switch.is_done, **asdict(switch)})
    else:
        for difference in switch.differences:
            print_line(_line_of(difference))
    _say_of(switch)
    return 0 if switch.is_done else 1


async def _follow(migration: migrating.Migration) -> bool:
    """Copy what changes until somebody presses Enter; return False if nobody can any more."""
    say("Stop all that writes to the old store, handlers too; then press Enter to switch.")
    pressed = asyncio.create_task(_enter())
    try:
        while not pressed.done():
            await _caught_up(migration)
            await asyncio.wait([pressed], timeout=_FOLLOW_SECONDS)
        return await pressed
    finally:
        pressed.cancel()


async def _enter() -> bool:
    """Wait for a line on the standard input; return False at its end."""
    loop, is_there = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(sys.stdin.fileno(), is_there.set)
    except PermissionError:  # a file, which nobody presses Enter in
        return False
    try:
        await is_there.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return sys.stdin.readline() != ""


async def _caught_up(migration: migrating.Migration) -> None:
    started = time.perf_counter()
    caught = await migration.catch_up()
    if caught.aggregates:
        seconds = time.perf_counter() - started
        what = f"{caught.events:,} events of {caught.aggregates:,} aggregates"
        say(f"copied {what} in {seconds:.2f} s")


def _say_of(switch: migrating.Switch) -> None:
    if not switch.is_quiet:
        say("somebody has appended to the old store meanwhile: stop it and run this again")
    parts = f"catching up {switch.catching_up:.2f} s, comparing {switch.comparing:.2f} s"
    again = f"; {switch.mended:,} aggregates were copied again" if switch.mended else ""
    say(f"the switch took {switch.seconds:.2f} s: {parts}{again}")
    say("the new store has everything" if switch.is_done else "not switched")
