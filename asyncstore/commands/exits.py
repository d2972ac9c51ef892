"""Running a command, and what its exit code is. Nothing ends in a traceback but a fault of ours."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer

from asyncstore.commands.output import RED, say
from asyncstore.errors import (
    AsyncStoreError,
    DurabilityNotReached,
    OutcomeUnknown,
    SequenceConflict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import FrameType

FAILED: Final = 1
MISUSED: Final = 2
CONFLICT: Final = 3
UNSURE: Final = 4
INTERRUPTED: Final = 130
CLOSED_PIPE: Final = 141
_OF_A_SIGNAL: Final = 128  # and its number, as shells have it

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 not done, or something is wrong; 2 it can't be done as it was asked "
    "for: arguments, settings; 3 a conflict: somebody else has appended first; 4 events are "
    "stored, but not as durable as asked for, or may be; 129 the terminal was closed; 130 Ctrl-C; "
    "141 nobody reads the output any more; 143 SIGTERM. `doctor`, `verify`, `compare`: see their "
    "--help."
)


def run(
    command: Callable[[], Coroutine[Any, Any, int]],
    failed: int = FAILED,
    interrupted: str = "interrupted",
) -> NoReturn:
    """Run a command, and end with the code that it returns, or that of an error.

    `failed` is that of an error which has none of its own. `interrupted` is said at Ctrl-C and at
    the signals that end it as Ctrl-C does; '' where that is how the command ends.
    """
    end_with(lambda: asyncio.run(_stoppable(command())), failed, interrupted)


def stop_signals() -> list[signal.Signals]:
    """Return the signals beside that of Ctrl-C which ask to stop.

    That of a terminal which was closed is one, unless whoever has started this process wants it to
    go on then, as `nohup` does.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


class _Stopped(Exception):
    """A signal has ended a command."""

    def __init__(self, number: int) -> None:
        self.code = _OF_A_SIGNAL + number


async def _stoppable(work: Coroutine[Any, Any, int]) -> int:
    """Cancel it at a signal, as asyncio does at Ctrl-C: it leaves nothing behind.

    A second SIGTERM ends it at once. A terminal that was closed may say so more than once.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        came.append(number)
        if task is not None:
            loop.call_soon_threadsafe(task.cancel)

    # Not add_signal_handler: the loop's end would let SIGHUP kill it before the code is known.
    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        return await work
    except asyncio.CancelledError:
        if came:
            raise _Stopped(came[0]) from None
        raise
    finally:
        if not came:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with(
    work: Callable[[], int], failed: int = FAILED, interrupted: str = "interrupted"
) -> NoReturn:
    """Do the same with what asks the user before it needs an event loop."""
    try:
        code = work()
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is left of it must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED_PIPE
    except (AsyncStoreError, OSError) as error:
        _say_if_heard(f"error: {error}", RED)
        code = _code_of(error, failed)
    except typer.Abort:  # at a question
        say(interrupted)
        code = INTERRUPTED
    except KeyboardInterrupt:
        _leave(interrupted, INTERRUPTED)
    except _Stopped as stopped:
        _leave(interrupted, stopped.code)
    raise typer.Exit(code)


def _code_of(error: Exception, failed: int) -> int:
    if isinstance(error, SequenceConflict):
        return CONFLICT
    if isinstance(error, OutcomeUnknown | DurabilityNotReached):
        return UNSURE
    is_ours = isinstance(error, AsyncStoreError)
    return MISUSED if is_ours and isinstance(error, ValueError | TypeError) else failed


def _leave(why: str, code: int) -> NoReturn:
    _say_if_heard(why)
    os._exit(code)  # a thread may still wait for a pipe, and nothing else is left to do


def _say_if_heard(text: str, style: str = "") -> None:
    """Say something on a terminal or pipe that may be gone: the exit code counts then."""
    if text:
        with suppress(OSError):
            say(text, style)
