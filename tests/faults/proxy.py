"""A proxy between client and server on which things go wrong, by a plan that a seed decides.

It knows where a request and an answer end, so a request is lost before the server has seen any of it, or its answer
after the server has done all of it. What happens to a call depends on the seed, on the job that it belongs to, and on
how often it was tried: not on what else runs at the same time.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from hashlib import sha256
from typing import Any, Self
from urllib.parse import urlsplit


class Fault(StrEnum):
    """What may go wrong; of the first four the server notices nothing, or nothing that it can use."""

    LOST_REQUEST = "the request never arrives, and the connection ends"
    SWALLOWED_REQUEST = "the request never arrives, and nobody says so"
    CUT_REQUEST = "the server gets half of the request"
    REFUSED = "the request never arrives, and no connection is taken for a while"
    LOST_ANSWER = "the server does it, and the connection ends without an answer"
    CUT_ANSWER = "the server does it, and the client gets half of the answer"
    SLOW_ANSWER = "the server does it, and the answer takes its time"
    LATE_ANSWER = "the server does it, and the client has given up when the answer comes"
    GARBAGE = "the server does it, and the client gets something else"


Rates = Mapping[Fault, float]
"""The probability of each fault, for one try of a call."""

USUAL: Rates = {
    **dict.fromkeys(Fault, 0.02),
    Fault.SLOW_ANSWER: 0.04,
    Fault.SWALLOWED_REQUEST: 0.003,
    Fault.LATE_ANSWER: 0.004,
    Fault.REFUSED: 0.004,
}
DOOMED = 0.004
"""The share of calls that lose every answer, so that whoever calls never learns what was done."""

SLOW = 0.1
REFUSING = 0.25
"""Seconds."""

GARBAGE = (
    b"\x00\xff\x16\x03 this is no HTTP\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 14\r\n\r\n<html>ok</html",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n" + b'{"allowed": true',
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 12\r\n\r\n<h1>502</h1>",
)

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class FaultyProxy:
    """Listens on a free port of 127.0.0.1, and passes calls on to a server, or not. `counts` says what it did.

    `late` is after how many seconds a client gives up a try.
    """

    def __init__(self, url: str, seed: str, late: float, rates: Rates = USUAL, doomed: float = DOOMED) -> None:
        self.counts: Counter[Fault | None] = Counter()
        self._seed, self._late, self._rates, self._doomed = seed, late, rates, doomed
        self._server = urlsplit(url)
        self._tries: Counter[str] = Counter()
        self._jobs: dict[str, str] = {}
        self._idle: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        # not asyncio.start_server, nor sock_accept: ended while they accept, they forget a connection that is open
        self._listening = socket.create_server(("127.0.0.1", self._port))
        self._listening.setblocking(False)
        self._port = self._listening.getsockname()[1]
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._listening.accept()
            task = self._loop.create_task(self._serve(connection))
            self._tasks.add(task)  # the loop itself holds it but weakly
            task.add_done_callback(self._tasks.discard)

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._listening)
        self._listening.close()

    async def _end(self) -> None:
        if self._is_listening:
            self._stop_listening()
        ending = list(self._tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were closed close their sockets in the loop's next round

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    self._idle.add(writer)
                    request = await read_message(reader)
                    self._idle.discard(writer)
                    if not await self._call(request, writer):
                        break
        finally:
            self._idle.discard(writer)
            writer.close()

    async def _call(self, request: bytes, client: asyncio.StreamWriter) -> bool:
        """Treat one request; false when the connection is over."""
        call, job = self._identify(request)
        self._tries[call] += 1
        fault = self.fate(call, self._tries[call])
        self.counts[fault] += 1
        if fault is Fault.REFUSED:
            await self._refuse()
        elif fault is Fault.SWALLOWED_REQUEST:
            await asyncio.sleep(self._late * 2)
        elif fault is Fault.CUT_REQUEST:
            await self._send(request[: len(request) // 2])
        if fault in (Fault.LOST_REQUEST, Fault.REFUSED, Fault.SWALLOWED_REQUEST, Fault.CUT_REQUEST):
            return False
        answer = await self._ask(request)
        self._remember(answer, job)
        return await self._answer(answer, fault, client, call)

    async def _answer(self, answer: bytes, fault: Fault | None, client: asyncio.StreamWriter, call: str) -> bool:
        if fault is Fault.LOST_ANSWER:
            return False
        if fault is Fault.SLOW_ANSWER:
            await asyncio.sleep(SLOW)
        elif fault is Fault.LATE_ANSWER:
            await asyncio.sleep(self._late * 1.1)
        elif fault is Fault.CUT_ANSWER:
            answer = answer[: len(answer) // 2]
        elif fault is Fault.GARBAGE:
            answer = GARBAGE[int(self._number(call, "garbage") * len(GARBAGE))]
        client.write(answer)
        await client.drain()
        return fault not in (Fault.CUT_ANSWER, Fault.GARBAGE)

    def fate(self, call: str, attempt: int) -> Fault | None:
        """Say what happens to a try of a call; None is nothing."""
        if self._number(call, "doomed") < self._doomed:
            return Fault.LOST_ANSWER
        number = self._number(call, attempt)
        for fault, rate in self._rates.items():
            if number < rate:
                return fault
            number -= rate
        return None

    def _number(self, *parts: object) -> float:
        """Draw a number from 0 to 1."""
        digest = sha256("/".join(map(str, (self._seed, *parts))).encode()).digest()
        return int.from_bytes(digest[:7]) / 2**56

    def _identify(self, request: bytes) -> tuple[str, str]:
        """Name a call by its function and job; a settlement names a usage, and that the job which recorded it."""
        head, _, body = request.partition(b"\r\n\r\n")
        params: dict[str, Any] = json.loads(body)
        function = head.split(b" ", 2)[1].rpartition(b"/")[2].decode()
        metadata = params.get("p_metadata") or params.get("p_requests", [{}])[0].get("metadata")
        job = metadata["job"] if metadata else self._jobs.get(params.get("p_usage_id", ""), function)
        return f"{function}/{job}", job

    def _remember(self, answer: bytes, job: str) -> None:
        with suppress(ValueError):
            told = json.loads(answer.partition(b"\r\n\r\n")[2])
            if isinstance(told, dict) and told.get("usage_id"):
                self._jobs[told["usage_id"]] = job

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await self._open()
        try:
            writer.write(request)
            return await read_message(reader)
        finally:
            writer.transport.abort()

    async def _send(self, part: bytes) -> None:
        _, writer = await self._open()
        try:
            writer.write(part)
            await writer.drain()
        finally:
            writer.close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._server.hostname, self._server.port)

    async def _refuse(self) -> None:
        """Take no connection for a while, and end those that are not in use."""
        if not self._is_listening:
            return
        self._stop_listening()
        for writer in self._idle:
            writer.transport.abort()
        await asyncio.sleep(REFUSING)
        await self._listen()

    @property
    def _is_listening(self) -> bool:
        return self._listening.fileno() != -1


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Read a whole request or answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    assert length is not None, head
    return head + await reader.readexactly(int(length[1]))
