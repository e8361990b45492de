"""The ways to compute a linear layer that the benchmarks compare, and how far off each may be.

A contender is prepared once for a weight and then called with X. What it may be off by is not a constant: it follows
from the rounding that its arithmetic does on the X and W at hand (`Problem.rounding`). One that is further off is not
timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import octavo
import torch
from torch.nn import functional

Layer = Callable[[torch.Tensor], torch.Tensor]

THRESHOLD = 6.0
OCTAVO = "octavo int8"
BFLOAT16 = "torch bfloat16"
FLOAT32 = "torch float32"
INT_MM = "torch _int_mm"
BITSANDBYTES = "bitsandbytes, threshold 6"
BITSANDBYTES_PLAIN = "bitsandbytes, threshold 0"
TORCHAO = "torchao int8"
TORCHAO_COMPILED = "torchao int8, compiled"


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


def problem(k: int, n: int, m: int, outliers: int) -> Problem:
    """Random X and W, the same for the same arguments; `outliers` columns of X lie around 20, all else below 5."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16().float()
    x = torch.randn(m, k, generator=generator).clamp_(-5, 5)
    columns = torch.randperm(k, generator=generator)[:outliers]
    x[:, columns] = 20 + torch.randn(m, outliers, generator=generator)
    x = x.bfloat16().float()
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


def octavo_linear(weight: torch.Tensor) -> Layer:
    """LLM.int8() with the options that `octavo.linear` has by default."""
    quantized = octavo.quantize_weight(weight.bfloat16())
    return lambda x: octavo.linear(x, quantized)


def torch_linear(dtype: torch.dtype) -> Callable[[torch.Tensor], Layer]:
    """`torch.nn.functional.linear` in a floating-point type."""

    def prepare(weight: torch.Tensor) -> Layer:
        converted = weight.to(dtype)
        return lambda x: functional.linear(x, converted)

    return prepare


class IntMm:
    """`torch._int_mm` between a quantization of X's rows and a scaling of the sums, all in torch operations."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(1) / 127
        self.codes = (weight / self.scale.clamp_min(1e-30)[:, None]).round_().to(torch.int8)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of X [m, k] and a scale [m, 1] for each row."""
        scale = x.abs().amax(1, keepdim=True).float().div_(127).clamp_min_(1e-30)
        return (x / scale).round_().to(torch.int8), scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Y [m, n] in the dtype of X [m, k]."""
        codes, scale = self.quantize(x)
        sums = torch._int_mm(codes, self.codes.t())
        return sums.float().mul_(scale).mul_(self.scale).to(x.dtype)


def verify_int_mm(layer: Layer, x: torch.Tensor) -> None:
    """Raise RuntimeError unless the integers are right, for X's codes and for the largest there are.

    Without the VNNI instructions oneDNN adds pairs of products in 16 bits, where they saturate.
    """
    assert isinstance(layer, IntMm)
    n, k = layer.codes.shape
    largest = torch.full((k, n), 127, dtype=torch.int8)
    if not bool((torch._int_mm(largest[:, :1].t().expand(len(x), k).contiguous(), largest) == 127 * 127 * k).all()):
        raise RuntimeError("torch._int_mm gives wrong integers: its sums saturate on this processor")
    codes, _ = layer.quantize(x)
    # C = A B^T has C r = A (B^T r) for any r; with r of -1, 0 and 1 every number here is exact.
    r = torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(1)).float()
    sums = torch._int_mm(codes, layer.codes.t()).double() @ r.double()
    if not torch.equal(sums, codes.double() @ (layer.codes.float().t() @ r).double()):
        raise RuntimeError("torch._int_mm gives wrong integers")


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
        prepared: Layer = layer.to("cpu").eval()
        return prepared

    return prepare


def torchao_linear(compiled: bool) -> Callable[[torch.Tensor], Layer]:
    """Int8 weights of torchao, with activations quantized in each call, eager or through `torch.compile`."""

    def prepare(weight: torch.Tensor) -> Layer:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        n, k = weight.shape
        layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).eval()
        layer.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        if not compiled:
            return layer
        torch.compiler.reset()  # else the layers of earlier shapes count against the limit of recompilations
        prepared: Layer = torch.compile(layer, dynamic=False)
        return prepared

    return prepare


def contenders(*, compile_torchao: bool = False) -> dict[str, Contender]:
    """All contenders by name, octavo first."""
    f16, bf16 = torch.float16, torch.bfloat16
    found = {
        OCTAVO: Contender(octavo_linear, bf16, within(THRESHOLD)),
        # One rounding of Y; X and W are exact.
        BFLOAT16: Contender(torch_linear(bf16), bf16, lambda given: 2**-8),
        FLOAT32: Contender(torch_linear(torch.float32), torch.float32, lambda given: 1e-5),
        INT_MM: Contender(IntMm, bf16, within(0), verify_int_mm),
        BITSANDBYTES: Contender(bitsandbytes_linear(THRESHOLD), f16, within(THRESHOLD)),
        BITSANDBYTES_PLAIN: Contender(bitsandbytes_linear(0.0), f16, within(0)),
        TORCHAO: Contender(torchao_linear(compiled=False), bf16, within(0)),
    }
    if compile_torchao:
        found[TORCHAO_COMPILED] = Contender(torchao_linear(compiled=True), bf16, within(0))
    return found


def prepare(chosen: dict[str, Contender], weight: torch.Tensor) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be made of `weight`, and why the others cannot."""
    layers: dict[str, Layer] = {}
    left_out: dict[str, str] = {}
    for name, contender in chosen.items():
        try:
            layers[name] = contender.prepare(weight)
        except (ImportError, RuntimeError, NotImplementedError, AttributeError) as problem:
            left_out[name] = reason(problem)
    return layers, left_out


def check(contender: Contender, layer: Layer, given: Problem) -> tuple[float, str]:
    """The error of a prepared layer on `given`, and why it is not to be timed ("" where it is)."""
    x = given.x.to(contender.dtype)
    try:
        contender.verify(layer, x)
        y = layer(x)
    except (RuntimeError, NotImplementedError, AttributeError) as problem:
        return math.nan, reason(problem)
    if y.dtype != contender.dtype:
        return math.nan, f"wrong: the result is {y.dtype}, expected {contender.dtype}"
    error, largest = given.error(y), contender.tolerance(given)
    if not error <= largest:
        return error, f"wrong: error {error:.3g}, its arithmetic explains {largest:.3g}"
    return error, ""


def reason(problem: Exception) -> str:
    """An exception in one line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
