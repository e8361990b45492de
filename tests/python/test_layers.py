"""The layer rule of CONTRIBUTING.md, by reading #include and import lines.

bench -> python/octavo -> bindings -> cpp/include <- cpp/src -> backend.hpp <- { cpp/src/cpu, cuda }
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)

# What each layer may include of this repository.
MAY_INCLUDE: dict[str, str] = {
    "cpp/include": r"cpp/include/",
    "cpp/src": r"cpp/include/|cpp/src/[^/]+$",
    "cpp/src/cpu": r"cpp/include/|cpp/src/cpu/|cpp/src/backend\.hpp",
    "cuda": r"cpp/include/|cuda/|cpp/src/(backend|cuda)\.hpp|tests/simt/",  # the last: for the emulated GPU
    "bindings": r"cpp/include/|bindings/",
}
# Headers of others, and the one layer that may include them; None: none may.
HEADERS: dict[str, str | None] = {
    r"Python\.h|patchlevel\.h|(pybind11|nanobind|numpy)/": "bindings",
    r"cuda|cu(blas|sparse|dnn|rand)|(cutlass|cute|thrust|cub|crt|nv)/|cooperative_groups|mma\.h": "cuda",
    r"(torch|ATen|c10|xla)/": None,
}


def layer_of(path: str) -> str | None:
    """The most specific layer that holds a path of this repository."""
    return max((layer for layer in MAY_INCLUDE if path.startswith(f"{layer}/")), key=len, default=None)


def resolved(root: Path, path: Path, name: str) -> str | None:
    """The file of this repository that an include means."""
    for base in (path.parent, root / "cpp/include", root / "cpp/src", root, root / "tests/simt"):
        found = (base / name).resolve()
        if found.is_file() and found.is_relative_to(root):
            return found.relative_to(root).as_posix()
    return None


def faults(root: Path) -> list[str]:
    """Every include that the rule forbids."""
    found = []
    for path in (path for layer in ("cpp", "cuda", "bindings") for path in sorted((root / layer).rglob("*.*"))):
        where = path.relative_to(root).as_posix()
        layer = layer_of(where)
        if layer is None or path.suffix not in {".h", ".hpp", ".cuh", ".c", ".cpp", ".cu"}:
            continue
        for name in INCLUDE.findall(COMMENT.sub("", path.read_text(encoding="utf-8"))):
            target = resolved(root, path, name)
            if target is not None:
                allowed = re.match(MAY_INCLUDE[layer], target) is not None
            else:
                allowed = all(layer == owner for pattern, owner in HEADERS.items() if re.match(pattern, name))
            if not allowed:
                found.append(f"{where}: {name}")
    return found


def test_includes_run_one_way() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpp/include/octavo/a.hpp", '#include "backend.hpp"'),
        ("cpp/src/a.cpp", '#include "cpu/b.hpp"'),
        ("cpp/src/cpu/a.cpp", '#include "../check.hpp"'),
        ("cpp/src/cpu/a.cpp", "#  include <cuda_fp16.h>"),
        ("cuda/a.cu", '#include "cpu/b.hpp"'),
        ("cuda/a.cu", "#include <pybind11/pybind11.h>"),
        ("bindings/a.cpp", '/* x */ #include "../cpp/src/check.hpp"'),
        ("bindings/a.cpp", "#include <ATen/ATen.h>"),
    ],
)
def test_a_forbidden_include_is_seen(tmp_path: Path, path: str, line: str) -> None:
    good = {
        "cpp/include/octavo/types.hpp": "#include <cstdint>",
        "cpp/src/backend.hpp": '#include "octavo/types.hpp"',
        "cpp/src/check.hpp": '// #include "cpu/b.hpp"',
        "cpp/src/cpu/b.hpp": '#include "backend.hpp"',
        "cuda/c.cuh": '#include <cuda_runtime.h>\n#include "backend.hpp"',
        "bindings/d.hpp": "#include <pybind11/pybind11.h>",
    }
    for name, text in {**good, path: line}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [fault.split(":")[0] for fault in faults(tmp_path)] == [path]


def test_the_c_abi_is_a_c_header() -> None:
    text = (ROOT / "cpp/include/octavo/octavo.h").read_text(encoding="utf-8")
    assert INCLUDE.findall(text)
    assert all(name.endswith(".h") for name in INCLUDE.findall(text))


def imports(path: Path) -> Iterator[str]:
    """The modules that a Python file names in its imports, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


def test_the_library_imports_neither_the_laboratory_nor_a_way_around_the_bindings() -> None:
    laboratory = {path.stem for path in (ROOT / "bench").glob("*") if path.suffix in {"", ".py"}}
    assert "octavo_bench" in laboratory
    paths = sorted((ROOT / "python/octavo").rglob("*.py"))
    roots = {path: {name.split(".")[0] for name in imports(path)} for path in paths}
    forbidden = {*laboratory, "ctypes", "cffi"}
    assert {str(path): found & forbidden for path, found in roots.items() if found & forbidden} == {}
    assert "octavo" in roots[ROOT / "python/octavo/functional.py"], "no import was read"
