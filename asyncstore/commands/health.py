"""`doctor` and `verify`: whether the server is fit for events, and the history sound."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from asyncstore import verify
from asyncstore.commands.exits import MISUSED, run
from asyncstore.commands.options import (
    AsJson,
    AsJsonLines,
    Domains,
    KeyPrefix,
    Url,
    options_at,
    settings_of_a_store,
)
from asyncstore.commands.output import (
    Cell,
    Column,
    Rows,
    counting,
    print_json,
    print_line,
    print_rows,
    say,
)
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
    as_json: AsJson = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Say whether the server is fit for events, what is not, and the setting that mends it.

    The exit code is 0 if all is good, 1 if there are warnings, 2 if something is bad. Nothing is
    changed.
    """
    run(lambda: _doctor(as_json, options_at(url, key_prefix)))


@app.command("verify")
def verify_(
    domain: Domains = None,
    repair_indexes: Annotated[
        bool,
        typer.Option(help="Mend indexes and claims by what the events say; never the events."),
    ] = False,
    as_json: AsJsonLines = False,
    url: Url = None,
    key_prefix: KeyPrefix = None,
) -> None:
    """Look whether the history is sound, and all that belongs to it. Others may write meanwhile.

    Exit code: 0 nothing is wrong, or all of it was repaired; 1 something is; 2 it could not look.
    It walks through all keys (SCAN), so it needs a user who may do that.
    """
    run(
        lambda: _verify(domain, repair_indexes, as_json, options_at(url, key_prefix)),
        failed=MISUSED,
    )


async def _doctor(as_json: bool, options: Options) -> int:
    report = await examine(settings_of_a_store(options))
    if as_json:
        print_json({"level": report.level, **asdict(report)})
    else:
        print_rows(_findings(report))
        if report.level != "good":
            print_line(_ABOUT_SETTINGS)
    return _DOCTOR_CODES[report.level]


def _findings(report: Report) -> Rows:
    columns = (("", 1), ("what", 2), ("found", 4), ("what it means for events", 6))
    return Rows(
        [Column(name, share=share) for name, share in columns],
        [_cells(finding) for finding in report.findings],
        title=report.server,
    )


def _cells(finding: Finding) -> list[Cell]:
    remedy = f"→ {finding.remedy}" if finding.remedy else ""
    return [
        Cell(finding.level, _COLOURS[finding.level]),
        Cell(finding.name),
        Cell(finding.found),
        Cell(finding.meaning, below=remedy),
    ]


async def _verify(domains: list[str] | None, repair: bool, as_json: bool, options: Options) -> int:
    bad = notes = repaired = read = 0

    def on_events(count: int) -> None:
        nonlocal read
        read += count
        on_more(count)

    with counting("verifying") as on_more:
        async with open_store(settings_of_a_store(options)) as store:
            async for problem in verify.problems(store, domains, on_events):
                is_repaired = repair and await verify.repair(store, problem)
                bad += not (problem.is_note or is_repaired)
                notes += problem.is_note
                repaired += is_repaired
                _print_problem(problem, is_repaired, as_json)
    say(
        f"{read:,} events read: {bad:,} problems"
        + (f", {repaired:,} repaired" if repair else "")
        + (f", {notes:,} notes" if notes else "")
    )
    return 1 if bad else 0


def _print_problem(problem: Problem, is_repaired: bool, as_json: bool) -> None:
    severity = "note" if problem.is_note else "repaired" if is_repaired else "bad"
    if as_json:
        print_json(
            {
                "severity": severity,
                "kind": problem.kind,
                "key": problem.key,
                "sequence": problem.sequence,
                "text": problem.text,
                "repairable": bool(problem.mending),
            }
        )
        return
    where = problem.key
    if problem.sequence is not None:
        where += f", sequence {problem.sequence}"
    print_line(f"{severity}: {problem.kind}: {where}: {problem.text}")
