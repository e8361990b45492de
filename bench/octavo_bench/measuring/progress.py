"""One progress bar for the whole run, on standard error, that says what is being done now."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar over `total` units of work. What a unit is, who makes the bar says: units should take about as long."""

    def __init__(self, total: float, *, show: bool = True) -> None:
        self._bar = tqdm(
            total=total,
            file=sys.stderr,
            disable=not show,
            bar_format="{l_bar}{bar:30}| {elapsed}<{remaining}",
            dynamic_ncols=True,
            leave=False,
        )

    @contextmanager
    def step(self, doing: str, units: float = 1.0) -> Iterator[None]:
        """A piece of the work: shown while it lasts, counted when it is done."""
        self._bar.set_description(doing)
        yield
        self._bar.update(units)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
