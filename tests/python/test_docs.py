"""The documentation names everything that is public. `dev.py docs` builds it and checks the pages themselves."""

from __future__ import annotations

import importlib
import importlib.util
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
    # test_jax.py, test_onnx.py and test_vllm.py import them where these are installed.
    needs = {"octavo.jax": "jax", "octavo.flax": "flax", "octavo.onnx": "onnx", "octavo.vllm": "vllm"}
    for module, names in found.items():
        if importlib.util.find_spec(needs.get(module, "octavo")) is None:
            continue
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


def test_tables_and_pictures_of_the_guide_are_those_of_the_results(hooks: ModuleType) -> None:
    """A page names a table; the site shows it as the result file has it."""
    found = 0
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        for name, title in hooks.TABLE.findall(text):
            table = hooks.tables.read(RESULTS / name).table(title)
            assert table.markdown() in hooks.on_page_markdown(text, page_at(path.relative_to(ROOT / "docs").as_posix()))
            found += 1
        for name in re.findall(r"\]\((?:\.\./)+bench/results/([^)\s]+)\)", text):
            assert (RESULTS / name).is_file(), (path, name)
    assert found >= 3
