"""What holds for every command: help, colours, errors in one line, Ctrl-C, completion."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
from tests.integration.servers import raw_server, read_request, silent
from tests.support.waiting import eventually

from tokenlimits.cli._app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenlimits import GroupManager, TokenLimits
    from tokenlimits.local import LocalStack

    from .conftest import Program


def all_commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from all_commands(each, (*path, name))


COMMANDS = list(all_commands(typer.main.get_command(app)))


def test_every_command_explains_itself() -> None:
    """In one process: what differs between them is the text."""
    script = f"""
from tokenlimits.cli import main
for path in {COMMANDS!r}:
    print("==", *path)
    assert main([*path, "--help"]) == 0
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    texts = done.stdout.split("==")[1:]
    assert len(texts) == len(COMMANDS) > 15
    for path, text in zip(COMMANDS, texts, strict=True):
        assert f"Usage: {' '.join(('tokenlimits', *path))} " in text
        _, _, listed = text.partition("Commands:")
        assert "..." not in listed, listed


def test_without_a_command_it_explains_itself(nowhere: Program) -> None:
    assert nowhere(status=2).stdout.startswith("Usage: tokenlimits")
    assert "create" in nowhere("groups", status=2).stdout


def test_version(nowhere: Program) -> None:
    expected = f"tokenlimits {version('tokenlimits')}\n"
    assert nowhere("--version").stdout == expected
    script = Path(sys.executable).with_name("tokenlimits")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gruops"], "Did you mean 'groups'? See: tokenlimits --help"),
        (["groups", "show"], "GROUP"),
        (["groups", "create", "x", "--priority", "high"], "--priority"),
        (["usage", "--nope"], "--nope"),
        (
            ["history", "--by", "minute"],
            "'--by': 'minute' is not one of 'hour', 'day', 'week', 'month'. See: tokenlimits",
        ),
        (["history", "--since", "soon"], "or 2026-01-31T12:00:00Z. See: tokenlimits history --help"),
    ],
)
def test_what_is_not_understood(nowhere: Program, arguments: list[str], says: str) -> None:
    assert says in nowhere.fails(*arguments, status=2)


def test_what_is_not_configured(nowhere: Program) -> None:
    assert "SUPABASE_URL" in nowhere.fails("groups", "list")


def test_a_traceback_only_with_debug(nowhere: Program) -> None:
    for arguments in (["--debug", "groups", "list"], ["groups", "list", "--debug"]):
        done = nowhere(*arguments, status=1)
        assert done.stderr.startswith("Traceback")
        assert done.stderr.splitlines()[-1].startswith("Error: SUPABASE_")


def test_without_the_extra() -> None:
    script = """
import sys
sys.modules["typer"] = None
from tokenlimits.cli import main
sys.exit(main(["groups", "list"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "The command line needs more packages: pip install 'tokenlimits[cli]'\n"


def test_colours_only_where_they_can_be_seen(nowhere: Program) -> None:
    assert "\x1b" not in nowhere("groups", "list", status=1).stderr
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        with nowhere.on_terminal("groups", "list", **environment) as terminal:
            assert terminal.status() == 1
            assert ("\x1b[31m" in terminal.raw) is coloured
            assert "SUPABASE_URL" in terminal.text


def printed(program: Program, *arguments: object, stdout: Any = subprocess.PIPE, **environment: str) -> Any:
    """Run a command whose stdout is as Python makes it."""
    return subprocess.run(
        program.command(*arguments),
        cwd=program.directory,
        env=program.environment | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "bar"), [("cp1252", "#####---------------"), ("cp437", "█████░░░░░░░░░░░░░░░")])
def test_an_encoding_that_lacks_characters(
    tl: Program, groups: GroupManager, limits: TokenLimits, stack: LocalStack, name: str, encoding: str, bar: str
) -> None:
    (user,) = stack.create_users(1)
    group = groups.create(f"{name} \u4eba", limits={"image": 4})
    groups.add_member(group.id, user)
    limits.track(user, "image")
    for command in (["usage", group.id], ["usage", group.id, "--json"], ["groups", "list"], ["doctor"]):
        done = printed(tl, *command, PYTHONIOENCODING=encoding)
        assert done.stderr == b"", command
    said = printed(tl, "usage", group.id, PYTHONIOENCODING=encoding).stdout.decode(encoding)
    assert f"{name} ?" in said
    assert bar in said
    listed = json.loads(printed(tl, "members", "list", group.id, "--json", PYTHONIOENCODING="ascii").stdout)
    assert [member["id"] for member in listed] == [str(user)]


@pytest.mark.parametrize("command", [["--version"], ["groups", "list"], ["groups", "list", "--json"], ["export"]])
def test_a_full_disk(tl: Program, groups: GroupManager, name: str, command: list[str]) -> None:
    groups.create(name)
    with Path("/dev/full").open("w") as full:
        done = printed(tl, *command, stdout=full)
    assert (done.returncode, done.stderr) == (1, b"Error: The output can't be written: No space left on device.\n")


def test_a_full_disk_for_a_file(tl: Program) -> None:
    assert tl.fails("export", "-o", "/dev/full") == "/dev/full: No space left on device"


def test_whoever_reads_nothing_hears_nothing(nowhere: Program) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = printed(nowhere, "--version", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_key_is_never_shown(tl: Program) -> None:
    key = tl.environment["SUPABASE_SECRET_KEY"]
    for arguments in (["groups", "list"], ["usage", "nope"], ["track", "x@y.z", "image"]):
        for url in (tl.environment["SUPABASE_URL"], "nonsense"):
            done = tl(*arguments, "--debug", status=None, SUPABASE_URL=url)
            assert key not in done.stdout + done.stderr


def test_ctrl_c_ends_a_command_that_waits(tl: Program) -> None:
    asked = threading.Event()

    def listen(connection: socket.socket, over: threading.Event) -> None:
        # once the request is whole, the client has its connection in hand and waits for the answer
        read_request(connection)
        asked.set()
        silent(connection, over)

    with raw_server(listen) as server, tl.on_terminal("groups", "list", SUPABASE_URL=server.url) as terminal:
        eventually(asked.is_set)
        terminal.interrupt()
        assert terminal.status() == 130
        assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_ctrl_c_at_a_question_changes_nothing(tl: Program, groups: GroupManager, name: str) -> None:
    group = groups.create(name)
    for answer, status in (("", 130), ("n\n", 1)):
        with tl.on_terminal("groups", "delete", name) as terminal:
            terminal.wait_for(r"\[y/N\]")
            time.sleep(0.5)  # whoever is quicker than that presses it again
            if answer:
                terminal.type(answer)
            else:
                terminal.interrupt()
            assert terminal.status() == status
            assert terminal.text.splitlines()[-1].endswith("Nothing was changed.")
    assert groups.get(group.id)


@pytest.mark.slow
def test_what_is_tried_again_is_said_once(tl: Program) -> None:
    """A person waits; which call it was, and how often, is for --debug."""
    with raw_server(lambda *_: None) as hanging_up:
        for debug, says, count in ((), "Supabase is not responding; retrying.", 1), (("--debug",), "find_groups: ", 3):
            with tl.on_terminal("groups", "list", *debug, SUPABASE_URL=hanging_up.url) as terminal:
                before = hanging_up.accepted
                terminal.wait_for(rf"(?s)(retrying.*){{{count}}}")
                eventually(lambda before=before: hanging_up.accepted >= before + 4)
                terminal.interrupt()
                assert terminal.status() == 130
                assert says in terminal.text
                assert debug or terminal.text.count("retrying") == 1


def test_a_refused_connection_is_not_waited_for(tl: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = tl.fails("groups", "list", SUPABASE_URL=url)
    assert said == "127.0.0.1 refuses connections. Check SUPABASE_URL; is the project running?"


def test_completion(nowhere: Program) -> None:
    done = nowhere(_TOKENLIMITS_COMPLETE="complete_bash", COMP_WORDS="tokenlimits groups cr", COMP_CWORD="2")
    assert done.stdout.split() == ["create"]
    assert "complete" in nowhere("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
