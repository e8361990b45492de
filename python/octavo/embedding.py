"""Where C and C++ programs find the library that this installation of octavo carries.

cmake -DCMAKE_PREFIX_PATH="$(python -c 'import octavo; print(octavo.cmake_prefix())')"    # find_package(octavo)
cc main.c $(python -m octavo --cflags --libs)
PKG_CONFIG_PATH="$(python -m octavo --pkg-config-path)" pkg-config --cflags --libs octavo
"""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_LIBRARIES = _FOLDER / "lib"


def cmake_prefix() -> str:
    """The folder for CMake's ``CMAKE_PREFIX_PATH``, under which ``find_package(octavo)`` finds octavo.

    The package has the targets ``octavo::shared`` and ``octavo::static``, and ``octavo::octavo``, which is the shared
    library where ``BUILD_SHARED_LIBS`` is on, else the static one.
    """
    return str(_FOLDER)


# By what ``python -m octavo`` is asked: of the headers, ``octavo/octavo.h`` (C) and ``octavo/octavo.hpp`` (C++20); of
# the shared library, for the linker and later the program; the folder of ``octavo.pc``.
ANSWERS = {
    "--cflags": [f"-I{_FOLDER / 'include'}"],
    "--libs": [f"-L{_LIBRARIES}", f"-Wl,-rpath,{_LIBRARIES}", "-loctavo"],
    "--cmake-prefix": [cmake_prefix()],
    "--pkg-config-path": [str(_LIBRARIES / "pkgconfig")],
}
