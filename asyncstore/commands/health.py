"""`doctor` and `verify`: whether the server is fit for events, and the history sound."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from asyncstore import verify
from asyncstore.commands.exits import run
from asyncstore.commands.options import KeyPrefix, Url, options_of, settings_of_a_store
from asyncstore.commands.output import progress, say, show
from asyncstore.store import examine
from asyncstore.store import open as open_store

if TYPE_CHECKING:
    from asyncstore.checks import Finding, Report
    from asyncstore.settings import Options
    from asyncstore.verify import Problem

_ABOUT_SETTINGS = (
    "A setting behind → is one for CONFIG SET, and for the configuration file (CONFIG REWRITE)."
)
_DOCTOR_CODES = {"good": 0, "warning": 1, "bad": 2}
_COLOURS = {"good": "green", "warning": "yellow", "bad": "red"}

app = typer.Typer()


@app.command("doctor")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say whether the server is fit for events, what is not, and the setting that mends it.

    The exit code is 0 if all is good, 1 if there are warnings, 2 if something is bad. Nothing is
    changed.
    """
    run(lambda: _doctor(as_json, options_of(url, key_prefix)))


@app.command("verify")
def verify_(
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    repair_indexes: Annotated[
        bool,
        typer.Option(help="Mend indexes and claims by what the events say; never the events."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, one for each problem.")
    ] = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Look whether the history is sound, and all that belongs to it. Others may write meanwhile.

    Exit code: 0 nothing is wrong, or all of it was repaired; 1 something is; 2 it could not look.
    It walks through all keys (SCAN), so it needs a user who may do that.
    """
    run(lambda: _verify(domain, repair_indexes, as_json, options_of(url, key_prefix)), failed=2)


async def _doctor(as_json: bool, options: Options) -> int:
    report = await examine(settings_of_a_store(options))
    if as_json:
        typer.echo(json.dumps({"level": report.level, **asdict(report)}, indent=2))
    else:
        _print_findings(report)
    return _DOCTOR_CODES[report.level]


def _print_findings(report: Report) -> None:
    table = Table(title=Text(report.server), title_justify="left")
    for column, share in (("", 1), ("what", 2), ("found", 4), ("what it means for events", 6)):
        table.add_column(column, ratio=share)
    for finding in report.findings:
        table.add_row(*_cells(finding))
    show(table)
    if report.level != "good":
        show(_ABOUT_SETTINGS)


def _cells(finding: Finding) -> tuple[Text, ...]:
    """Return the line of a finding; as Text, for what a server says is no markup."""
    meaning = Text(finding.meaning)
    if finding.remedy:
        meaning.append(f"\n→ {finding.remedy}", style="bold")
    level = Text(finding.level, style=_COLOURS[finding.level])
    return level, Text(finding.name), Text(finding.found), meaning


async def _verify(domains: list[str] | None, repair: bool, as_json: bool, options: Options) -> int:
    bad = notes = repaired = read = 0
    with progress("verifying", None) as advance:

        def on_events(count: int) -> None:
            nonlocal read
            read += count
            advance(None, read)

        async with open_store(settings_of_a_store(options)) as store:
            async for problem in verify.problems(store, domains, on_events):
                is_repaired = repair and await verify.repair(store, problem)
                bad += not (problem.is_note or is_repaired)
                notes += problem.is_note
                repaired += is_repaired
                print(_show(problem, is_repaired, as_json), flush=True)
    say.print(
        f"{read:,} events read: {bad:,} problems"
        + (f", {repaired:,} repaired" if repair else "")
        + (f", {notes:,} notes" if notes else "")
    )
    return 1 if bad else 0


def _show(problem: Problem, is_repaired: bool, as_json: bool) -> str:
    severity = "note" if problem.is_note else "repaired" if is_repaired else "bad"
    if as_json:
        fields = {
            "severity": severity,
            "kind": problem.kind,
            "key": problem.key,
            "sequence": problem.sequence,
            "text": problem.text,
            "repairable": bool(problem.mending),
        }
        return json.dumps(fields)
    where = problem.key if problem.key.isprintable() else repr(problem.key)
    if problem.sequence is not None:
        where += f", sequence {problem.sequence}"
    line = f"{severity}: {problem.kind}: {where}: {problem.text}"
    return line.encode(errors="backslashreplace").decode()  # names may be no text
