"""Build the sync clients from the async ones; with --check, fail if they are stale.

Each method, docstring and comment of the clients is written once, in the async module. `async`, `await` and the names
of the async classes go by rule, in `__all__` and in the examples of docstrings too; other strings stay as they are.
Where a docstring says more that is true of one colour alone, a comment right after it has the phrase and what replaces
it:

    # SYNC: event loops => threads

The phrase must stand exactly once in the docstring, so no such comment outlives it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import libcst as cst

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tokenlimits"
SOURCES = {"client.py": "async_client.py", "groups.py": "async_groups.py"}
HEADER = "# Generated from {source} by `make sync`; edit it there.\n"

# Names whose sync form isn't made by dropping an "Async" before a capital.
NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "aclose": "close",
    "async_decorated": "decorated",
    "atrack_generation": "track_generation",
}
REWORDING = re.compile(r"# SYNC: (?P<phrase>.+) => (?P<replacement>.+)")
EXAMPLE = re.compile(r"^(?P<indent> *)>>> (?P<code>.*(?:\n(?P=indent)\.\.\.(?: .*)?$)*)", re.MULTILINE)


class Unconvertible(Exception):
    """A `# SYNC:` comment that doesn't match the code before it."""


def sync_name(name: str) -> str:
    """Convert one identifier."""
    return NAMES.get(name) or re.sub("Async(?=[A-Z])", "", name)


def sync_prose(text: str) -> str:
    """Convert prose, and the code in it between backticks."""

    def with_article(match: re.Match[str]) -> str:
        article, quote, initial = match.groups()
        return f"{article}{'n' if initial.lower() in 'aeiou' else ''} {quote}{initial}"

    text = re.sub(r"\b([Aa])n (`?)(?:async |Async)(\w)", with_article, text)
    text = re.sub(r"`[^`\n]+`", lambda code: re.sub(r"\b(?:async|await) ", "", code[0]), text)
    return re.sub(r"\w+", lambda word: sync_name(word[0]), text)


def sync_docstring(text: str) -> str:
    """Convert the examples of a docstring as code, and the rest as prose."""

    def example(match: re.Match[str]) -> str:
        code = sync_code(re.sub(r"\n *\.\.\. ?", "\n", match["code"]))
        return textwrap.indent(">>> " + code.replace("\n", "\n... "), match["indent"])

    return sync_prose(EXAMPLE.sub(example, text))


def sync_code(code: str) -> str:
    """Convert a module, or an example."""
    return cst.parse_module(code).visit(_Reword()).visit(_ToSync()).visit(_Exports()).code


class _Reword(cst.CSTTransformer):
    """Applies the `# SYNC:` comments, and removes them."""

    def on_leave(self, _: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:
        match updated_node:
            case (cst.Module() | cst.IndentedBlock()) as block:
                match block.body:
                    case [cst.SimpleStatementLine(body=[cst.Expr(cst.SimpleString())]) as docstring, following, *rest]:
                        return block.with_changes(body=[*_reworded(docstring, following), *rest])
        return updated_node


def _reworded(docstring: cst.SimpleStatementLine, following: cst.CSTNode) -> tuple[cst.CSTNode, cst.CSTNode]:
    string = docstring.body[0].value
    text, others = string.value, []
    for line in following.leading_lines:
        if rewording := REWORDING.fullmatch(line.comment.value if line.comment else ""):
            text = _replaced(text, **rewording.groupdict())
        else:
            others.append(line)
    return docstring.with_deep_changes(string, value=text), following.with_changes(leading_lines=others)


def _replaced(text: str, phrase: str, replacement: str) -> str:
    if text.count(phrase) != 1:
        raise Unconvertible(f"the docstring has {phrase!r} {text.count(phrase)} times; correct its `# SYNC:` comment")
    return text.replace(phrase, replacement)


class _ToSync(cst.CSTTransformer):
    """Removes `async` and `await`, and renames."""

    def on_leave(self, _: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:
        match updated_node:
            # Drop parentheses around it too: what is awaited binds tightly enough without them.
            case cst.Await(expression=awaited):
                return awaited
            case cst.FunctionDef() | cst.For() | cst.With() | cst.CompFor():
                return updated_node.with_changes(asynchronous=None)
            case cst.Name(value=name):
                return updated_node.with_changes(value=sync_name(name))
            case cst.Expr(value=cst.SimpleString(value=text) as string):
                return updated_node.with_deep_changes(string, value=sync_docstring(text))
            case cst.Comment(value=text) if text.startswith("# SYNC:"):
                raise Unconvertible(f"{text!r} must stand right after a docstring, as `# SYNC: phrase => replacement`")
            case cst.Comment(value=text):
                return updated_node.with_changes(value=sync_prose(text))
        return updated_node


class _Exports(cst.CSTTransformer):
    """Renames what `__all__` lists."""

    def on_leave(self, _: cst.CSTNode, updated_node: cst.CSTNode) -> cst.CSTNode:
        match updated_node:
            case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value="__all__"))], value=cst.List() as listed):
                elements = [
                    each.with_deep_changes(each.value, value=sync_prose(each.value.value)) for each in listed.elements
                ]
                return updated_node.with_deep_changes(listed, elements=elements)
        return updated_node


def formatted(code: str, path: Path) -> str:
    """Sort the imports and format, as ruff does with the file."""
    for command in (["check", "--quiet", "--fix", "--select=I"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config=pyproject.toml", f"--stdin-filename={path}", "-"]
        code = subprocess.run(ruff, input=code, stdout=subprocess.PIPE, cwd=ROOT, text=True, check=True).stdout
    return code


def built(source: Path, target: Path) -> str:
    """Convert a module."""
    return formatted(HEADER.format(source=source.name) + sync_code(source.read_text()), target)


def main(arguments: Sequence[str], package: Path = PACKAGE) -> int:
    """Write the generated files, or say which are stale."""
    stale: dict[Path, str] = {}
    for target, source in SOURCES.items():
        try:
            code = built(package / source, package / target)
        except Unconvertible as error:
            print(f"{source}: {error}", file=sys.stderr)
            return 1
        path = package / target
        if not path.exists() or path.read_text() != code:
            stale[path] = code
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is stale: run `make sync`", file=sys.stderr)
        return bool(stale)
    for path, code in stale.items():
        path.write_text(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
