"""Appends over HTTP: the FastAPI example beside twins on plain redis-py, on one server.

    python -m benchmarks.web [--output build/bench-http.json] [--quick]

`wrk` posts notes over many connections to one uvicorn worker. The sides take turns, a round each;
then each runs once more under a sampler, for where its time goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from asyncstore import embedded
from benchmarks import machine
from benchmarks.sides import client_of

CONNECTIONS = 128
APPS = {
    "asyncstore": "store_app",
    "redis-py evalsha": "script_app",
    "redis-py commands": "commands_app",
}
ROOT = Path(__file__).parent.parent

# Not `uvicorn --fd`: it takes the socket for one of UNIX, and so sets no TCP_NODELAY. A response is
# two writes, and the second would wait until the client acknowledges the first, up to 40 ms.
SERVE = """
import socket, sys, uvicorn
app, descriptor = sys.argv[1:]
config = uvicorn.Config(app, access_log=False, log_level="warning")
uvicorn.Server(config).run([socket.socket(fileno=int(descriptor))])
"""

# Each request is for one of 10,000 orders; the body is an event of about 200 bytes.
WRK = """
local text = string.rep("x", 180)
wrk.method = "POST"
wrk.body = '{"text":"' .. text .. '"}'
wrk.headers["Content-Type"] = "application/json"
function request()
  return wrk.format(nil, "/orders/" .. math.random(10000) .. "/notes")
end
function done(summary, latency)
  local failed = summary.errors.status + summary.errors.read + summary.errors.timeout
  io.write(string.format("found %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), failed))
end
"""

console = Console(highlight=False, width=120)

Round = dict[str, float]


@contextmanager
def serving(app: str, url: str, profile: Path | None = None) -> Iterator[str]:
    """Run one uvicorn worker."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        listening.set_inheritable(True)
        environment = {**os.environ, "REDIS_URL": url, "ASYNCSTORE_KEY_PREFIX": "store:"}
        if profile is not None:
            environment["BENCH_PROFILE"] = str(profile)
        descriptor = listening.fileno()
        server = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", SERVE, f"benchmarks.web_app:{app}", str(descriptor)],
            cwd=ROOT,
            env=environment,
            pass_fds=[descriptor],
        )
        try:
            where = f"http://127.0.0.1:{listening.getsockname()[1]}"
            # Waits in the socket's queue until the worker is there.
            with urllib.request.urlopen(f"{where}/openapi.json", timeout=60):  # noqa: S310
                pass
            yield where
        finally:
            server.terminate()
            server.wait()


def measure(wrk: str, where: str, seconds: int, script: Path) -> Round:
    """Return what one run of wrk has found."""
    done = subprocess.run(  # noqa: S603
        [
            wrk,
            "-t1",
            f"-c{CONNECTIONS}",
            f"-d{seconds}s",
            "--timeout",
            "30s",
            "-s",
            str(script),
            where,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"^found (\d+) (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.M)
    if found is None:
        raise RuntimeError(f"wrk has said nothing: {done.stdout}{done.stderr}")
    requests, micros, p50, p99, failed = map(int, found.groups())
    if failed:
        raise RuntimeError(f"{failed} of {requests} requests have failed")
    rate = requests * 1e6 / micros
    return {"requests": requests, "rate": rate, "p50_ms": p50 / 1000, "p99_ms": p99 / 1000}


def run(wrk: str, url: str, rounds: int, seconds: int) -> dict[str, Any]:
    """Let the sides take turns, and look where their time goes."""
    found: dict[str, list[Round]] = {side: [] for side in APPS}
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "notes.lua")
        script.write_text(WRK)
        with ExitStack() as stack:
            served = {side: stack.enter_context(serving(app, url)) for side, app in APPS.items()}
            for where in served.values():
                measure(wrk, where, 1, script)  # warms up
            for _ in range(rounds):
                for side, where in served.items():
                    found[side].append(measure(wrk, where, seconds, script))
        profiles = {side: _profile(wrk, side, url, seconds, script) for side in APPS}
    return {"rounds": found, "profiles": profiles}


def _profile(wrk: str, side: str, url: str, seconds: int, script: Path) -> dict[str, float]:
    path = script.with_suffix(f".{side}")
    with serving(APPS[side], url, path) as where:
        requests = measure(wrk, where, seconds, script)["requests"]
    found = json.loads(path.read_text())
    samples: dict[str, int] = found["packages"]
    micros = found["cpu"] / requests / sum(samples.values()) * 1e6
    costs = {name: count * micros for name, count in samples.items()}
    return dict(sorted(costs.items(), key=lambda cost: -cost[1]))


def _medians(rounds: list[Round]) -> Round:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def show(found: dict[str, Any]) -> None:
    """Print what was found; in brackets the store's figure as a multiple of each."""
    sides = {side: _medians(found["rounds"][side]) for side in APPS}
    table = Table(title=f"POST of a note, {CONNECTIONS} connections, one uvicorn worker")
    for name in ("", "requests/s", "p50, ms", "p99, ms"):
        table.add_column(name, justify="right" if name else "left")
    store = sides["asyncstore"]
    for side, figures in sides.items():
        cells = [
            f"{figures[name]:,.1f} ({store[name] / figures[name]:.2f} x)"
            for name in ("rate", "p50_ms", "p99_ms")
        ]
        table.add_row(side, *cells)
    console.print(table)
    for side, profile in found["profiles"].items():
        costs = ", ".join(f"{name} {micros:.0f}" for name, micros in profile.items() if micros > 1)
        total = sum(profile.values())
        console.print(f"{side}, {total:.0f} µs of CPU a request, sampled: {costs}")


async def _describe(url: str) -> dict[str, Any]:
    client = client_of(url)
    try:
        return {**machine.describe(), "server": await machine.server(client)}
    finally:
        await client.aclose()


async def _measured(wrk: str, *, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        async with embedded.running(Path(directory)) as url:
            about = await _describe(url)
            rounds, seconds = (1, 2) if quick else (7, 5)
            return {**about, **await asyncio.to_thread(run, wrk, url, rounds, seconds)}


def main(output: Annotated[Path | None, typer.Option()] = None, *, quick: bool = False) -> None:
    """Measure appends over HTTP."""
    wrk = shutil.which("wrk")
    if wrk is None:
        console.print("bench-http is skipped: there is no wrk here (apt-get install wrk)")
        return
    found = asyncio.run(_measured(wrk, quick=quick))
    show(found)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
