"""Files that commands write: whole or not at all, and for their owner alone."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from ._terminal import Problem


def check_directory(path: Path | None) -> Path | None:
    """Refuse a path that can be no file, before anything is done.

    Raises:
        Problem: Its directory does not exist, or it is one itself.
    """
    if path is not None and not path.parent.is_dir():
        raise Problem(f"{path}: the directory {path.parent} does not exist.")
    if path is not None and path.is_dir():
        raise Problem(f"{path} is a directory; name a file.")
    return path


@contextmanager
def written(path: Path) -> Generator[IO[str]]:
    """Open a file that appears only once it is complete, and that only its owner may read.

    Raises:
        OSError: It can't be written; the path is in it.
    """
    unfinished = None
    try:
        if _is_device(path):
            with path.open("w", encoding="utf-8", newline="") as device:
                yield device
            return
        # under a name that nobody can guess, or somebody's link there would be followed
        with NamedTemporaryFile(
            "w", encoding="utf-8", newline="", dir=path.parent, prefix=".tokenlimits-", delete=False
        ) as file:
            unfinished = Path(file.name)
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Whether to write to what is there, such as /dev/stdout or a pipe, instead of replacing it.

    A link elsewhere than in /dev is replaced: somebody else may have put it there.
    """
    return path.exists() and not path.is_file() and (not path.is_symlink() or path.parent == Path(os.devnull).parent)
