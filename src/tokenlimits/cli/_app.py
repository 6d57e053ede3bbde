"""The program: its commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.main

import tokenlimits
from tokenlimits.errors import TokenLimitsError

from . import (
    _admin,
    _correct,
    _dev,
    _export,
    _groups,
    _history,
    _import,
    _limits,
    _members,
    _migrate,
    _overrides,
    _setup,
    _track,
    _usage,
)
from ._terminal import Problem, discard_output, note, print_anything
from .doctor import _command

_HELP = """Exact limits on AI generations for users and groups, on Supabase.

Most commands read SUPABASE_URL and SUPABASE_SECRET_KEY from the environment or .env.
"""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# a full disk, a quota, a bad disk, somebody who went away
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EPIPE)
_logger = logging.getLogger("tokenlimits")
_IN_ORDER = (
    *(_setup, _migrate, _command, _dev),
    *(_groups, _members, _limits, _overrides, _admin),
    *(_usage, _history, _export, _import, _track, _correct),
)
for commands in _IN_ORDER:
    commands.register(app)


def _version(asked: bool) -> None:
    if asked:
        print(f"tokenlimits {tokenlimits.__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _options_of_all(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, help="Print the version.", is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status. An error is one line on stderr that says what to do."""
    # wherever it stands: after a failure, people add it at the end of the line
    debug = "--debug" in arguments
    rest = [argument for argument in arguments if argument != "--debug"]
    patience = logging.StreamHandler() if debug else _Patience()
    _logger.addHandler(patience)
    print_anything()
    try:
        command: Any = typer.main.get_command(app)
        status = command.main(rest, prog_name="tokenlimits", standalone_mode=False) or 0
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001 - nothing above this handles it
        if str(error).startswith("Usage: "):  # a command that has only subcommands
            print(error)  # noqa: T201
            return 2
        if isinstance(error, typer.Abort):  # Ctrl-C at a prompt: the cursor is still in its line
            note("\nNothing was changed.", style="red")
            return 130
        if _is_of_output(error):
            discard_output()
        if isinstance(error, BrokenPipeError):  # nobody reads on
            return 1
        if debug:
            traceback.print_exception(error)
        note(f"Error: {_message(error)}", style="red")
        return getattr(error, "exit_code", 1)
    else:
        return status
    finally:
        _logger.removeHandler(patience)


def _is_of_output(error: Exception) -> bool:
    return isinstance(error, OSError) and error.filename is None and error.errno in _OF_OUTPUT


class _Patience(logging.Handler):
    """Reports unreadable rows, and the first retry only; with --debug, the log has every retry with its reason."""

    _said = False

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "left_out"):
            note(record.getMessage(), style="yellow")
        elif not self._said:
            self._said = True
            note("Supabase is not responding; retrying.", style="yellow")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _is_of_output(error):
        return f"The output can't be written: {getattr(error, 'strerror', error)}."
    if isinstance(error, typer.TyperException):
        context: typer.Context | None = getattr(error, "ctx", None)
        # pydantic puts the class of the error before the message
        message = error.format_message().replace(": Value error, ", ": ")
        stop = "" if message.endswith((".", "?")) else "."
        return f"{message}{stop}" + (f" See: {context.command_path} --help" if context is not None else "")
    if isinstance(error, Problem | TokenLimitsError):
        return str(error)
    return f"{type(error).__name__}: {error}. This is a bug: run it again with --debug and report the output."
