"""The laboratory that proves octavo: the commands `octavo demo`, `eval`, `analyze` and `bench`.

A distribution of its own, octavo-bench. It uses octavo; octavo does not know it.
"""

__version__ = "0.1.0"
