"""What each feature of the append script costs the server.

The script is run as it is and with one feature taken out, turn by turn; the difference is the
feature's cost. Times are the server's own, from INFO commandstats, and do not hold what it takes to
read the request and to write the reply.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from asyncstore import scripts
from asyncstore.appends import MOST_APPENDS
from asyncstore.keys import ALL
from benchmarks.sides import KEYS, Workload, Writer, script_call

if TYPE_CHECKING:
    import redis.asyncio

ROUNDS = 40
APPENDS_A_ROUND = 1280
GROUPS = (1, MOST_APPENDS)
WHOLE = "the whole script"

# What stands in the script, and what stands there without the feature.
_NUMBER = ("local number = next_commit()", "now = '1700000000000000'")
_ROOTS = ("redis.call('ZADD', roots, number, root)", "")
FEATURES = {
    "check of the sequence": [("redis.call('ZCARD', events)", "expected")],
    "the server's clock": [("redis.call('TIME')", "{ '1700000000', '1' }")],
    # The number is kept, and counted from 0 in each call.
    "reading the last number and time": [("redis.call('GET', commits)", "'0'")],
    # Without a new number the root would stay where it is, which costs less: so both, or the index.
    "number of the commit and index of roots": [_NUMBER, _ROOTS],
    "index of roots": [_ROOTS],
    "telling those who listen": [("ring(channel, domain, edition)\nreturn", "return")],
    "failure of its own (pcall)": [("pcall(append, ", "true, append(")],
}
"""Claims cost only those who make them: see bench.py."""

Costs = dict[str, dict[str, float]]


async def measure(client: redis.asyncio.Redis) -> Costs:
    """Return microseconds of the server's time an append, for each size of a group."""
    variants = {WHOLE: scripts.APPEND.source}
    for feature, changes in FEATURES.items():
        variants[feature] = scripts.APPEND.source
        for code, without in changes:
            if variants[feature].count(code) != 1:
                raise RuntimeError(f"the script is not what this benchmark takes it for: {feature}")
            variants[feature] = variants[feature].replace(code, without)
    return {str(size): await _costs(client, variants, size) for size in GROUPS}


async def _costs(
    client: redis.asyncio.Redis, variants: dict[str, str], size: int
) -> dict[str, float]:
    writers = {name: [Writer(Workload()) for _ in range(size)] for name in variants}
    times: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(ROUNDS + 1):
        order = list(variants)
        random.shuffle(order)
        for name in order:
            taken = await _turn(client, variants[name], writers[name])
            if number:  # the first is for warming up
                times[name].append(taken)
    whole = times.pop(WHOLE)
    saved = {
        name: [full - less for full, less in zip(whole, without, strict=True)]
        for name, without in times.items()
    }
    return {
        name: statistics.median(measured) for name, measured in ({WHOLE: whole} | saved).items()
    }


async def _turn(client: redis.asyncio.Redis, source: str, writers: list[Writer]) -> float:
    """Return the server's microseconds an append."""
    calls = APPENDS_A_ROUND // len(writers)
    sha = await client.script_load(source)
    pipeline: Any = client.pipeline(transaction=False)
    for _ in range(calls):
        keys, arguments = _group(writers)
        pipeline.evalsha(sha, len(keys), *keys, *arguments)
    await client.config_resetstat()
    for replies in await pipeline.execute():
        if any(reply[0] != b"ok" for reply in replies):
            raise RuntimeError("an append was not stored")
    stats = (await client.info("commandstats"))["cmdstat_evalsha"]
    return float(stats["usec"]) / (calls * len(writers))


def _group(writers: list[Writer]) -> tuple[list[str], list[str | bytes]]:
    """Return the keys and arguments of one call for one append of each writer."""
    prepared = [script_call(append) for writer in writers for append in writer.appends(1)]
    count = str(len(prepared))
    shared_keys, shared_arguments = prepared[0][0][:4], [*prepared[0][1][:3], count, KEYS.live(ALL)]
    keys = [*shared_keys, *(key for keys, _ in prepared for key in keys[4:])]
    own = [argument for _, arguments in prepared for argument in arguments[5:]]
    return keys, [*shared_arguments, *own]


def table(costs: Costs) -> Table:
    """Return the costs as a table."""
    made = Table(
        "µs of the server an append",
        *(f"groups of {size}" for size in costs),
        title=f"the append script, keys under {KEYS.prefix}",
        title_justify="left",
    )
    for feature in (WHOLE, *FEATURES):
        made.add_row(feature, *(f"{measured[feature]:.2f}" for measured in costs.values()))
    return made
