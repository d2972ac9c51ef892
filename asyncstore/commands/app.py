"""The command line as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncstore import __version__
from asyncstore.commands import (
    access,
    appending,
    beginning,
    benching,
    clusters,
    conforming,
    handlers,
    health,
    history,
    measuring,
    moving,
    tailing,
    transferring,
)
from asyncstore.commands.exits import EXIT_CODES
from asyncstore.commands.output import print_line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXIT_CODES)
_TOPICS = (
    *(beginning, history, tailing, appending),
    *(health, measuring, benching, access),
    *(handlers, transferring, moving, conforming),
)
for _topic in _TOPICS:
    app.add_typer(_topic.app)
app.add_typer(clusters.app, name="cluster")


def _show_version(wanted: bool) -> None:
    if wanted:
        print_line(f"asyncstore {__version__}")
        raise typer.Exit


@app.callback()
def _asyncstore(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """The event store you await: events of Redis, Valkey or an embedded server."""
