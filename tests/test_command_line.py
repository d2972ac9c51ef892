"""The command line: what is in a store, appending, live events, sizes, latencies, a first file.

Most of it in this process, as typer runs it; as a process of its own what signals, pipes and
terminals have to do with. The commands that were there before are tested with what they do.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import asyncstore
from asyncstore import (
    ANY,
    Aggregate,
    ConfigurationError,
    Durability,
    DurabilityNotReached,
    Event,
    EventTooLarge,
    OutcomeUnknown,
    SequenceConflict,
    Settings,
    StoreUnavailable,
    acl,
    settings,
    sizes,
)
from asyncstore.commands import beginning, tailing
from asyncstore.commands.app import app
from asyncstore.commands.exits import run
from asyncstore.commands.output import json_of, safe
from tests import servers
from tests.fix_clusters import SmallCluster
from tests.polling import eventually
from tests.servers import Server

ASYNCSTORE = [sys.executable, "-m", "asyncstore"]
NASTY = "a\x1b[31mb\x9b2Jc\x07d\u202ee\x7f"


class Cli:
    """The command line, at one store."""

    def __init__(self, server: Server, prefix: str) -> None:
        self.server = server
        self.prefix = prefix
        self.place = ["--url", server.url, "--key-prefix", prefix]

    def __call__(self, *arguments: str, given: str | bytes = "") -> Result:
        return CliRunner().invoke(app, [*arguments, *self.place], input=given)

    def lines(self, *arguments: str) -> list[str]:
        done = self(*arguments)
        assert done.exit_code == 0, done.stderr
        return done.stdout.splitlines()

    def json(self, *arguments: str) -> list[Any]:
        return [json.loads(line) for line in self.lines(*arguments, "--json")]

    def append(self, *arguments: str, given: str | bytes = "") -> int:
        done = self("append", *arguments, given=given)
        assert done.exit_code == 0, done.stderr
        return int(done.stdout)

    @contextmanager
    def process(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        pipe = subprocess.PIPE
        command = [*ASYNCSTORE, *arguments, *self.place]
        with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process, killed(process):
            yield process


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill it where a test ends before it does: leaving a Popen waits for it."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


@pytest.fixture
def cli(one_server: Server, prefix: str) -> Iterator[Cli]:
    yield Cli(one_server, prefix)
    servers.sweep(one_server, prefix)


@pytest.fixture
def orders(cli: Cli) -> Cli:
    """An order of three events, that leaves main at the second on `what-if`."""
    times = [f"2026-01-0{day}T12:00:00+00:00" for day in (1, 2, 3)]
    place: dict[str, Any] = {"domain": "orders", "root": "1"}
    lines = [{**place, "type": f"E{n}", "data": {"n": n}, "time": times[n]} for n in range(3)]
    lines += [{**place, "edition": "what-if", "sequence": 1, "type": "Other", "data": "else"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    assert cli("import", "-", given=text).exit_code == 0
    return cli


# Names


def test_domains_roots_and_editions(orders: Cli) -> None:
    orders.append("shelves", "7", "Filled", "1")
    assert orders.lines("domains") == ["orders", "shelves"]
    assert orders.json("domains") == [{"domain": "orders"}, {"domain": "shelves"}]
    orders.append("orders", "a root", "Placed", "1")
    assert orders.lines("roots", "orders") == ["1", "a root"]
    assert orders.lines("roots", "orders", "--edition", "what-if") == ["1"]
    assert orders.json("roots", "shelves") == [{"root": "7"}]
    assert orders.lines("editions", "orders") == ["main", "what-if"]
    assert orders.lines("editions", "orders", "1") == [
        "edition\tleaves main at\tevents of its own\tnext sequence",
        "main\t\t3\t3",
        "what-if\t1\t1\t2",
    ]
    assert orders.json("editions", "orders", "1") == [
        {"edition": "main", "diverges_at": None, "next_sequence": 3},
        {"edition": "what-if", "diverges_at": 1, "next_sequence": 2},
    ]
    assert orders.json("editions", "orders", "a root") == [
        {"edition": "main", "diverges_at": None, "next_sequence": 1}
    ]


def test_what_is_not_there_is_an_empty_list(cli: Cli) -> None:
    for command in ("domains", "roots orders", "editions orders", "editions orders 1"):
        done = cli(*command.split())
        assert (done.exit_code, done.stdout) == (0, ""), command
    done = cli("read", "orders", "1")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "orders/1: no such events\n")


# Reading


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ("", [0, 1, 2]),
        ("--from 1", [1, 2]),
        ("--until 1", [0, 1]),
        ("--from 1 --until 1", [1]),
        ("--until 2026-01-02T12:00:00+00:00", [0, 1]),
        ("--until 2026-01-02T11:59:59Z", [0]),
        ("--reverse", [2, 1, 0]),
        ("--reverse --limit 1", [2]),
        ("--limit 2", [0, 1]),
    ],
)
def test_which_events_are_read(orders: Cli, options: str, sequences: list[int]) -> None:
    found = orders.json("read", "orders", "1", *options.split())
    assert [event["sequence"] for event in found] == sequences
    header, *rows = orders.lines("read", "orders", "1", *options.split())
    assert header == "sequence\ttime\ttype\tdata"
    assert [int(row.split("\t")[0]) for row in rows] == sequences


def test_a_row_of_an_event(orders: Cli) -> None:
    orders.append("orders", "1", "Wörter", '{"a": "ä", "b": [1.5, null]}')
    rows = orders.lines("read", "orders", "1")
    assert rows[1] == '0\t2026-01-01 12:00:00.000\tE0\t{"n":0}'
    assert rows[4].split("\t")[2:] == ["Wörter", '{"a":"ä","b":[1.5,null]}']
    (event,) = orders.json("read", "orders", "1", "--from", "1", "--edition", "what-if")
    assert (event["type"], event["data"], event["edition"]) == ("Other", "else", "what-if")


def test_what_is_read_can_be_imported(orders: Cli) -> None:
    orders.append(
        "orders", "1", "Paid", "-", "--metadata", '{"by": "u1"}', given="9007199254740993"
    )
    text = orders("read", "orders", "1", "--json").stdout
    other = Cli(orders.server, f"{orders.prefix}other:")
    report = other("import", "-", "--json", given=text)
    assert json.loads(report.stdout)["stored"] == 4
    assert other("read", "orders", "1", "--json").stdout == text


def test_bytes_are_counted_and_in_base64(cli: Cli) -> None:
    line = {"domain": "films", "root": "1", "type": "Filmed", "data_base64": "AAEC"}
    assert cli("import", "-", given=json.dumps(line)).exit_code == 0
    assert cli.lines("read", "films", "1")[1].endswith("\tFilmed\t<3 bytes>")
    assert cli.json("read", "films", "1")[0]["data_base64"] == "AAEC"


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["plain", "json"])
def test_events_before_a_corrupt_one_are_shown(orders: Cli, options: Sequence[str]) -> None:
    key = f"{orders.prefix}events:orders:main:{{1}}"
    servers.rewrite_member(orders.server, key, 2, servers.without_end)
    done = orders("read", "orders", "1", *options)
    assert done.exit_code == 1
    assert "E1" in done.stdout
    assert "E2" not in done.stdout
    assert "sequence 2" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_many_events_have_one_header(cli: Cli) -> None:
    lines = (json.dumps({"domain": "d", "root": "1", "type": "T", "data": n}) for n in range(1200))
    assert cli("import", "-", given="\n".join(lines)).exit_code == 0
    rows = cli.lines("read", "d", "1")
    assert [row.split("\t")[0] for row in rows] == ["sequence", *map(str, range(1200))]


# A branch beside main


def test_a_branch_beside_main(orders: Cli) -> None:
    done = orders("diff", "orders", "1", "what-if")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "sequence\tmain\twhat-if",
        '1\tE1 {"n":1}\tOther "else"',
        '2\tE2 {"n":2}\t',
    ]
    assert done.stderr == "orders/1 on edition what-if: it has left main at sequence 1\n"
    found = orders.json("diff", "orders", "1", "what-if")
    types = [[side and side["type"] for side in (one["main"], one["edition"])] for one in found]
    assert types == [["E1", "Other"], ["E2", None]]
    assert [one["sequence"] for one in found] == [1, 2]


def test_a_branch_that_is_longer_than_main(orders: Cli) -> None:
    for n in range(3):
        orders.append("orders", "1", f"W{n}", "null", "--edition", "what-if")
    rows = [row.split("\t") for row in orders.lines("diff", "orders", "1", "what-if")[1:]]
    assert [(row[0], row[2]) for row in rows] == [
        ("1", 'Other "else"'),
        *((f"{n + 2}", f"W{n} null") for n in range(3)),
    ]
    assert [row[1] for row in rows[2:]] == ["", ""]


def test_there_must_be_a_branch(orders: Cli) -> None:
    done = orders("diff", "orders", "1", "typo")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "has not left main" in done.stderr
    assert orders("diff", "orders", "1", "main").exit_code == 2


# Appending


def test_append_prints_the_sequence(cli: Cli) -> None:
    assert cli.append("orders", "1", "Placed", '{"total": 12}', "--expected", "new") == 0
    assert cli.append("orders", "1", "Paid", "-", given='"card"\n') == 1
    assert cli.append("orders", "1", "Sent", given=b"[1, 2]") == 2
    assert cli.append("orders", "1", "Sent", "1", "--expected", "3", "--durability", "memory") == 3
    done = cli("append", "orders", "1", "Sent", "1", "--json")
    assert json.loads(done.stdout) == {"first_sequence": 4, "last_sequence": 4, "duplicate": False}
    events = cli.json("read", "orders", "1")
    assert [event["data"] for event in events] == [{"total": 12}, "card", [1, 2], 1, 1]


def test_a_conflict_names_both_sequences(orders: Cli) -> None:
    for expected in ("new", "2", "5"):
        done = orders("append", "orders", "1", "Paid", '"s3cret"', "--expected", expected)
        assert (done.exit_code, done.stdout) == (3, "")
        number = 0 if expected == "new" else expected
        assert f"sequence {number}, but the next sequence is 3" in done.stderr
        assert "s3cret" not in done.stderr
    assert len(orders.json("read", "orders", "1")) == 3


def test_the_same_key_again_writes_nothing(cli: Cli) -> None:
    arguments = ("orders", "1", "Paid", "1", "--idempotency-key", "k1", "--correlation-id", "c1")
    assert [cli.append(*arguments) for _ in range(2)] == [0, 0]
    done = cli("append", *arguments, "--json")
    assert json.loads(done.stdout)["duplicate"] is True
    assert "nothing was written" in done.stderr
    (event,) = cli.json("read", "orders", "1")
    assert (event["idempotency_key"], event["correlation_id"]) == ("k1", "c1")


def test_metadata_and_editions(orders: Cli) -> None:
    more = ("--metadata", '{"user": "u1"}', "--edition", "what-if")
    assert orders.append("orders", "1", "Paid", "1", *more) == 2
    event = orders.json("read", "orders", "1", "--edition", "what-if")[-1]
    assert (event["metadata"], event["edition"]) == ({"user": "u1"}, "what-if")


def test_a_level_that_the_server_can_not_give(cli: Cli) -> None:
    done = cli("append", "orders", "1", "Paid", "1", "--durability", "replicas(1)")
    assert done.exit_code == 1
    assert "nothing was written" in done.stderr
    assert cli.lines("domains") == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SequenceConflict(Aggregate("d", "1"), 1, 2), 3),
        (DurabilityNotReached(Aggregate("d", "1"), 0, 0, Durability.FSYNC, False, 0), 4),
        (OutcomeUnknown("redis://h", "no answer"), 4),
        (StoreUnavailable("redis://h", "no connection"), 1),
        (EventTooLarge("max_event_bytes", 1, 2, 0), 2),
        (ConfigurationError("url", "it is none"), 2),
        (FileNotFoundError(2, "No such file", "x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_which_error_has_which_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail() -> int:
        raise error

    with pytest.raises(typer.Exit) as ended:
        run(fail)
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == f"error: {error}\n"


# What can't be done as it was asked for


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["read", "orders", "{"], "braces"),
        (["read", "or ders", "1"], "only letters"),
        (["read", "orders", "1", "--edition", "MAIN"], "spelled 'main'"),
        (["read", "orders", "1", "--until", "soon"], "'soon' is neither a sequence nor a moment"),
        (["read", "orders", "1", "--until", "2026-01-01"], "2026-01-01T00:00:00+00:00 is UTC"),
        (["read", "orders", "1", "--until", "²"], "neither"),
        (["read", "orders", "1", "--until", "1", "--from", "2"], "1 is before --from, 2"),
        (["read", "orders", "1", "--until", "9" * 5000], "beyond the largest sequence"),
        (["read", "orders", "1", "--from", "9" * 30], "beyond the largest sequence"),
        (["roots", "*"], "only letters"),
        (["editions", "*"], "only letters"),
        (["editions", "orders", "{"], "braces"),
        (["diff", "orders", "1", "a b"], "only letters"),
        (["tail", "*"], "only letters"),
        (["tail", "--type", ""], "type"),
        (["append", "orders", "1", "", "1"], "type"),
        (["append", "orders", "1", "T", "s3cret"], "not JSON"),
        (["append", "orders", "1", "T", '"s3cret'], "not JSON"),
        (["append", "orders", "1", "T", "NaN"], "not JSON that can be stored"),
        (["append", "orders", "1", "T", "[" * 100_000], "not JSON that can be stored"),
        (["append", "orders", "1", "T", f"{2**64}"], "64-bit"),
        (["append", "orders", "1", "T"], "not JSON"),
        (["append", "orders", "1", "T", "1", "--expected", "next"], "neither new, any nor"),
        (["append", "orders", "1", "T", "1", "--expected", "9" * 5000], "beyond the largest"),
        (["append", "orders", "1", "T", "1", "--expected", "-1"], "neither new, any nor"),
        (["append", "orders", "1", "T", "1", "--metadata", "[]"], "a JSON object"),
        (["append", "orders", "1", "T", "1", "--metadata", "{"], "not JSON"),
        (["append", "orders", "1", "T", "1", "--durability", "raid"], "fsync_and_replicas"),
        (["append", "orders", "1", "T", "1", "--idempotency-key", "\n"], "control character"),
        (["bench", "--durability", "raid"], "fsync_and_replicas"),
        (["export", "--domain", "*"], "only letters"),
        (["subscriptions", "--handler", "*"], "only letters"),
        (["dead-letters", "h", "--retry", "--drop"], "--drop"),
        (["reset", "h", "d", "--to", "soon"], "'soon' is neither first, now nor a time"),
        (["reset", "h", "d", "--to", "2026-01-01"], "2026-01-01T00:00:00+00:00 is UTC"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(cli: Cli, command: list[str], said: str) -> None:
    done = cli(*command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "s3cret" not in done.stderr
    assert not servers.keys_with(cli.server, cli.prefix) - {f"{cli.prefix}layout:{{all}}"}


def test_input_that_is_no_text(cli: Cli) -> None:
    done = cli("append", "orders", "1", "T", given=b'"\xff"')
    assert (done.exit_code, "no UTF-8" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "command", ["domains", "read d 1", "append d 1 T 1", "tail", "stats", "bench", "diff d 1 e"]
)
def test_a_server_that_is_not_there(command: str) -> None:
    url = f"redis://:s3cret@127.0.0.1:{servers.free_port()}"
    done = CliRunner().invoke(app, [*command.split(), "--url", url])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no connection" in done.stderr
    assert "s3cret" not in done.stderr


def test_a_store_that_is_not_there_is_made_by_append_only(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path / 'store'}"
    for command in ("domains", "roots d", "read d 1", "diff d 1 e", "stats", "bench", "tail"):
        done = CliRunner().invoke(app, [*command.split(), "--url", url])
        assert (done.exit_code, "there is no store in" in done.stderr) == (2, True), command
    assert not (tmp_path / "store").exists()
    assert CliRunner().invoke(app, ["append", "d", "1", "T", "1", "--url", url]).exit_code == 0
    assert CliRunner().invoke(app, ["domains", "--url", url]).stdout == "d\n"


# Live


def test_tail_shows_what_is_appended(orders: Cli) -> None:
    with orders.process("tail", "orders", "--type", "Paid", "--json", "--limit", "2") as tailing:
        assert tailing.stdout is not None
        assert tailing.stderr is not None
        assert tailing.stderr.readline() == b"listening\n"
        orders.append("orders", "1", "Paid", "1")
        orders.append("orders", "1", "Sent", "2")
        orders.append("shelves", "1", "Paid", "3")
        orders.append("orders", "2", "Paid", "4", "--edition", "what-if")
        events = [json.loads(line) for line in tailing.stdout]
        assert tailing.wait(30) == 0
    assert [(one["data"], one["edition"]) for one in events] == [(1, "main"), (4, "what-if")]


def test_tail_ends_with_ctrl_c(orders: Cli) -> None:
    with orders.process("tail", "--root", "1", "--edition", "main") as tailing:
        assert tailing.stdout is not None
        assert tailing.stderr is not None
        assert tailing.stderr.readline() == b"listening\n"
        orders.append("orders", "2", "Paid", "1")
        orders.append("orders", "1", "Paid", NASTY_JSON)
        cells = tailing.stdout.readline().decode().rstrip("\n").split("\t")
        assert cells[1:4] == ["orders/1", "3", "Paid"]
        assert cells[4].isprintable()
        tailing.send_signal(signal.SIGINT)
        assert tailing.wait(30) == 130
        assert (tailing.stdout.read(), tailing.stderr.read()) == (b"", b"")


NASTY_JSON = json.dumps(NASTY)


async def test_tail_says_that_it_lagged_and_goes_on(
    one_server: Server, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    order = Aggregate("orders", "1")
    async with (
        asyncstore.open(one_server.url, key_prefix=prefix) as store,
        store.listen("orders", buffer=2) as live,
    ):
        heard = tailing._heard(live)
        await store.events.append(order, [Event("First", n) for n in range(5)], expected=ANY)
        lagged = asyncio.ensure_future(anext(heard))
        await eventually(lambda: "5 events were passed over" in capsys.readouterr().err, "it lags")
        await store.events.append(order, [Event("Then", 5)], expected=ANY)
        assert (await lagged).data == 5
    servers.sweep(one_server, prefix)


# Sizes


def test_stats_count_and_weigh(orders: Cli) -> None:
    orders.append("shelves", "7", "Filled", "1")
    Cli(orders.server, f"{orders.prefix}other").append("orders", "1", "T", "1")
    (found,) = orders.json("stats")
    named = {one["domain"]: one for one in found["domains"]}
    counts = {name: (one["aggregates"], one["events"]) for name, one in named.items()}
    assert counts == {"orders": (2, 4), "shelves": (1, 1)}
    assert found["keys"] == len(
        {key for key in servers.keys_with(orders.server, orders.prefix) if "other" not in key}
    )
    total = found["total"]
    assert (total["aggregates"], total["events"]) == (3, 5)
    parts = [one["memory"] for one in found["domains"]]
    assert total["memory"] == sum(parts) + total["other_memory"]
    assert named["orders"]["bytes_per_event"] == named["orders"]["memory"] / 4
    with orders.server.client() as client:
        keys = [f"{orders.prefix}events:orders:{edition}:{{1}}" for edition in ("main", "what-if")]
        used = sum(client.memory_usage(key) for key in keys)
    assert named["orders"]["event_memory"] == used < named["orders"]["memory"]
    rows = [line.split("\t")[:3] for line in orders.lines("stats")]
    assert rows[1:] == [["orders", "2", "4"], ["shelves", "1", "1"], ["(all)", "3", "5"]]


def test_stats_of_an_empty_store(cli: Cli) -> None:
    (found,) = cli.json("stats")
    assert (found["domains"], found["total"]["bytes_per_event"]) == ([], None)
    assert cli.lines("stats")[1].split("\t")[:3] == ["(all)", "0", "0"]


def of_cluster(small_cluster: SmallCluster) -> Server:
    return Server("cluster", f"{small_cluster.urls[0]}?cluster=true")


async def test_sizes_on_a_cluster(small_cluster: SmallCluster, prefix: str) -> None:
    async with asyncstore.open(urls=small_cluster.urls, key_prefix=prefix) as store:
        for root in range(20):
            order = Aggregate("orders", f"{root}")
            await store.events.append(order, [Event("T", 1), Event("T", 2)], expected=ANY)
        found = await sizes.measure(store)
    assert (found.total.aggregates, found.total.events) == (20, 40)
    assert found.total.memory > found.total.event_memory > 40 * 30
    servers.sweep(of_cluster(small_cluster), prefix)


# Latencies


def test_bench_leaves_nothing_behind(orders: Cli) -> None:
    before = servers.keys_with(orders.server, "")
    text = orders("export").stdout
    done = orders("bench", "--count", "120", "--size", "50", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["durability"], found["size"], found["unit"]) == ("memory", 50, "ms")
    for name in ("append", "read"):
        one = found[name]
        assert one["calls"] == 120
        assert 0 < one["min"] <= one["p50"] <= one["p90"] <= one["p99"] <= one["max"]
    assert f"begin with {orders.prefix}bench-" in done.stderr
    assert servers.keys_with(orders.server, "") == before
    assert orders("export").stdout == text


def test_bench_shows_how_the_calls_spread(cli: Cli) -> None:
    lines = cli.lines("bench", "--count", "50")
    assert lines[0] == "milliseconds\tp50\tp90\tp99\tmin\tmax"
    bars = [line.split()[-1] for line in lines if "ms  " in line]
    assert sum(map(int, bars)) == 2 * 50


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_bench_interrupted_leaves_nothing_behind(cli: Cli, number: int, code: int) -> None:
    with cli.process("bench", "--count", "100000") as benching:
        assert benching.stderr is not None
        asyncio.run(eventually(lambda: written(cli), "it writes"))
        benching.send_signal(number)
        assert benching.wait(30) == code
        said = benching.stderr.read()
    assert b"interrupted" in said
    assert b"Traceback" not in said
    assert servers.keys_with(cli.server, cli.prefix) == set()


def test_a_terminal_that_closes_more_than_once_does_not_stop_the_cleaning(cli: Cli) -> None:
    with cli.process("bench", "--count", "100000") as benching:
        asyncio.run(eventually(lambda: written(cli), "it writes"))
        while benching.poll() is None:
            benching.send_signal(signal.SIGHUP)
        assert benching.wait(30) == 129
    assert servers.keys_with(cli.server, cli.prefix) == set()


def test_nohup_outlives_the_terminal(orders: Cli) -> None:
    command = [*ASYNCSTORE, "tail", "--limit", "1", *orders.place]
    with (
        subprocess.Popen(
            ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command],  # noqa: S607
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as tailing,
        killed(tailing),
    ):
        assert tailing.stderr is not None
        assert tailing.stderr.readline() == b"listening\n"
        tailing.send_signal(signal.SIGHUP)
        orders.append("orders", "1", "Paid", "1")
        assert tailing.wait(30) == 0


def written(cli: Cli) -> bool:
    return any("events:bench" in key for key in servers.keys_with(cli.server, cli.prefix))


def test_bench_on_a_cluster(small_cluster: SmallCluster, prefix: str) -> None:
    cluster = of_cluster(small_cluster)
    done = Cli(cluster, prefix)("bench", "--count", "300")
    assert done.exit_code == 0, done.stderr
    assert servers.keys_with(cluster, prefix) == set()


# A first file


def init(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(app, ["init", *arguments], input=given)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], Settings(path=".asyncstore")),
        (["--path", "data"], Settings(path="data")),
        (
            ["--url", "redis://:s3cret@h:1", "--key-prefix", "shop:", "--durability", "fsync"],
            Settings(url="redis://:s3cret@h:1", key_prefix="shop:", durability="fsync"),
        ),
        (["--url", "redis://a,b@h:1,redis://i"], Settings(urls=["redis://a,b@h:1", "redis://i"])),
    ],
    ids=["defaults", "embedded", "server", "cluster"],
)
def test_init_writes_the_settings(
    arguments: list[str], wanted: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    done = init(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert ("has the password in it" in done.stderr) == ("s3cret" in " ".join(arguments))
    assert Settings.from_toml("asyncstore.toml") == wanted
    assert Path("asyncstore.toml").stat().st_mode & 0o777 == 0o600


def test_init_explains_every_setting() -> None:
    assert {setting.key for setting in settings._SETTINGS} == set(beginning.ABOUT)
    text = beginning.commented(Settings(urls=["redis://h", "redis://i"], password="s3cret"))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if " = " in line:
            assert lines[number - 1].removeprefix("# ") in beginning.ABOUT.values(), line


def test_init_does_not_overwrite() -> None:
    Path("asyncstore.toml").write_text("mine")
    done = init("--path", "data", "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--force overwrites it" in done.stderr
    assert Path("asyncstore.toml").read_text() == "mine"
    Path("asyncstore.toml").chmod(0o644)
    done = init("--path", "data", "--force", "--json")
    assert json.loads(done.stdout)["file"] == "asyncstore.toml"
    assert Settings.from_toml().path == "data"
    assert Path("asyncstore.toml").stat().st_mode & 0o777 == 0o600
    assert init("--file", "none/asyncstore.toml").exit_code == 1


def test_init_looks_at_the_server(one_server: Server) -> None:
    done = init("--url", f"redis://127.0.0.1:{servers.free_port()}", "--check")
    assert done.exit_code == 1
    assert "nothing was written" in done.stderr
    assert not Path("asyncstore.toml").exists()
    assert init("--check").exit_code == 0
    done = init("--url", one_server.url, "--check", "--force")
    assert done.exit_code == 0
    assert "doctor" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "redis://:s3cret@"], "without a host"),
        (["--url", "redis://h", "--path", "x"], "there is a url too"),
        (["--durability", "raid"], "fsync_and_replicas"),
        (["--key-prefix", "{}"], "allowed"),
    ],
    ids=["url", "both", "durability", "prefix"],
)
def test_init_refuses_what_is_no_setting(arguments: list[str], said: str) -> None:
    done = init(*arguments)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    assert "s3cret" not in done.stderr
    assert not Path("asyncstore.toml").exists()


# Other commands, for programs


def test_reset_for_programs(orders: Cli) -> None:
    asyncio.run(subscribe(orders.server.url, orders.prefix))
    (one,) = orders.json("reset", "projector", "orders", "--to", "2026-01-31T12:00:00+00:00")
    place = {"handler": "projector", "domain": "orders", "edition": "main"}
    assert one == {**place, "to": "2026-01-31T12:00:00+00:00"}
    assert orders.json("reset", "projector", "orders") == [{**place, "to": "first"}]
    (progress,) = orders.json("subscriptions")
    assert (progress["handler"], progress["events_behind"]) == ("projector", 3)


def test_acl_for_programs() -> None:
    done = CliRunner().invoke(app, ["acl", "me", "--json"])
    assert json.loads(done.stdout) == {"user": "me", "command": acl.line("me")}


def test_migrate_for_programs(orders: Cli) -> None:
    new = f"{orders.prefix}new:"
    arguments = ("--key-prefix", orders.prefix, "--new-key-prefix", new, "--stopped", "--json")
    url = orders.server.url
    done = CliRunner().invoke(app, ["migrate", url, url, *arguments])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["done"], found["differences"]) == (True, [])


# Terminals


@contextmanager
def on_a_terminal(
    *arguments: str, kind: str = "xterm"
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run it on a terminal; what comes with it is the file of the terminal's other end."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": kind, "COLUMNS": "120"}
    try:
        with (
            subprocess.Popen(
                [*ASYNCSTORE, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
            ) as process,
            killed(process),
        ):
            os.close(theirs)
            yield process, ours
    finally:
        os.close(ours)


def shown_on(terminal: int, until: bytes = b"") -> bytes:
    """What a terminal shows until a text comes, or until nobody writes to it any more."""
    shown = b""
    deadline = time.monotonic() + 30
    while not until or until not in shown:
        assert time.monotonic() < deadline, shown
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # all have left it
            break
    return shown


@pytest.mark.parametrize("command", ["read orders 1", "read orders 1 --json", "export"])
def test_nothing_is_acted_on_by_a_terminal(cli: Cli, command: str) -> None:
    line = {"domain": "orders", "root": "1", "type": NASTY, "data": {NASTY: NASTY}}
    assert cli("import", "-", given=json.dumps(line)).exit_code == 0
    with on_a_terminal(*command.split(), *cli.place) as (process, terminal):
        shown = shown_on(terminal).decode()
    assert process.returncode == 0
    for sign in ("\x1b[31mb", "\x9b", "\x07", "\u202e", "\x7f"):
        assert sign not in shown
    assert "[31mb" in shown


def test_events_before_a_corrupt_one_are_shown_on_a_terminal(orders: Cli) -> None:
    key = f"{orders.prefix}events:orders:main:{{1}}"
    servers.rewrite_member(orders.server, key, 2, servers.without_end)
    with on_a_terminal("read", "orders", "1", *orders.place) as (process, terminal):
        shown = shown_on(terminal)
    assert process.returncode == 1
    assert shown.index(b"E1") < shown.index(b"sequence 2")


def test_init_asks_on_a_terminal() -> None:
    with on_a_terminal("init") as (process, terminal):
        for question, answer in (
            (b"[embedded]", b""),
            (b"[.asyncstore]", b"data"),
            (b"[]", b"shop:"),
            (b"[memory]", b"fsync"),
        ):
            shown_on(terminal, until=question)
            os.write(terminal, answer + b"\n")
        shown_on(terminal)
    assert process.returncode == 0
    wanted = Settings(path="data", key_prefix="shop:", durability="fsync")
    assert Settings.from_toml() == wanted


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C, and again: one that comes right before Python reads a line is heard late."""
    for _ in range(30):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
            return


def test_ctrl_c_at_a_question() -> None:
    with on_a_terminal("init") as (process, terminal):
        shown_on(terminal, until=b"[embedded]")
        interrupt(process)
        shown = shown_on(terminal)
    assert (process.returncode, b"Traceback" in shown) == (130, False)
    assert not Path("asyncstore.toml").exists()


async def subscribe(url: str, prefix: str) -> None:
    async with (
        asyncstore.open(url, key_prefix=prefix) as store,
        store.subscribe("projector", "orders") as sub,
    ):
        await (await anext(sub)).ack()


def test_watching_subscriptions(orders: Cli) -> None:
    asyncio.run(subscribe(orders.server.url, orders.prefix))
    with on_a_terminal("subscriptions", "--watch", *orders.place) as (process, terminal):
        shown = shown_on(terminal, until=b"projector")
        shown += shown_on(terminal, until=b"projector")  # it comes again
        process.send_signal(signal.SIGINT)
        shown += shown_on(terminal)
    assert process.returncode == 130
    assert shown.endswith(b"\x1b[?25h"), "the cursor is back"
    assert b"Traceback" not in shown


def test_watching_on_a_terminal_that_can_not_go_back(orders: Cli) -> None:
    asyncio.run(subscribe(orders.server.url, orders.prefix))
    corner = "┘".encode()
    watching = ("subscriptions", "--watch", *orders.place)
    with on_a_terminal(*watching, kind="dumb") as (process, terminal):
        shown = shown_on(terminal, until=corner)
        process.send_signal(signal.SIGINT)
        shown += shown_on(terminal)
    assert process.returncode == 130
    assert b"\x1b" not in shown


def test_screenshots(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "docs" / "terminal.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=50)
    shown = {path.stem: path.read_text() for path in tmp_path.glob("*.svg")}
    wanted = {"doctor": "noeviction", "read": "VoucherRedeemed", "tail": "OrderShipped"}
    assert set(shown) == set(wanted)
    for name, text in wanted.items():
        assert text in shown[name], name


# Pipes


@pytest.mark.parametrize("command", ["read d 1", "domains"], ids=["much", "little"])
def test_a_reader_that_has_seen_enough(cli: Cli, command: str) -> None:
    lines = (json.dumps({"domain": "d", "root": "1", "type": "T", "data": n}) for n in range(5000))
    assert cli("import", "-", given="\n".join(lines)).exit_code == 0
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*ASYNCSTORE, *command.split(), *cli.place],
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_error_that_nobody_hears_has_its_code(orders: Cli) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*ASYNCSTORE, "append", "orders", "1", "T", "1", "--expected", "new", *orders.place]
    try:
        assert subprocess.run(command, stderr=write, check=False).returncode == 3
    finally:
        os.close(write)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nobody says what it heeds")
@pytest.mark.parametrize("command", ["import", "export"])
def test_one_ctrl_c_is_enough_where_nobody_opens_the_pipe(
    cli: Cli, command: str, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with cli.process(command, str(pipe)) as waiting:
        asyncio.run(eventually(lambda: heeds(waiting.pid, signal.SIGTERM), "it is at work"))
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130


def heeds(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\t([0-9a-f]+)$", status, re.M)
    assert caught is not None
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_bar_on_the_terminal_takes_nothing_out_of_a_pipe(orders: Cli) -> None:
    url = orders.server.url
    arguments = ("--key-prefix", orders.prefix, "--new-key-prefix", f"{orders.prefix}none:")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*ASYNCSTORE, "compare", url, url, *arguments], stdout=subprocess.PIPE, stderr=theirs
    ) as comparing:
        os.close(theirs)
        out, _ = comparing.communicate()
        shown = shown_on(ours)
    os.close(ours)
    assert comparing.returncode == 1
    assert b"orders/1" in out
    assert b"orders/1" not in shown
    assert b"differences" in shown


def test_an_output_that_is_not_utf_8(cli: Cli) -> None:
    cli.append("orders", "ä", "Wörter", '"€"')
    done = subprocess.run(
        [*ASYNCSTORE, "read", "orders", "ä", *cli.place],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.rstrip().endswith(b'W\\xf6rter\t"\\u20ac"')


@pytest.mark.parametrize("command", ["append d 1 T", "import -"], ids=["append", "import"])
def test_ctrl_c_where_nobody_writes(cli: Cli, command: str) -> None:
    with on_a_terminal(*command.split(), *cli.place) as (process, terminal):
        shown_on(terminal, until=b"Ctrl-D ends it")
        process.send_signal(signal.SIGINT)
        shown = shown_on(terminal)
        assert process.wait(30) == 130
    assert b"Traceback" not in shown


@pytest.mark.parametrize(
    ("command", "closed", "code"),
    [("append d 1 T", 0, 2), ("import -", 0, 0), ("stats", 1, 0), ("stats", 2, 0)],
    ids=["append", "import", "stats", "stats-errors"],
)
def test_a_standard_stream_that_is_closed(cli: Cli, command: str, closed: int, code: int) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *ASYNCSTORE, *command.split(), *cli.place],  # noqa: S607
        capture_output=True,
        check=False,
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr


def test_an_interrupted_export_ends_with_a_whole_line(cli: Cli) -> None:
    lines = (json.dumps({"domain": "d", "root": "1", "type": "T", "data": n}) for n in range(5000))
    assert cli("import", "-", given="\n".join(lines)).exit_code == 0
    with cli.process("export") as exporting:
        assert exporting.stdout is not None
        assert exporting.stderr is not None
        exporting.stdout.readline()
        # It waits for a reader, with most of the lines still before it.
        exporting.send_signal(signal.SIGINT)
        rest = exporting.stdout.read()
        assert exporting.wait(30) == 130
        assert exporting.stderr.read() == b"interrupted\n"
    assert rest.endswith(b"}\n")
    assert rest.count(b"\n") < 4999


# Help


COMMANDS = [
    *("init", "domains", "roots", "editions", "read", "diff", "tail", "append", "doctor"),
    *("verify", "stats", "bench", "acl", "subscriptions", "dead-letters", "reset", "import"),
    *("export", "compare", "migrate", "conformance", "cluster start", "cluster stats"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert ("--json" in done.stdout) == (command != "export"), "an export is JSON already"


def test_the_docs_name_commands_that_exist() -> None:
    pages = (Path(__file__).parent.parent / "docs").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    named = set(re.findall(r"^asyncstore (cluster [a-z]+|[a-z-]+)", text, re.M))
    assert {"init", "doctor", "cluster stats"} <= named <= set(COMMANDS)


def test_exit_codes_are_documented() -> None:
    said = " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    assert "Exit codes: 0 done;" in said


TYPED: dict[str, dict[str, str]] = {
    "bash": {"COMP_WORDS": "asyncstore do", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "asyncstore do"},
    "fish": {"_TYPER_COMPLETE_ARGS": "asyncstore do", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", TYPED)
def test_shells_can_complete(shell: str) -> None:
    program = "import sys; sys.argv[0] = 'asyncstore'; from asyncstore.cli import main; main()"

    def asked(what: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "_ASYNCSTORE_COMPLETE": f"{what}_{shell}", **TYPED[shell]},
        )
        return done.stdout

    assert f"_ASYNCSTORE_COMPLETE=complete_{shell}" in asked("source")
    first_words = re.findall(r'^(?:.*\(\()?"?(\w+)', asked("complete"), re.M)
    assert first_words == ["domains", "doctor"]


def test_what_is_written_out() -> None:
    assert safe("plain ä € 😀") == "plain ä € 😀"
    assert safe(NASTY) == "a\\x1b[31mb\\x9b2Jc\\x07d\\u202ee\\x7f"
    assert safe("\udcff\n\t") == "\\udcff\\n\\t"
    assert json.loads(json_of(NASTY)) == NASTY
    assert json_of(NASTY).isprintable()
    assert json_of(NASTY).isascii()
