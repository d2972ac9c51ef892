"""What all commands are told alike: where the store is, and how results are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from asyncstore.errors import ConfigurationError
from asyncstore.settings import EMBEDDED, PRIMARY, Settings

if TYPE_CHECKING:
    from asyncstore.settings import Options

Url = Annotated[
    str | None,
    typer.Option(help="Where the store is. Default: REDIS_URL, asyncstore.toml, or embedded."),
]
KeyPrefix = Annotated[str | None, typer.Option(help="What stands in front of every key.")]


def options_of(url: str | None, key_prefix: str | None) -> Options:
    """Return what was said of one store."""
    options: Options = {}
    if url is not None:
        options["url"] = url
    if key_prefix is not None:
        options["key_prefix"] = key_prefix
    return options


def options_at(place: str, key_prefix: str | None) -> Options:
    """Return the same of a place that may be some nodes of a cluster, with commas in between."""
    if "," not in place:
        return options_of(place, key_prefix)
    options = options_of(None, key_prefix)
    options["urls"] = place.split(",")
    return options


def settings_of_a_store(options: Options) -> Settings:
    """Return the settings, unless they name an embedded store that would have to be made.

    What is said of a store must not be old: nothing is read from replicas.
    """
    settings = replace(Settings.resolve(options), read_from=PRIMARY)
    directory = settings.embedded_directory()
    if settings.backend == EMBEDDED and directory is not None and not directory.exists():
        raise ConfigurationError("path", f"there is no store in {directory}", "the settings")
    return settings
