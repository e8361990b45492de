"""Times of calls that take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a call over the rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, seconds: float, min_rounds: int = 4
) -> dict[str, list[float]]:
    """Milliseconds of each call in every round, for about `seconds` and at least `min_rounds` rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < min_rounds or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return times


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)
