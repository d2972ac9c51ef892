"""Measure the store beside rival event stores, all on this machine and in one run.

    python -m benchmarks.rivals [--output build/bench-rivals.json]

The sides take turns, round by round and each time in another order, so that a slow moment of the
machine meets all of them. Each is named with its fsync mode. A rival that can't run here is
skipped, and its reason stands in the tables and in the JSON file.

The rivals' clients are synchronous: they get a thread for each writer, asyncstore gets a task. All
sides turn a dict into bytes and back in the time that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

import orjson
import redis.asyncio
import typer
from rich.console import Console
from rich.table import Table

import asyncstore
from asyncstore import Aggregate, Event, SequenceConflict, Store, embedded
from benchmarks import machine

BODY = {"text": "x" * 245}  # 256 bytes as JSON
MANY = 10_000
SOME = 50
FILL = 1000  # events an append when there are many; UmaDB's messages are limited
MOST_WRITERS = 128
READY_SECONDS = 30
STOP_SECONDS = 30

AOF_OFF = "asyncstore, AOF off"
EVERYSEC = "asyncstore, AOF everysec"
ALWAYS = "asyncstore, AOF always"
UMADB = "UmaDB, fdatasync a commit"
SQLITE = "eventsourcing on SQLite, WAL, synchronous=FULL"
POSTGRES = "eventsourcing on PostgreSQL, fsync=on"

console = Console(highlight=False)
Call = Callable[[], Any]


# The sides


class Side(ABC):
    """An event store, and two streams to read from it.

    What `append` and `read` return is awaited, unless the side is `threaded`.
    """

    threaded = True
    conflict: type[Exception]
    version: str

    def __init__(self) -> None:
        self.many = uuid4()
        self.some = uuid4()

    @abstractmethod
    def append(self, stream: UUID, count: int, start: int = 0) -> Any:
        """Append events to a stream that must have exactly `start` of them."""

    @abstractmethod
    def read(self, stream: UUID) -> Any:
        """Return the data of all events of a stream, as dicts."""

    def load(self, stream: UUID) -> Any:
        """Return the data of what is needed to go on with a stream. To the rivals, it is all."""
        return self.read(stream)

    async def settle(self) -> None:
        """Wait until the side has no work left over from its turn."""
        return


class Ours(Side):
    """The store itself, on an embedded server."""

    threaded = False
    conflict = SequenceConflict

    def __init__(self, store: Store, client: redis.asyncio.Redis, version: str) -> None:
        super().__init__()
        self.store = store
        self.client = client
        self.version = version

    async def append(self, stream: UUID, count: int, start: int = 0) -> object:
        """`start` is the expected sequence; 0 is NEW."""
        events = [Event("Benched", BODY) for _ in range(count)]
        return await self.store.events.append(Aggregate("bench", stream), events, expected=start)

    async def read(self, stream: UUID) -> list[Any]:
        """Read all events."""
        return [event.data for event in await self.store.events.read(Aggregate("bench", stream))]

    async def load(self, stream: UUID) -> list[Any]:
        """Look for a snapshot, too: there is none."""
        loaded = await self.store.load(Aggregate("bench", stream))
        return [event.data for event in loaded.events]

    async def settle(self) -> None:
        """Let a rewrite of the append-only file end, which would slow down whoever is next."""
        while (await self.client.info("persistence"))["aof_rewrite_in_progress"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class UmaDB(Side):
    """UmaDB, with one tag for a stream.

    An event gets no UUID, which would make its append idempotent, as it costs more.
    """

    def __init__(self, module: Any, client: Any) -> None:
        super().__init__()
        self.module = module
        self.client = client  # one for all threads: faster than one for each
        self.conflict = module.IntegrityError
        self.version = f"umadb {importlib.metadata.version('umadb')}, server and client"

    def query(self, stream: UUID) -> Any:
        """Return what matches the events of a stream."""
        return self.module.Query([self.module.QueryItem(tags=[f"bench:{stream}"])])

    def append(self, stream: UUID, count: int, start: int = 0) -> object:
        """Fail if there are events with the tag after the position that is known."""
        tags = [f"bench:{stream}"]
        events = [self.module.Event("Benched", orjson.dumps(BODY), tags) for _ in range(count)]
        # A new stream has no known position: then no event at all may have the tag.
        after = self.client.head() if start else None
        condition = self.module.AppendCondition(self.query(stream), after)
        return self.client.append(events, condition)

    def read(self, stream: UUID) -> list[Any]:
        """Read all events with the tag."""
        response = self.client.read(query=self.query(stream))
        return [orjson.loads(recorded.event.data) for recorded in response]


class EventSourcing(Side):
    """The library `eventsourcing`, at the level of its recorders.

    It gets the aggregate recorder, which keeps no order over all aggregates, as that is its
    fastest one. Events are encoded and decoded by its JSONTranscoder, which is most of what its
    mapper does; it need not make objects of the dicts, while asyncstore makes its events.
    """

    def __init__(self, recorder: Any, version: str) -> None:
        super().__init__()
        persistence = importlib.import_module("eventsourcing.persistence")
        self.recorder = recorder
        self.stored_event = persistence.StoredEvent
        self.transcoder = persistence.JSONTranscoder()
        self.conflict = persistence.IntegrityError
        library = f"eventsourcing {importlib.metadata.version('eventsourcing')}"
        self.version = f"{library}, {version}"

    def append(self, stream: UUID, count: int, start: int = 0) -> object:
        """Versions begin at 1; a version that is taken violates the primary key."""
        events = [
            self.stored_event(stream, version, "bench:Benched", self.transcoder.encode(BODY))
            for version in range(start + 1, start + count + 1)
        ]
        return self.recorder.insert_events(events)

    def read(self, stream: UUID) -> list[Any]:
        """Select all events."""
        decode = self.transcoder.decode
        return [decode(event.state) for event in self.recorder.select_events(stream)]


# Starting and stopping them


@contextlib.asynccontextmanager
async def ours(where: Path | None, fsync: str | None) -> AsyncIterator[Ours]:
    """Run an embedded server, a throw-away one if `fsync` is None."""
    async with AsyncExitStack() as stack:
        data = fsync and Path(stack.enter_context(temporary_directory(where)))
        url = await stack.enter_async_context(embedded.running(data or None))
        client = redis.asyncio.Redis.from_url(url, protocol=2, decode_responses=True)
        await stack.enter_async_context(client)
        if fsync:
            await client.config_set("appendfsync", fsync)
        modes = await client.config_get("append*")
        wanted = {"appendonly": "yes", "appendfsync": fsync} if fsync else {"appendonly": "no"}
        check_modes([str(modes[name]) for name in wanted], list(wanted.values()))
        server = await client.info("server")
        store = await stack.enter_async_context(asyncstore.open(url))
        name, number = server.get("server_name", "redis"), server.get("valkey_version")
        yield Ours(store, client, f"asyncstore {asyncstore.__version__}, {name} {number}")


@contextlib.contextmanager
def umadb(where: Path | None) -> Iterator[UmaDB]:
    handler = signal.getsignal(signal.SIGINT)
    module = importlib.import_module("umadb")
    # Importing it replaced asyncio's handler, without which Ctrl-C would leave servers behind.
    signal.signal(signal.SIGINT, handler)
    with temporary_directory(where) as name:
        address = f"127.0.0.1:{free_port()}"
        start = "from umadb.umadb_server_cli import main; main()"
        command = [sys.executable, "-c", start, "--listen", address]
        command += ["--db-path", str(Path(name, "uma.db"))]
        log = Path(name, "server.log")
        with running(command, log, signal.SIGTERM) as process:

            def connect() -> Any:
                client = module.Client(f"http://{address}")
                client.head()
                return client

            with until_ready(connect, process, log) as client:
                yield UmaDB(module, client)


@contextlib.contextmanager
def on_sqlite(where: Path | None) -> Iterator[EventSourcing]:
    module = importlib.import_module("eventsourcing.sqlite")
    with temporary_directory(where) as name:
        datastore = module.SQLiteDatastore(str(Path(name, "events.db")))
        with contextlib.closing(datastore):
            recorder = module.SQLiteAggregateRecorder(datastore)
            recorder.create_table()
            with datastore.transaction(commit=False) as cursor:
                modes = []
                for pragma in ("journal_mode", "synchronous"):
                    cursor.execute(f"PRAGMA {pragma}")
                    modes.append(str(cursor.fetchone()[0]))
            check_modes(modes, ["wal", "2"])  # 2 is FULL
            yield EventSourcing(recorder, f"SQLite {sqlite3.sqlite_version}")


@contextlib.contextmanager
def on_postgres(where: Path | None) -> Iterator[EventSourcing]:
    module = importlib.import_module("eventsourcing.postgres")
    psycopg = importlib.import_module("psycopg")
    with postgres_server(where, psycopg) as (host, connection):
        settings = ("fsync", "synchronous_commit")
        modes = [connection.execute(f"SHOW {setting}").fetchone()[0] for setting in settings]
        check_modes(modes, ["on", "on"])
        # A connection for each writer, so that commits can share an fsync.
        datastore = module.PostgresDatastore(
            "postgres", host, 5432, "bench", "", connect_timeout=30, pool_size=MOST_WRITERS
        )
        with contextlib.closing(datastore):
            recorder = module.PostgresAggregateRecorder(datastore)
            recorder.create_table()
            server = connection.info.parameter_status("server_version")
            client = f"psycopg {psycopg.__version__} ({psycopg.pq.__impl__})"
            yield EventSourcing(recorder, f"PostgreSQL {server}, {client}")


@contextlib.contextmanager
def postgres_server(where: Path | None, psycopg: Any) -> Iterator[tuple[str, Any]]:
    """Run a PostgreSQL on a socket in a directory of its own, and give that and a connection."""
    binaries = find_postgres()
    with temporary_directory(where) as name:
        how: dict[str, Any] = {"cwd": name}
        if os.getuid() == 0:  # as which PostgreSQL refuses to run
            user = find_user("postgres")
            os.chown(name, user.pw_uid, user.pw_gid)
            how |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = str(Path(name, "data"))
        make = [str(binaries / "initdb"), "--pgdata", data, "--auth=trust", "--username=bench"]
        made = subprocess.run(  # noqa: S603
            [*make, "--encoding=UTF8", "--locale=C"],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **how,
        )
        if made.returncode:
            raise RuntimeError(f"initdb: {last_line(made.stdout)}")
        start = [str(binaries / "postgres"), "-D", data, "-k", name, "-c", "listen_addresses="]
        start += ["-c", "port=5432", "-c", f"max_connections={MOST_WRITERS + 20}"]
        log = Path(name, "server.log")
        with running(start, log, signal.SIGINT, **how) as process:  # SIGINT: a fast shutdown

            def connect() -> Any:
                return psycopg.connect(host=name, port=5432, user="bench", dbname="postgres")

            with until_ready(connect, process, log) as connection:
                yield name, connection


def find_postgres() -> Path:
    """Return the directory of the server's binaries, which Debian keeps out of the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if not versions:
        raise RuntimeError("PostgreSQL is not installed")
    return max(versions, key=lambda path: float(path.parent.name))


def find_user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise RuntimeError(f"PostgreSQL does not run as root, and no user is {name}") from None


def temporary_directory(where: Path | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rivals-", dir=where, ignore_cleanup_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    command: list[str], log: Path, stop: signal.Signals, **how: Any
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **how
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until_ready(
    connect: Call, process: subprocess.Popen[bytes], log: Path
) -> AbstractContextManager[Any]:
    """Return a connection as soon as the server gives one."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            connection: AbstractContextManager[Any] = connect()
            return connection
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                why = f"the server did not start: {last_line(log.read_text(errors='replace'))}"
                raise RuntimeError(why) from error
        time.sleep(0.01)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def check_modes(found: list[str], wanted: list[str]) -> None:
    if found != wanted:
        raise RuntimeError(f"its durability is {found} instead of {wanted}, as its name says")


# Measuring


@dataclass(frozen=True)
class Workload:
    """What `writers` do over and over; `count` is the number of events of a call."""

    what: str
    does: Literal["append", "read", "load"]
    writers: int
    count: int

    def call(self, side: Side) -> Call:
        """Return what a writer does over and over."""
        if self.does == "append":
            return lambda: side.append(uuid4(), self.count)
        if self.does == "read":
            return lambda: side.read(side.many)
        return lambda: side.load(side.some)


WORKLOADS = (
    *(
        Workload(f"one event an append, writers: {writers}", "append", writers, 1)
        for writers in (1, 8, 32, MOST_WRITERS)
    ),
    Workload("ten events an append, writers: 8", "append", 8, 10),
    Workload(f"reading {MANY:,} events, decoded", "read", 1, MANY),
    Workload(f"loading {SOME} events, decoded", "load", 1, SOME),
)


@dataclass(frozen=True)
class Sample:
    """One turn of a side: events a second, and the median time of a call."""

    rate: float
    p50_ms: float


@dataclass(frozen=True)
class Ratio:
    """Ours by theirs in one figure of a workload, and what it should be."""

    workload: Workload
    figure: Literal["rate", "p50_ms"]
    ours: str
    theirs: str
    target: str


RATIOS = (
    Ratio(WORKLOADS[1], "rate", ALWAYS, UMADB, "≥ 1.7"),
    Ratio(WORKLOADS[2], "rate", ALWAYS, UMADB, "≥ 3"),
    # How the file is synced makes no difference to reading; everysec is what users get.
    Ratio(WORKLOADS[5], "p50_ms", EVERYSEC, SQLITE, "≤ 0.6"),
)


@dataclass
class Results:
    """The samples of each workload and side, or why there are none."""

    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    samples: dict[tuple[Workload, str], list[Sample]] = field(default_factory=dict)
    failed: dict[tuple[Workload, str], str] = field(default_factory=dict)

    def median(self, workload: Workload, name: str) -> Sample | None:
        """Return the medians over the rounds, or None for a side that failed in one."""
        samples = self.samples.get((workload, name))
        if not samples or self.reason(workload, name):
            return None
        return Sample(
            statistics.median(sample.rate for sample in samples),
            statistics.median(sample.p50_ms for sample in samples),
        )

    def reason(self, workload: Workload, name: str) -> str | None:
        """Return why there are no figures, if there are none."""
        return self.skipped.get(name) or self.failed.get((workload, name))

    def ratio(self, ratio: Ratio) -> float | None:
        """Return the ratio of the medians."""
        ours = self.median(ratio.workload, ratio.ours)
        theirs = self.median(ratio.workload, ratio.theirs)
        if ours is None or theirs is None:
            return None
        mine: float = getattr(ours, ratio.figure)
        other: float = getattr(theirs, ratio.figure)
        return mine / other


def in_threads(call: Call, writers: int, seconds: float) -> list[list[float]]:
    """Call in as many threads; return the times at which each began and ended its calls."""
    together = threading.Barrier(writers)

    def writer() -> list[float]:
        together.wait()
        times = [time.perf_counter()]
        while times[-1] < times[0] + seconds:
            call()
            times.append(time.perf_counter())
        return times

    with ThreadPoolExecutor(writers) as pool:
        return [future.result() for future in [pool.submit(writer) for _ in range(writers)]]


async def in_tasks(call: Call, writers: int, seconds: float) -> list[list[float]]:
    """Do the same in tasks."""

    async def writer() -> list[float]:
        times = [time.perf_counter()]
        while times[-1] < times[0] + seconds:
            await call()
            times.append(time.perf_counter())
        return times

    return await asyncio.gather(*(writer() for _ in range(writers)))


async def measure(side: Side, workload: Workload, seconds: float) -> Sample:
    call = workload.call(side)
    # What others have left in the page cache shall not be written in this side's time.
    await asyncio.to_thread(os.sync)
    if side.threaded:
        times = await asyncio.to_thread(in_threads, call, workload.writers, seconds)
    else:
        times = await in_tasks(call, workload.writers, seconds)
    await side.settle()
    latencies = [after - before for one in times for before, after in pairwise(one)]
    elapsed = max(one[-1] for one in times) - min(one[0] for one in times)
    rate = workload.count * len(latencies) / elapsed
    return Sample(rate, 1000 * statistics.median(latencies))


async def once(side: Side, call: Call) -> Any:
    return await asyncio.to_thread(call) if side.threaded else await call()


async def prepare(side: Side) -> None:
    """Fill the streams; see that the side reads what it was given, and refuses a conflict."""
    for start in range(0, MANY, FILL):
        await once(side, partial(side.append, side.many, FILL, start))
    await once(side, partial(side.append, side.some, SOME))
    if await once(side, partial(side.read, side.many)) != [BODY] * MANY:
        raise RuntimeError("it does not read what was appended")
    if await once(side, partial(side.load, side.some)) != [BODY] * SOME:
        raise RuntimeError("it does not load what was appended")
    with contextlib.suppress(side.conflict):
        await once(side, partial(side.append, side.some, 1))
        raise RuntimeError("it does not check what is expected")


def openers(
    where: Path | None,
) -> dict[str, AbstractAsyncContextManager[Side] | AbstractContextManager[Side]]:
    return {
        AOF_OFF: ours(where, None),
        EVERYSEC: ours(where, "everysec"),
        ALWAYS: ours(where, "always"),
        UMADB: umadb(where),
        SQLITE: on_sqlite(where),
        POSTGRES: on_postgres(where),
    }


async def open_all(
    stack: AsyncExitStack, where: Path | None, results: Results
) -> list[tuple[str, Side]]:
    """Open the sides that can run on this machine, and note why the others can't."""
    sides: list[tuple[str, Side]] = []
    for name, opener in openers(where).items():
        async with AsyncExitStack() as own:
            try:
                if isinstance(opener, AbstractAsyncContextManager):
                    side = await own.enter_async_context(opener)
                else:
                    side = own.enter_context(opener)
                await prepare(side)
            except Exception as error:
                results.skipped[name] = describe(error)
                continue
            stack.push_async_exit(own.pop_all())
        results.versions[name] = side.version
        sides.append((name, side))
    return sides


async def measure_all(where: Path | None, rounds: int, seconds: float) -> Results:
    results = Results()
    async with AsyncExitStack() as stack:
        sides = await open_all(stack, where, results)
        for turn in range(-1, rounds):  # the first is for warming up, and short
            for number, workload in enumerate(WORKLOADS):
                first = (turn + 1 + number) % len(sides) if sides else 0
                for name, side in sides[first:] + sides[:first]:
                    if results.reason(workload, name):
                        continue
                    try:
                        sample = await measure(side, workload, seconds if turn >= 0 else 0.1)
                    except Exception as error:
                        results.failed[workload, name] = describe(error)
                    else:
                        if turn >= 0:
                            results.samples.setdefault((workload, name), []).append(sample)
    return results


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# Telling


def fsync_ms(where: Path | None) -> float:
    """Return the median time of an fsync after 256 bytes, without which no rate says much."""
    times = []
    with tempfile.TemporaryFile(dir=where, buffering=0) as file:
        for _ in range(200):
            file.write(b"x" * 256)
            started = time.perf_counter()
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def print_workload(results: Results, workload: Workload) -> None:
    appends = workload.does == "append"
    table = Table("", *(["events, 1/s"] if appends else []), "p50, ms", title=workload.what)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in openers(None):
        sample = results.median(workload, name)
        if sample is None:
            table.add_row(f"{name}\n  skipped: {results.reason(workload, name)}", "–")
        else:
            rate = [f"{sample.rate:,.0f}"] if appends else []
            table.add_row(name, *rate, f"{sample.p50_ms:,.2f}")
    console.print(table)


def print_ratios(results: Results) -> None:
    table = Table("", "of", "ratio", "target", title="ratios")
    for ratio in RATIOS:
        value = results.ratio(ratio)
        table.add_row(
            f"{ratio.workload.what}: {'rate' if ratio.figure == 'rate' else 'time'}",
            f"{ratio.ours} / {ratio.theirs}",
            "not measured" if value is None else f"{value:.2f}",
            ratio.target,
        )
    console.print(table)


def as_json(results: Results) -> dict[str, Any]:
    rows = []
    for workload in WORKLOADS:
        for name in openers(None):
            sample = results.median(workload, name)
            row: dict[str, Any] = {**asdict(workload), "side": name}
            if sample is None:
                row["skipped"] = results.reason(workload, name)
            else:
                each = [asdict(sample) for sample in results.samples[workload, name]]
                row |= {**asdict(sample), "rounds": each}
            rows.append(row)
    ratios = [
        {**asdict(ratio), "workload": ratio.workload.what, "ratio": results.ratio(ratio)}
        for ratio in RATIOS
    ]
    versions = {"versions": results.versions, "skipped": results.skipped}
    return {**versions, "rows": rows, "ratios": ratios}


def main(
    output: Annotated[Path, typer.Option()] = Path("build/bench-rivals.json"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 0.6,
    directory: Annotated[
        Path | None, typer.Option(help="where the data is for the while, on the disk to measure")
    ] = None,
) -> None:
    """Measure, print, save."""
    here = machine.describe() | {
        "fsync_p50_ms": fsync_ms(directory),
        "rounds": rounds,
        "seconds": seconds,
    }
    results = asyncio.run(measure_all(directory, rounds, seconds))
    for workload in WORKLOADS:
        print_workload(results, workload)
    print_ratios(results)
    for name, version in results.versions.items():
        console.print(f"{name}: {version}")
    console.print(f"an fsync takes {here['fsync_p50_ms']:.2f} ms here (p50)")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**here, **as_json(results)}, indent=2) + "\n")
    console.print(f"saved to {output}")


if __name__ == "__main__":
    typer.run(main)
