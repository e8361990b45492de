"""The ways to compute a linear layer that are compared; `contest` says how they are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import octavo
import octavo.torch
import torch
from torch import Tensor
from torch.nn import functional

from ..models import variants
from ..turns import Call
from .contest import OCTAVO, Contender, Layer, Problem

THRESHOLD = 6.0
INT8_PATH, WEIGHT_ONLY, PRODUCT = "octavo int8 path", "octavo weight-only", "octavo int8 product"
INT_MM, BITSANDBYTES, BITSANDBYTES_PLAIN = "torch _int_mm", "bitsandbytes", "bitsandbytes, threshold 0"
TORCHAO = "torchao int8"
# Y is rounded once; X and W are exact in every dtype. What is left is the order of float32 sums.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5}
WEIGHT_ONLY_ROWS = 256  # beyond, the weight-only path is no contender


def of_octavo(dtype: str) -> dict[str, Contender]:
    """`octavo.torch.Int8Linear` with its defaults, X and Y in `dtype`."""
    made = getattr(torch, dtype)

    def prepare(weight: Tensor) -> Layer:
        layer: Layer = octavo.torch.Int8Linear.from_linear(_linear(weight, made))
        return layer

    return {OCTAVO: Contender(prepare, made, within(THRESHOLD))}


def of_torch(dtypes: Sequence[str]) -> dict[str, Contender]:
    """`torch.nn.functional.linear` in floating-point types."""

    def prepare(weight: Tensor, dtype: torch.dtype) -> Layer:
        converted = weight.to(dtype)
        return lambda x: functional.linear(x, converted)

    found = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        found[torch_name(name)] = Contender(partial(prepare, dtype=dtype), dtype, at_most(ROUNDING[name]))
    return found


def torch_name(dtype: str) -> str:
    """The contender's name."""
    return f"torch {dtype}"


def of_bitsandbytes(*thresholds: float) -> dict[str, Contender]:
    """The official implementation, in the float16 that it computes in; with threshold 0 without decomposition.

    It takes bfloat16 too, but converts it to float16 and back in each call, which is slower.
    """

    def prepare(weight: Tensor, threshold: float) -> Layer:
        layer: Layer = variants.bitsandbytes_layer(_linear(weight, torch.float16), threshold)
        return layer

    names = {THRESHOLD: BITSANDBYTES, 0.0: BITSANDBYTES_PLAIN}
    return {names[t]: Contender(partial(prepare, threshold=t), torch.float16, within(t)) for t in thresholds}


def of_torchao() -> dict[str, Contender]:
    """Int8 weights with activations quantized in each call."""

    def prepare(weight: Tensor) -> Layer:
        layer: Layer = variants.torchao_layer(_linear(weight, torch.bfloat16))
        return layer

    return {TORCHAO: Contender(prepare, torch.bfloat16, within(0))}


class IntMm:
    """`torch._int_mm` between a quantization of X's rows and a scaling of the sums, all in torch operations."""

    def __init__(self, weight: Tensor) -> None:
        self.codes, self.scale = _quantize(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Y [m, n] in the dtype of X [m, k]."""
        codes, scale = _quantize(x)
        sums = torch._int_mm(codes, self.codes.t())
        return sums.float().mul_(scale).mul_(self.scale.T).to(x.dtype)

    def verify(self, x: Tensor) -> None:
        """Raise RuntimeError unless the integers are right, for X's codes and for the largest there are.

        Without the VNNI instructions oneDNN adds pairs of products in 16 bits, where they saturate.
        """
        largest = torch.full_like(x, 127, dtype=torch.int8)
        same = torch.full_like(self.codes, 127)
        if not bool((torch._int_mm(largest, same.t()) == 127 * 127 * x.shape[1]).all()):
            raise RuntimeError("torch._int_mm gives wrong integers: its sums saturate on this processor")
        check_integers(torch._int_mm(_quantize(x)[0], self.codes.t()), _quantize(x)[0], self.codes)


def of_int_mm() -> dict[str, Contender]:
    """`IntMm` with X and Y in bfloat16."""

    def verify(layer: Layer, x: Tensor) -> None:
        assert isinstance(layer, IntMm)
        layer.verify(x)

    return {INT_MM: Contender(IntMm, torch.bfloat16, within(0), verify)}


def paths_of_octavo(
    scheme: Literal["absmax", "zeropoint"] = "absmax", granularity: Literal["tensor", "row", "vector"] = "vector"
) -> dict[str, Contender]:
    """`octavo.linear` with float16, by its own choice, by each path, and its int8 product alone, codes of X given."""

    def prepare(weight: Tensor, path: Literal["auto", "int8", "weight_only"]) -> Layer:
        int8 = octavo.quantize_weight(weight.half(), scheme=scheme, granularity=granularity)
        return lambda x: octavo.linear(x, int8, path=path)

    def tolerance(given: Problem, weight_only: bool) -> float:
        per_tensor = granularity == "tensor"
        return 2 * given.rounding(THRESHOLD, weight_only=weight_only, per_tensor=per_tensor) + 2**-10

    def verify(layer: Layer, x: Tensor) -> None:
        assert isinstance(layer, _Product)
        codes = octavo.quantize(x).codes
        check_integers(octavo.int8_matmul(codes, layer.weight.codes), codes, layer.weight.codes)

    def bind(layer: Layer, x: Tensor) -> Call:
        assert isinstance(layer, _Product)
        return partial(octavo.int8_matmul, octavo.quantize(x).codes, layer.weight.codes)

    rounded, float16 = partial(tolerance, weight_only=False), torch.float16
    return {
        OCTAVO: Contender(partial(prepare, path="auto"), float16, rounded),
        INT8_PATH: Contender(partial(prepare, path="int8"), float16, rounded),
        WEIGHT_ONLY: Contender(
            partial(prepare, path="weight_only"), float16, partial(tolerance, weight_only=True), most=WEIGHT_ONLY_ROWS
        ),
        PRODUCT: Contender(_Product, float16, within(0), verify, bind),
    }


class _Product:
    """The int8 product of octavo, of which alone the time is taken; as a layer with its scales, to be checked."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = octavo.quantize_weight(weight.half())

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = _quantize(x)
        sums: Tensor = octavo.int8_matmul(codes, self.weight.codes)
        y: Tensor = sums.float() * scale * self.weight.scale
        return y.to(x.dtype)


def check_integers(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Raises RuntimeError unless the int32 `sums` are A B^T, exactly. a int8 [m, k], b int8 [n, k].

    C = A B^T has C r = A (B^T r) for any r; with r of -1, 0 and 1 every number here is exact.
    """
    r = torch.randint(-1, 2, (len(b),), generator=torch.Generator().manual_seed(1)).double().to(b.device)
    if not torch.equal(sums.double() @ r, a.double() @ (b.double().T @ r)):
        raise RuntimeError("wrong: the integers are not those of the codes")


def within(threshold: float) -> Callable[[Problem], float]:
    """The tolerance of an int8 product: a quarter more than is expected, and a rounding of Y to bfloat16."""
    return lambda given: 1.25 * given.rounding(threshold) + 2**-8


def at_most(tolerance: float) -> Callable[[Problem], float]:
    """The tolerance that is the same for every X and W."""
    return lambda given: tolerance


def _linear(weight: Tensor, dtype: torch.dtype) -> torch.nn.Linear:
    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, device="meta").eval()
    layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of X [m, k] and a scale [m, 1] for each row."""
    scale = x.abs().amax(1, keepdim=True).float().div_(127).clamp_min_(1e-30)
    return (x / scale).round_().to(torch.int8), scale
