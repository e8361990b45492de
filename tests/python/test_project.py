"""The project's own files agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import octavo

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version_everywhere() -> None:
    versions = {
        "pyproject.toml": re.search(r'^version = "([\d.]+)"', read("pyproject.toml"), re.MULTILINE),
        "CMakeLists.txt": re.search(r"project\(octavo VERSION ([\d.]+)", read("CMakeLists.txt")),
        "CHANGELOG.md": re.search(r"^## ([\d.]+)", read("CHANGELOG.md"), re.MULTILINE),
    }
    found = {name: match and match.group(1) for name, match in versions.items()}
    assert set(found.values()) == {octavo.__version__}, found


def test_pre_commit_runs_the_pinned_tools() -> None:
    pinned = dict(re.findall(r'"(clang-format|ruff)==([\d.]+)"', read("pyproject.toml")))
    used = re.findall(r'"(clang-format|ruff)==([\d.]+)"', read(".pre-commit-config.yaml"))
    assert set(pinned) == {"clang-format", "ruff"}
    assert used
    assert all(pinned[tool] == version for tool, version in used), used


def test_continuous_integration_runs_the_commands_of_the_readme() -> None:
    commands = re.findall(r"^python3 dev\.py (\w+)", read("README.md"), re.MULTILINE)
    assert commands[:2] == ["demo", "test"], "the first two commands a reader meets"
    for command in commands:
        assert f"python3 dev.py {command}" in read(".ci/run")
