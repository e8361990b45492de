"""The project's own files agree with each other."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import octavo
import pytest

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version_everywhere() -> None:
    versions = {
        "pyproject.toml": re.search(r'^version = "([\d.]+)"', read("pyproject.toml"), re.MULTILINE),
        "bench/pyproject.toml": re.search(r'^version = "([\d.]+)"', read("bench/pyproject.toml"), re.MULTILINE),
        "CMakeLists.txt": re.search(r"project\(octavo VERSION ([\d.]+)", read("CMakeLists.txt")),
        "CHANGELOG.md": re.search(r"^## ([\d.]+)", read("CHANGELOG.md"), re.MULTILINE),
    }
    found = {name: match and match.group(1) for name, match in versions.items()}
    assert set(found.values()) == {octavo.__version__}, found


def test_an_operation_is_in_eight_files() -> None:
    """One that is there on the CPU and in Python, as CONTRIBUTING.md says of a new one."""
    names = ["CMakeLists.txt", "bindings/ops.cpp", *(f"python/octavo/{each}" for each in ("_core.pyi", "__init__.py"))]
    sources = [
        path for folder in ("include/octavo", "src", "src/cpu") for path in (ROOT / "cpp" / folder).glob("*.?pp")
    ]
    places = [ROOT / "python/octavo/functional.py", *(ROOT / name for name in names), *sources]
    found = [each for each in places if re.search(r"\bfind_outliers\b|\boutlier\.cpp\b", each.read_text())]
    assert 7 <= len([each for each in found if each.name != "c_api.cpp"]) <= 8, found


def test_pre_commit_runs_the_pinned_tools() -> None:
    pinned = dict(re.findall(r'"(clang-format|ruff)==([\d.]+)"', read("pyproject.toml")))
    used = re.findall(r'"(clang-format|ruff)==([\d.]+)"', read(".pre-commit-config.yaml"))
    assert set(pinned) == {"clang-format", "ruff"}
    assert used
    assert all(pinned[tool] == version for tool, version in used), used


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """dev.py as a module, whose steps print into a folder of this test."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("dev")
    monkeypatch.setattr(module, "BUILD", tmp_path)
    return module


def test_every_stage_has_what_its_steps_need(dev: ModuleType) -> None:
    assert "exec python3 dev.py ci" in read(".ci/run")
    done: set[str] = set()
    for stage in dev.STAGES:
        names = {step.name for step in stage}
        assert not names & done, "a step is done once"
        done |= names
        assert {need for step in stage for need in step.needs} <= done
    assert {step.name for step in (*dev.TESTS, *dev.CHECKS, *dev.MORE_TESTS, dev.DEMO, dev.DOCS, dev.WHEEL)} <= done


def test_no_step_of_a_command_starts_before_there_is_an_environment(dev: ModuleType) -> None:
    for steps in ([*dev.INSTALLED, *dev.CHECKS, *dev.MORE_CHECKS], [*dev.INSTALLED, *dev.LABORATORY], dev.TESTS):
        assert [step.name for step in steps if not {s.name for s in steps} & {*step.needs}] == ["environment"]


def test_steps_run_after_what_they_need(dev: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    needs = {"last": ("first", "second"), "first": (), "second": ("first", "not asked for")}
    dev.perform([dev.Step(name, lambda name=name: order.append(name), of) for name, of in needs.items()])
    assert order == ["first", "second", "last"]
    assert "=== second: done in 0 s" in capfd.readouterr().out


def test_a_step_that_fails_ends_the_others(dev: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        dev.say("this is wrong")
        dev.run(sys.executable, "-c", "raise SystemExit(3)")

    started = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError):
        dev.perform(
            [
                dev.Step("long", lambda: dev.run(sys.executable, "-c", "import time; time.sleep(300)")),
                dev.Step("wrong", fail),
                dev.Step("never", lambda: pytest.fail("it needs what failed"), ("wrong",)),
            ]
        )
    assert time.monotonic() - started < 200
    said = capfd.readouterr().out
    assert "this is wrong" in said
    assert "=== wrong: failed" in said
    assert "=== long: failed" in said
