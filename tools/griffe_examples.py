"""Griffe reads sections named "Examples"; ours are named "Example", as the style that the linter checks has both."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Lets the reference show each example as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of an object's docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:\n((?:    .*\n?|\n)+)", _section, obj.docstring.value, flags=re.MULTILINE
            )


def _section(match: re.Match[str]) -> str:
    code = match[1].rstrip("\n")
    if ">>>" not in code:  # not a doctest: griffe would treat it as text
        code = f"    ```python\n{code}\n    ```"
    return f"Examples:\n{code}\n"
