"""Pictures of `doctor`, `read` and `tail`: what they print on a terminal, saved as SVG.

python docs/terminal.py build/terminal
"""

from __future__ import annotations

import asyncio
import io
import os
import pty
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

import asyncstore
from asyncstore import ANY, Aggregate, Event, Store

ROWS: Final = 50
WIDTH: Final = 116
STORE: Final = ".asyncstore"  # where commands look for one, in the directory that they run in
ORDER: Final = Aggregate("orders", "2026-0042")
EVENTS: Final = (
    Event("OrderPlaced", {"customer": "Ada", "currency": "EUR"}),
    Event("ItemAdded", {"item": "tea", "quantity": 2, "price": 4.5}),
    Event("ItemAdded", {"item": "cup", "quantity": 1, "price": 12.0}),
    Event("VoucherRedeemed", {"code": "AUTUMN", "percent": 10}),
    Event("OrderPaid", {"amount": 18.9, "by": "card"}),
    Event("OrderShipped", {"parcels": 1}),
)


async def take(target: Path) -> None:
    """Run the commands, and save what they show in the directory `target`."""
    with tempfile.TemporaryDirectory(prefix="shop-") as shop:
        async with asyncstore.open(path=Path(shop, STORE)) as store:
            await _tail(store, Shot(shop, f"tail orders --limit {len(EVENTS)}"), target)
            for line in (f"read orders {ORDER.root}", "doctor"):
                shot = Shot(shop, line)
                await asyncio.to_thread(shot.watch)
                shot.save(target)


async def _tail(store: Store, shot: Shot, target: Path) -> None:
    await asyncio.to_thread(shot.watch, b"listening")
    for event in EVENTS:
        await store.events.append(ORDER, [event], expected=ANY)
    await asyncio.to_thread(shot.watch)
    shot.save(target)


@dataclass
class Shot:
    """A command that runs on a terminal of its own."""

    directory: str
    line: str
    shown: bytes = b""
    terminal: int = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.terminal, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (ROWS, WIDTH))
        settings = ("REDIS_URL", "ASYNCSTORE_", "COLUMNS", "LINES", "NO_COLOR")
        others = {name: os.environ[name] for name in os.environ if not name.startswith(settings)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "asyncstore", *self.line.split()],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=self.directory,
            env={**others, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )
        os.close(theirs)

    def watch(self, until: bytes | None = None) -> None:
        """Read what is shown, until something is, or to the end."""
        while until is None or until not in self.shown:
            try:
                self.shown += os.read(self.terminal, 65536)
            except OSError:  # so a terminal says that nobody has it open any more
                return

    def save(self, target: Path) -> None:
        """Save it all as a picture that has the command's name."""
        os.close(self.terminal)
        self.process.wait()
        paper = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
        paper.print(Text(f"$ asyncstore {self.line}", style="bold"))
        shown = self.shown.decode().replace("\r\n", "\n")
        paper.print(Text.from_ansi(shown.rstrip()))
        path = target / f"{self.line.split()[0]}.svg"
        paper.save_svg(f"{path}", title="asyncstore")
        print(path)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    asyncio.run(take(directory))
