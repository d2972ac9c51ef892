"""The least that the driver's user needs. That it is enough, the contract's tests show on a server
of their matrix, `embedded-valkey-acl`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.exceptions import NoPermissionError

import asyncstore
from asyncstore import NEW, Aggregate, InvalidName, UnexpectedReply, acl, embedded, scripts, verify
from tests.builders import listed, numbered
from tests.proxy import proxy_to
from tests.servers import Server, as_user, kinds, redis_server

ORDER = Aggregate("orders", "1")
VALKEY = str(embedded.find_binary())


@pytest.fixture(scope="module", params=["embedded-valkey", "redis-on-path", "redis-8.2"])
def known(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of the matrix with the user."""
    (kind,) = (kind for kind in kinds() if kind.name == request.param)
    if kind.missing:
        pytest.skip(kind.missing)
    with kind.start() as url:
        yield Server(kind.name, as_user(url), url)


def test_commands_are_those_of_the_scripts_and_of_the_driver() -> None:
    used = {
        command.lower()
        for script in scripts.ALL
        if script not in scripts.MENDING
        for command in re.findall(r"redis\.p?call\('(\w+)'", script.source)
    }
    sent = {"evalsha", "eval", "get", "zcard", "zrange", "zscan", "zscore", "hello", "info", "ping"}
    sent |= {"select", "client|kill", "client|setname", "wait", "config|get", "memory|usage"}
    sent |= {"cluster|slots", "cluster|info", "cluster|nodes", "asking", "readonly"}
    sent |= {"ssubscribe"}
    assert set(acl.COMMANDS) == used | sent
    assert len(acl.COMMANDS) == len(set(acl.COMMANDS))


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL", "FLUSHDB", "KEYS *", "CONFIG SET maxmemory 1", "SCAN 0", "CLIENT LIST",
        "SCRIPT FLUSH", "ACL LIST", "SHUTDOWN", "MONITOR", "PUBLISH c m",
        "SUBSCRIBE c", "SSUBSCRIBE c", "SPUBLISH c m",
        "DEL test-x", "RENAME test-x other", "GET other", "TYPE test-x",
    ],
)  # fmt: skip
def test_what_is_refused(known: Server, command: str) -> None:
    with redis.Redis.from_url(known.url) as client:
        with pytest.raises(NoPermissionError):
            client.execute_command(*command.split())
        call = ", ".join(f"'{part}'" for part in command.split())
        with pytest.raises(redis.ResponseError):
            client.eval(f"return redis.call({call})", 0)


async def test_a_store_works_and_no_other(known: Server) -> None:
    async with asyncstore.open(known.url, key_prefix="test-1:") as store:
        await store.events.append(ORDER, numbered(3), expected=NEW)
        with pytest.raises(UnexpectedReply, match="NOPERM"):
            await listed(verify.problems(store))
    async with asyncstore.open(known.outside, key_prefix="test-1:") as store:
        assert await listed(verify.problems(store)) == []
    with pytest.raises(UnexpectedReply, match="NOPERM"):
        async with asyncstore.open(known.url, key_prefix="other:"):
            pass


def test_again_keeps_the_password_and_takes_other_rights_away(known: Server) -> None:
    with redis.Redis.from_url(known.outside) as client:
        client.execute_command("ACL", "SETUSER", "app", "+@all", "~*", "&*")
        client.execute_command(*shlex.split(acl.line("app", "test-")))
    with redis.Redis.from_url(known.url) as client:
        assert client.ping()
        for command in ("FLUSHALL", "GET other", "PUBLISH c m"):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split())


async def test_a_lost_reply_is_found_out_under_it() -> None:
    with redis_server(VALKEY) as server:
        as_user(server.url)
        async with proxy_to(Path(urlsplit(server.url).path)) as proxy:
            url = proxy.url.replace("://", "://app:s3cret@", 1)
            async with asyncstore.open(url, key_prefix="test-1:") as store:
                proxy.replies.cut()
                done = await store.events.append(ORDER, numbered(1), expected=NEW)
                assert (proxy.cuts, done.first_sequence) == (1, 0)


def test_waitaof_is_for_servers_that_have_it() -> None:
    assert "+waitaof" not in acl.line("app")
    line = acl.line("app", waitaof=True)
    with redis_server(VALKEY) as server, redis.Redis.from_url(server.url) as client:
        client.execute_command(*shlex.split(line))


@pytest.mark.parametrize("user", ["", "a b", "a\n", "'a'", "on;"])
def test_a_user_that_is_none(user: str) -> None:
    with pytest.raises(InvalidName):
        acl.line(user)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncstore", "acl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line() -> None:
    done = run("app", "--key-prefix", "shop:")
    assert done.stdout == acl.line("app", "shop:") + "\n"
    start = "ACL SETUSER app on resetkeys ~shop:* resetchannels &shop:* -@all +hello"
    assert done.stdout.startswith(start)
    assert "password" in done.stderr
    assert done.returncode == 0
    for arguments in (["a b"], ["app", "--key-prefix", "a*"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "error: " in done.stderr
