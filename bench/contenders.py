"""Ways to compute a linear layer, which the benchmarks compare as `octavo_bench.measuring.contest` says."""

from __future__ import annotations

from collections.abc import Callable

import octavo
import torch
from octavo_bench.measuring.contest import (
    OCTAVO,
    Contender,
    Layer,
    Problem,
    at_most,
    bitsandbytes_linear,
    check,
    prepare,
    problem,
    torch_linear,
    within,
)
from octavo_bench.measuring.schemes import THRESHOLD

__all__ = ["OCTAVO", "THRESHOLD", "Contender", "Layer", "Problem", "check", "contenders", "prepare", "problem"]

BFLOAT16 = "torch bfloat16"
FLOAT32 = "torch float32"
INT_MM = "torch _int_mm"
BITSANDBYTES = "bitsandbytes, threshold 6"
BITSANDBYTES_PLAIN = "bitsandbytes, threshold 0"
TORCHAO = "torchao int8"
TORCHAO_COMPILED = "torchao int8, compiled"


def octavo_linear(weight: torch.Tensor) -> Layer:
    """LLM.int8() with the options that `octavo.linear` has by default."""
    quantized = octavo.quantize_weight(weight.bfloat16())
    return lambda x: octavo.linear(x, quantized)


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
        BFLOAT16: Contender(torch_linear(bf16), bf16, at_most(2**-8)),
        FLOAT32: Contender(torch_linear(torch.float32), torch.float32, at_most(1e-5)),
        INT_MM: Contender(IntMm, bf16, within(0), verify_int_mm),
        BITSANDBYTES: Contender(bitsandbytes_linear(THRESHOLD), f16, within(THRESHOLD)),
        BITSANDBYTES_PLAIN: Contender(bitsandbytes_linear(0.0), f16, within(0)),
        TORCHAO: Contender(torchao_linear(compiled=False), bf16, within(0)),
    }
    if compile_torchao:
        found[TORCHAO_COMPILED] = Contender(torchao_linear(compiled=True), bf16, within(0))
    return found
