"""The `asyncstore` command. What it is made of comes with the extra `cli`."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
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
