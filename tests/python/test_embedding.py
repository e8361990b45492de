"""The library that the installed package carries for C and C++, used from a stranger's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import octavo
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = r"""
#include <octavo/octavo.h>
#include <stdio.h>
int main(void) {
    printf("%s %d %d\n", octavo_version(), octavo_abi_version() == OCTAVO_ABI_VERSION,
           octavo_packed_size((int64_t)1 << 40, (int64_t)1 << 24) == -1);
    return 0;
}
"""
EXPECTED = f"{octavo.__version__} 1 1\n"


def run(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
    return result.stdout


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "main.c"
    path.write_text(PROGRAM)
    return path


def test_flags_of_the_module(source: Path) -> None:
    flags = run(sys.executable, "-m", "octavo", "--cflags", "--libs").split()
    run(need("cc"), source, *flags, "-o", source.parent / "program")
    assert run(source.parent / "program") == EXPECTED


@pytest.mark.parametrize("static", [False, True])
def test_pkg_config(source: Path, static: bool) -> None:
    path = run(sys.executable, "-m", "octavo", "--pkg-config-path").strip()
    kind = ["--static"] if static else []
    flags = run(need("pkg-config"), "--cflags", "--libs", *kind, "octavo", PKG_CONFIG_PATH=path).split()
    if static:
        flags[flags.index("-loctavo")] = "-l:liboctavo.a"
    run(need("cc"), source, *flags, "-o", source.parent / "program")
    assert run(source.parent / "program", LD_LIBRARY_PATH=str(Path(path).parent)) == EXPECTED


@pytest.mark.parametrize("shared", ["ON", "OFF"])
def test_cmake_package(tmp_path: Path, shared: str) -> None:
    example = ROOT / "examples" / "embed_cpp"
    cmake = need("cmake")
    options = [f"-DCMAKE_PREFIX_PATH={octavo.cmake_prefix()}", f"-DBUILD_SHARED_LIBS={shared}"]
    run(cmake, "-S", example, "-B", tmp_path, *options)
    run(cmake, "--build", tmp_path)
    run(tmp_path / "embed_cpp")
    assert ("liboctavo.so" in run(need("ldd"), tmp_path / "embed_cpp")) == (shared == "ON")


def test_symbols_are_versioned() -> None:
    library = Path(octavo.cmake_prefix()) / "lib" / "liboctavo.so"
    lines = run(need("nm"), "-D", "-C", "--with-symbol-versions", "--defined-only", library).splitlines()
    names = {line.split(maxsplit=2)[2] for line in lines if " A " not in line}
    assert all(name.endswith("@@OCTAVO_1") for name in names)
    assert {"octavo_linear@@OCTAVO_1", "octavo_abi_version@@OCTAVO_1"} <= names
    assert not [name for name in names if not name.startswith(("octavo_", "octavo::", "typeinfo", "vtable"))]
    assert not [name for name in names if "octavo::cpu::" in name or "octavo::check::" in name]
