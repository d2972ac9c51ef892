"""The `asyncstore` command. What it is made of comes with the extra `cli`."""

from __future__ import annotations

import io
import os
import sys


def _open_what_is_closed() -> None:
    """Put the null device where a standard stream is closed, as `>&-` and some supervisors do.

    Python has None there, and the first connection would get the number of the stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - until the end
            setattr(sys, name, null)


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    _open_what_is_closed()
    try:
        from asyncstore.commands.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'asyncstore[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where it is not UTF-8
            stream.reconfigure(errors="backslashreplace")
    app()
