"""Looks after one embedded server: starts it, and stops it when its last user has gone.

A program of its own, on the standard library alone, so that it outlives the process that started
it and starts fast. It takes a plan, as JSON in its only argument:

    command     the server's command line
    data        the directory of the data
    control     the socket on which users come and go
    socket      the socket of the server
    restarts    whether a server that ends by itself is started again
    throw_away  whether the data goes with the last user

A user is an open connection to the control socket. It is told `ready` once the server answers, or
`failed` when the server ended before; the reason is in the log, where the output of both goes. When
the user hangs up, the keeper does too: at once if there are other users, and otherwise when the
server has stopped.

A server that is not to be restarted stays down when it ends, and its users are told `ended`. They
may give orders, each with a new line: the number of a signal for the server, which is answered by
`sent`, or `ended` if there is no server any more; and `start`, to have it started again.

At most one server works on the data: keeper and server share a lock on `data/lock`, which the
kernel keeps as long as one of them lives. A keeper that finds it taken leaves it to the keeper that
answers on the control socket; if there is none, that one was killed, and the server it left behind
is told to end.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.005
_LOCK_SECONDS = 90
_ORPHAN_SECONDS = 2
_FIRST_USER_SECONDS = 30
_STOP_SECONDS = 60
_LARGEST_LOG = 1 << 20
_MOST_RESTARTS = 5
_PR_SET_PDEATHSIG = 1

# How many free blocks of one size glibc keeps at hand. A group of appends frees more than the 7 of
# its default, and the search for others took the server a tenth of its time; see ARCHITECTURE.md.
_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=512"}


def main(argument: str) -> None:
    """Take charge of the data and go on in the background, or return if another keeper has."""
    plan = json.loads(argument)
    os.umask(0o077)
    lock = _take_lock(plan)
    if lock is None:
        return
    control = _listen(plan["control"])
    if os.fork() == 0:
        os.setsid()
        os.chdir("/")
        _rotate_log(Path(plan["data"]))
        Keeper(plan, lock, control).run()
        os._exit(0)


def _take_lock(plan: dict[str, Any]) -> int | None:
    lock = os.open(Path(plan["data"]) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    started = time.monotonic()
    asked = False
    while time.monotonic() < started + _LOCK_SECONDS:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if _talk(plan["control"]):
                return None
            if not asked and time.monotonic() > started + _ORPHAN_SECONDS:
                asked = True
                _talk(plan["socket"], b"SHUTDOWN")
            time.sleep(_POLL_SECONDS)
        else:
            return lock
    sys.exit(f"{plan['data']} is still in use by a server that nobody looks after")


def _listen(path: str) -> socket.socket:
    Path(path).parent.mkdir(mode=0o700, exist_ok=True)  # the last keeper may just have removed it
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _talk(path: str, command: bytes | None = None) -> bytes:
    """Return what the socket answers to a command; something for a mere connection; or nothing."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        try:
            connection.connect(path)
            if command is None:
                return b"connected"
            connection.sendall(b"*1\r\n$%d\r\n%s\r\n" % (len(command), command))
            return connection.recv(64)
        except OSError:
            return b""


def _rotate_log(data: Path) -> None:
    log = data / "server.log"
    if log.stat().st_size > _LARGEST_LOG:
        log.rename(data / "server.log.1")
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


class Keeper:
    """The server, its users, and what is to be done when either ends."""

    def __init__(self, plan: dict[str, Any], lock: int, control: socket.socket) -> None:
        self._plan = plan
        self._lock = lock
        self._control = control
        self._users: set[socket.socket] = set()
        self._last_user: socket.socket | None = None
        self._ready = False  # as far as we know, it answers
        self._proven = False  # it did answer once
        self._restarts = 0  # since then
        self._down = False  # it has ended, and is not started before somebody says so
        self._stopping = False
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._welcome)
        self._watch_signals()

    def run(self) -> None:
        """Keep the server until the last user has gone."""
        patience = time.monotonic() + _FIRST_USER_SECONDS
        try:
            self._server = self._start()
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
            self._fail()
            return
        while not self._stopping:
            waiting = not (self._ready or self._down) or not self._users
            for key, _ in self._selector.select(_POLL_SECONDS if waiting else None):
                key.data(key.fileobj)
            if self._has_ended() and not self._down and not self._goes_on():
                return
            if not self._ready and not self._down and self._answers():
                self._ready = self._proven = True
                self._restarts = 0
                self._tell(b"ready\n")
            if not self._users and time.monotonic() > patience:
                self._stopping = True
        self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - the server that we were asked to keep
            self._plan["command"],
            stdin=subprocess.DEVNULL,
            pass_fds=[self._lock],
            cwd=self._plan["data"],
            env=_ALLOCATOR | os.environ,
            preexec_fn=self._die_with_keeper,
        )

    def _answers(self) -> bool:
        return _talk(self._plan["socket"], b"PING").startswith(b"+PONG")

    def _die_with_keeper(self) -> None:
        """Have the kernel end the server when the keeper is killed, where it can (Linux)."""
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _has_ended(self) -> bool:
        return self._server.poll() is not None

    def _goes_on(self) -> bool:
        """Start a server anew that was ready, or was killed; or leave it down, if that is the plan.

        One that ended by itself before it was ready would do so again.
        """
        self._restarts += 1
        was_killed = self._server.returncode < 0
        hopeful = (self._proven or was_killed) and self._restarts <= _MOST_RESTARTS
        if hopeful and self._plan["restarts"]:
            self._start_again()
            return True
        if self._proven:
            self._ready, self._down = False, True
            self._tell(b"ended\n")
            return True
        self._fail()
        return False

    def _start_again(self) -> None:
        self._ready = self._proven = self._down = False
        self._server = self._start()

    def _fail(self) -> None:
        """Tell the users, and clean up once they have read the log and gone."""
        told: set[socket.socket] = set()
        deadline = time.monotonic() + _FIRST_USER_SECONDS
        while (self._users or not told) and time.monotonic() < deadline:
            for user in self._users - told:
                self._send(user, b"failed\n")
            told |= self._users
            for key, _ in self._selector.select(_POLL_SECONDS):
                key.data(key.fileobj)
        self._clean_up()

    def _stop(self) -> None:
        self._control.close()
        Path(self._plan["control"]).unlink(missing_ok=True)
        self._server.terminate()
        self._server.send_signal(signal.SIGCONT)  # or one that is paused would not hear of it
        # Without its directory it can't save, and would refuse to end.
        patience = _STOP_SECONDS if Path(self._plan["data"]).is_dir() else 0
        try:
            self._server.wait(patience)
        except subprocess.TimeoutExpired:
            # It can't save its RDB, and has been given its time to write the AOF.
            self._server.kill()
            self._server.wait()
        self._clean_up()

    def _clean_up(self) -> None:
        for name in ("control", "socket"):
            Path(self._plan[name]).unlink(missing_ok=True)
        sockets = Path(self._plan["control"]).parent
        if sockets != Path(self._plan["data"]):
            with contextlib.suppress(OSError):
                sockets.rmdir()
        if self._plan["throw_away"]:
            shutil.rmtree(self._plan["data"], ignore_errors=True)

    # Users and signals

    def _welcome(self, control: socket.socket) -> None:
        while True:
            try:
                user, _ = control.accept()
            except BlockingIOError:
                return
            user.setblocking(False)
            self._users.add(user)
            self._selector.register(user, selectors.EVENT_READ, self._hear)
            if self._down:
                self._start_again()
            # It may just have been killed, and we have not heard of it yet.
            self._ready = self._ready and self._answers()
            if self._ready:
                self._send(user, b"ready\n")

    def _hear(self, user: socket.socket) -> None:
        try:
            orders = user.recv(64)
        except BlockingIOError:
            return
        except OSError:
            orders = b""  # it was killed, which is a good-bye too
        if orders:
            self._obey(user, orders)
            return
        self._selector.unregister(user)
        self._users.remove(user)
        self._welcome(self._control)
        if self._users:
            user.close()
        else:
            self._last_user = user  # hung up when this process ends, after the server
            self._stopping = True

    def _obey(self, user: socket.socket, orders: bytes) -> None:
        for order in orders.split():
            if order == b"start":
                if self._down:
                    self._start_again()
            elif self._has_ended():
                self._send(user, b"ended\n")
            else:
                self._server.send_signal(int(order))
                self._send(user, b"sent\n")

    def _tell(self, word: bytes) -> None:
        for user in self._users:
            self._send(user, word)

    def _send(self, user: socket.socket, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it may have hung up; that is heard in its turn
            user.send(word)

    def _watch_signals(self) -> None:
        receiver, sender = socket.socketpair()
        receiver.setblocking(False)
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno())
        self._signals = (receiver, sender)
        self._selector.register(receiver, selectors.EVENT_READ, self._hear_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _hear_signal(self, receiver: socket.socket) -> None:
        if signal.SIGTERM in receiver.recv(64):
            self._stopping = True


if __name__ == "__main__":
    main(sys.argv[1])
