"""`domains`, `roots`, `editions`, `read` and `diff`: what is in a store."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from asyncstore.commands.exits import FAILED, run
from asyncstore.commands.options import (
    AsJsonLines,
    Domain,
    Edition,
    KeyPrefix,
    Root,
    Url,
    options_at,
    parse_moment,
    parse_sequence,
    settings_of_a_store,
)
from asyncstore.commands.output import (
    Columns,
    numbers,
    print_all,
    print_json,
    print_line,
    say,
)
from asyncstore.commands.shown import data_of, fields_of, time_of
from asyncstore.errors import InvalidValue
from asyncstore.names import MAIN
from asyncstore.store import open as open_store
from asyncstore.values import Aggregate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime

    from asyncstore.commands.output import Row
    from asyncstore.recorded import RecordedEvent
    from asyncstore.settings import Options
    from asyncstore.store import Store

_EVENT: Final[Columns] = [*numbers("sequence"), "time", "type", "data"]

app = typer.Typer()


@app.command("domains")
def domains_(as_json: AsJsonLines = False, url: Url = None, key_prefix: KeyPrefix = None) -> None:
    """List the domains that have events, in alphabetical order."""
    options = options_at(url, key_prefix)
    run(lambda: _list("domain", lambda store: store.events.domains(), as_json, options))


@app.command("roots")
def roots_(
    domain: Domain,
    edition: Edition = MAIN,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """List the aggregates of a domain by their roots, the last one that was appended to last.

    On another edition than main, those that have diverged there.
    """
    options = options_at(url, key_prefix)

    def roots(store: Store) -> AsyncIterator[str]:
        return store.events.roots(domain, edition=edition)

    run(lambda: _list("root", roots, as_json, options))


@app.command("editions")
def editions_(
    domain: Domain,
    root: Annotated[str | None, typer.Argument(help="Only those of this aggregate.")] = None,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """List the editions of a domain; of an aggregate also where they leave main, and their end."""
    options = options_at(url, key_prefix)
    if root is None:
        run(lambda: _list("edition", lambda store: store.events.editions(domain), as_json, options))
    else:
        run(lambda: _editions(domain, root, as_json, options))


@app.command("read")
def read_(
    domain: Domain,
    root: Root,
    edition: Edition = MAIN,
    start: Annotated[int, typer.Option("--from", min=0, help="The first sequence.")] = 0,
    until: Annotated[
        str | None,
        typer.Option(help="The last sequence, or moment, such as 2026-01-31T12:00:00+00:00."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="No more events than that.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The last ones first.")] = False,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Show the events of an aggregate, data included. As JSON they are what `import` takes."""
    wanted = _Wanted(domain, root, edition, start, until, limit, reverse)
    run(lambda: _read(wanted, as_json, options_at(url, key_prefix)))


@app.command("diff")
def diff_(
    domain: Domain,
    root: Root,
    edition: Annotated[str, typer.Argument(help="The edition that is compared with main.")],
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Show a branch beside main, from where it has left main on, data included.

    The exit code is 0, however much they differ; 1 if the aggregate has not diverged there.
    """
    run(lambda: _diff(domain, root, edition, as_json, options_at(url, key_prefix)))


# Names


async def _list(
    what: str, names: Callable[[Store], AsyncIterator[str]], as_json: bool, options: Options
) -> int:
    async with open_store(settings_of_a_store(options)) as store:
        async for name in names(store):
            if as_json:
                print_json({what: name})
            else:
                print_line(name)
    return 0


@dataclass(frozen=True, slots=True)
class _Timeline:
    """An edition of an aggregate. Its own events are those from `diverges_at` on."""

    edition: str
    diverges_at: int
    next_sequence: int


async def _editions(domain: str, root: str, as_json: bool, options: Options) -> int:
    main = Aggregate(domain, root)
    async with open_store(settings_of_a_store(options)) as store:
        if as_json:
            async for one in _timelines(store, main):
                own = {"diverges_at": None if one.edition == MAIN else one.diverges_at}
                print_json({"edition": one.edition, **own, "next_sequence": one.next_sequence})
            return 0
        columns = ["edition", *numbers("leaves main at", "events of its own", "next sequence")]
        count = await print_all(columns, (_cells(one) async for one in _timelines(store, main)))
    if not count:
        say(f"{main}: no events")
    return 0


async def _timelines(store: Store, main: Aggregate) -> AsyncIterator[_Timeline]:
    """Iterate over the editions that an aggregate has: few of those that its domain may have."""
    async for name in store.events.editions(main.domain):
        place = main.on(name)
        diverges_at = 0 if name == MAIN else await store.events.divergence(place)
        end = 0 if diverges_at is None else await store.events.next_sequence(place)
        if diverges_at is not None and (end or name != MAIN):
            yield _Timeline(name, diverges_at, end)


def _cells(one: _Timeline) -> Row:
    at = "" if one.edition == MAIN else f"{one.diverges_at:,}"
    return [one.edition, at, f"{one.next_sequence - one.diverges_at:,}", f"{one.next_sequence:,}"]


# Events


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which events are read, in the words of the command line."""

    domain: str
    root: str
    edition: str
    start: int
    until: str | None
    limit: int | None
    reverse: bool

    @property
    def aggregate(self) -> Aggregate:
        """Whose they are."""
        return Aggregate(self.domain, self.root, self.edition)

    def stream(self, store: Store) -> AsyncIterator[RecordedEvent]:
        """Read them."""
        stop, until = self._end()
        return store.events.stream(
            self.aggregate,
            start=self.start,
            stop=stop,
            until=until,
            limit=self.limit,
            reverse=self.reverse,
        )

    def _end(self) -> tuple[int | None, datetime | None]:
        """Return where they end: at a sequence or a moment, which are among them."""
        text = self.until
        if text is None:
            return None, None
        last = parse_sequence("--until", text)
        if last is not None:
            if last < self.start:
                raise InvalidValue("--until", f"{last} is before --from, {self.start}")
            return last + 1, None
        moment = parse_moment("--until", text)
        if moment is None:
            why = f"{text!r} is neither a sequence nor a moment, as 2026-01-31T12:00:00+00:00 is"
            raise InvalidValue("--until", why)
        return None, moment


async def _read(wanted: _Wanted, as_json: bool, options: Options) -> int:
    aggregate = wanted.aggregate
    async with open_store(settings_of_a_store(options)) as store:
        events = wanted.stream(store)
        if as_json:
            async for event in events:
                print_json(fields_of(event))
            return 0
        if not await print_all(_EVENT, (_row(event) async for event in events)):
            say(f"{aggregate}: no such events")
    return 0


def _row(event: RecordedEvent) -> Row:
    return [f"{event.sequence}", time_of(event), event.type, data_of(event)]


async def _diff(domain: str, root: str, edition: str, as_json: bool, options: Options) -> int:
    branch = Aggregate(domain, root, edition)
    if branch.edition == MAIN:
        raise InvalidValue("EDITION", f"{MAIN} is what others are compared with")
    async with open_store(settings_of_a_store(options)) as store:
        at = await store.events.divergence(branch)
        if at is None:
            say(f"{branch}: it has not left main, and reads as main does")
            return FAILED
        say(f"{branch}: it has left main at sequence {at}")
        pairs = _pairs(store, branch, at)
        if as_json:
            async for pair in pairs:
                print_json(pair.fields())
        else:
            columns = [*numbers("sequence"), MAIN, branch.edition]
            await print_all(columns, (pair.row() async for pair in pairs))
    return 0


@dataclass(frozen=True, slots=True)
class _Pair:
    """What stands at a sequence of main and of a branch; None behind the end."""

    sequence: int
    main: RecordedEvent | None
    branch: RecordedEvent | None

    def fields(self) -> dict[str, Any]:
        """Return it for programs."""
        main, branch = (event and fields_of(event) for event in (self.main, self.branch))
        return {"sequence": self.sequence, "main": main, "edition": branch}

    def row(self) -> Row:
        """Return it for people."""
        events = (self.main, self.branch)
        shown = ("" if event is None else f"{event.type} {data_of(event)}" for event in events)
        return [f"{self.sequence}", *shown]


async def _pairs(store: Store, branch: Aggregate, start: int) -> AsyncIterator[_Pair]:
    main = aiter(store.events.stream(branch.on(MAIN), start=start))
    own = aiter(store.events.stream(branch, start=start))
    for sequence in itertools.count(start):
        pair = _Pair(sequence, await anext(main, None), await anext(own, None))
        if pair.main is None and pair.branch is None:
            return
        yield pair
