"""What commands print. Results go to the standard output, all that is said to the standard error.

On a terminal results are tables and colours, in a pipe plain lines with tabs in between. Names,
types and data may have been chosen by anybody: what a terminal would act on is written out, as in
`\\x1b`, on every way out of here. The only file that knows rich.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

RED: Final = "red"
_PAGE: Final = 500  # rows


class _Console(Console):
    """One that leaves a closed pipe to whoever runs the command."""

    def on_broken_pipe(self) -> None:
        raise  # rich has caught the error where it calls this


_errors = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def safe(text: str) -> str:
    """Return a text with all that is not shown as itself written out: `\\x1b`, `\\n`, `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _written_out(char) for char in text)


def _written_out(char: str) -> str:
    return char.encode("unicode_escape").decode()


def say(text: str, style: str = "") -> None:
    """Say something about the results, in one line on the standard error."""
    _errors.print(Text(safe(text), style=style))


def say_if_typed(what: str) -> None:
    """Say what is read, if the standard input is a terminal: the command seems to do nothing."""
    if sys.stdin.isatty():
        say(f"reading {what} from the terminal; Ctrl-D ends it")


def print_line(text: str) -> None:
    """Print a line of a result, at once."""
    print(safe(text), flush=True)


def print_json(value: Any) -> None:
    """Print a result for programs: a line of JSON, at once."""
    print(json_of(value), flush=True)


def json_of(value: Any) -> str:
    """Return a value as JSON in ASCII, which no terminal acts on. Of what is no JSON its `str`."""
    return json.dumps(value, default=str)


# Tables


@dataclass(frozen=True, slots=True)
class Cell:
    """Text of a table in a style. What is in `below` stands in a line of its own, in bold."""

    text: str
    style: str = ""
    below: str = ""

    def rich(self) -> Text:
        """Return it for a terminal."""
        shown = Text(safe(self.text), style=self.style)
        return shown.append(f"\n{safe(self.below)}", style="bold") if self.below else shown

    def plain(self) -> str:
        """Return it for a pipe."""
        return safe(f"{self.text} {self.below}" if self.below else self.text)


@dataclass(frozen=True, slots=True)
class Column:
    """How a column of a table is called, and where its texts stand; `share` of the width."""

    name: str
    is_number: bool = False
    share: int | None = None


Columns = Sequence[str | Column]
Row = Sequence[str | Cell]


@dataclass(frozen=True, slots=True)
class Rows:
    """A table."""

    columns: Columns
    cells: Sequence[Row]
    title: str = ""

    def rich(self) -> Table:
        """Return it for a terminal."""
        table = Table(title=Text(safe(self.title)) if self.title else None, title_justify="left")
        for column in map(_column, self.columns):
            if column.is_number:
                table.add_column(column.name, justify="right")
            else:
                table.add_column(column.name, ratio=column.share, overflow="fold")
        for row in self.cells:
            table.add_row(*(_cell(cell).rich() for cell in row))
        return table

    def plain(self) -> Iterator[str]:
        """Return its lines for a pipe: the names of the columns first."""
        yield "\t".join(_column(column).name for column in self.columns)
        for row in self.cells:
            yield "\t".join(_cell(cell).plain() for cell in row)


def numbers(*names: str) -> Columns:
    """Return columns of numbers."""
    return [Column(name, is_number=True) for name in names]


def _column(column: str | Column) -> Column:
    return column if isinstance(column, Column) else Column(column)


def _cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def print_rows(*tables: Rows) -> None:
    """Print tables."""
    screen = _screen()
    for table in tables:
        if screen.is_terminal:
            screen.print(table.rich())
        else:
            print("\n".join(table.plain()), flush=True)


async def print_all(columns: Columns, rows: AsyncIterator[Row]) -> int:
    """Print a table of any length as it comes; return how many rows it has.

    On a terminal, each page of it has columns as wide as its own texts.
    """
    most = _PAGE if _screen().is_terminal else 1
    count, page = 0, list[Row]()
    try:
        async for row in rows:
            page.append(row)
            count += 1
            if len(page) == most:
                _print_page(Rows(columns, page), is_first=count == most)
                page = []
    finally:
        if page:  # also where the next row is an error
            _print_page(Rows(columns, page), is_first=count == len(page))
    return count


def _print_page(rows: Rows, *, is_first: bool) -> None:
    if _screen().is_terminal or is_first:
        print_rows(rows)
    else:
        print("\n".join(list(rows.plain())[1:]), flush=True)


def print_cells(*cells: Cell) -> None:
    """Print one line of what comes bit by bit, at once."""
    screen = _screen()
    if screen.is_terminal:
        screen.print(Text("  ").join(cell.rich() for cell in cells), soft_wrap=True)
    else:
        print("\t".join(cell.plain() for cell in cells), flush=True)


@contextmanager
def watched() -> Iterator[Callable[[Rows], None]]:
    """Give the function that shows the newest state of a table, in the place of the one before."""
    screen = _screen()
    if not screen.is_terminal or screen.is_dumb_terminal:  # Live shows nothing there till the end
        yield print_rows
        return
    with Live(Group(), console=screen, auto_refresh=False) as live:
        yield lambda rows: live.update(rows.rich(), refresh=True)


def _screen() -> Console:
    return _Console(highlight=False, emoji=False)


# What takes long


@contextmanager
def progress(
    what: str, size: int | None, unit: str = "events"
) -> Iterator[Callable[[int | None, int], None]]:
    """Show a bar, where somebody is there to see it, and give the function that moves it."""
    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.fields[done]:,} " + unit),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns,
        console=_errors,
        transient=True,
        disable=not _errors.is_terminal,
        # What is printed meanwhile goes above the bar, but never from a pipe to the terminal.
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task(what, total=size, done=0)
        yield lambda position, done: bar.update(task, completed=position, done=done)


@contextmanager
def counting(what: str, unit: str = "events") -> Iterator[Callable[[int], None]]:
    """Show how many there were; the call takes how many there are more."""
    count = 0
    with progress(what, None, unit) as advance:

        def on_more(more: int) -> None:
            nonlocal count
            count += more
            advance(None, count)

        yield on_more
