"""What is printed, and how: tables on the standard output, all else on the standard error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PIPED_WIDTH: Final = 120

say = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""Where everything is said about the results."""


def show(*results: RenderableType) -> None:
    """Print results on the standard output; wide enough where it is no terminal."""
    screen = Console(highlight=False, emoji=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, emoji=False, width=_PIPED_WIDTH)
    for result in results:
        screen.print(result)


def table(first: str, *others: str) -> Table:
    """Return a table with a column of names, and others of numbers."""
    made = Table(first)
    for name in others:
        made.add_column(name, justify="left" if name == "node" else "right")
    return made


@contextmanager
def progress(what: str, size: int | None) -> Iterator[Callable[[int | None, int], None]]:
    """Show a bar, where somebody is there to see it, and give the function that moves it."""
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.fields[events]:,} events"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=say, transient=True, disable=not say.is_terminal) as bar:
        task = bar.add_task(what, total=size, events=0)
        yield lambda position, events: bar.update(task, completed=position, events=events)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Show how many events have been looked at; the call takes how many there are more."""
    read = 0
    with progress(what, None) as advance:

        def on_events(count: int) -> None:
            nonlocal read
            read += count
            advance(None, read)

        yield on_events
