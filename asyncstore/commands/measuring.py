"""`stats`: what there is, and the memory it takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from asyncstore import sizes
from asyncstore.commands.exits import run
from asyncstore.commands.options import AsJson, KeyPrefix, Url, options_at, settings_of_a_store
from asyncstore.commands.output import Rows, counting, numbers, print_json, print_rows, say
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from asyncstore.commands.output import Row
    from asyncstore.settings import Options
    from asyncstore.sizes import DomainSize, Sizes

app = typer.Typer()


@app.command("stats")
def stats_(as_json: AsJson = False, url: Url = None, key_prefix: KeyPrefix = None) -> None:
    """Say how many aggregates and events there are, and the memory that an event takes, by domain.

    Asks for the size of each key, one short command for each, and walks through all keys (SCAN), so
    it needs a user who may do that. Nothing is changed.
    """
    run(lambda: _stats(as_json, options_at(url, key_prefix)))


async def _stats(as_json: bool, options: Options) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        with counting("measuring", "keys") as on_keys:
            found = await sizes.measure(store, on_keys)
    if as_json:
        print_json(_fields(found))
        return 0
    columns = numbers("aggregates", "events", "memory", "bytes/event", "events only")
    print_rows(Rows(["domain", *columns], [_row(one) for one in (*found.domains, found.total)]))
    used = "not known" if found.server_memory is None else _mebibytes(found.server_memory)
    say(f"{found.keys:,} keys; memory of the server, whoever uses it: {used}")
    return 0


def _fields(found: Sizes) -> dict[str, Any]:
    return {
        "domains": [_size_fields(one) for one in found.domains],
        "total": {"other_memory": found.other_memory, **_size_fields(found.total)},
        "keys": found.keys,
        "server_memory": found.server_memory,
    }


def _size_fields(one: DomainSize) -> dict[str, Any]:
    return {**asdict(one), "bytes_per_event": one.bytes_per_event}


def _row(one: DomainSize) -> Row:
    counts = (f"{one.aggregates:,}", f"{one.events:,}", _mebibytes(one.memory))
    if not one.events:
        return [one.domain, *counts, "", ""]
    alone = one.event_memory / one.events
    return [one.domain, *counts, f"{one.bytes_per_event:,.0f}", f"{alone:,.0f}"]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
