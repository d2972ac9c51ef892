"""`asyncstore conformance`: whether a store of somebody else does what every store must do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from asyncstore.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncstore.testing.conformance.running import Outcome

_CODES = {False: 0, True: 1}
_COULD_NOT_LOOK = 2


def conformance(
    factory: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="What opens an empty store.")
    ],
    without: Annotated[
        list[str] | None, typer.Option(help="A part that the store lacks; repeatable.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only cases that match, as in pytest -k.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that a case may take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Run what every store must do against a store of your own.

    FACTORY takes no arguments and returns an async context manager with an empty store, which has
    the methods of asyncstore.Store and raises the errors of asyncstore. It is called for each case.
    Parts that a store may lack: correlation, editions, idempotency, limits, positions, snapshots,
    sources. Exit codes: 0 all passed or were skipped, 1 some failed, 2 they could not be run.
    """
    try:
        outcomes = _run(factory, (tuple(without or ()), only, timeout), is_quiet=as_json)
    except ConfigurationError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(_COULD_NOT_LOOK) from None
    counts = _count(outcomes)
    if as_json:
        typer.echo(json.dumps({**counts, "cases": [_row(outcome) for outcome in outcomes]}))
    else:
        typer.echo(", ".join(f"{number} {result}" for result, number in counts.items()))
    raise typer.Exit(_CODES[counts["failed"] > 0])


def _run(name: str, terms: tuple[tuple[str, ...], str, float], *, is_quiet: bool) -> list[Outcome]:
    try:
        from asyncstore.testing.conformance import running
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        typer.echo("This needs pytest: pip install 'asyncstore[testing]'", err=True)
        raise typer.Exit(_COULD_NOT_LOOK) from None
    asked = running.Terms(*terms)
    return running.run(running.factory_of(name), asked, _hush if is_quiet else _tell)


def _hush(outcome: Outcome) -> None:
    """Say nothing of an outcome: all come in the end."""


def _tell(outcome: Outcome) -> None:
    if outcome.result == "skipped":
        typer.echo(f"skipped {outcome.case}: {outcome.why}")
    elif outcome.result == "failed":
        typer.echo(f"FAILED  {outcome.case}\n{outcome.text}\n")


def _count(outcomes: list[Outcome]) -> dict[str, int]:
    results = [outcome.result for outcome in outcomes]
    return {result: results.count(result) for result in ("passed", "failed", "skipped")}


def _row(outcome: Outcome) -> dict[str, object]:
    return {name: value for name, value in asdict(outcome).items() if name != "text"}
