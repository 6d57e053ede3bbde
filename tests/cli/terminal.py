"""A terminal of 120 columns for a process, and what it wrote on it."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_SIZE = struct.pack("HHHH", 40, 120, 0, 0)


class Terminal:
    """Runs a process that believes that somebody sits in front of it."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, _SIZE)
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env={**environment, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)
        self._written = bytearray()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # nobody holds the other end any more
                return
            with self._changed:
                self._written += data
                self._changed.notify_all()

    @property
    def raw(self) -> str:
        """All that was written, with its escape sequences."""
        with self._changed:
            return self._written.decode(errors="replace")

    @property
    def text(self) -> str:
        """All that was written, without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Wait until a pattern was written."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._written.decode(errors="replace"))):
                assert self._process.poll() is None or self._reader.is_alive(), self._written
                assert self._changed.wait(deadline - time.monotonic()), self._written

    def type(self, text: str) -> None:
        """Type on the keyboard."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def status(self, seconds: float = 60) -> int:
        """Wait for the end; return the exit status."""
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status
