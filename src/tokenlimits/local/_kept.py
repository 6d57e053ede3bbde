"""A directory that keeps the embedded database and the keys of a stack, from one run to the next."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import LocalStackError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Kept:
    """The directory; one stack at a time may use it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: int | None = None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LocalStackError(f"data_dir {directory} can't be used: {error.strerror}") from error

    @property
    def database(self) -> str:
        """Where PGlite keeps its files."""
        return str(self._directory / "database")

    def keys(self, make: Callable[[], Mapping[str, str]]) -> dict[str, str]:
        """Return the keys of the first run; they stay the same, so that a .env file does."""
        path = self._directory / "keys.json"
        with suppress(FileExistsError):
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as new:
                json.dump(make(), new)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LocalStackError(
                f"{path} is not what LocalStack wrote; remove the directory to begin with an empty database"
            ) from error

    def take(self) -> None:
        """Keep other stacks from using it; the system lets go of it when this process ends, however it does."""
        file = os.open(self._directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            _lock(file)
        except OSError as error:
            os.close(file)
            raise LocalStackError(
                f"{self._directory} is in use by another stack; stop it, or choose another data_dir"
            ) from error
        self._held = file

    def leave(self) -> None:
        """Let others use it."""
        file, self._held = self._held, None
        if file is not None:
            os.close(file)
