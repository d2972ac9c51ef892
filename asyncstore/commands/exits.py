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

FAILED: Final = 1
MISUSED: Final = 2
CONFLICT: Final = 3
UNSURE: Final = 4
INTERRUPTED: Final = 130
CLOSED_PIPE: Final = 141
TERMINATED: Final = 143

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 not done, or something is wrong; 2 it can't be done as it was asked "
    "for: arguments, settings; 3 a conflict: somebody else has appended first; 4 events are "
    "stored, but not as durable as asked for, or may be; 130 Ctrl-C; 141 nobody reads the output "
    "any more; 143 SIGTERM. `doctor`, `verify`, `compare`: see their --help."
)


def run(
    command: Callable[[], Coroutine[Any, Any, int]],
    failed: int = FAILED,
    interrupted: str = "interrupted",
) -> NoReturn:
    """Run a command, and end with the code that it returns, or that of an error.

    `failed` is that of an error which has none of its own. `interrupted` is said at Ctrl-C and at
    SIGTERM; '' where that is how the command ends.
    """
    end_with(lambda: asyncio.run(_terminable(command())), failed, interrupted)


async def _terminable(work: Coroutine[Any, Any, int]) -> int:
    """Cancel it at SIGTERM, as asyncio does at Ctrl-C: it leaves nothing behind.

    A second SIGTERM ends it at once.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def cancel() -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        if task is not None:
            task.cancel()

    loop.add_signal_handler(signal.SIGTERM, cancel)
    return await work


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
        say(f"error: {error}", RED)
        code = _code_of(error, failed)
    except typer.Abort:  # at a question
        say(interrupted)
        code = INTERRUPTED
    except KeyboardInterrupt:
        _leave(interrupted, INTERRUPTED)
    except asyncio.CancelledError:
        _leave(interrupted, TERMINATED)
    raise typer.Exit(code)


def _code_of(error: Exception, failed: int) -> int:
    if isinstance(error, SequenceConflict):
        return CONFLICT
    if isinstance(error, OutcomeUnknown | DurabilityNotReached):
        return UNSURE
    is_ours = isinstance(error, AsyncStoreError)
    return MISUSED if is_ours and isinstance(error, ValueError | TypeError) else failed


def _leave(why: str, code: int) -> NoReturn:
    if why:
        with suppress(OSError):
            say(why)
    os._exit(code)  # a thread may still wait for a pipe, and nothing else is left to do
