"""Real text that is on the machine already: documentation of Python, of its packages, and of the system.

Docstrings of Python files, .rst and .txt files, and what Debian keeps in /usr/share/doc, compressed or not. Everything
is ordered by the SHA-256 of paths or of texts, so that the same machine gives the same text; another one, where other
versions are installed, another. `corpus` gives texts to train with, `sentences` single sentences of the standard
library.
"""

import ast
import gzip
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..tables import write_text

VERSION = 4  # another one where the same files give another corpus
SHORTEST = 400  # characters of a text
LONGEST = 100_000  # of each text: one that is longer is cut, so that no file makes up the corpus alone
SHORTEST_PARAGRAPH = 40  # characters of one that is looked for in other parts: headings and signatures may be anywhere
MIN_WORDS, MAX_WORDS = 8, 40  # of a sentence
_BREAK = re.compile(r"\n\s*\n")  # between paragraphs
# Not prose, or the same in every package.
_NO_PROSE = ("license", "licence", "copying", "copyright", "notice", "changelog", "record", "sources", "top_level",
             "requirements", "entry_points", "cmakelists", "authors", "installed-files")  # fmt: skip
# One sentence: a capital, then words, numbers and everyday punctuation, then a full stop. Code, markup and tables do
# not match.
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/-]*[a-z)]\.")
# A full stop, a space and a capital end a sentence, except after the usual abbreviations.
_BOUNDARY = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<=\.)\s+(?=[A-Z])")


def roots() -> set[Path]:
    """Where documentation is: the standard library and installed packages, or what holds both; the system's."""
    places = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc")
    found = {Path(place).resolve() for place in places if Path(place).is_dir()}
    return {root for root in found if not any(root != other and root.is_relative_to(other) for other in found)}


def corpus(characters: int) -> dict[str, list[str]]:
    """Texts of `characters` in all (fewer where the machine has fewer): 92 % "train", 6 % "heldout", 2 % "calibration".

    Files are read until there is enough; the hash that orders them says of each which part it is for. A text that was
    seen before is left out, and so is a paragraph of the calibration or held-out texts that training has, too: packages
    copy each other's docstrings, and a model that has learned one by heart says nothing of new text. Raises ValueError
    where a part stays empty.
    """
    parts: dict[str, list[str]] = {"train": [], "heldout": [], "calibration": []}
    seen: set[bytes] = set()
    total = 0
    for digest, path in _ordered(roots()):
        text = read(path)[:LONGEST]
        content = hashlib.sha256(text.encode()).digest()
        if len(text) < SHORTEST or content in seen or not _is_prose(text):
            continue
        seen.add(content)
        share = int.from_bytes(digest[-2:], "big") % 50
        parts["calibration" if share == 0 else "heldout" if share < 4 else "train"].append(text)
        total += len(text)
        if total >= characters:
            break
    known = _paragraphs(parts["train"])
    parts["calibration"] = _without(known, parts["calibration"])
    parts["heldout"] = _without(known | _paragraphs(parts["calibration"]), parts["heldout"])
    for name, texts in parts.items():
        if not texts:
            raise ValueError(f"corpus: expected text for {name}, got none in {total} characters of documentation")
    return parts


def sentences(count: int, calibration: int = 0) -> tuple[list[str], list[str]]:
    """`count` sentences of the standard library's own documentation, and `calibration` others.

    Raises RuntimeError where this Python does not carry enough of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = (read(path) for path in sorted(library.glob("*.py")))
    distinct = {each for text in texts for paragraph in _BREAK.split(text) for each in split_sentences(paragraph)}
    found = sorted(distinct, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())
    if len(found) < count + calibration:
        wanted = f"expected {count + calibration} sentences of documentation in {library}, got {len(found)}"
        raise RuntimeError(f"{wanted}; use a Python that is installed with its source files")
    return found[calibration : calibration + count], found[:calibration]


def write_sentences(folder: Path, count: int, calibration: int) -> list[str]:
    """`sentences` as sentences.txt and calibration.txt, one a line; returns the former."""
    parts = sentences(count, calibration)
    for name, part in zip(("sentences", "calibration"), parts, strict=True):
        write_text(folder / f"{name}.txt", "\n".join(part) + "\n")
    return parts[0]


def split_sentences(paragraph: str) -> Iterator[str]:
    """The sentences of one paragraph (line breaks are spaces) that are plain prose of 8 to 40 words."""
    if len({len(line) - len(line.lstrip()) for line in paragraph.strip("\n").splitlines()}) > 1:
        return  # lines that differ in indentation are of lists or code
    for part in _BOUNDARY.split(" ".join(paragraph.split())):
        words = part.split(" ")
        if not MIN_WORDS <= len(words) <= MAX_WORDS or not _PROSE.fullmatch(part) or "--" in part:
            continue
        # Prose is made of lower-case words; lists of names, signatures and headings are not.
        if sum(word.strip(",;:'()").islower() for word in words) >= 0.75 * len(words):
            yield part


def read(path: Path) -> str:
    """A file's prose: of Python its docstrings, of others all. "" where it cannot be read."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if path.suffix != ".py":
            return text
        tree = ast.parse(text)
    except (OSError, EOFError, SyntaxError, ValueError, RecursionError):
        return ""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text)


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


def _ordered(folders: Iterable[Path]) -> list[tuple[bytes, Path]]:
    every = ((path.relative_to(root), path) for root in folders for path in root.rglob("*"))
    wanted = ((below, path) for below, path in every if _wanted(below) and path.is_file())
    return sorted((hashlib.sha256(below.as_posix().encode()).digest(), path) for below, path in wanted)


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
