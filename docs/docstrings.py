"""Docstrings as the site shows them: an extension of Griffe, which reads them for mkdocstrings.

They are written to be read in a terminal. Here examples become code, names of octavo's own links.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from hooks import public_names

_EXAMPLE = re.compile(r"(?:^>>> .*\n?)(?:^(?:>>>|\.\.\.|(?=\S)).*\n?)*", re.MULTILINE)
_PUBLIC = {f"{module}.{name}" for module, names in public_names().items() for name in names}


class Docstrings(griffe.Extension):  # type: ignore[misc]
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the object's docstring, where it has one."""
        if obj.docstring:
            obj.docstring.value = shown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the package's own docstring: Griffe does not call the package an object."""
        self.on_object(obj=pkg)


def shown(docstring: str) -> str:
    """The docstring with examples as code, public names as links, and lists of attributes that Griffe understands."""
    text = _EXAMPLE.sub(lambda match: _fenced(match[0]), docstring)
    text = re.sub(r"(^ *|: )>(?==)", r"\1\\>", text, flags=re.MULTILINE)  # ">= 0" begins no quotation
    text = re.sub(r"(?<!`)`(octavo\.[\w.]+)`(?!`)", lambda match: _linked(match[1]), text)
    # "a, b: what they are": Griffe takes what follows a space for a type.
    return re.sub(
        r"^( +)(\w+(?:, \w+)+)(?=: )", lambda match: match[1] + match[2].replace(" ", "\u00a0"), text, flags=re.M
    )


def _fenced(example: str) -> str:
    code = re.sub(r" *# doctest:.*", "", example.rstrip())
    return f"```pycon\n{code}\n```\n"


def _linked(name: str) -> str:
    return f"[`{name}`][{name}]" if name in _PUBLIC else f"`{name}`"
