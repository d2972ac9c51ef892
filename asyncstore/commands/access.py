"""`acl`: what a user of the server needs."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncstore import acl
from asyncstore.commands.options import KeyPrefix
from asyncstore.commands.output import say
from asyncstore.errors import ConfigurationError, InvalidName
from asyncstore.settings import Settings

app = typer.Typer()


@app.command("acl")
def acl_(
    user: Annotated[str, typer.Argument(help="The user's name on the server.")],
    waitaof: Annotated[
        bool,
        typer.Option(help="WAITAOF too, for fsync_and_replicas(n); Redis has it from 7.2 on."),
    ] = False,
    key_prefix: KeyPrefix = None,
) -> None:
    """Print the ACL SETUSER command for a user who may do what a store needs, and nothing else."""
    try:
        prefix = Settings(key_prefix=key_prefix or "").key_prefix
        print(acl.line(user, prefix, waitaof=waitaof))
    except (ConfigurationError, InvalidName) as error:
        say.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    say.print("give the user a password, too: ACL SETUSER … '>the password'", markup=False)
