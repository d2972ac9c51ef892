"""`acl`: what a user of the server needs."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncstore import acl
from asyncstore.commands.exits import run
from asyncstore.commands.options import AsJson, KeyPrefix
from asyncstore.commands.output import print_json, print_line, say
from asyncstore.settings import Settings

app = typer.Typer()


@app.command("acl")
def acl_(
    user: Annotated[str, typer.Argument(help="The user's name on the server.")],
    waitaof: Annotated[
        bool,
        typer.Option(help="WAITAOF too, for fsync_and_replicas(n); Redis has it from 7.2 on."),
    ] = False,
    as_json: AsJson = False,
    key_prefix: KeyPrefix = None,
) -> None:
    """Print the ACL SETUSER command for a user who may do what a store needs, and nothing else."""
    run(lambda: _acl(user, waitaof, as_json, key_prefix or ""))


async def _acl(user: str, waitaof: bool, as_json: bool, key_prefix: str) -> int:
    line = acl.line(user, Settings(key_prefix=key_prefix).key_prefix, waitaof=waitaof)
    if as_json:
        print_json({"user": user, "command": line})
    else:
        print_line(line)
    say("give the user a password, too: ACL SETUSER … '>the password'")
    return 0
