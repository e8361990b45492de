"""Ways to compute a linear layer, to be compared: each is checked before it is timed.

A contender is prepared once for a weight and then called with X. What it may be off by is not a constant: it follows
from the rounding that its arithmetic does on the X and W at hand (`Problem.rounding`). One that is further off is not
timed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from ..models.variants import attempt
from ..turns import Call, Spread, spread

Layer = Callable[[Tensor], Tensor]

OCTAVO = "octavo int8"  # what the others are compared with
LATE = "the time given was over"
CHECKED = 32  # rows of Y, at most, that are compared with the exact ones


@dataclass
class Problem:
    """Y = X W^T: X [m, k] and W [n, k] in float32, with values that bfloat16 and float16 hold."""

    x: Tensor
    weight: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """The rows of X that are checked, int64, evenly spread."""
        return torch.linspace(0, len(self.x) - 1, min(len(self.x), CHECKED), device=self.x.device).long()

    @cached_property
    def exact(self) -> Tensor:
        """Y of those rows, float64 [rows, n]."""
        return self.x[self.rows].double() @ self.weight.double().T

    def error(self, y: Tensor) -> float:
        """|Y - exact| / |exact|, Frobenius, over the checked rows. y: [m, n]."""
        return float((y[self.rows].double() - self.exact).norm() / self.exact.norm())

    def rounding(self, threshold: float, *, weight_only: bool = False, per_tensor: bool = False) -> float:
        """The expected `error` of rounding X and W to 8 bits, one step for each row of X and of W (or for all).

        Rounding to a step s is off by s^2 / 12 in the mean square, so that of Y_ij is off by
        s_i^2 / 12 |w_j|^2 + t_j^2 / 12 |x_i|^2. Columns of X that reach `threshold` (0: none) keep 16 bits.
        """
        rounded = self.x
        if threshold > 0:
            rounded = self.x.masked_fill((self.x.abs() >= threshold).any(0), 0)
        of_x, of_w = rounded.abs().amax(1)[self.rows].double() / 127, self.weight.abs().amax(1).double() / 127
        if per_tensor:
            of_x, of_w = (rounded.abs().amax().double() / 127).expand_as(of_x), of_w.amax().expand_as(of_w)
        variance = of_w.square().sum() * self.x[self.rows].square().sum(dtype=torch.float64) / 12
        if not weight_only:
            variance += of_x.square().sum() * self.weight.square().sum(dtype=torch.float64) / 12
        return float(variance.sqrt() / self.exact.norm())


def problem(k: int, n: int, m: int, outliers: int, device: str = "cpu") -> Problem:
    """Random X and W, the same for the same arguments; `outliers` columns of X lie around 20, all else below 5."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=device).div_(k**0.5).bfloat16().half().float()
    x = torch.randn(m, k, generator=generator, device=device).clamp_(-5, 5)
    columns = torch.randperm(k, generator=generator, device=device)[:outliers]
    x[:, columns] = 20 + torch.randn(m, outliers, generator=generator, device=device)
    return Problem(x.bfloat16().float(), weight)


@dataclass
class Contender:
    """A way to compute the layer."""

    prepare: Callable[[Tensor], Layer]  # takes W in float32 [n, k] and returns what is called with X
    dtype: torch.dtype  # of X and of the result
    tolerance: Callable[[Problem], float]  # the largest `Problem.error` that the arithmetic explains
    most: float = math.inf  # the largest m that it is meant for


@dataclass
class Case:
    """A shape, and by contender: times, and why it was not timed."""

    k: int
    n: int
    m: int
    outliers: int
    times: dict[str, Spread] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str) -> float | None:
        """How many times as long as octavo a contender takes."""
        if name not in self.times or OCTAVO not in self.times:
            return None
        return self.times[name].median / self.times[OCTAVO].median


def checked(contender: Contender, layer: Layer, given: Problem) -> Call:
    """A call of the prepared layer on `given`. Raises RuntimeError where the result is wrong."""
    call = partial(layer, given.x.to(contender.dtype))
    y = call()
    if y.dtype != contender.dtype:
        raise RuntimeError(f"wrong: the result is {y.dtype}, expected {contender.dtype}")
    found, largest = given.error(y), contender.tolerance(given)
    if not found <= largest:
        raise RuntimeError(f"wrong: error {found:.3g}, its arithmetic explains {largest:.3g}")
    return call


def measure(
    cases: Sequence[Case],
    chosen: Mapping[str, Contender],
    time_calls: Callable[[Mapping[str, Call]], Mapping[str, Sequence[float]]],
    device: str = "cpu",
    deadline: float = math.inf,
    prepare: Callable[[Call], Call] = lambda call: call,
) -> None:
    """Check, then time, every contender in cases of one k and n.

    What `prepare` makes of a call is timed, by `time_calls`. A case that is not reached before the `deadline` (of
    `time.perf_counter`) is left out as `LATE`.
    """
    k, n, most = cases[0].k, cases[0].n, max(case.m for case in cases)
    given = {o: problem(k, n, most, o, device) for o in {case.outliers for case in cases}}
    layers: dict[str, Layer] = {}
    left_out: dict[str, str] = {}
    for name, contender in chosen.items():
        with attempt(name, left_out):
            layers[name] = contender.prepare(next(iter(given.values())).weight)
    for case in cases:
        if time.perf_counter() > deadline:
            case.left_out["all"] = LATE
            continue
        case.left_out |= left_out
        part, calls = Problem(given[case.outliers].x[: case.m], given[case.outliers].weight), {}
        for name, layer in layers.items():
            if case.m <= chosen[name].most:
                with attempt(name, case.left_out):
                    calls[name] = prepare(checked(chosen[name], layer, part))
        if calls:
            case.times = {name: spread(values) for name, values in time_calls(calls).items()}
