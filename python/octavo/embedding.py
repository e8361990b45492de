"""Where C and C++ programs find the library that this installation of octavo carries.

cmake -DCMAKE_PREFIX_PATH="$(python -c 'import octavo; print(octavo.cmake_prefix())')"    # find_package(octavo)
cc main.c $(python -m octavo --cflags --libs)
PKG_CONFIG_PATH="$(python -m octavo --pkg-config-path)" pkg-config --cflags --libs octavo
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def cmake_prefix() -> str:
    """The folder for CMake's ``CMAKE_PREFIX_PATH``, under which ``find_package(octavo)`` finds octavo.

    The package has the targets ``octavo::shared`` and ``octavo::static``, and ``octavo::octavo``, which is the shared
    library where ``BUILD_SHARED_LIBS`` is on, else the static one.
    """
    return str(_FOLDER)


def compiler_flags() -> list[str]:
    """What a compiler needs to find the headers ``octavo/octavo.h`` (C) and ``octavo/octavo.hpp`` (C++20)."""
    return [f"-I{_FOLDER / 'include'}"]


def linker_flags() -> list[str]:
    """What a linker, and later the program, need to find the shared library."""
    return [f"-L{_FOLDER / 'lib'}", f"-Wl,-rpath,{_FOLDER / 'lib'}", "-loctavo"]


def pkg_config_path() -> str:
    """The folder for ``PKG_CONFIG_PATH``, which has ``octavo.pc``."""
    return str(_FOLDER / "lib" / "pkgconfig")
