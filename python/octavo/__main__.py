"""``python -m octavo``: the command line, and what compilers need to use the library of this installation."""

import shlex
import sys

from octavo.cli import main
from octavo.embedding import ANSWERS

if __name__ == "__main__":
    asked = sys.argv[1:]
    if asked and all(word in ANSWERS for word in asked):
        print(shlex.join([answer for word in asked for answer in ANSWERS[word]]))
        sys.exit(0)
    sys.exit(main())
