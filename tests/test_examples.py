"""Every example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent


LONG = "/".join(["[id] :o:", *("x" * 200 for _ in range(3)), "page.tsx"])


def git(repository: Path, *arguments: str, minute: int = 59) -> None:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    when = f"2024-01-01T12:{minute:02}:00+02:00"
    subprocess.run(
        ["git", *who, "-C", str(repository), *arguments],  # noqa: S607
        check=True,
        capture_output=True,
        env={**os.environ, "GIT_COMMITTER_DATE": when},
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small history with everything that is odd in file names."""
    path = tmp_path / "repository"
    path.mkdir()
    git(path, "init", "-q")
    names = ["plain.txt", "a b/{{ name }}.py", ":colon", "new\nline", "ü%20", "tab\there", LONG]
    for number in range(6):
        for name in names[: number + 2]:
            file = path / name
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text("line\n" * (number + 1))
        if number == 3:
            (path / "binary").write_bytes(b"\x00\xff" * 50)
            (path / names[2]).unlink()
        git(path, "add", "-A")
        subject = "" if number == 2 else f"[/b] \x01 {number}"
        git(path, "commit", "-q", "--allow-empty-message", "-m", subject, minute=number)
    return path


def run_example(*arguments: str, name: str = "git_history.py") -> subprocess.CompletedProcess[str]:
    example = str(ROOT / "examples" / name)
    return subprocess.run(
        [sys.executable, example, *arguments], capture_output=True, text=True, check=False
    )


def test_leaderboard() -> None:
    done = run_example(name="leaderboard.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed it after" in done.stdout
    assert "6,000 points, the same as a fold over all events" in done.stdout


def test_git_history(repository: Path) -> None:
    done = run_example(str(repository))
    assert done.returncode == 0, done.stderr
    # By commit: 2 + 3 + 4 + 6 (4 written, 1 deleted, the binary one) + 6 + 7.
    assert re.search(r"^28 events of 8 files in .* events/s", done.stdout, re.M), done.stdout
    assert re.search(r"^append: p50 .* ms, p95 .* ms, p99 .* ms$", done.stdout, re.M)
    assert re.search(r"│ 6 +│ plain.txt", done.stdout)
    assert re.search(r"│ 6 +│ a b/%7B%7B name %7D%7D.py", done.stdout)
    assert "Traceback" not in done.stderr
    assert re.search(
        r"a b/.* as of 2024-01-01 10:02:00 UTC: 3 lines, commit 3 of it, by Ada$", done.stdout, re.M
    )
    assert "now: 6 lines, commit 6 of it, by Ada" in done.stdout
    assert re.search(
        r"in one round trip, .*: snapshot as of sequence 3 and 2 events after it; 6 lines",
        done.stdout,
    )


def test_git_history_again_into_the_same_store(repository: Path, tmp_path: Path) -> None:
    url = f"embedded://{tmp_path / 'store'}"
    assert run_example(str(repository), "--url", url).returncode == 0
    (repository / "plain.txt").write_text("only line\n")
    git(repository, "commit", "-qam", "later")
    done = run_example(str(repository), "--url", url)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 events of 8 files", done.stdout, re.M)
    assert "plain.txt now: 1 lines, commit 7 of it" in done.stdout


def test_git_history_of_odd_names(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / LONG).parent.mkdir(parents=True)
    (tmp_path / LONG).write_text("line\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "[/b] \x01 :smile:")
    done = run_example(str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 events of 1 files", done.stdout, re.M)
    assert "[id] :o:/xxx" in done.stdout


def test_git_history_without_a_history(tmp_path: Path) -> None:
    done = run_example(str(tmp_path))
    assert done.returncode == 1
    assert "has no history to read" in done.stderr
    assert "Traceback" not in done.stderr


def run_chess(*arguments: str) -> str:
    done = run_example(*arguments, name="chess_variations.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_chess_variations() -> None:
    out = run_chess()
    assert "on edition 8.Qxb7 diverges at sequence 14, White's move 8" in out
    assert "14 half moves of main, then 4 of its own" in out
    assert "main went on to 33 half moves; the variation still has 18" in out

    rows = re.findall(r"│ (\d+)\. +│ ([^│]+)│ ([^│]+)│", out)
    moves = [(int(row[0]), row[1].split(), row[2].split()) for row in rows]
    assert [number for number, _, _ in moves] == [*range(1, 18)]
    assert all(played == tried != [] for _, played, tried in moves[:7])
    assert moves[7:9] == [
        (8, ["Nc3", "c6"], ["Qxb7", "Qb4+"]),
        (9, ["Bg5", "b5"], ["Qxb4", "Bxb4+"]),
    ]
    assert [tried for _, _, tried in moves[9:]] == [[]] * 8
    assert moves[-1][1] == ["Rd8#"]
    assert re.search(r"│ 7\. .*\n├─.*\n│ 8\. ", out), "a rule where they part"

    # Both start from the snapshot that main has of move 5.
    assert "1858: loaded the snapshot as of sequence 9 and 23 half moves after it" in out
    assert "8.Qxb7: loaded the snapshot as of sequence 9 and 8 half moves after it" in out
    # How they end: with a mate, and with a pawn less.
    assert "8  · ♞ · ♖ ♚ ♝ · ♜     8  ♜ ♞ · · ♚ · · ♜" in out
    assert "7  ♟ · · · · ♟ ♟ ♟     7  ♟ · ♟ · · ♟ ♟ ♟" in out
    assert "4  · · · · ♙ · · ·     4  · ♝ ♗ · ♙ · · ·" in out
    assert "1  · · ♔ · · · · ·     1  ♖ ♘ ♗ · ♔ · · ♖" in out

    assert "edition 8.Qxb7 deleted: 4 events of its own" in out
    assert "main is as it was: 33 half moves, the last is Rd8#" in out


def test_chess_variations_again_into_the_same_store(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path / 'store'}"
    assert run_chess("--url", url) == run_chess("--url", url)


def test_a_suite_that_uses_the_testing_kit() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"),
            *("-p", "no:valkey", "--config-file", os.devnull, "--rootdir", "examples/testing"),
            *("-o", "asyncio_default_fixture_loop_scope=function", "examples/testing"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_prometheus_metrics() -> None:
    example = [sys.executable, str(ROOT / "examples" / "prometheus_metrics.py"), "--port", "0"]
    with subprocess.Popen(example, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            url = running.stdout.readline().strip()
            scrape_until(url, "handler_lag", "messaging_process_duration", "conflicts_total")
            running.terminate()
            assert running.wait(timeout=20) == 0
        finally:
            running.kill()


def scrape_until(url: str, *wanted: str) -> None:
    """Scrape a Prometheus endpoint until it has more than 0 under these names."""
    deadline = time.monotonic() + 30
    missing = set(wanted)
    while missing:
        assert time.monotonic() < deadline, f"these are missing: {missing}"
        text = httpx.get(url).raise_for_status().text
        missing = {name for name in wanted if not re.search(rf"{name}\S*{{.*}} [1-9]", text)}


def test_trace_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it is in the extra bench")
    picture = tmp_path / "trace.svg"
    done = run_example("--output", str(picture), name="trace_picture.py")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()[:-1]]
    assert [what.partition(" -> ")[0] for _, _, what in lines] == [
        "POST /orders",
        "load orders",
        "append orders",
        "process orders",
        "append orders",
        "ack orders",
    ]
    traces = [trace for trace, _, _ in lines]
    assert len(set(traces[:3])) == len(set(traces[3:])) == 1
    assert lines[3][2] == f"process orders -> {lines[2][1]}"
    assert "<svg" in picture.read_text()
