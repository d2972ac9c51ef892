"""Running a command, and what its exit code is."""

from __future__ import annotations

import asyncio
import os
import sys
import zlib
from typing import TYPE_CHECKING, Any

import typer

from asyncstore.commands.output import say
from asyncstore.errors import AsyncStoreError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def run(command: Callable[[], Coroutine[Any, Any, int]], failed: int = 1) -> None:
    """Run a command, and end with the code that it returns, or that of an error: `failed`."""
    try:
        code = asyncio.run(command())
    except ConfigurationError as error:
        say.print(f"error: {error}", style="red", markup=False)
        code = 2
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is left of it must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (AsyncStoreError, OSError, EOFError, zlib.error) as error:
        say.print(f"error: {error}", style="red", markup=False)
        code = failed
    except KeyboardInterrupt:
        say.print("interrupted; what was stored is stored, run it again to go on")
        os._exit(130)  # a thread may still wait for a pipe, and nothing else is left to do
    raise typer.Exit(code)
