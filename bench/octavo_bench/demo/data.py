"""Real sentences: prose from the documentation that Python itself carries, the same ones every time.

The text is read with `ast` from the standard library's source files (importing modules for their docstrings
would run them, and `python -OO` would strip them) and from pydoc's language reference (`pydoc_data.topics`).
Sentences are ordered by the SHA-256 of their text and the first ones taken. So the choice depends on nothing
but the text: the same Python gives the same sentences on every machine, and another Python version, whose
documentation differs here and there, gives mostly the same ones.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import TooFewSentencesError

EVALUATION_SENTENCES = 200
CALIBRATION_SENTENCES = 64

# Modules documented in prose, all present from Python 3.10 on. Packages are read whole.
MODULES = (
    "argparse", "calendar", "cmd", "collections", "configparser", "contextlib", "copy", "csv", "difflib",
    "doctest", "fileinput", "fractions", "functools", "heapq", "imaplib", "inspect", "ipaddress", "logging",
    "mailbox", "optparse", "pickle", "pickletools", "pprint", "queue", "random", "sched", "shlex", "shutil",
    "smtplib", "socket", "socketserver", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "trace", "turtle", "typing", "unittest", "urllib", "warnings", "zipfile",
)  # fmt: skip

MIN_WORDS, MAX_WORDS = 8, 40

# One sentence: a capital, then words, numbers and everyday punctuation, then a full stop. Code, markup and
# tables do not match.
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/-]*[a-z)]\.")
# A full stop, a space and a capital end a sentence, except after the usual abbreviations.
_BOUNDARY = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<=\.)\s+(?=[A-Z])")


class Sentences(NamedTuple):
    """What to embed, and other sentences for a calibration pass. No sentence is in both."""

    evaluation: list[str]
    calibration: list[str]


def load(evaluation: int = EVALUATION_SENTENCES, calibration: int = CALIBRATION_SENTENCES) -> Sentences:
    """The first `evaluation` sentences, and `calibration` more from behind the first 200.

    Raises TooFewSentencesError where this Python does not carry enough of them.
    """
    found = all_sentences()
    start = max(evaluation, EVALUATION_SENTENCES)
    if len(found) < start + calibration:
        raise TooFewSentencesError(
            f"needs {start + calibration} sentences of documentation, found {len(found)} in the standard "
            f"library of this Python ({_library()}); use a Python that is installed with its source files"
        )
    return Sentences(found[:evaluation], found[start : start + calibration])


def all_sentences() -> list[str]:
    """Every distinct sentence, ordered by the SHA-256 of its text. Takes a second or two."""
    distinct = {sentence for paragraph in _paragraphs() for sentence in split_sentences(paragraph)}
    return sorted(distinct, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())


def split_sentences(paragraph: str) -> Iterator[str]:
    """The sentences of one paragraph (line breaks are spaces) that are plain prose of 8 to 40 words."""
    for part in _BOUNDARY.split(" ".join(paragraph.split())):
        words = part.split(" ")
        if not MIN_WORDS <= len(words) <= MAX_WORDS or not _PROSE.fullmatch(part) or "--" in part:
            continue
        # Prose is made of lower-case words; lists of names, signatures and headings are not.
        if sum(word.strip(",;:'()").islower() for word in words) >= 0.75 * len(words):
            yield part


def _paragraphs() -> Iterator[str]:
    """Blocks of text between blank lines, without those whose lines differ in indentation: lists, code."""
    for text in _documentation():
        for block in re.split(r"\n\s*\n", text):
            if len({len(line) - len(line.lstrip()) for line in block.strip("\n").splitlines()}) == 1:
                yield block


def _documentation() -> Iterator[str]:
    """The text of each docstring of the chosen modules, then of each topic of the language reference."""
    for path in _module_files():
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # a file that cannot be read only makes the collection smaller; load checks its size
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.values()


def _module_files() -> Iterable[Path]:
    library = _library()
    for name in MODULES:
        module, package = library / f"{name}.py", library / name
        if module.is_file():
            yield module
        elif package.is_dir():
            for path in sorted(package.rglob("*.py")):
                # Tests live inside some packages on some installations only.
                if not {"test", "tests"} & set(path.relative_to(library).parts):
                    yield path


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
