"""The table of what became of each fault, and the file with all of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.run import Row

_WIDTH = 170
_SHOWN = 5
_COLUMNS = (
    "acknowledged",
    "lost",
    "doubled",
    "wrong",
    "unknown",
    "refused",
)


def console() -> Console:
    """Return where to print: as wide as the table, where nobody says how wide that is."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH)


def show(rows: Sequence[Row]) -> None:
    table = Table(title="Faults under load: events, and seconds to the next acknowledged append")
    for name in ("fault", "server", "level"):
        table.add_column(name, no_wrap=True)
    for name in ("writers", "times", *_COLUMNS, "recovery", "longest", "p99 ms", "others"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = [f"{getattr(row, name):,}" for name in _COLUMNS]
        times = sorted(row.recovery)
        seconds = [f"{times[len(times) // 2]:.3f}", f"{times[-1]:.3f}"] if times else ["", ""]
        fixed = (row.fault, row.server, row.level, f"{row.writers}", f"{row.rounds}")
        slow = ["" if one is None else f"{one:.0f}" for one in (row.p99, row.p99_others)]
        table.add_row(*fixed, *counts, *seconds, *slow, style="red" if row.why else None)
    console().print(table)


def show_what_is_wrong(rows: Sequence[Row]) -> None:
    for row in rows:
        for why in row.why[:_SHOWN]:
            console().print(f"{row.fault}, {row.server}: {why}", style="red", markup=False)
        if len(row.why) > _SHOWN:
            console().print(f"… and {len(row.why) - _SHOWN} more")


def save(path: Path, **content: Any) -> None:
    machine = {"python": platform.python_version(), "machine": platform.platform()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine, **content}, indent=1, ensure_ascii=False) + "\n")
