"""``python -m octavo_bench``."""

import sys

from .commands import main

sys.exit(main())
