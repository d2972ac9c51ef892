"""`tail`: events as they are appended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from asyncstore.commands.exits import run
from asyncstore.commands.options import (
    AsJsonLines,
    KeyPrefix,
    Url,
    options_at,
    settings_of_a_store,
)
from asyncstore.commands.output import Cell, print_cells, print_json, say
from asyncstore.commands.shown import data_of, fields_of, time_of
from asyncstore.errors import CorruptEvent, ListenerLagged
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncstore.listening import Listener
    from asyncstore.recorded import RecordedEvent
    from asyncstore.settings import Options
    from asyncstore.store import Store

_YELLOW = "yellow"

app = typer.Typer()


@app.command("tail")
def tail_(
    domain: Annotated[str | None, typer.Argument(help="Only this domain.")] = None,
    root: Annotated[str | None, typer.Option(help="Only aggregates with this root.")] = None,
    edition: Annotated[str | None, typer.Option(help="Only this edition.")] = None,
    types: Annotated[
        list[str] | None, typer.Option("--type", help="Only this type; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="End after that many.")] = None,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Show events as they are appended, data included, until Ctrl-C.

    From the line `listening` on, none is left out without a word.
    """
    wanted = _Wanted(domain, root, edition, types, limit)
    run(lambda: _tail(wanted, as_json, options_at(url, key_prefix)), interrupted="")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which events are shown."""

    domain: str | None
    root: str | None
    edition: str | None
    types: list[str] | None
    limit: int | None

    def listener(self, store: Store) -> Listener:
        """Return what hears of them."""
        types = self.types or None
        return store.listen(self.domain, root=self.root, edition=self.edition, types=types)


async def _tail(wanted: _Wanted, as_json: bool, options: Options) -> int:
    count = 0
    async with (
        open_store(settings_of_a_store(options)) as store,
        wanted.listener(store) as live,
    ):
        say("listening")
        async for event in _heard(live):
            count += _print(event, as_json)
            if count == wanted.limit:
                break
    return 0


async def _heard(live: Listener) -> AsyncIterator[RecordedEvent]:
    """Iterate over what is heard; what is not, or can't be read, is said."""
    while True:
        try:
            yield await anext(live)
        except StopAsyncIteration:
            return
        except (ListenerLagged, CorruptEvent) as error:
            say(f"{error}", _YELLOW)


def _print(event: RecordedEvent, as_json: bool) -> bool:
    """Print an event; return False if it can't be decoded."""
    try:
        shown = fields_of(event) if as_json else data_of(event)
    except CorruptEvent as error:
        say(f"{error}", _YELLOW)
        return False
    if as_json:
        print_json(shown)
        return True
    print_cells(
        Cell(time_of(event), "dim"),
        Cell(f"{event.aggregate}", "cyan"),
        Cell(f"{event.sequence}"),
        Cell(event.type, "bold"),
        Cell(f"{shown}"),
    )
    return True
