"""Times of calls that take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a call: median and quartiles over `calls` calls."""

    median: float
    lower: float
    upper: float
    calls: int


def on_the_wall(call: Callable[[], object]) -> float:
    """Milliseconds until `call` returns."""
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def on_the_gpu(call: Callable[[], object]) -> float:
    """Milliseconds that the current CUDA stream takes for what `call` enqueues, from an idle device on."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    before: Callable[[str], object] = lambda name: None,
    least: int = 3,
    clock: Clock = on_the_wall,
) -> dict[str, list[float]]:
    """Milliseconds of each of `calls` in every round, one call of each after the other.

    `before` is given the name of the call that comes next and is not timed. Goes on for `seconds`, and for at least
    `least` rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < least or time.perf_counter() < end:
        for name, call in calls.items():
            before(name)
            samples[name].append(clock(call))
        rounds += 1
    return samples


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least two."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, len(values))


def spreads(samples: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Of each call of `take_turns`."""
    return {name: spread(values) for name, values in samples.items()}
