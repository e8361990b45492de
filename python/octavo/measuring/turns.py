"""Timing calls against each other: in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[Callable[[], object]], float]


@dataclass
class Timing:
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
) -> dict[str, Timing]:
    """Time `calls`, one call of each after the other, so that a change of the machine's speed meets all alike.

    `before` is given the name of the call that comes next and is not timed. Goes on for `seconds`, and until there are
    `least` (>= 2) times of each.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < least or time.perf_counter() < end:
        for name, call in calls.items():
            before(name)
            samples[name].append(clock(call))
        turns += 1
    timings = {}
    for name, values in samples.items():
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, lower, upper, turns)
    return timings
