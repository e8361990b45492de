"""octavo report: what it finds, what it says, and how the page behaves in a browser."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

import browser
import numpy as np
import pytest
from octavo import cli, report
from octavo.report import page as pages
from octavo.report.collect import collect
from octavo.report.pictures import read_picture
from octavo.report.readers import read

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def png(width: int = 4, height: int = 3, color: tuple[int, ...] = (255, 255, 255)) -> bytes:
    """A PNG of one color."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    kinds = {1: 0, 3: 2, 4: 6}
    header = struct.pack(">IIBBBBB", width, height, 8, kinds[len(color)], 0, 0, 0)
    rows = (b"\0" + bytes(color) * width) * height
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"><rect width="4" height="3" fill="red"/></svg>'


def result(**changes: Any) -> dict[str, Any]:
    """A result as the commands write it."""
    table = {
        "title": "Perplexity",
        "columns": ["scheme", "loss"],
        "rows": [["absmax", "1.5"]],
        "note": "Less is better.",
    }
    machine = {
        "cpu": "A processor",
        "cores": 2,
        "threads": 1,
        "date": "2026-11-21T04:42:42+00:00",
        "command": "octavo eval m",
    }
    return {"format": 1, "machine": machine, "settings": {"seed": 7, "window": 512}, "tables": [table], **changes}


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


class Text(HTMLParser):
    """The tables of a page as rows of cells, its anchors and its links."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.anchors += [named["id"]] if named.get("id") else []
        self.links += [named["href"]] if tag == "a" and named.get("href") else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self._cell = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


# --- what is found ----------------------------------------------------------------------------------------------------


def test_tables_facts_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "run" / "eval.json", result(conclusions=["It is 1.5."]))
    put(tmp_path / "run" / "plots" / "perplexity.png", png())
    put(tmp_path / "run" / "plots" / "table.png", png())
    assert cli.main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "report.html: 1 tables and 1 pictures of 1 results" in printed
    assert "run/plots/table.png: a drawing of tables that are here as tables" in printed

    html = (tmp_path / "report.html").read_text()
    assert Text(html).tables == [[["scheme", "loss"], ["absmax", "1.5"]]]
    for said in ("Perplexity", "Less is better.", "It is 1.5.", "octavo eval m", "A processor, 1 thread, 2 cores"):
        assert said in html
    facts = dict(re.findall(r"<dt>(\w+)</dt><dd[^>]*>(?:<code>)?([^<]*)", html))
    assert facts["Date"] == "2026-11-21 04:42 UTC"
    assert facts["Seed"] == "7"
    assert facts["Commit"] == "not recorded"
    assert html.count("data:image/png;base64,") == 1
    assert 'width="4" height="3"' in html
    assert "Log-likelihood that each scheme loses" in html


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    put(tmp_path / "eval.json", result())
    first = report.write(tmp_path).read_bytes()
    assert report.write(str(tmp_path), tmp_path / "new" / "page.html").read_bytes() == first
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["page.html"]


def test_of_png_and_svg_the_svg_is_taken(tmp_path: Path) -> None:
    put(tmp_path / "eval.json", result())
    put(tmp_path / "quality.svg", SVG)
    put(tmp_path / "quality.png", png())
    found = collect(tmp_path)
    assert [path.name for path, _ in found.pictures] == ["quality.svg"]
    assert "data:image/svg+xml;base64," in pages.page(found)


def test_a_picture_goes_with_the_nearest_result(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "deep/c.json"):
        put(tmp_path / name, result())
    for name in ("b-plots/one.png", "a_two.png", "deep/er/three.png", "four.png"):
        put(tmp_path / name, png())
    runs = {run.path.as_posix(): [path.as_posix() for path, _ in run.pictures] for run in collect(tmp_path).runs}
    assert runs == {
        "a.json": ["a_two.png", "four.png"],
        "b.json": ["b-plots/one.png"],
        "deep/c.json": ["deep/er/three.png"],
    }


def test_a_result_can_name_its_pictures(tmp_path: Path) -> None:
    put(tmp_path / "analyze.json", result(plots=["emergence.png"], seed=None))
    put(tmp_path / "eval.json", result(plots=["perplexity.png"], seed={"training": 0, "task": 3}))
    for name in ("perplexity.png", "analyze/emergence.png"):
        put(tmp_path / name, png())
    runs = {run.path.name: run for run in collect(tmp_path).runs}
    assert {name: [path.name for path, _ in run.pictures] for name, run in runs.items()} == {
        "analyze.json": ["emergence.png"],
        "eval.json": ["perplexity.png"],
    }
    assert dict(runs["analyze.json"].result.facts)["Seed"] == "nothing is drawn"
    assert dict(runs["eval.json"].result.facts)["Seed"] == "training: 0, task: 3"


def test_pictures_without_a_result(tmp_path: Path) -> None:
    put(tmp_path / "loss.png", png())
    assert "Other pictures" in report.write(tmp_path).read_text()


def test_all_results_of_the_repository_are_read() -> None:
    found = collect(RESULTS)
    assert {run.path.as_posix() for run in found.runs} == {
        path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json")
    }
    assert [each for each in found.skipped if "as tables" not in each.reason] == []
    by_path = {run.path.as_posix(): run.tables for run in found.runs}
    demo = json.loads((RESULTS / "demo" / "report.json").read_text())
    assert [table.rows for table in by_path["demo/report.json"]] == [table["rows"] for table in demo["tables"]]

    summary, cases = by_path["linear/linear.json"]
    raw = json.loads((RESULTS / "linear" / "linear.json").read_text())["cases"]
    assert len(cases.rows) == len(raw)
    times = raw[1]["times"]
    ratio = times["torch bfloat16"]["median"] / times["octavo int8"]["median"]
    assert cases.rows[1][cases.columns.index("torch bfloat16")] == f"{ratio:.2f}x"
    own = min(case["times"]["torch bfloat16"]["median"] / case["times"]["octavo int8"]["median"] for case in raw)
    assert summary.rows[0][:3] == ["torch bfloat16", str(len(raw)), f"{own:.2f}x"]

    (targets,) = by_path["targets/targets.json"]
    verdicts = [row[5] for row in targets.rows]
    assert targets.title == f"{verdicts.count('pass')} of {len(verdicts)} targets met"


def test_readers_of_the_other_kinds() -> None:
    training = {"perplexity": {"model": 12.5}, "parameters": 1000, "heldout_windows": 3}
    assert read(training, PurePosixPath("training.json")).tables[0].rows == [["model", "12.500000"]]
    spread = {"first": 1.0, "last": 2.0, "highest": 3.0, "mib_per_1000_requests": 0.25}
    load = {
        "requests": {"whole": 5},
        "latency_ms": {"whole": {"p50": 10.4, "p99": 20.6}},
        "memory_mib": {"resident": spread},
        "limit_mib_per_1000_requests": 1.0,
        "clients": 2, "batch": 8, "seconds": 3.2, "requests_per_second": 1.5, "tokens_per_second": 9.0, "model": "m",
    }  # fmt: skip
    times, memory = read(load, PurePosixPath("serve.json")).tables
    assert times.rows == [["whole", "10", "21"]]
    assert memory.rows == [["resident", "1.00", "2.00", "3.00", "0.25"]]
    gpu = {
        "machine": {"gpu": "A GPU"},
        "ceilings": {},
        "cases": [
            {"k": 8, "n": 16, "m": 1, "outliers": 6, "times": {"octavo": [1, 2, 3], "torch float16": [4, 5, 6]}},
            {"k": 8, "n": 16, "m": 8, "outliers": 6, "scheme": "zeropoint", "times": {}, "left_out": {"all": "late"}},
        ],
    }
    found = read(gpu, PurePosixPath("gpu.json"))
    assert dict(found.facts)["Machine"] == "A GPU"
    assert found.tables[0].rows == [
        ["torch float16", "1", "2.50x", "2.50x", "2.50x", "8 x 16, 1 row, 6 outlier columns"]
    ]
    assert found.tables[1].rows == [["8 x 16", "1", "6", "2.000", "2.50x"], ["8 x 16, zeropoint", "8", "6", "-", "-"]]
    assert "Left out: all: late." in found.tables[1].note
    google = {
        "context": {"executable": "build/bench_gemm", "date": "2026-11-21T11:23:12+00:00"},
        "benchmarks": [{"name": "int8/k:1", "real_time": 1234.5, "time_unit": "us", "iterations": 3, "GOPS": 2.5}],
    }
    found = read(google, PurePosixPath("gemm.json"))
    assert found.title == "bench_gemm"
    assert found.tables[0].columns == ["benchmark", "time", "GOPS"]
    assert found.tables[0].rows == [["int8/k:1", "1234 us", "2.5"]]


# --- what cannot be used ----------------------------------------------------------------------------------------------

TABLE = {"title": "t", "columns": ["a", "b"], "rows": [["1", "2"]]}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", {"model_type": "opt"}, "no tables"),
        ("list.json", [1, 2], "expected a JSON object, got list"),
        ("half.json", b'{"tables": [', "not JSON"),
        ("bytes.json", b"\xff\xfe", "not UTF-8"),
        ("deep.json", b'{"tables":' + b"[" * 200_000, "nested too deeply"),
        ("short.json", {"tables": [TABLE | {"rows": [["1"]]}]}, "tables[0]: expected rows of 2 cells"),
        ("title.json", {"tables": [TABLE, {"rows": []}]}, "tables[1]: expected an object with a title"),
        ("columns.json", {"tables": [TABLE | {"columns": "ab"}]}, "tables[0]: expected names of columns"),
        ("linear.json", {"machine": {}, "cases": [{"times": {"x": 1}}]}, "not as bench/linear.py writes it"),
        ("targets.json", {"machine": {}, "lines": [{"shape": "1"}]}, "targets.json"),
        ("cut.png", png()[:-20], "not a whole PNG"),
        ("flipped.png", png()[:45] + b"!" + png()[46:], "damaged"),
        ("text.png", b"hello", "not a PNG"),
        ("text.svg", b"hello", "not an SVG"),
        ("page.svg", b"<html/>", "its root is another element"),
        ("bomb.svg", b'<!DOCTYPE svg [<!ENTITY a "aa">]><svg/>', "entities"),
    ],
)
def test_what_cannot_be_used_is_listed(tmp_path: Path, name: str, content: Any, reason: str) -> None:
    put(tmp_path / "good.json", result())
    put(tmp_path / name, content)
    found = collect(tmp_path)
    assert [run.path.name for run in found.runs] == ["good.json"]
    assert [each.path.name for each in found.skipped] == [name]
    html = pages.page(found)
    assert "Left out" in html
    assert name in html
    if reason != name:
        assert reason in found.skipped[0].reason


@pytest.mark.parametrize(
    ("number", "cell"), [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf"), ("1e999", "inf"), ("null", "-")]
)
def test_odd_numbers_are_shown(tmp_path: Path, number: str, cell: str) -> None:
    text = f'{{"tables": [{{"title": "t", "columns": ["a"], "rows": [[{number}]]}}], "seconds": {number}}}'
    put(tmp_path / "odd.json", text.encode())
    assert Text(report.write(tmp_path).read_text()).tables[0][1] == [cell]


def test_a_folder_without_results_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "config.json", {"model_type": "opt"})
    put(tmp_path / ".hidden" / "eval.json", result())
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "octavo report: directory: expected JSON of octavo's commands" in error
    assert "config.json: no result" in error
    assert not (tmp_path / "report.html").exists()
    assert cli.main(["report", str(tmp_path / "gone")]) == 1
    assert "expected a folder with results, got" in capsys.readouterr().err


def test_a_failed_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "eval.json", result())
    old = report.write(tmp_path).read_bytes()
    monkeypatch.setattr(pages, "page", lambda found: "\ud800")  # cannot be encoded: fails while it is written
    with pytest.raises(UnicodeEncodeError):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "report.html"]


def test_everything_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>\"&<img src=y>"
    table = {"title": bad, "columns": [bad], "rows": [[bad]], "note": bad}
    machine = dict.fromkeys(("cpu", "command", "date", "commit", "instruction_set", "python", "octavo"), bad)
    content = result(tables=[table], machine=machine, settings={bad: bad, "seed": bad}, title=bad, conclusions=[bad])
    name = "<b>&\"'x"
    put(tmp_path / name / "eval.json", content)
    put(tmp_path / name / f"{name}.png", png())
    put(tmp_path / name / "bad.json", b"<i>")
    html = report.write(tmp_path).read_text()
    parsed = Text(html)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert "i" not in parsed.tags
    assert parsed.tags.count("img") == 1
    assert parsed.tables[0] == [[bad], [bad]]


def test_every_link_leads_somewhere(tmp_path: Path) -> None:
    parsed = Text(report.write(RESULTS, tmp_path / "page.html").read_text())
    assert len(parsed.anchors) == len(set(parsed.anchors))
    assert len(parsed.links) > 10
    assert [link for link in parsed.links if link.removeprefix("#") not in parsed.anchors] == []


@pytest.mark.parametrize(("color", "light"), [((255, 255, 255), True), ((20, 20, 30), False), ((250,), True),
                                              ((0, 0, 0, 0), True), ((0, 0, 0, 255), False)])  # fmt: skip
def test_the_background_of_a_picture(color: tuple[int, ...], light: bool) -> None:
    assert read_picture(png(color=color), PurePosixPath("x.png")).on_light is light


# --- in a browser -----------------------------------------------------------------------------------------------------

# The lowest contrast (WCAG 2) of any text with what is behind it, and which text that is.
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const luminance = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let lowest = [99, ""];
  for (const element of document.body.querySelectorAll("*")) {
    if (![...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    const back = layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    const front = over(parse(getComputedStyle(element).color), back);
    const [a, b] = [luminance(front), luminance(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const name = element.tagName + "." + element.className + ": " + element.textContent.trim();
    if (ratio < lowest[0]) lowest = [ratio, name];
  }
  return lowest;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launched() as running:
        yield running


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the repository's results, and one of what is long, wide or missing."""
    folder = tmp_path_factory.mktemp("report")
    for path in RESULTS.rglob("*"):
        if path.is_file():
            put(folder / "results" / path.relative_to(RESULTS), path.read_bytes())
    long = "a_name_without_a_break_" * 20
    wide = {"title": long, "columns": [f"column {i}" for i in range(40)], "rows": [[long] * 40] * 40, "note": long}
    put(folder / "results" / "wide" / f"{long[:120]}.json", result(tables=[wide], conclusions=[long], title=long,
        machine={"cpu": long, "command": long}))  # fmt: skip
    put(folder / "results" / "wide" / "plot.svg", SVG)
    put(folder / "results" / "wide" / f"{long[:120]}-broken.json", b"{")
    return report.write(folder / "results", folder / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_page_in_chromium(chromium: Any, written: Path, width: int, scheme: str) -> None:
    shown = browser.Shown(chromium, written, width=width, scheme=scheme)
    page = shown.page
    widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths == [width, width], "the page scrolls sideways"
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    # Each plot once and the wide result's own; a picture of tables is left out, as the page has the tables.
    plots = [path for path in RESULTS.rglob("*.png") if path.stem not in {"table", "tables"}]
    assert len(images) == len(plots) + 1
    assert all(complete and wide > 0 and tall > 0 for complete, wide, tall in images), images
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, text[:200]
    # Every table can be reached: it fits, or its own box scrolls.
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')]"
        ".map(box => [box.scrollWidth > box.clientWidth, getComputedStyle(box).overflowX])"
    )
    assert len(boxes) > 10
    assert all(overflow == "auto" for wider, overflow in boxes if wider)
    assert any(wider for wider, _ in boxes)
    assert shown.complaints == []
    assert shown.requests == []
    shown.close()


def test_light_and_dark(chromium: Any, written: Path) -> None:
    """The page, and the plots, which are drawn on white, follow the reader's choice; paper is white in any case."""
    from PIL import Image

    pixels = {}
    for scheme in ("light", "dark"):
        shown = browser.Shown(chromium, written, width=1200, scheme=scheme)
        plot = shown.page.locator("figure.picture.on-light img").first
        for name, taken in (("page", shown.page.screenshot()), ("plot", plot.screenshot())):
            pixels[scheme, name] = np.asarray(Image.open(io.BytesIO(taken)).convert("L"), dtype=float)
        if scheme == "dark":
            shown.page.emulate_media(media="print")
            printed = shown.page.evaluate("getComputedStyle(document.body).color")
            assert max(map(int, re.findall(r"\d+", printed)[:3])) < 80, "light text on white paper"
        shown.close()
    for name in ("page", "plot"):
        light, dark = pixels["light", name], pixels["dark", name]
        assert np.median(light) > 240
        assert np.median(dark) < 45
        assert light.std() > 5, "blank"
        assert light.min() < 90, "nothing dark on light"
        assert dark.std() > 5, "blank"
        assert dark.max() > 190, "nothing light on dark"
    # White paper becomes the page itself, not black or gray beside it.
    corner = pixels["dark", "plot"][:8, :8]
    assert np.ptp(corner) < 4
    assert 15 < corner.mean() < 45


def test_numbers_end_below_each_other(chromium: Any, written: Path) -> None:
    shown = browser.Shown(chromium, written, width=1200, scheme="light")
    ends = shown.page.evaluate(
        """() => {
          const rows = [...document.querySelector('figure.table table').rows].slice(1);
          return rows.map(row => { const range = document.createRange(); range.selectNodeContents(row.cells[1]);
                                   return Math.round(range.getBoundingClientRect().right); });
        }"""
    )
    assert len(ends) > 2
    assert max(ends) - min(ends) <= 1
    shown.close()


def test_contents_lead_to_their_sections(chromium: Any, written: Path) -> None:
    shown = browser.Shown(chromium, written, width=390, scheme="light")
    links = shown.page.locator("nav a")
    assert links.count() >= 6
    links.nth(3).click()
    target = links.nth(3).get_attribute("href")
    top = shown.page.evaluate(f"document.querySelector('{target}').getBoundingClientRect().top")
    assert 0 <= top < 200
    shown.close()
