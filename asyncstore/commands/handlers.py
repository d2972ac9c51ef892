"""`subscriptions`, `dead-letters` and `reset`: what handlers have done and have before them."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from asyncstore.commands.exits import run
from asyncstore.commands.options import (
    AsJson,
    AsJsonLines,
    KeyPrefix,
    Url,
    options_at,
    parse_moment,
    settings_of_a_store,
)
from asyncstore.commands.output import (
    Rows,
    numbers,
    print_json,
    print_line,
    print_rows,
    say,
    watched,
)
from asyncstore.errors import InvalidValue
from asyncstore.names import MAIN
from asyncstore.store import open as open_store
from asyncstore.values import Start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from asyncstore.progress import DeadLetter, Progress
    from asyncstore.settings import Options

_WATCH_SECONDS = 2.0

app = typer.Typer()


@app.command("subscriptions")
def subscriptions_(
    handler: Annotated[str | None, typer.Option(help="Only this handler.")] = None,
    watch: Annotated[bool, typer.Option(help="Again every two seconds, until Ctrl-C.")] = False,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say how far handlers are: what they are behind, since when, retries and dead letters."""
    options = options_at(url, key_prefix)
    run(lambda: _subscriptions(handler, watch, as_json, options), interrupted="")


@app.command("dead-letters")
def dead_letters_(
    handler: Annotated[str, typer.Argument(help="The handler that could not handle them.")],
    domain: Annotated[str | None, typer.Option(help="Only this domain.")] = None,
    edition: Annotated[str, typer.Option(help="The edition.")] = MAIN,
    retry: Annotated[bool, typer.Option(help="Have each of them handled once more.")] = False,
    drop: Annotated[bool, typer.Option(help="Forget them for good; the events stay.")] = False,
    root: Annotated[str | None, typer.Option(help="Only this aggregate.")] = None,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """List the events that a handler could not handle; have them handled again, or forget them."""
    which = _Letters(handler, domain, edition, root)
    run(lambda: _dead_letters(which, retry, drop, as_json, options_at(url, key_prefix)))


@app.command("reset")
def reset_(
    handler: Annotated[str, typer.Argument(help="The handler that is put back.")],
    domain: Annotated[str, typer.Argument(help="The domain.")],
    edition: Annotated[str, typer.Option(help="The edition.")] = MAIN,
    to: Annotated[
        str, typer.Option(help="first, now, or a time such as 2026-01-31T12:00:00+00:00.")
    ] = "first",
    as_json: AsJson = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Put a handler back: it handles all events of a domain anew, or those from a time on."""
    wanted = _Reset(handler, domain, edition, to)
    run(lambda: _reset(wanted, as_json, options_at(url, key_prefix)))


async def _subscriptions(handler: str | None, watch: bool, as_json: bool, options: Options) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        with _shown(watch, as_json) as show:
            while True:
                show(await store.subscriptions.status(handler))
                if not watch:
                    return 0
                await asyncio.sleep(_WATCH_SECONDS)


@contextmanager
def _shown(watch: bool, as_json: bool) -> Iterator[Callable[[list[Progress]], None]]:
    """Give the function that shows how far handlers are; watched, in the place of what it was."""
    if as_json:
        yield _print_each
        return
    with watched() if watch else nullcontext(print_rows) as show:
        yield lambda found: show(_progress_of(found))


def _print_each(found: list[Progress]) -> None:
    for one in found:
        print_json(asdict(one))


def _progress_of(found: list[Progress]) -> Rows:
    counts = numbers("aggregates behind", "events", "since", "retrying", "dead letters")
    return Rows(
        ["handler", "domain", "edition", *counts],
        [
            [
                *(one.handler, one.domain, one.edition),
                *(f"{one.aggregates_behind:,}", f"{one.events_behind:,}"),
                "" if one.oldest is None else f"{one.oldest:%Y-%m-%d %H:%M:%S}",
                *(f"{one.retrying:,}", f"{one.dead_letters:,}"),
            ]
            for one in found
        ],
    )


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
    if retry and drop:
        raise InvalidValue("--retry", "it can't be together with --drop")
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
            _print_letter(letter, as_json)
    done = "are handled again" if retry else "were dropped" if drop else "dead letters"
    say(f"{count:,} {done}")
    return 0


def _print_letter(letter: DeadLetter, as_json: bool) -> None:
    place = letter.aggregate
    if as_json:
        print_json(
            {
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
        )
        return
    when = f"{letter.time:%Y-%m-%d %H:%M:%S}"
    why = letter.reason or "no reason given"
    print_line(f"{place}, event {letter.sequence}: {why}, {letter.attempts} attempts until {when}")


@dataclass(frozen=True)
class _Reset:
    """Which handler is put back, and to where."""

    handler: str
    domain: str
    edition: str
    to: str

    def start(self) -> Start | datetime:
        """Return where it begins."""
        if self.to in ("first", "now"):
            return Start(self.to)
        moment = parse_moment("--to", self.to)
        if moment is None:
            raise InvalidValue("--to", f"{self.to!r} is neither first, now nor a time")
        return moment


async def _reset(wanted: _Reset, as_json: bool, options: Options) -> int:
    start = wanted.start()
    async with open_store(settings_of_a_store(options)) as store:
        await store.subscriptions.reset(
            wanted.handler, wanted.domain, edition=wanted.edition, to=start
        )
    if as_json:
        print_json(asdict(wanted))
    say(f"{wanted.handler} begins anew in {wanted.domain}")
    return 0
