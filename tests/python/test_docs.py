"""The documentation names everything that is public. `dev.py docs` builds it and checks the pages themselves."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from octavo import cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_are_those_that_python_sees(hooks: ModuleType) -> None:
    found = hooks.public_names()
    assert {"octavo", "octavo.torch", "octavo.transformers", "octavo.checkpoint", "octavo.distributed"} <= set(found)
    for module, names in found.items():
        imported = importlib.import_module(module)
        assert set(names) == {name for name in imported.__all__ if not name.startswith("__")}
        assert all(hasattr(imported, name) for name in names)


def test_every_public_module_has_its_page(hooks: ModuleType) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for module in hooks.public_names():
        page = f"reference/{module.removeprefix('octavo.')}.md"
        assert re.search(
            rf"^::: {re.escape(module)}$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert f"{module}: {page}" in navigation


def test_every_command_and_option_is_listed(hooks: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    listed = hooks.on_page_markdown(hooks.COMMANDS, page_at("command-line.md"))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert commands is not None
    for command in commands[1].split(","):
        section = re.search(rf"^## octavo {command}$(.*?)(?=^## |\Z)", listed, re.MULTILINE | re.DOTALL)
        assert section is not None, command
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        for option in re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE):
            assert f"`{option}" in section[1], (command, option)
    assert hooks.COMMANDS in (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def page_at(path: str) -> object:
    """What the hooks need of a page of MkDocs."""

    class File:
        src_uri = path

    class Page:
        file = File

    return Page


def test_plots_are_found_where_the_site_has_them(hooks: ModuleType) -> None:
    for path, shown in (("index.md", "results/demo/a.png"), ("guide/x.md", "../results/demo/a.png")):
        depth = "../" * (path.count("/") + 1)
        assert hooks.on_page_markdown(f"![a]({depth}bench/results/demo/a.png)", page_at(path)) == f"![a]({shown})"


def test_faults_of_a_site_are_seen(hooks: ModuleType, tmp_path: Path) -> None:
    anchors = [f"{module}.{name}" for module, names in hooks.public_names().items() for name in names]
    page = tmp_path / "reference" / "all.html"
    page.parent.mkdir()
    whole = "".join(f'<h2 id="{anchor}"></h2>' for anchor in anchors)
    page.write_text(whole + '<a href="https://arxiv.org/abs/2208.07339"></a><img src="a.png"><img src="data:,">')
    assert list(hooks.faults(tmp_path)) == []
    page.write_text(whole.replace('id="octavo.linear"', ""))
    assert list(hooks.faults(tmp_path)) == ["the reference lacks octavo.linear"]
    for fetched in ('<script src="https://host/a.js">', '<link href="//host/a.css">', '<img src="http://host/a.png">'):
        page.write_text(whole + fetched)
        assert len(list(hooks.faults(tmp_path))) == 1, fetched
    page.write_text(whole + "<blockquote>")
    assert len(list(hooks.faults(tmp_path))) == 1
    page.write_text(whole)
    (tmp_path / "a.css").write_text("@import 'https://host/font.css'; a { background: url(data:,) }")
    assert len(list(hooks.faults(tmp_path))) == 1


def test_the_guide_has_the_figures_of_the_load_test() -> None:
    """Those of bench/results/serve, which another run replaces."""
    page = (ROOT / "docs" / "guide" / "serving.md").read_text(encoding="utf-8")
    report = json.loads((RESULTS / "serve" / "serve.json").read_text(encoding="utf-8"))
    kinds, latency, memory = report["requests"], report["latency_ms"], report["memory_mib"]["private"]
    whole, first = latency["whole"], latency["first token of a stream"]
    for figure in (
        f"{sum(kinds.values())} in {report['seconds']:.0f} s: {kinds['whole']} whole, {kinds['stream']} streams, "
        f"{kinds['hang up']} that hang up, {kinds['wrong']} wrong",
        f"none; {report['tokens_compared']:,} tokens compared",
        f"median {whole['p50']:.0f} ms, 99 % within {whole['p99']:.0f} ms",
        f"median {first['p50']:.0f} ms, 99 % within {first['p99']:.0f} ms",
        f"{memory['first']:.1f} to {memory['last']:.1f} MiB: {memory['mib_per_1000_requests']:.2f} MiB for 1000",
        report["machine"]["cpu"],
        report["machine"]["date"][:10],
    ):
        assert figure in page, figure
    assert report["faults"] == []


def _demo_rows() -> list[str]:
    """The table of docs/guide/schemes.md from bench/results/demo."""
    report = json.loads((RESULTS / "demo" / "report.json").read_text(encoding="utf-8"))
    natural = {row["name"]: row["quality"] for row in report["natural"]}
    size = next(each for each in report["systematic"] if each["size"]["magnitude"] == 58)
    rescaled = {row["name"]: row["quality"] for row in size["rows"]}
    return [
        " | ".join(f"{own[key]:.4f}" for own in (quality, rescaled[name]) for key in ("mean_cosine", "min_cosine"))
        for name, quality in natural.items()
        if name != "float32"
    ]


def _evidence_rows() -> list[str]:
    """The table of losses there, from bench/results/evidence."""
    rows: dict[str, list[str]] = {}
    for model in ("model", "outliers-40", "outliers-58", "outliers-two-sided"):
        report = json.loads((RESULTS / "evidence" / model / "eval.json").read_text(encoding="utf-8"))
        for row in report["results"]:
            rows.setdefault(row["key"], []).append(f"{0 - row['difference']:.4f}")
    report = json.loads((RESULTS / "evidence" / "minilm" / "eval.json").read_text(encoding="utf-8"))
    for row in report["similarities"]:
        rows[row["key"]].append(f"{1 - row['mean_cosine']:.5f}")
    shown = ("absmax", "absmax-row", "absmax-vector", "zeropoint-vector", "llm-int8", "llm-int8-zeropoint",
             "kept-columns", "kept-zeropoint", "smoothquant", "bitsandbytes", "torchao")  # fmt: skip
    return [" | ".join(rows[key]) for key in shown]


def test_the_guide_has_the_figures_of_the_schemes() -> None:
    """Each row as it stands in the results, in their order."""
    page = (ROOT / "docs" / "guide" / "schemes.md").read_text(encoding="utf-8")
    for rows in (_demo_rows(), _evidence_rows()):
        places = [page.find(f" | {row} |") for row in rows]
        assert -1 not in places, [row for row, place in zip(rows, places, strict=True) if place < 0]
        assert places == sorted(places)
    training = json.loads((RESULTS / "evidence" / "training.json").read_text(encoding="utf-8"))
    perplexities = list(training["perplexity"].values())
    assert f"perplexity\n{perplexities[0]:.1f}" in page or f"perplexity {perplexities[0]:.1f}" in page
    assert perplexities[0] < 35
    assert max(perplexities) / min(perplexities) - 1 < 1e-6
