"""Ways to compute a linear layer, to be compared: each is checked before it is timed.

A contender is prepared once for a weight and then called with X. What it may be off by is not a constant: it follows
from the rounding that its arithmetic does on the X and W at hand (`Problem.rounding`). One that is further off is not
timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from octavo.torch import Int8Linear
from torch.nn import functional

from octavo_bench.measuring.peers import BROKEN, reason
from octavo_bench.measuring.turns import Clock, Spread, on_the_wall, spreads, take_turns

Layer = Callable[[torch.Tensor], torch.Tensor]

OCTAVO = "octavo int8"  # what the others are compared with


@dataclass
class Problem:
    """Y = X W^T: X [m, k] and W [n, k] in float32 with values that bfloat16 holds, and Y [m, n] in float64."""

    x: torch.Tensor
    weight: torch.Tensor
    exact: torch.Tensor

    @cached_property
    def _squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """|w_j|^2 summed over all j, and the squared steps of W's codes summed over all j."""
        steps = self.weight.abs().amax(1).double() / 127
        return self.weight.square().sum(dtype=torch.float64), steps.square().sum()

    def error(self, y: torch.Tensor) -> float:
        """|Y - exact| / |exact|, Frobenius."""
        return float((y.double() - self.exact).norm() / self.exact.norm())

    def rounding(self, threshold: float) -> float:
        """The expected `error` of rounding X and W to 8 bits, one step for each row of X and of W.

        Rounding to a step s is off by s^2 / 12 in the mean square, so that of Y_ij is off by
        s_i^2 / 12 |w_j|^2 + t_j^2 / 12 |x_i|^2. Columns of X that reach `threshold` (0: none) keep 16 bits.
        """
        rounded = self.x
        if threshold > 0:
            rounded = self.x.masked_fill((self.x.abs() >= threshold).any(0), 0)
        steps = rounded.abs().amax(1).double() / 127
        weight_square, weight_steps = self._squares
        x_square = self.x.square().sum(dtype=torch.float64)
        variance = (steps.square().sum() * weight_square + weight_steps * x_square) / 12
        return float(variance.sqrt() / self.exact.norm())


def problem(k: int, n: int, m: int, outliers: int, device: str = "cpu") -> Problem:
    """Random X and W, the same for the same arguments; `outliers` columns of X lie around 20, all else below 5."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16().float()
    x = torch.randn(m, k, generator=generator).clamp_(-5, 5)
    columns = torch.randperm(k, generator=generator)[:outliers]
    x[:, columns] = 20 + torch.randn(m, outliers, generator=generator)
    x, weight = x.bfloat16().float().to(device), weight.to(device)
    return Problem(x, weight, x.double() @ weight.double().T)


@dataclass
class Contender:
    """A way to compute the layer.

    Attributes:
        prepare: takes W in float32 [n, k] and returns what is called with X.
        dtype: of X and of the result.
        tolerance: the largest `Problem.error` that the arithmetic explains.
        verify: further checks of the prepared layer with X; raises RuntimeError.
    """

    prepare: Callable[[torch.Tensor], Layer]
    dtype: torch.dtype
    tolerance: Callable[[Problem], float]
    verify: Callable[[Layer, torch.Tensor], None] = field(default=lambda layer, x: None)


def within(threshold: float) -> Callable[[Problem], float]:
    """The tolerance of an int8 product: a quarter more than is expected, and a rounding of Y to bfloat16."""
    return lambda given: 1.25 * given.rounding(threshold) + 2**-8


def at_most(tolerance: float) -> Callable[[Problem], float]:
    """The tolerance that is the same for every X and W."""
    return lambda given: tolerance


def octavo_layer(dtype: torch.dtype) -> Callable[[torch.Tensor], Layer]:
    """`octavo.torch.Int8Linear`, made of a ``nn.Linear`` of that dtype with the options it has by default."""

    def prepare(weight: torch.Tensor) -> Layer:
        n, k = weight.shape
        layer = torch.nn.Linear(k, n, bias=False, device="meta").eval()
        layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        return Int8Linear.from_linear(layer)

    return prepare


def torch_linear(dtype: torch.dtype) -> Callable[[torch.Tensor], Layer]:
    """`torch.nn.functional.linear` in a floating-point type."""

    def prepare(weight: torch.Tensor) -> Layer:
        converted = weight.to(dtype)
        return lambda x: functional.linear(x, converted)

    return prepare


def bitsandbytes_linear(threshold: float) -> Callable[[torch.Tensor], Layer]:
    """The official implementation, `Linear8bitLt`, in the float16 that it computes in.

    It takes bfloat16 too, but converts it to float16 and back in each call, which is slower. On the CPU it does heed
    the threshold: 0 means no decomposition, and its error shows that.
    """

    def prepare(weight: torch.Tensor) -> Layer:
        import bitsandbytes

        n, k = weight.shape
        layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
        prepared: Layer = layer.to(weight.device).eval()
        return prepared

    return prepare


def prepare(chosen: Mapping[str, Contender], weight: torch.Tensor) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be made of `weight`, and why the others cannot."""
    layers: dict[str, Layer] = {}
    left_out: dict[str, str] = {}
    for name, contender in chosen.items():
        try:
            layers[name] = contender.prepare(weight)
        except BROKEN as problem:
            left_out[name] = reason(problem)
    return layers, left_out


def check(contender: Contender, layer: Layer, given: Problem) -> tuple[float, str]:
    """The error of a prepared layer on `given`, and why it is not to be timed ("" where it is)."""
    x = given.x.to(contender.dtype)
    try:
        contender.verify(layer, x)
        y = layer(x)
    except BROKEN as problem:
        return math.nan, reason(problem)
    if y.dtype != contender.dtype:
        return math.nan, f"wrong: the result is {y.dtype}, expected {contender.dtype}"
    error, largest = given.error(y), contender.tolerance(given)
    if not error <= largest:
        return error, f"wrong: error {error:.3g}, its arithmetic explains {largest:.3g}"
    return error, ""


@dataclass
class Case:
    """A shape and what each contender needs for it.

    `error` is |Y - exact| / |exact| in the Frobenius norm, `left_out` why a contender was not timed.
    """

    k: int
    n: int
    m: int
    outliers: int
    threads: int = 1
    times: dict[str, Spread] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def measure(
    cases: Sequence[Case],
    chosen: Mapping[str, Contender],
    seconds: float,
    *,
    before: Callable[[str], object] | None = None,
    done: Callable[[], object] = lambda: None,
    device: str = "cpu",
    clock: Clock = on_the_wall,
) -> None:
    """Check, then time, every contender in cases of one k and n; `done` is called after each case."""
    k, n = cases[0].k, cases[0].n
    given = {o: problem(k, n, max(case.m for case in cases), o, device) for o in {case.outliers for case in cases}}
    layers, left_out = prepare(chosen, next(iter(given.values())).weight)
    for case in cases:
        case.left_out |= left_out
        whole = given[case.outliers]
        part = Problem(whole.x[: case.m], whole.weight, whole.exact[: case.m])
        calls = {}
        for name, layer in layers.items():
            error, why = check(chosen[name], layer, part)
            if error == error:
                case.error[name] = error
            if why:
                case.left_out[name] = why
                continue
            calls[name] = partial(layer, part.x.to(chosen[name].dtype))
        if calls:
            case.times = spreads(take_turns(calls, seconds, before or (lambda name: None), clock=clock))
        done()


def ratio(case: Case, name: str) -> float | None:
    """How many times as long as octavo a contender takes."""
    if name not in case.times or OCTAVO not in case.times:
        return None
    return case.times[name].median / case.times[OCTAVO].median
