"""Transformers' own command line, for int8 models too: ``python -m octavo.transformers serve MODEL``.

``transformers serve MODEL`` itself does not import octavo, so it refuses them. What else is different:
a model whose own code is not trusted is refused in one line.
"""

import sys

from transformers.cli.transformers import main

import octavo.transformers  # noqa: F401 - registers the method

if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        sys.exit("octavo.transformers: the model brings Python code of its own: --trust-remote-code runs it")
