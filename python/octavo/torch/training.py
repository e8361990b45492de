"""Training with int8 products over 16- or 32-bit weights: `train_` and `untrain_` (appendix E and F of the paper)."""

import itertools
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo import _core
from octavo._text import expect, expect_choice, expect_patterns, unexpected
from octavo.functional import quantize_weight
from octavo.options import Options, options_of
from octavo.torch.choice import choose_layers
from octavo.torch.operation import FLOAT_DTYPES
from octavo.weight import Int8Weight

_SAMPLE = 256  # values of a weight that are compared, for changes that its version counter does not tell


class _Product:
    """The ``forward`` of a layer that is trained: the product, and the codes of the weight as it was last quantized."""

    def __init__(self, layer: nn.Linear, options: Options, grad_input: str, seed: str | None) -> None:
        self.layer = layer
        self.options = options
        self.seed = seed
        self.draws = 0
        self.of_gradient = replace(options, path="int8")
        self.grad_input = grad_input
        self._begin()

    def _begin(self) -> None:
        self._int8_weight: Int8Weight | None = None
        self._mark: Any = None
        self._shape: Any = None
        self._sample: Any = None
        self.number = next(_numbers)
        _products[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("layer", "options", "of_gradient", "grad_input", "seed", "draws")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __call__(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        layer = self.layer
        return _linear(input, layer.weight, layer.bias, self.number, self.grad_input == "int8")  # type: ignore[no-any-return]

    def int8_weight(self, weight: Tensor, *, backward: bool = False) -> Int8Weight:
        """The weight as codes, which are made anew, in the same memory, where it has changed.

        A change that the version counter tells, or memory that is another, is always seen. FSDP2 and what is done to
        ``weight.data`` change a weight without that: so a forward pass compares some values, too. On a device that
        would wait for it: there codes are made in every forward pass. The backward pass takes those.
        """
        version = -1 if weight.is_inference() else weight._version
        mark = (version, weight.data_ptr(), weight.shape, weight.dtype, weight.device)
        held = self._int8_weight
        if mark == self._mark and backward:
            assert held is not None
            return held
        sample = weight.flatten()[:: max(1, weight.numel() // _SAMPLE)] if _compares(weight) else None
        if mark != self._mark or sample is None or not torch.equal(sample, self._sample):
            fits = held is not None and self._shape == mark[2:]
            self._mark = None  # of codes that are half made
            if not fits:
                held = quantize_weight(weight, options=self.options)
            if fits or self.seed is not None:
                number = None if self.seed is None else random.Random(f"{self.seed} {self.draws}").getrandbits(64)
                held = quantize_weight(weight, options=self.options, out=held, seed=number)
            self.draws += 1
            self._int8_weight, self._shape = held, mark[2:]
            self._mark, self._sample = mark, None if sample is None else sample.clone()
        assert held is not None
        return held


def _compares(weight: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return weight.device.type == "cpu"


_numbers = itertools.count()
_products: weakref.WeakValueDictionary[int, _Product] = weakref.WeakValueDictionary()


@torch.library.custom_op("octavo::train_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, number: int, int8_gradient: bool) -> Tensor:
    """``x @ weight.T + bias`` by `octavo.linear`, the weight quantized. `number`: of the layer's `_Product`."""
    own = _products[number]
    native = own.int8_weight(weight.detach())._native
    return _core.linear(x.detach(), native, None if bias is None else bias.detach(), own.options._native, None)  # type: ignore[no-any-return]


@torch.library.custom_op("octavo::train_linear_backward", mutates_args=())
def _input_gradient(grad: Tensor, weight: Tensor, number: int) -> Tensor:
    """``grad @ weight`` by the int8 product with the same codes."""
    own = _products[number]
    native = own.int8_weight(weight.detach(), backward=True)._native
    return _core.linear_backward(grad.detach(), native, own.of_gradient._native, None)  # type: ignore[no-any-return]


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, number: int, int8_gradient: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, number: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.number, ctx.int8_gradient = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x in int8 or like that of the weight, which is a product in the dtype of x."""
    x, weight = ctx.saved_tensors
    of_x = of_weight = of_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        of_x = _input_gradient(grad, weight, ctx.number) if ctx.int8_gradient else grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[1]:
        of_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        of_bias = rows.sum(0)
    return of_x, of_weight, of_bias, None, None


_linear.register_autograd(_gradients, setup_context=_save)


def train_(
    model: nn.Module,
    modules: Literal["ffn", "ffn+attention"] | Sequence[str] = "ffn",
    *,
    grad_input: Literal["int8", "16bit"] = "int8",
    decomposition: bool = True,
    seed: int | None = None,
    options: Options | None = None,
    **keywords: Any,
) -> nn.Module:
    """Let linear layers of `model` multiply in int8 while they are trained, in place (appendix E and F of the paper).

    A layer stays what it is, with its class and its parameters, which any optimizer may change and any tool shard,
    cast and save; its ``forward`` is replaced. That is LLM.int8() with codes made of the weight as it is, and made anew
    in the same memory when it has changed. They take a byte for each weight.

    - The output: `octavo.linear` of x and the codes, in the dtype of x (under autocast: in autocast's).
    - The gradient of x: ``grad @ codes``, the rows of ``grad * scale`` quantized in the same way, elements from 20
      times the median magnitude of their row on (at most 2 %) in 16 bit. As in straight-through estimators, rounding
      counts as the identity.
    - The gradient of the weight: ``grad.T @ x`` as without `train_`, in the dtype of x; that of the bias is a sum.

    Args:
        modules: "ffn": the linear layers of numbered blocks that are no part of an attention. "ffn+attention": those,
            too. Or patterns of qualified names, as in a shell ("*.mlp.*"). Neither output heads nor routers, unless a
            pattern names them; see `octavo.torch.choice.choose_layers`.
        grad_input: "int8", as above, or "16bit": ``grad @ weight`` in the dtype of the gradient.
        decomposition: whether outliers of x are multiplied in 16 bit; False is ``outliers="none"``.
        seed: round weights stochastically (`octavo.quantize_weight`): another draw for each layer and each time that
            its codes are made, the same for the same seed. None: to the nearest.
        options: see `octavo.Options`; or single ones by name. With scheme "zeropoint" the gradient of x is the product
            with the dequantized weight, in float32.

    Returns:
        model. `quantize_` freezes what was trained, `untrain_` gives the layers their own products back.

    Raises (before anything is replaced):
        TypeError: a weight of another dtype than float32, float16 and bfloat16; a value of the wrong kind.
        ValueError: no such layers; a seed with scheme "zeropoint" or rotation; a layer whose class has a ``forward`` of
            its own; "static", as nothing is kept; a value that octavo does not have.
    """
    expect("train_: model", model, nn.Module, "an nn.Module")
    expect_choice("train_: grad_input", grad_input, ("int8", "16bit"))
    expect("train_: decomposition", decomposition, bool, "a bool")
    if seed is not None:
        expect("train_: seed", seed, int, "an int or None")
    chosen = options_of("train_", options, **keywords)
    if chosen.outliers == "static":
        raise ValueError("train_: outliers: expected 'columns', 'rows' or 'none', got 'static'")
    if seed is not None and (chosen.scheme != "absmax" or chosen.rotation):
        raise unexpected("train_: seed", "scheme 'absmax' and rotation 0", f"{chosen.scheme!r} and {chosen.rotation}")
    if not decomposition:
        chosen = replace(chosen, outliers="none")
    for name, layer in (layers := _choose(model, modules)).items():
        if layer.weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"train_: {name}.weight: expected float32, float16 or bfloat16, got {layer.weight.dtype}")
    for name, layer in layers.items():
        layer.forward = _Product(layer, chosen, grad_input, None if seed is None else f"{seed} {name}")  # type: ignore[method-assign]
    return model


def untrain_(model: nn.Module) -> nn.Module:
    """Give the layers that `train_` changed their own products back, in place; returns `model`."""
    expect("untrain_: model", model, nn.Module, "an nn.Module")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Product):
            del module.forward
    return model


def _choose(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The layers to train, by name."""
    if isinstance(modules, str):
        if modules not in ("ffn", "ffn+attention"):
            raise ValueError(f"train_: modules: expected 'ffn', 'ffn+attention' or patterns, got {modules!r:.99}")
        found = {}
        for name, layer in choose_layers(model).layers.items():
            path = name.lower().split(".")
            in_attention = any("attention" in part or "attn" in part for part in path)
            if _is_linear(layer) and any(map(str.isdigit, path)) and (modules == "ffn+attention" or not in_attention):
                found[name] = layer
    else:
        expect("train_: modules", modules, (list, tuple, set), "'ffn', 'ffn+attention' or a list of patterns")
        expect_patterns("train_: modules", modules)
        found = choose_layers(model, include=modules).layers
        for name, layer in found.items():
            if not _is_linear(layer):
                raise ValueError(f"train_: {name}: expected the forward of nn.Linear, got a {type(layer).__name__}")
    if not found:
        raise ValueError(f"train_: modules: expected layers of the model, got {modules!r:.99}, which finds none")
    return found


def _is_linear(layer: Any) -> bool:
    """Whether a layer's product is that of its forward; attention of PyTorch itself reads the weight past it."""
    kind = type(layer)
    return kind.forward is nn.Linear.forward and not isinstance(
        layer, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
