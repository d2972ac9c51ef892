"""A famous game of chess as events, and what might have been as an edition.

    python examples/chess_variations.py [--url redis://localhost:6379]

The Opera Game: Paul Morphy against the Duke of Brunswick and Count Isouard, Paris 1858. At move 8
Morphy brought out a knight, where he could have won a pawn. Every half move is an event, the game
is the main edition, and the pawn is won on another one, which shares the first seven moves. Both
are printed side by side, move by move and as they end.
"""

from __future__ import annotations

import asyncio
from functools import reduce
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import asyncstore
from asyncstore import NEW, Aggregate, Event, RecordedEvent, Store

GAME = Aggregate("chess", "opera-game-1858")
VARIATION = GAME.on("8.Qxb7")

# Each half move as it is written, and which pieces it moves from where to where.
PLAYED = """
    e4:e2e4 e5:e7e5          Nf3:g1f3 d6:d7d6         d4:d2d4 Bg4:c8g4
    dxe5:d4e5 Bxf3:g4f3      Qxf3:d1f3 dxe5:d6e5      Bc4:f1c4 Nf6:g8f6
    Qb3:f3b3 Qe7:d8e7        Nc3:b1c3 c6:c7c6         Bg5:c1g5 b5:b7b5
    Nxb5:c3b5 cxb5:c6b5      Bxb5+:c4b5 Nbd7:b8d7     O-O-O:e1c1,a1d1 Rd8:a8d8
    Rxd7:d1d7 Rxd7:d8d7      Rd1:h1d1 Qe6:e7e6        Bxd7+:b5d7 Nxd7:f6d7
    Qb8+:b3b8 Nxb8:d7b8      Rd8#:d1d8
"""
POSSIBLE = "Qxb7:b3b7 Qb4+:e7b4  Qxb4:b7b4 Bxb4+:f8b4"
DIVERGES_AT = 14  # the sequence of White's 8th move

Board = dict[str, str]  # from a square to the piece that stands there
START: Board = {
    file + rank: piece
    for rank, row in zip("8721", ("♜♞♝♛♚♝♞♜", "♟" * 8, "♙" * 8, "♖♘♗♕♔♗♘♖"), strict=True)
    for file, piece in zip("abcdefgh", row, strict=True)
}

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def moves(text: str) -> list[Event]:
    """Return an event for each half move."""
    pairs = (move.split(":") for move in text.split())
    return [Event("MovePlayed", {"san": san, "moved": moved.split(",")}) for san, moved in pairs]


def play(board: Board, move: RecordedEvent) -> Board:
    """Return the board after a move: what stood where the piece goes to is taken."""
    after = dict(board)
    for squares in move.data["moved"]:
        after[squares[2:]] = after.pop(squares[:2])
    return after


async def record(store: Store) -> None:
    """Store the game and the variation; the game ends after the variation was tried."""
    for line in (VARIATION, GAME):
        await store.events.delete(line)  # so that this can be run again
    game = moves(PLAYED)
    await store.events.append(GAME, game[:10], expected=NEW)
    board = await store.fold(GAME, play, START)
    await store.snapshots.put(GAME, sequence=9, state=board)
    await store.events.append(GAME, game[10:-1], expected=10)

    # The first append to an edition says where it leaves main.
    own = await store.events.append(VARIATION, moves(POSSIBLE), expected=DIVERGES_AT)
    tried = await store.events.read(VARIATION)
    console.print(f"{VARIATION} diverges at sequence {own.first_sequence}, White's move 8:")
    console.print(f"{DIVERGES_AT} half moves of main, then {len(tried) - DIVERGES_AT} of its own")

    await store.events.append(GAME, game[-1:], expected=len(game) - 1)
    assert await store.events.read(VARIATION) == tried, "what main gets later is not seen there"
    console.print(f"main went on to {len(game)} half moves; the variation still has {len(tried)}\n")


async def print_moves(store: Store) -> None:
    """Print both lines beside each other, with a rule where they part."""
    lines = [await store.events.read(line) for line in (GAME, VARIATION)]
    table = Table("", "as played", "8.Qxb7")
    for first in range(0, len(lines[0]), 2):
        if first == DIVERGES_AT:
            table.add_section()
        cells = [" ".join(f"{e.data['san']:6}" for e in line[first : first + 2]) for line in lines]
        style = "dim" if first < DIVERGES_AT else ""
        table.add_row(f"{first // 2 + 1}.", *cells, style=style)
    console.print(table)


async def print_boards(store: Store) -> None:
    """Print how both lines end: each from main's snapshot and the moves after it."""
    boards = []
    for line in (GAME, VARIATION):
        loaded = await store.load(line)
        assert loaded.snapshot is not None
        boards.append(reduce(play, loaded.events, loaded.snapshot.state))
        console.print(
            f"{line}: loaded the snapshot as of sequence {loaded.snapshot.sequence} "
            f"and {len(loaded.events)} half moves after it"
        )
    console.print("\n   as played              8.Qxb7")
    for rank in "87654321":
        rows = (" ".join(board.get(file + rank, "·") for file in "abcdefgh") for board in boards)
        console.print("     ".join(f"{rank}  {row}" for row in rows))
    console.print("     ".join(["   a b c d e f g h"] * 2) + "\n")


async def forget(store: Store) -> None:
    """Delete the variation, and see that nothing of this has changed the game."""
    count = await store.events.delete_edition(VARIATION.domain, VARIATION.edition)
    game = await store.events.read(GAME)
    assert [move.data for move in game] == [move.data for move in moves(PLAYED)]
    console.print(f"edition {VARIATION.edition} deleted: {count} events of its own")
    console.print(f"main is as it was: {len(game)} half moves, the last is {game[-1].data['san']}")


async def run(url: str) -> None:
    async with asyncstore.open(url) as store:
        await record(store)
        await print_moves(store)
        await print_boards(store)
        await forget(store)


def main(
    url: Annotated[str, typer.Option(help="Where to keep the game.")] = "embedded://",
) -> None:
    """Keep a game of chess in a store, with a variation that branches off it."""
    asyncio.run(run(url))


if __name__ == "__main__":
    typer.run(main)
