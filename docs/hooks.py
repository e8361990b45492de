"""What the documentation is made of that is kept elsewhere, and what must hold of the result.

Pictures and tables come from bench/results, the options of the commands from their parsers, the reference (through
mkdocstrings) from docstrings. After the build every public name must be in the reference, and no page may fetch
anything from another host. MkDocs calls the functions whose names begin with `on_`.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from octavo_bench import tables  # noqa: E402

PACKAGE = ROOT / "python" / "octavo"
RESULTS = ROOT / "bench" / "results"
TABLE = re.compile(r"<!-- table of bench/results/(\S+): (.+?) -->")  # the first whose title begins so
COMMANDS = "<!-- every command and its options, from the parsers -->"


# --- what is public ---------------------------------------------------------------------------------------------------


def public_names() -> dict[str, list[str]]:
    """By public module its names: those of ``__all__``.

    Public are the modules of the package itself (not of its folders) that have one.
    """
    paths = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py")]
    found = {}
    for path in sorted(paths):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(getattr(each, "id", "") == "__all__" for each in node.targets):
                module = ".".join(part for part in parts if part != "__init__")
                found[module] = [str(name) for name in ast.literal_eval(node.value) if not name.startswith("__")]
    return found


# --- pages that are made ----------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of bench/results, a page for each of its reports, and a page that lists them."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.rglob("*.png")):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    lines = ["# What was measured", "", "Each page says on which machine, of which commit and by which command.", ""]
    for path in sorted(RESULTS.rglob("*.json")):
        report, name = tables.read(path), path.relative_to(RESULTS).with_suffix(".md").as_posix()
        pictures = "".join(f"\n![{report.title}]({each})\n" for each in report.pictures)
        files.append(File.generated(config, f"results/{name}", content=report.markdown() + pictures))
        lines.append(f"- [{report.title}]({name})")
    files.append(File.generated(config, "results/index.md", content="\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point at the pictures where they are in the site; put tables and commands where they are asked for."""
    folder = os.path.dirname(page.file.src_uri)
    markdown = re.sub(
        r"\]\((?:\.\./)+bench/results/([^)\s]+)\)",
        lambda match: f"]({os.path.relpath('results/' + match[1], folder or '.').replace(os.sep, '/')})",
        markdown,
    )
    markdown = TABLE.sub(lambda match: tables.read(RESULTS / match[1]).table(match[2]).markdown(), markdown)
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def _commands() -> str:
    """Every command of `octavo`: what it does, how it is called, its options."""
    from octavo.cli import make_parser

    (subparsers,) = (each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    summaries = {each.dest: each.help or "" for each in subparsers._choices_actions}
    with mock.patch.dict(os.environ, COLUMNS="82"):  # of usages, on every machine
        return "\n".join(_command(name, parser, summaries[name]) for name, parser in subparsers.choices.items())


def _command(name: str, parser: argparse.ArgumentParser, summary: str) -> str:
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    lines = [f"## octavo {name}", "", summary[:1].upper() + summary[1:] + ".", "", "```text", usage, "```", ""]
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = formatter._format_args(action, action.dest.upper() if action.option_strings else action.dest)
        shown = f"{', '.join(action.option_strings)} {value}".strip()
        text = formatter._expand_help(action) if action.help else ""
        rows.append(f"| {_code(shown)} | {_escaped(text)} |")
    if rows:
        lines += ["| argument | what it is |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """Text in a cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


# --- what must hold ---------------------------------------------------------------------------------------------------


# By tag the attribute with the address of what the browser gets without being asked.
_FETCHED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "use": "href",
    "video": "src",
}


class _Page(HTMLParser):
    """The anchors of a page, and what a browser would fetch to show it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag's anchor and address."""
        named = {name: value or "" for name, value in attrs}
        if "id" in named:
            self.anchors.add(named["id"])
        if _FETCHED.get(tag) in named:
            self.fetched.append(named[_FETCHED[tag]])


def on_post_build(config: Any) -> None:
    """Refuse a site that lacks a public name, or that would fetch something from elsewhere."""
    from mkdocs.exceptions import PluginError

    problems = list(faults(Path(config.site_dir)))
    if problems:
        raise PluginError("the site is not as it has to be:\n  " + "\n  ".join(problems))


def faults(site: Path) -> Iterator[str]:
    """What is wrong with the built site."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for address in page.fetched:
            if re.match(r"(?:[a-z]+:)?//", address):
                yield f"{path.relative_to(site)}: fetches {address}"
        if path.parent.name == "reference" and "<blockquote>" in path.read_text(encoding="utf-8"):
            yield f"{path.relative_to(site)}: shows an example as a quotation"
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", path.read_text("utf-8")):
            yield f"{path.relative_to(site)}: fetches {address}"
    anchors = {anchor for path, page in pages.items() if path.parent.name == "reference" for anchor in page.anchors}
    for module, names in public_names().items():
        yield from (f"the reference lacks {module}.{name}" for name in names if f"{module}.{name}" not in anchors)
