"""One progress bar for the whole run, on standard error, that says what is being done now."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """A bar, or a part of one. Who does the work says of how many units it is; they should take about as long each."""

    def __init__(self, *, show: bool = True, bar: "tqdm[None] | None" = None, share: float = 1.0) -> None:
        self._bar = bar or tqdm(
            total=1.0, file=sys.stderr, disable=not show, bar_format="{l_bar}{bar:30}| {elapsed}<{remaining}",
            dynamic_ncols=True, leave=False,
        )  # fmt: skip
        self._share = share
        self._unit = share

    def begin(self, units: float) -> None:
        """The work of this bar, or of this part, is of so many units."""
        self._unit = self._share / units if units else 0.0

    @contextmanager
    def step(self, doing: str, units: float = 1.0) -> Iterator[None]:
        """A piece of the work: shown while it lasts, counted when it is done."""
        self._bar.set_description(doing)
        yield
        self._bar.update(units * self._unit)

    def part(self, units: float) -> "Progress":
        """So many units of this, as a bar for somebody else, who divides them."""
        return Progress(bar=self._bar, share=units * self._unit)

    def close(self) -> None:
        """The bar goes."""
        self._bar.close()
