"""`conformance`: whether a store of somebody else does what every store must do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncstore.commands.exits import FAILED, MISUSED, end_with
from asyncstore.commands.options import AsJson
from asyncstore.commands.output import RED, counting, print_json, print_line, say
from asyncstore.testing.parts import Part, Terms

if TYPE_CHECKING:
    from asyncstore.testing.conformance.running import Outcome

app = typer.Typer()


@app.command()
def conformance(
    factory: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="What opens an empty store.")
    ],
    without: Annotated[
        list[Part] | None, typer.Option(help="A part that the store lacks; repeatable.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only cases that match, as in pytest -k.")] = "",
    timeout: Annotated[
        float, typer.Option(min=0.01, max=3600, help="Seconds that a case may take.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Run what every store must do against a store of your own.

    FACTORY takes no arguments and returns an async context manager with an empty store, which has
    the methods of asyncstore.Store and raises the errors of asyncstore. It is called for each case.
    Exit codes: 0 all passed or were skipped, 1 some failed, 2 they could not be run.
    """
    terms = Terms(tuple(without or ()), only, timeout)
    end_with(lambda: _conformance(factory, terms, as_json=as_json), failed=MISUSED)


def _conformance(factory: str, terms: Terms, *, as_json: bool) -> int:
    try:
        from asyncstore.testing.conformance import running
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        say("error: this needs pytest: pip install 'asyncstore[testing]'", RED)
        return MISUSED
    with counting("running", "cases") as on_more:

        def told(outcome: Outcome) -> None:
            on_more(1)
            if not as_json:  # there all come in the end
                _tell(outcome)

        outcomes = running.run(running.factory_of(factory), terms, told)
    counts = _count(outcomes)
    if as_json:
        print_json({**counts, "cases": [_row(outcome) for outcome in outcomes]})
    else:
        print_line(", ".join(f"{number} {result}" for result, number in counts.items()))
    return FAILED if counts["failed"] else 0


def _tell(outcome: Outcome) -> None:
    if outcome.result == "skipped":
        print_line(f"skipped {outcome.case}: {outcome.why}")
    elif outcome.result == "failed":
        print_line(f"FAILED  {outcome.case}")
        for line in outcome.text.splitlines():
            print_line(line)


def _count(outcomes: list[Outcome]) -> dict[str, int]:
    results = [outcome.result for outcome in outcomes]
    return {result: results.count(result) for result in ("passed", "failed", "skipped")}


def _row(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(outcome).items() if name != "text"}
