"""`subscriptions`, `dead-letters` and `reset`: what handlers have done and have before them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from asyncstore.commands.exits import run
from asyncstore.commands.options import KeyPrefix, Url, options_of, settings_of_a_store
from asyncstore.commands.output import say, show
from asyncstore.names import MAIN
from asyncstore.store import open as open_store
from asyncstore.values import Start

if TYPE_CHECKING:
    from asyncstore.progress import DeadLetter, Progress
    from asyncstore.settings import Options

_WATCH_SECONDS = 2.0

app = typer.Typer()


@app.command("subscriptions")
def subscriptions_(
    handler: Annotated[str | None, typer.Option(help="Only this handler.")] = None,
    watch: Annotated[bool, typer.Option(help="Again every two seconds, until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, one for each handler and domain.")
    ] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say how far handlers are: what they are behind, since when, retries and dead letters."""
    run(lambda: _subscriptions(handler, watch, as_json, options_of(url, key_prefix)))


@app.command("dead-letters")
def dead_letters_(
    handler: Annotated[str, typer.Argument(help="The handler that could not handle them.")],
    domain: Annotated[str | None, typer.Option(help="Only this domain.")] = None,
    edition: Annotated[str, typer.Option(help="The edition.")] = MAIN,
    retry: Annotated[bool, typer.Option(help="Have each of them handled once more.")] = False,
    drop: Annotated[bool, typer.Option(help="Forget them for good; the events stay.")] = False,
    root: Annotated[str | None, typer.Option(help="Only this aggregate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """List the events that a handler could not handle; have them handled again, or forget them."""
    if retry and drop:
        raise typer.BadParameter("--retry and --drop exclude each other")
    which = _Letters(handler, domain, edition, root)
    run(lambda: _dead_letters(which, retry, drop, as_json, options_of(url, key_prefix)))


@app.command("reset")
def reset_(
    handler: Annotated[str, typer.Argument(help="The handler that is put back.")],
    domain: Annotated[str, typer.Argument(help="The domain.")],
    edition: Annotated[str, typer.Option(help="The edition.")] = MAIN,
    to: Annotated[
        str, typer.Option(help="first, now, or a time such as 2026-01-31T12:00:00+00:00.")
    ] = "first",
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Put a handler back: it handles all events of a domain anew, or those from a time on."""
    try:
        start = Start(to) if to in ("first", "now") else datetime.fromisoformat(to)
    except ValueError:
        raise typer.BadParameter(f"--to {to!r} is neither first, now nor a time") from None
    run(lambda: _reset(handler, domain, edition, start, options_of(url, key_prefix)))


async def _subscriptions(handler: str | None, watch: bool, as_json: bool, options: Options) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        while True:
            found = await store.subscriptions.status(handler)
            if as_json:
                for one in found:
                    print(json.dumps(asdict(one), default=str), flush=True)
            else:
                _print_progress(found)
            if not watch:
                return 0
            await asyncio.sleep(_WATCH_SECONDS)


def _print_progress(found: list[Progress]) -> None:
    table = Table("handler", "domain", "edition", "aggregates behind", "events", "since")
    for column in ("retrying", "dead letters"):
        table.add_column(column)
    for one in found:
        since = "" if one.oldest is None else f"{one.oldest:%Y-%m-%d %H:%M:%S}"
        counts = (f"{one.aggregates_behind:,}", f"{one.events_behind:,}", since)
        rest = (f"{one.retrying:,}", f"{one.dead_letters:,}")
        table.add_row(one.handler, one.domain, one.edition, *counts, *rest)
    show(table)


@dataclass(frozen=True)
class _Letters:
    """Which dead letters are meant."""

    handler: str
    domain: str | None
    edition: str
    root: str | None


async def _dead_letters(
    which: _Letters, retry: bool, drop: bool, as_json: bool, options: Options
) -> int:
    count = 0
    async with open_store(settings_of_a_store(options)) as store:
        letters = store.subscriptions.dead_letters(
            which.handler, which.domain, edition=which.edition
        )
        async for letter in letters:
            if which.root not in (None, letter.aggregate.root):
                continue
            if retry:
                count += await store.subscriptions.retry(letter)
            elif drop:
                count += await store.subscriptions.drop(letter)
            else:
                count += 1
            print(_show_letter(letter, as_json), flush=True)
    done = "are handled again" if retry else "were dropped" if drop else "dead letters"
    say.print(f"{count:,} {done}")
    return 0


def _show_letter(letter: DeadLetter, as_json: bool) -> str:
    place = letter.aggregate
    if as_json:
        fields = {
            "handler": letter.handler,
            "domain": place.domain,
            "edition": place.edition,
            "root": place.root,
            "sequence": letter.sequence,
            "id": letter.event_id,
            "attempts": letter.attempts,
            "time": letter.time.isoformat(),
            "reason": letter.reason,
        }
        return json.dumps(fields)
    when = f"{letter.time:%Y-%m-%d %H:%M:%S}"
    why = letter.reason or "no reason given"
    return f"{place}, event {letter.sequence}: {why}, {letter.attempts} attempts until {when}"


async def _reset(
    handler: str, domain: str, edition: str, start: Start | datetime, options: Options
) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        await store.subscriptions.reset(handler, domain, edition=edition, to=start)
    say.print(f"{handler} begins anew in {domain}", markup=False)
    return 0
