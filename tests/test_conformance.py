"""`asyncstore conformance`: a sound store passes, and each broken one fails where it is broken."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncstore.commands.app import app
from asyncstore.testing import conformance
from tests.servers import Server

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """What the command said."""

    code: int
    passed: set[str]
    failed: dict[str, str]
    skipped: dict[str, str]


def call(
    server: Server, factory: str, *options: str, errors: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run the command, as somebody does who has a store in a module of their own."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "asyncstore", "conformance"),
            *(f"tests.conformance_stores:{factory}", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "CONFORMANCE_URL": server.url,
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": "--maxfail=1 --durations=3",  # nothing of this run's, either
        },
    )


def run(server: Server, factory: str, *options: str) -> Run:
    done = call(server, factory, *options, "--json")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    whys: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
    for case in said["cases"]:
        whys[case["result"]][case["case"]] = case["why"]
    assert {result: len(cases) for result, cases in whys.items()} == {
        result: said[result] for result in whys
    }
    return Run(done.returncode, set(whys["passed"]), whys["failed"], whys["skipped"])


def test_a_sound_store_passes(one_server: Server) -> None:
    done = run(one_server, "sound", "--only", "TestAppend or positions or TestSource")
    assert (done.code, done.failed, done.skipped) == (0, {}, {})
    assert len(done.passed) > 50


APPEND = "events::TestAppend::test_"


@pytest.mark.parametrize(
    ("factory", "only", "red", "green"),
    [
        pytest.param(
            "unchecked",
            "TestAppend",
            [
                f"{APPEND}another_sequence_is_a_conflict[2]",
                f"{APPEND}a_first_append_beyond_the_beginning_is_a_conflict",
                f"{APPEND}writers_at_one_sequence_one_wins",
            ],
            [f"{APPEND}one_event_is_read_back", f"{APPEND}batches_in_a_row_are_dense"],
            id="that does not check sequences",
        ),
        pytest.param(
            "doubling",
            "TestAppend or test_counts_step_by_step",
            [
                f"{APPEND}one_event_is_read_back",
                f"{APPEND}five_events_get_five_sequences",
                "events::TestNextSequence::test_counts_step_by_step",
            ],
            [
                f"{APPEND}nothing_is_fine_and_leaves_nothing",
                f"{APPEND}a_first_append_beyond_the_beginning_is_a_conflict",
            ],
            id="that appends twice",
        ),
        pytest.param(
            "disordered",
            "TestAppend or test_ranges or test_counts_step_by_step",
            [f"{APPEND}five_events_get_five_sequences", "events::TestRead::test_ranges"],
            [
                f"{APPEND}one_event_is_read_back",
                "events::TestNextSequence::test_counts_step_by_step",
            ],
            id="that returns events out of order",
        ),
        pytest.param(
            "forgetful",
            "positions and not editions",
            [
                "positions::test_advance_never_goes_back",
                "positions::test_concurrent_advances_end_at_the_highest",
            ],
            ["positions::test_put_goes_anywhere", "positions::test_zero_is_a_position"],
            id="whose positions go back",
        ),
    ],
)
def test_a_store(
    one_server: Server, factory: str, only: str, red: list[str], green: list[str]
) -> None:
    done = run(one_server, factory, "--only", only)
    assert done.code == 1
    assert set(red) <= set(done.failed)
    assert all(done.failed[case] for case in red), "it says why"
    assert set(green) <= done.passed
    assert done.skipped == {}


def test_a_store_without_editions_says_so_and_passes(one_server: Server) -> None:
    only = ("--only", "TestSource or TestListing or positions")
    done = run(one_server, "one_time_line", "--without", "editions", *only)
    assert (done.code, done.failed) == (0, {})
    assert done.passed
    assert set(done.skipped.values()) == {"the store has no editions"}
    silent = run(one_server, "one_time_line", *only)
    assert silent.code == 1
    assert set(silent.failed) == set(done.skipped)


def test_one_that_hangs_fails_and_the_others_go_on(one_server: Server) -> None:
    done = run(one_server, "stuck", "--only", "test_zero or test_unknown", "--timeout", "0.5")
    assert done.failed["positions::test_zero_is_a_position"] == "it was not done in 0.5 seconds"
    assert "snapshots::test_unknown_is_none" in done.passed


def test_for_people_it_shows_where_it_failed(one_server: Server) -> None:
    done = call(one_server, "forgetful", "--only", "test_advance_never", "--without", "editions")
    assert done.returncode == 1
    first, *shown = done.stdout.splitlines()
    assert first == "FAILED  positions::test_advance_never_goes_back"
    assert any("is False" in line for line in shown), "the line of the case"
    assert shown[-1] == "0 passed, 1 failed, 0 skipped"


def test_at_a_terminal_it_shows_how_far_it_is(one_server: Server) -> None:
    ours, theirs = pty.openpty()
    try:
        done = call(one_server, "sound", "--only", "test_zero_is_a_position", errors=theirs)
        shown = os.read(ours, 65536)
    finally:
        os.close(theirs)
        os.close(ours)
    assert (done.returncode, done.stdout) == (0, "1 passed, 0 failed, 0 skipped\n")
    assert b"cases" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tests.conformance_stores"], "MODULE:FACTORY"),
        (["tests.no_such_module:store"], "there is no module 'tests.no_such_module'"),
        (["tests.conformance_stores:nothing"], "no function 'nothing'"),
        (["tests.conformance_stores:closed"], "it opens no store: OSError('closed')"),
        (["tests.conformance_stores:sound", "--without", "wings"], "'wings' is not one of"),
        (["tests.conformance_stores:sound", "--timeout", "nan"], "3600"),
    ],
    ids=["no colon", "no module", "no function", "no store", "no part", "no time"],
)
def test_what_can_not_be_run(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["conformance", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr


def test_no_case_that_matches(one_server: Server) -> None:
    done = call(one_server, "sound", "--only", "no_such_case")
    assert done.returncode == 2
    assert "no_such_case" in done.stderr


def test_a_part_that_there_is_not_can_not_be_needed() -> None:
    with pytest.raises(ValueError, match="wings"):
        conformance.needs("wings")
