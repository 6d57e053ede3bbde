"""The Node process that runs Supabase Lite: start it, talk to it, and make sure that it ends."""

from __future__ import annotations

import atexit
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

from ._errors import LocalStackError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenlimits.sql_files import SqlFile

_GRACE: Final = 3.0  # seconds for each step of ending the process


class LiteServer:
    """One Node process and its project directory. Thread-safe; `stop` removes both.

    The process ends when its stdin does, so it can't outlive this process, however that ends.
    """

    def __init__(self, command: Sequence[str], migrations: Sequence[SqlFile]) -> None:
        self._pid = os.getpid()
        # one question at a time: answers carry no number, so the next line is the answer to the last question
        self._asking = threading.Lock()
        # another one, since a question that times out stops the process while it holds the first
        self._stopping = threading.Lock()
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._directory = Path(tempfile.mkdtemp(prefix="tokenlimits-local-"))
        # A file without a name leaves nothing behind and, unlike a pipe, needs nobody to drain it. Node appends to it
        # wherever this process reads.
        self._log = cast("IO[bytes]", tempfile.TemporaryFile("a+b"))  # noqa: SIM115 - closed in stop()
        try:
            self._copy(migrations)
            self._process = subprocess.Popen(  # noqa: S603 - Node, with a script of ours
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=self._directory,
                env={**os.environ, "LITE_TELEMETRY": "0", "DO_NOT_TRACK": "1"},
                start_new_session=True,
            )
        except BaseException:
            self._remove()
            raise
        self._reader = threading.Thread(target=self._read, name="tokenlimits-local", daemon=True)
        self._reader.start()
        atexit.register(self.stop)

    def start(self, configuration: Mapping[str, object], *, timeout: float) -> int:
        """Send the configuration and wait until the server listens; returns its port."""
        answer = self._ask({**configuration, "directory": str(self._directory)}, timeout=timeout)
        error = answer.get("error")
        if error is None:
            return int(answer["port"])
        if error["code"] == "EADDRINUSE":
            raise LocalStackError(
                f"Port {configuration['port']} on 127.0.0.1 is taken; choose another, or leave it out to get a free one"
            )
        raise LocalStackError(f"Supabase Lite did not start: {_text(error)}{self.last_output()}")

    def query(self, sql: str, parameters: Sequence[object], *, timeout: float) -> list[dict[str, Any]]:
        """Run one statement as the owner of the database."""
        answer = self._ask({"sql": sql, "parameters": list(parameters)}, timeout=timeout)
        if "error" in answer:
            raise LocalStackError(f"PostgreSQL refused: {_text(answer['error'])}")
        return answer["rows"]

    def last_output(self) -> str:
        """Return the end of the server's output, to append to a message; empty if there is none."""
        if self._log.closed:
            return ""
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - 4000))
        text = self._log.read().decode(errors="replace").strip()
        return f"\nLast output:\n{text}" if text else ""

    def stop(self) -> None:
        """End the process and remove its directory; a second call does nothing."""
        if os.getpid() != self._pid:  # a fork inherits this object, but the process is its parent's to stop
            return
        with self._stopping:
            atexit.unregister(self.stop)
            if self._log.closed:
                return
            self._end()
            self._reader.join(_GRACE)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._remove()

    def _copy(self, migrations: Sequence[SqlFile]) -> None:
        target = self._directory / "supabase" / "migrations"
        target.mkdir(parents=True)
        for migration in migrations:
            target.joinpath(migration.name).write_text(migration.text, encoding="utf-8")

    def _read(self) -> None:
        stream = self._process.stdout
        for line in stream or ():
            self._answers.put(line.decode())
        self._answers.put(None)

    def _ask(self, message: Mapping[str, object], *, timeout: float) -> dict[str, Any]:
        with self._asking:
            try:
                self._write(json.dumps(message).encode() + b"\n")
                line = self._answers.get(timeout=timeout)
            except (queue.Empty, OSError) as error:
                late = isinstance(error, queue.Empty)
                output = self.last_output()
                self.stop()  # a late answer would be taken for that to the next question
                reason = f"did not answer within {timeout:g} seconds" if late else "is gone"
                raise LocalStackError(f"Supabase Lite {reason}.{output}") from error
        if line is None:
            raise LocalStackError(f"Supabase Lite ended.{self.last_output()}")
        return json.loads(line)

    def _write(self, data: bytes) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise BrokenPipeError
        stdin.write(data)
        stdin.flush()

    def _end(self) -> None:
        with suppress(OSError):  # data in the buffer that the process never read
            if self._process.stdin is not None:
                self._process.stdin.close()
        for send in (None, signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if send is not None:
                self._signal(send)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
                return

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._log.close()


def _text(error: Mapping[str, Any]) -> str:
    parts = (str(error["message"] or error["code"]), error.get("detail"))
    return ". ".join(part for part in parts if part)
