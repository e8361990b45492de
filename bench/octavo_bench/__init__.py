"""The laboratory that proves octavo: the commands `octavo demo`, `eval`, `analyze` and `bench`.

A distribution of its own, octavo-bench. It uses octavo; octavo does not know it.

- `tables`, `machine`, `pictures`, `progress`, `turns`, `commands`: what every measurement is made with.
- `layers`: how fast a linear layer is. `models`: models, texts, and the ways to run a model's linear layers.
- `accuracy` (`octavo eval`), `outliers` (`octavo analyze`): what those ways cost a model, and why.
- `stories`: what puts these together: `octavo demo` and the evidence.
"""

__version__ = "0.1.0"
