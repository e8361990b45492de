"""The linear layers of other int8 implementations, in models of float32 as octavo's are.

Their weights are rounded to float16 first, too, and all but the linear layers of the model stays in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from .modules import copy_modules, linear_layers
from .schemes import THRESHOLD

# What a package that is not installed, or that is and does not run here, may raise.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)


def reason(problem: Exception) -> str:
    """An exception in one line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


@dataclass(frozen=True)
class Peer:
    """Another implementation. `make` raises ImportError where its package is not installed."""

    key: str
    name: str
    package: str
    make: Callable[[nn.Linear], nn.Module]
    held: Callable[[nn.Module], int]  # bytes of such a layer


def convert(model: nn.Module, peer: Peer) -> nn.Module:
    """A copy of the float32 `model` with `peer`'s linear layers, but the output head; `model` is left as it is.

    Raises ImportError where the package is not installed.
    """
    model = copy_modules(model)
    with _quiet():
        for name, linear in list(linear_layers(model)):
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, peer.make(linear).eval())
    return model


def linear_bytes(converted: nn.Module, original: nn.Module, peer: Peer) -> int:
    """Bytes that the linear layers of a model hold that `convert` made of `original`."""
    return sum(peer.held(converted.get_submodule(name)) for name, _ in linear_layers(original))


def package_version(peer: Peer) -> str | None:
    """Of the installed package; None where there is none."""
    try:
        return version(peer.package)
    except PackageNotFoundError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: the packages tell, when imported, of extensions that they cannot load on this machine."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _InFloat16(nn.Module):
    """A layer that computes in float16, for inputs in float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n]`` in the dtype of x."""
        y: Tensor = self.layer(x.half())
        return y.to(x.dtype)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    """`Linear8bitLt`, the official implementation of LLM.int8(), in the float16 that it computes in."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=THRESHOLD,
    )
    weight = linear.weight.detach().half()
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().half(), requires_grad=False)
    return _InFloat16(layer.to(linear.weight.device))


def _bitsandbytes_bytes(module: nn.Module) -> int:
    layer: Any = module.get_submodule("layer")
    weight = layer.weight
    # It moves from the weight to the state in the first call.
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB
    return int(weight.nbytes + scale.nbytes) + _bias_bytes(layer)


def _torchao(linear: nn.Linear) -> nn.Module:
    """Int8 weights, and activations quantized row by row in each call; no outlier columns."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(linear.weight.detach().half().float(), requires_grad=False)
    layer.bias = linear.bias
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return layer


def _torchao_bytes(module: nn.Module) -> int:
    weight: Any = module.weight
    parts, _ = weight.__tensor_flatten__()
    return sum(int(getattr(weight, part).nbytes) for part in parts) + _bias_bytes(module)


def _bias_bytes(module: nn.Module) -> int:
    return module.bias.nbytes if isinstance(module.bias, Tensor) else 0


PEERS = (
    Peer(
        "bitsandbytes",
        f"bitsandbytes Linear8bitLt, threshold {THRESHOLD:g}",
        "bitsandbytes",
        _bitsandbytes,
        _bitsandbytes_bytes,
    ),
    Peer("torchao", "torchao int8 dynamic activations", "torchao", _torchao, _torchao_bytes),
)
