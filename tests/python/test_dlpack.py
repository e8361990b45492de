"""The DLPack structs that bindings/dlpack.hpp declares have the layout of the standard's own header."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What octavo reads or writes: (struct, field). The standard's names.
FIELDS = [
    ("DLPackVersion", "minor"),
    ("DLDevice", "device_id"),
    ("DLDataType", "lanes"),
    *[("DLTensor", field) for field in ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset")],
    *[("DLManagedTensor", field) for field in ("dl_tensor", "manager_ctx", "deleter")],
    *[("DLManagedTensorVersioned", field) for field in ("version", "manager_ctx", "deleter", "flags", "dl_tensor")],
    *[
        ("DLPackExchangeAPI", field)
        for field in (
            "header",
            "managed_tensor_from_py_object_no_sync",
            "managed_tensor_to_py_object_no_sync",
            "dltensor_from_py_object_no_sync",
            "current_work_stream",
        )
    ],
]


def layout(compiler: str, header: Path, folder: Path) -> str:
    """Sizes and offsets of the structs that `header` declares, as a compiled program prints them."""
    lines = [f'std::printf("{s} %zu\\n", sizeof({s}));' for s in dict.fromkeys(s for s, _ in FIELDS)]
    lines += [f'std::printf("{s}.{f} %zu\\n", offsetof({s}, {f}));' for s, f in FIELDS]
    source = folder / "layout.cpp"
    source.write_text(
        f'#include "{header}"\n#include <cstddef>\n#include <cstdio>\nint main() {{ {" ".join(lines)} }}\n'
    )
    program = folder / "layout"
    subprocess.run([compiler, "-std=c++20", str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


def test_structs_match_the_standard_header(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on the path")
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi, which carries the header, is not installed")
    standard = next(Path(tvm_ffi.__file__).parent.rglob("include/dlpack/dlpack.h"))
    ours = layout(compiler, ROOT / "bindings" / "dlpack.hpp", tmp_path)
    assert ours.count("\n") > len(FIELDS)
    assert ours == layout(compiler, standard, tmp_path)
