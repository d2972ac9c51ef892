"""What all commands are told alike: where the store is, and that results are for programs."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from asyncstore.errors import ConfigurationError, InvalidValue
from asyncstore.names import check_sequence
from asyncstore.settings import EMBEDDED, PRIMARY, Settings, embedded_directory_of
from asyncstore.values import check_moment

if TYPE_CHECKING:
    from asyncstore.settings import Options

Url = Annotated[
    str | None,
    typer.Option(
        help="Where the store is; of a cluster, some nodes with commas in between. "
        "Default: REDIS_URL, asyncstore.toml, or embedded."
    ),
]
KeyPrefix = Annotated[str | None, typer.Option(help="What stands in front of every key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Write a JSON object a line.")]
Domain = Annotated[str, typer.Argument(help="The domain.")]
Root = Annotated[str, typer.Argument(help="The root: which aggregate of the domain.")]
Edition = Annotated[str, typer.Option(help="The edition.")]
Level = Annotated[
    str | None, typer.Option(help="memory, fsync, replicas(n), fsync_and_replicas(n).")
]
Domains = Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")]

_MANY_DIGITS: Final = 20  # a number of so many is beyond every sequence
_NEXT_URL: Final = re.compile(r",(?=[a-z]+://)")


def options_at(place: str | None, key_prefix: str | None) -> Options:
    """Return what was said of one store; a place is a URL, or some with commas in between."""
    options: Options = {}
    urls = [] if place is None else _NEXT_URL.split(place)
    if len(urls) == 1:
        options["url"] = urls[0]
    elif urls:
        options["urls"] = urls
    if key_prefix is not None:
        options["key_prefix"] = key_prefix
    return options


def parse_sequence(option: str, text: str) -> int | None:
    """Return the sequence that a text is; None if it is something else."""
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0") or "0"
    return check_sequence(option, int(digits[:_MANY_DIGITS]))


def parse_moment(option: str, text: str) -> datetime | None:
    """Return the moment that a text is; None if it is something else."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.utcoffset() is None:
        why = f"{text!r} has no time zone: {moment.isoformat()}+00:00 is UTC"
        raise InvalidValue(option, why)
    return check_moment(option, moment)


def settings_of_a_store(options: Options) -> Settings:
    """Return the settings, unless they name an embedded store that would have to be made.

    What is said of a store must not be old: nothing is read from replicas.
    """
    settings = replace(Settings.resolve(options), read_from=PRIMARY)
    directory = embedded_directory_of(settings)
    if settings.backend == EMBEDDED and directory is not None and not directory.exists():
        raise ConfigurationError("path", f"there is no store in {directory}", "the settings")
    return settings
