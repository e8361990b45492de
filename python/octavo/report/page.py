"""The page: everything that was collected as HTML, every text escaped."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import PurePosixPath

import octavo
from octavo.measuring.output import Table

from .collect import Collection, Run, Skipped
from .pictures import CAPTIONS, Picture
from .readers import NOT_RECORDED

_LONG = 18  # characters from which a cell may take several lines
_TALL = 24  # rows from which a table scrolls in its box
# 12, -0.5, 1.2e-05, 3.94x, 89.5 %, >= 1.95x, 2 (6.3)
_NUMBER = re.compile(r"([<>]=? ?)?[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?( ?(x|%|ms|ns|us|s))?( \([^()]*\))?")
_VERDICTS = {"pass": "pass", "MISS": "miss", "not measured": "none"}
# Nothing from anywhere, no script: what the page shows is in the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(found: Collection) -> str:
    """The whole page."""
    titles = _titles(found.runs)
    sections = [_run(f"result-{n}", title, run) for n, (title, run) in enumerate(zip(titles, found.runs, strict=True))]
    if found.stray:
        sections.append(_section("other-pictures", "Other pictures", "".join(map(_picture, _ordered(found.stray)))))
    if found.skipped:
        sections.append(_section("left-out", "Left out", _skipped(found.skipped)))
    style = (files(__package__) / "style.css").read_text(encoding="utf-8")
    counts = f"{len(found.runs)} result{'' if len(found.runs) == 1 else 's'}, {len(found.pictures)} pictures"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="octavo {escape(octavo.__version__)}">
<title>{escape(found.name)} - octavo report</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">To the results</a>
<header>
<p class="brand">octavo report</p>
<h1>What was measured</h1>
<p class="lead">{counts} in <code>{escape(found.name)}</code>{_dates(found.runs)}</p>
</header>
<div class="layout">
{_contents(titles, found)}
<main id="content">
{"".join(sections)}</main>
</div>
<footer>Written by <code>octavo report</code> {escape(octavo.__version__)}.</footer>
</body>
</html>
"""


def _titles(runs: Sequence[Run]) -> list[str]:
    """The titles, told apart by their folders where several are the same."""
    counts = Counter(run.result.title for run in runs)
    return [
        run.result.title if counts[run.result.title] == 1 else f"{run.result.title} ({_place(run.path)})"
        for run in runs
    ]


def _place(path: PurePosixPath) -> str:
    return path.parent.as_posix() if path.parent.name else path.stem


def _dates(runs: Iterable[Run]) -> str:
    days = sorted({value[:10] for run in runs for name, value in run.result.facts if name == "Date"} - {NOT_RECORDED})
    days = [day for day in days if re.fullmatch(r"\d{4}-\d{2}-\d{2}", day)]
    if not days:
        return ""
    return f", measured {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else "")


def _contents(titles: Sequence[str], found: Collection) -> str:
    items = [
        _entry(f"result-{n}", title, run.path.as_posix())
        for n, (title, run) in enumerate(zip(titles, found.runs, strict=True))
    ]
    if found.stray:
        items.append(_entry("other-pictures", "Other pictures", f"{len(found.stray)}"))
    if found.skipped:
        items.append(_entry("left-out", "Left out", f"{len(found.skipped)}"))
    return f'<nav aria-label="Contents">\n<h2>Contents</h2>\n<ol>\n{"".join(items)}</ol>\n</nav>'


def _entry(anchor: str, title: str, small: str) -> str:
    return f'<li><a href="#{anchor}">{escape(title)}</a><small>{escape(small).replace("/", "/<wbr>")}</small></li>\n'


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n{_heading(2, anchor, title)}{body}</section>\n'


def _heading(level: int, anchor: str, title: str) -> str:
    link = f'<a class="anchor" href="#{anchor}" aria-label="Link to: {escape(title)}">#</a>'
    return f'<h{level} id="{anchor}-title">{escape(title)} {link}</h{level}>\n'


def _run(anchor: str, title: str, run: Run) -> str:
    parts = [f'<p class="path"><code>{escape(run.path.as_posix())}</code></p>\n', _facts(run.result.facts)]
    if run.result.details:
        parts.append(f"<details><summary>Versions and settings</summary>\n{_facts(run.result.details)}</details>\n")
    if run.result.sentences:
        lines = "".join(f"<li>{escape(line)}</li>\n" for line in run.result.sentences)
        parts.append(f'<ul class="sentences">\n{lines}</ul>\n')
    parts += [_picture(picture) for picture in _ordered(run.pictures)]
    parts += [_table(f"{anchor}-{number}", table) for number, table in enumerate(run.tables)]
    return _section(anchor, title, "".join(parts))


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    def value(name: str, text: str) -> str:
        if text == NOT_RECORDED:
            return f'<dd class="none">{text}</dd>'
        if name == "Commit":  # abbreviated as git does; "-dirty" stays
            text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", text)
        return f"<dd><code>{escape(text)}</code></dd>" if name in {"Command", "Commit"} else f"<dd>{escape(text)}</dd>"

    rows = "".join(f"<div><dt>{escape(name)}</dt>{value(name, text)}</div>\n" for name, text in facts)
    return f'<dl class="facts">\n{rows}</dl>\n'


def _ordered(pictures: Sequence[tuple[PurePosixPath, Picture]]) -> list[tuple[PurePosixPath, Picture]]:
    """In the order of the story where it is known, else by path."""
    order = {name: number for number, name in enumerate(CAPTIONS)}
    return sorted(pictures, key=lambda each: (each[0].parent, order.get(each[0].stem, len(order)), each[0]))


def _picture(named: tuple[PurePosixPath, Picture]) -> str:
    path, picture = named
    size = ""
    if picture.size:
        # Plots have 130 pixels to the inch: blown up, the letters of a narrow one would be larger than the page's.
        widest = math.ceil(0.8 * picture.size[0])
        size = f' width="{picture.size[0]}" height="{picture.size[1]}" style="--widest: {widest}px"'
    light = " on-light" if picture.on_light else ""
    return f"""<figure class="picture{light}">
<div class="scroll" tabindex="0" role="group" aria-label="{escape(picture.caption)}">
<img src="{picture.uri}"{size} alt="{escape(picture.caption)}" decoding="sync">
</div>
<figcaption>{escape(picture.caption)} <code>{escape(path.as_posix())}</code></figcaption>
</figure>
"""


def _table(anchor: str, table: Table) -> str:
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.columns)
    kinds = [_alignment(cells) for cells in columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' if name else f"<td{kind}></td>"
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "".join(_row(row, kinds) for row in table.rows)
    note = f"<figcaption>{escape(table.note)}</figcaption>\n" if table.note else ""
    tall = " tall" if len(table.rows) >= _TALL else ""
    return f"""<figure class="table" id="{anchor}">
{_heading(3, anchor, table.title)}<div class="scroll{tall}" tabindex="0" role="region" aria-labelledby="{anchor}-title">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table>
</div>
{note}</figure>
"""


def _alignment(cells: Sequence[str]) -> str:
    """Numbers end at the right, below each other; everything else begins at the left, long texts in several lines."""
    filled = [cell for cell in cells if cell not in {"", "-"}]
    if filled and all(_NUMBER.fullmatch(cell) for cell in filled):
        return ' class="number"'
    return ' class="text"' if max(map(len, cells), default=0) > _LONG else ""


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    first = f'<th scope="row"{kinds[0]}>{escape(row[0])}</th>'
    return f"<tr>{first}{''.join(map(_cell, row[1:], kinds[1:]))}</tr>\n"


def _cell(text: str, kind: str) -> str:
    if text in _VERDICTS:
        return f'<td><span class="verdict {_VERDICTS[text]}">{text}</span></td>'
    return f"<td{kind}>{escape(text)}</td>"


def _skipped(skipped: Sequence[Skipped]) -> str:
    lines = "".join(
        f"<li><code>{escape(each.path.as_posix())}</code>: {escape(each.reason)}</li>\n" for each in skipped
    )
    return f'<ul class="skipped">\n{lines}</ul>\n'
