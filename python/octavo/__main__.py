"""``python -m octavo``: the command line, and what compilers need to use the library of this installation."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

from octavo.cli import main
from octavo.embedding import cmake_prefix, compiler_flags, linker_flags, pkg_config_path

_ANSWERS: dict[str, Callable[[], list[str]]] = {
    "--cflags": compiler_flags,
    "--libs": linker_flags,
    "--cmake-prefix": lambda: [cmake_prefix()],
    "--pkg-config-path": lambda: [pkg_config_path()],
}

if __name__ == "__main__":
    asked = sys.argv[1:]
    if asked and all(word in _ANSWERS for word in asked):
        print(shlex.join([answer for word in asked for answer in _ANSWERS[word]()]))
        sys.exit(0)
    sys.exit(main())
