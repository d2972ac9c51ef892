"""Many questions in one request: what of the indexes of a cluster is there."""

from __future__ import annotations

import asyncio
from typing import Any

import hiredis

from asyncstore.transport import Bounds, Transport
from asyncstore.wire import ReplyError, Survey
from tests.proxy import serving

HELLO = b"*2\r\n$2\r\nid\r\n:7\r\n"
INFO = b"$19\r\nrun_id:0123456789\r\n\r\n"


class Questions:
    """A server that answers questions with what is left of `answers`, and cuts at a None."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                answer = self._answer_to(command)
                if answer is None:
                    return
                writer.write(answer)

    def _answer_to(self, command: list[bytes]) -> bytes | None:
        name = command[0].upper()
        if name == b"EXISTS":
            self.asked.append(command[1].decode())
            return self.answers.pop(0)
        return {b"HELLO": HELLO, b"INFO": INFO}.get(name, b"+OK\r\n")


async def asked(server: Questions, *keys: str) -> list[Any]:
    async with serving(server.serve) as url:
        transport = Transport(url, url, Bounds(5.0, 100, 1_000_000))
        await transport.open()
        try:
            loop = asyncio.get_running_loop()
            caller = loop.create_future()
            transport.send(Survey([("EXISTS", key) for key in keys], caller, loop.time()))
            replies: list[Any] = await caller
        finally:
            await transport.aclose()
        return replies


async def test_each_question_has_its_answer_which_may_be_an_error() -> None:
    server = Questions(b":1\r\n", b"-MOVED 7 127.0.0.1:7000\r\n", b":0\r\n", b"-TRYAGAIN later\r\n")
    one, moved, zero, later = await asked(server, "a", "b", "c", "d")
    assert (one, zero) == (1, 0)
    assert isinstance(moved, ReplyError)
    assert (moved.code, later.code) == ("MOVED", "TRYAGAIN")


async def test_all_are_asked_again_when_the_connection_broke_in_between() -> None:
    server = Questions(b":1\r\n", b":1\r\n", None, b":0\r\n", b":0\r\n", b":1\r\n")
    assert await asked(server, "a", "b", "c") == [0, 0, 1]
    assert server.asked == ["a", "b", "c"] * 2
