"""The least that a user of the server needs for all that a store does, except `verify`."""

from __future__ import annotations

import re
from typing import Final

from asyncstore.errors import InvalidName

COMMANDS: Final = (
    # to open a connection, and to know what became of an append when it broke
    *("hello", "select", "ping", "info", "client|kill", "client|setname"),
    # what the driver sends
    *("evalsha", "eval", "get", "zcard", "zrange", "zscan", "zscore"),
    # what its scripts do; those named above, too
    *("set", "time", "exists", "unlink", "hget", "hgetall", "hmget", "hset", "mget"),
    *("hlen", "mset", "rename", "sadd", "scard", "smembers", "zadd", "zrem"),
    *("zremrangebylex", "zremrangebyrank", "zremrangebyscore", "zunionstore", "spublish"),
    # to hear of appends
    "ssubscribe",
    # the nodes of a cluster, and indexes that are in another slot
    *("cluster|slots", "cluster|info", "cluster|nodes", "asking", "readonly", "incr"),
    # durability levels, and `store.check()`
    *("wait", "config|get", "memory|usage"),
)
"""All commands, as ACL SETUSER names them."""

_USER: Final = re.compile(r"[A-Za-z0-9._@-]+")


def line(user: str, key_prefix: str = "", *, waitaof: bool = False) -> str:
    """Return the ACL SETUSER command for a user of the stores with a key prefix.

    It sets all but the password, which a user keeps that had one. Such a prefix has no characters
    that a pattern of keys and channels gives a meaning. WAITAOF is for the level
    `fsync_and_replicas`; Redis before 7.2 does not have it, and would refuse the whole command.
    """
    if not _USER.fullmatch(user):
        raise InvalidName("user", user, "only letters A-Z a-z, digits, '.', '_', '@', '-' are fine")
    commands = (*COMMANDS, "waitaof") if waitaof else COMMANDS
    rights = ["resetkeys", f"~{key_prefix}*", "resetchannels", f"&{key_prefix}*", "-@all"]
    return " ".join(["ACL SETUSER", user, "on", *rights, *(f"+{name}" for name in commands)])
