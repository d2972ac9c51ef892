"""Which processes there are, and whose they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.polling import eventually


def stat_of(pid: int) -> tuple[str, int] | None:
    """The state of a process and its parent; None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return fields[0], int(fields[1])
    answer = subprocess.run(
        ["ps", "-o", "stat=,ppid=", "-p", str(pid)],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    fields = answer.stdout.split()
    return (fields[0], int(fields[1])) if fields else None


def parent_of(pid: int) -> int:
    found = stat_of(pid)
    assert found is not None
    return found[1]


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def is_running(pid: int) -> bool:
    found = stat_of(pid)
    return found is not None and not found[0].startswith("Z")


async def gone(pid: int) -> None:
    await eventually(lambda: not is_running(pid), f"process {pid} ended")
