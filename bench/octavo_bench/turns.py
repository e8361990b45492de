"""Times of calls that take turns, so that whatever else the machine does falls on all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]
Before = Callable[[str], object]  # is given the name of the call that comes next, and is not timed


class Spread(NamedTuple):
    """Milliseconds of a call: median and quartiles."""

    median: float
    lower: float
    upper: float


def on_the_wall(call: Call) -> float:
    """Milliseconds until `call` returns."""
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def on_the_cpu(call: Call) -> float:
    """Milliseconds of processor time: of one thread what `on_the_wall` is where no other program runs."""
    begin = time.process_time()
    call()
    return 1e3 * (time.process_time() - begin)


def on_the_gpu(call: Call) -> float:
    """Milliseconds that the current CUDA stream takes for what `call` enqueues, behind what is enqueued already."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def captured(call: Call) -> Call:
    """A CUDA graph of what `call`, which has been called before, enqueues: the host then has one launch to make."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def evicting(count: int, device: str = "cpu") -> Before:
    """Reads a buffer of so many bytes before each call, so that what the caches held is gone.

    The same buffer for every contender, so it is fair whatever a contender keeps and however it lays it out.
    """
    buffer = torch.ones(count // 8, dtype=torch.int64, device=device)
    return lambda name: buffer.sum()


def take_turns(
    calls: Mapping[str, Call],
    seconds: float,
    before: Before = lambda name: None,
    least: int = 3,
    most: int | None = None,
    clock: Clock = on_the_wall,
    in_order: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each of `calls` in every round, one call of each after the other.

    In an order that is drawn anew for each round, or with `in_order` as they are given, where one needs what another
    made: a call finds the caches and the heap as the one before it left them.
    Goes on for `seconds`, for at least `least` rounds and, where given, at most `most`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls.items()), random.Random(0)
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < least or (time.perf_counter() < end and (most is None or rounds < most)):
        if not in_order:
            draw.shuffle(order)
        for name, call in order:
            before(name)
            samples[name].append(clock(call))
        rounds += 1
    return samples


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least two."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)
