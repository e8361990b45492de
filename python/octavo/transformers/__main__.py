"""Transformers' own command line, for int8 models too: ``python -m octavo.transformers serve MODEL``.

``transformers serve MODEL`` itself does not import octavo, so it refuses them. Nothing else is different.
"""

from transformers.cli.transformers import main

import octavo.transformers  # noqa: F401 - registers the method

if __name__ == "__main__":
    main()
