"""The ways to compute a linear layer that are compared; `contest` says how they are held."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import octavo.torch
import torch
from octavo.torch.arrays import rotated
from torch import Tensor

from ..models import variants
from .contest import OCTAVO, Contender, Layer, Problem

THRESHOLD = 6.0
PATHS = {"auto": OCTAVO, "int8": "octavo int8 path", "weight_only": "octavo weight-only"}
TORCHAO, TORCHAO_COMPILED = "torchao int8", "torchao int8, compiled"
INT_MM = "torch _int_mm"
# Y is rounded once; X and W are exact in every dtype. What is left is the order of float32 sums.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5}
WEIGHT_ONLY_ROWS = 256  # beyond, the weight-only path is no contender


def of_octavo(dtype: str, paths: Sequence[str] = ("auto",), **options: Any) -> dict[str, Contender]:
    """`octavo.torch.Int8Linear` with `options`, X and Y in `dtype`, by each path ("auto" is octavo's own choice)."""
    found = {}
    for path in paths:
        alone, per_tensor = path == "weight_only", options.get("granularity") == "tensor"
        tolerance = within(THRESHOLD, weight_only=alone, per_tensor=per_tensor)
        most = WEIGHT_ONLY_ROWS if alone else math.inf
        found[PATHS[path]] = _int8(dtype, tolerance, most, path=path, **options)
    return found


def of_recipes(dtype: str) -> dict[str, Contender]:
    """Without outliers, as `OCTAVO`, and octavo's recipes, the paper's with a cap, too; rotation alone."""
    paper, best = octavo.recipe("paper"), octavo.recipe("best")
    options = {
        OCTAVO: replace(paper, outliers="none"),
        "paper": paper,
        f"paper, cap {best.cap}": replace(paper, cap=best.cap),
        "rotation": replace(best, outliers="none"),
        "best": best,
        "best, no cap": replace(best, cap=None),
    }

    def explained(given: Problem, rotation: int) -> float:
        """What is not kept in 16 bits is rounded at most as far as without outliers, after rotation."""
        return within(0)(Problem(rotated(given.x, rotation), rotated(given.weight, rotation)))

    return {
        name: _int8(dtype, partial(explained, rotation=each.rotation), options=each) for name, each in options.items()
    }


def of_torch(dtypes: Sequence[str]) -> dict[str, Contender]:
    """`torch.nn.Linear` in floating-point types."""
    found = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        found[f"torch {name}"] = Contender(partial(_linear, dtype=dtype), dtype, at_most(ROUNDING[name]))
    return found


def of_bitsandbytes(*thresholds: float) -> dict[str, Contender]:
    """The official implementation, in the float16 that it computes in; with threshold 0 without decomposition.

    It takes bfloat16 too, but converts it to float16 and back in each call, which is slower.
    """

    def prepare(weight: Tensor, threshold: float) -> Layer:
        return variants.bitsandbytes_layer(_linear(weight, torch.float16), threshold)

    names = {THRESHOLD: "bitsandbytes", 0.0: "bitsandbytes, threshold 0"}
    return {names[t]: Contender(partial(prepare, threshold=t), torch.float16, within(t)) for t in thresholds}


def of_torchao(*, compiled: bool = False) -> dict[str, Contender]:
    """Int8 weights with activations quantized in each call; `compiled`: by `torch.compile`, too."""

    def prepare(weight: Tensor) -> Layer:
        return variants.torchao_layer(_linear(weight, torch.bfloat16))

    def compile(weight: Tensor) -> Layer:
        torch.compiler.reset()  # else layers of earlier shapes count against the limit of recompilations
        return torch.compile(prepare(weight), dynamic=False)

    made = {TORCHAO: prepare, **({TORCHAO_COMPILED: compile} if compiled else {})}
    return {name: Contender(make, torch.bfloat16, within(0)) for name, make in made.items()}


def of_int_mm() -> dict[str, Contender]:
    """`torch._int_mm` between a quantization of X's rows and a scaling of the sums, all operations of torch."""

    def prepare(weight: Tensor) -> Layer:
        of_w = weight.abs().amax(1) / 127
        codes = (weight / of_w[:, None]).round_().to(torch.int8).t()

        def layer(x: Tensor) -> Tensor:
            of_x = x.abs().amax(1, keepdim=True).float().div_(127)
            sums = torch._int_mm((x / of_x).round_().to(torch.int8), codes)
            return sums.float().mul_(of_x).mul_(of_w).to(x.dtype)

        return layer

    return {INT_MM: Contender(prepare, torch.bfloat16, within(0))}


def within(threshold: float, **how: bool) -> Callable[[Problem], float]:
    """The tolerance of an int8 product: a quarter more than is expected, and a rounding of Y to bfloat16."""
    return lambda given: 1.25 * given.rounding(threshold, **how) + 2**-8


def at_most(tolerance: float) -> Callable[[Problem], float]:
    """The tolerance that is the same for every X and W."""
    return lambda given: tolerance


def _int8(dtype: str, tolerance: Callable[[Problem], float], most: float = math.inf, **options: Any) -> Contender:
    made = getattr(torch, dtype)

    def prepare(weight: Tensor) -> Layer:
        return octavo.torch.Int8Linear.from_linear(_linear(weight, made), **options)

    return Contender(prepare, made, tolerance, most)


def _linear(weight: Tensor, dtype: torch.dtype) -> torch.nn.Linear:
    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, device="meta").eval()
    layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer
