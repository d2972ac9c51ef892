"""`append`: one event, from the command line or a pipe."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import anyio.to_thread
import typer

from asyncstore.commands.exits import run
from asyncstore.commands.options import (
    AsJson,
    Domain,
    Edition,
    KeyPrefix,
    Level,
    Root,
    Url,
    options_at,
    parse_sequence,
)
from asyncstore.commands.output import print_json, print_line, say, say_if_typed
from asyncstore.errors import InvalidValue
from asyncstore.names import MAIN
from asyncstore.store import open as open_store
from asyncstore.values import ANY, NEW, Aggregate, Durability, Event

if TYPE_CHECKING:
    from asyncstore.settings import Options
    from asyncstore.values import Appended, Expected

_STDIN = "-"

app = typer.Typer()


@app.command("append")
def append_(
    domain: Domain,
    root: Root,
    type_: Annotated[str, typer.Argument(metavar="TYPE", help="The type of the event.")],
    data: Annotated[str, typer.Argument(help="JSON; - for the standard input.")] = _STDIN,
    edition: Edition = MAIN,
    expected: Annotated[
        str, typer.Option(help="The sequence it must get: new, any, or a number.")
    ] = "any",
    metadata: Annotated[str | None, typer.Option(help="A JSON object beside the data.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Again with the same key, nothing is written.")
    ] = None,
    correlation_id: Annotated[str | None, typer.Option(help="The business process.")] = None,
    durability: Level = None,
    as_json: AsJson = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Append an event to an aggregate, and print its sequence.

    Exit code: 3 if another event has the sequence that it must get; nothing is written then. 4 if
    it is stored, but not as durably as asked for, or may be. Then run it again with the same
    --idempotency-key, or read the aggregate.
    """
    keys = _Keys(idempotency_key, correlation_id)
    given = _Given(domain, root, edition, type_, data, metadata, expected, durability, keys)
    run(lambda: _append(given, as_json, options_at(url, key_prefix)))


@dataclass(frozen=True, slots=True)
class _Keys:
    """What is stored with the event beside itself."""

    idempotency_key: str | None
    correlation_id: str | None


@dataclass(frozen=True, slots=True)
class _Given:
    """An append, in the words of the command line."""

    domain: str
    root: str
    edition: str
    type: str
    data: str
    metadata: str | None
    expected: str
    durability: str | None
    keys: _Keys


async def _append(given: _Given, as_json: bool, options: Options) -> int:
    aggregate = Aggregate(given.domain, given.root, given.edition)
    expected, metadata = _expected(given.expected), _metadata(given.metadata)
    level = None if given.durability is None else Durability.parse(given.durability)
    event = Event(given.type, _json("DATA", await _text(given.data)), metadata=metadata)
    async with open_store(**options) as store:
        done = await store.events.append(
            aggregate, [event], expected=expected, durability=level, **asdict(given.keys)
        )
    _print_done(aggregate, done, as_json)
    return 0


def _print_done(aggregate: Aggregate, done: Appended, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done))
    else:
        print_line(f"{done.first_sequence}")
    how = "it was stored before, and nothing was written" if done.duplicate else "stored"
    say(f"{aggregate}, event {done.first_sequence}: {how}")


def _expected(text: str) -> Expected:
    words: dict[str, Expected] = {"new": NEW, "any": ANY}
    if text in words:
        return words[text]
    number = parse_sequence("--expected", text)
    if number is None:
        raise InvalidValue("--expected", f"{text!r} is neither new, any nor a sequence")
    return number


def _metadata(text: str | None) -> dict[str, Any] | None:
    value = None if text is None else _json("--metadata", text)
    if value is None or isinstance(value, dict):
        return value
    raise InvalidValue("--metadata", "a JSON object is wanted")


async def _text(data: str) -> str:
    if data != _STDIN:
        return data
    say_if_typed("JSON")
    read: bytes = await anyio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
    try:
        return read.decode()
    except UnicodeDecodeError:
        raise InvalidValue("DATA", "the standard input is no UTF-8") from None


def _json(what: str, text: str) -> Any:
    """Return a value; what is said of another text does not show it."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidValue(what, f"it is not JSON: {error.msg}, {where}") from None
    except (ValueError, RecursionError):
        raise InvalidValue(what, "it is not JSON that can be stored") from None


def _refuse(_: str) -> None:
    raise ValueError
