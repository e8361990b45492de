"""Real text that is on the machine already: documentation of Python, of its packages, and of the system.

Docstrings of Python files, .rst and .txt files, and what Debian keeps in /usr/share/doc, compressed or not. Files come
in the order of the SHA-256 of their paths below their root and are read until there is enough; the same hash says of
each file whether it is for training, held out, or for calibration. A text that was seen before is left out, and so is
a paragraph of the calibration or held-out texts that training has, too: packages copy each other's docstrings, and a
model that has learned one by heart says nothing of new text. The same machine gives the same corpus; another one, where
other versions are installed, another.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

VERSION = 2  # another one where the same files give another corpus
SHORTEST = 400  # characters of a text
LONGEST = 100_000  # of each text: one that is longer is cut, so that no file makes up the corpus alone
SHORTEST_PARAGRAPH = 40  # characters of one that is looked for in other parts: headings and signatures may be anywhere
_BREAK = re.compile(r"\n\s*\n")  # between paragraphs
# Not prose, or the same in every package.
_NO_PROSE = ("license", "licence", "copying", "copyright", "notice", "changelog", "record", "sources", "top_level",
             "requirements", "entry_points", "cmakelists", "authors", "installed-files")  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Texts by their part. `files`: how many were used."""

    train: list[str]
    heldout: list[str]
    calibration: list[str]

    @property
    def files(self) -> dict[str, int]:
        """How many texts each part has."""
        return {name: len(getattr(self, name)) for name in ("train", "heldout", "calibration")}


def default_roots() -> list[Path]:
    """Where documentation is: the standard library (or what holds it), installed packages, Debian's documents."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"]), Path("/usr/share/doc")]
    found = sorted({root.resolve() for root in roots if root.is_dir()})
    # A root inside another one is walked with it.
    return [root for root in found if not any(root != other and root.is_relative_to(other) for other in found)]


def load(characters: int, roots: Iterable[Path] | None = None) -> Corpus:
    """Texts of `characters` in all (fewer where the machine has fewer): 92 % train, 6 % held out, 2 % calibration.

    Of the latter two without the paragraphs that training has, of held-out texts without those of calibration. Raises
    ValueError where a part stays empty.
    """
    parts: dict[str, list[str]] = {"train": [], "heldout": [], "calibration": []}
    seen: set[bytes] = set()
    total = 0
    with tqdm(total=characters, desc="reading documentation", unit="B", unit_scale=True, mininterval=1) as bar:
        for digest, path in _ordered(default_roots() if roots is None else roots):
            text = read(path)[:LONGEST]
            content = hashlib.sha256(text.encode()).digest()
            if len(text) < SHORTEST or content in seen or not _is_prose(text):
                continue
            seen.add(content)
            share = int.from_bytes(digest[-2:], "big") % 50
            parts["calibration" if share == 0 else "heldout" if share < 4 else "train"].append(text)
            total += len(text)
            bar.update(len(text))
            if total >= characters:
                break
    known = _paragraphs(parts["train"])
    parts["calibration"] = _without(known, parts["calibration"])
    parts["heldout"] = _without(known | _paragraphs(parts["calibration"]), parts["heldout"])
    for name, texts in parts.items():
        if not texts:
            raise ValueError(f"corpus: expected text for {name}, got none in {total} characters of documentation")
    return Corpus(**parts)


def _paragraphs(texts: Iterable[str]) -> set[str]:
    return {key for text in texts for paragraph in _BREAK.split(text) if (key := _key(paragraph))}


def _key(paragraph: str) -> str:
    """What is the same of a paragraph however it is wrapped and indented; "" of one that is too short to matter."""
    words = " ".join(paragraph.split())
    return words if len(words) >= SHORTEST_PARAGRAPH else ""


def _without(known: set[str], texts: Iterable[str]) -> list[str]:
    """The texts without the paragraphs in `known`; those that become too short are left out."""
    kept = ("\n\n".join(p for p in _BREAK.split(text) if _key(p) not in known) for text in texts)
    return [text for text in kept if len(text) >= SHORTEST]


def read(path: Path) -> str:
    """A file's prose: of Python its docstrings, of others all. "" where it cannot be read."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile):
        return ""
    if path.suffix != ".py":
        return text
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text)


def _ordered(roots: Iterable[Path]) -> Iterator[tuple[bytes, Path]]:
    found = []
    for root in roots:
        for path in root.rglob("*"):
            below = path.relative_to(root)
            if _wanted(below) and path.is_file():
                found.append((hashlib.sha256(below.as_posix().encode()).digest(), path))
    yield from sorted(found)


def _wanted(path: Path) -> bool:
    """Of a path below its root: what a folder above it is called says nothing."""
    name = path.name.lower()
    if name.startswith(_NO_PROSE) or path.parent.name.endswith((".dist-info", ".egg-info")):
        return False
    if {"test", "tests", "testdata"} & set(path.parts):
        return False
    stem = name.removesuffix(".gz")
    return stem.endswith((".py", ".rst", ".txt")) or stem.startswith(("readme", "news", "faq", "todo"))


def _is_prose(text: str) -> bool:
    """Mostly English letters and spaces: no tables of numbers, no dumps, no other scripts."""
    plain = sum(character.isascii() and (character.isalpha() or character in " \n") for character in text)
    return plain >= 0.8 * len(text)
