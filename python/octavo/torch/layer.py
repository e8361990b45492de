"""`Int8Linear`: ``nn.Linear`` with an int8 weight, and what a state dict brings to a layer that has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional

from octavo import _core
from octavo import file_format as names
from octavo.options import Options, options_of
from octavo.torch.tensor import Int8Tensor
from octavo.weight import Int8Weight

# Where `calibrate_` leaves a layer's columns for `quantize_`.
CALIBRATED = "octavo_outlier_columns"


def _option(name: str) -> Any:
    """A property of the layer: an option of its weight."""

    def change(self: Int8Linear, value: Any) -> None:
        self.weight.options = replace(self.weight.options, **{name: value})

    return property(lambda self: getattr(self.weight.options, name), change)


def _array(name: str) -> Any:
    """A property of the layer: an array of its weight."""
    return property(lambda self: getattr(self.weight.int8_weight, name))


class Int8Linear(nn.Linear):
    """A linear layer with an int8 weight: LLM.int8() in place of `torch.nn.Linear`. See `octavo.linear`.

    `quantize_` makes it of every ``nn.Linear``. It is one in every respect, its `weight` being an `Int8Tensor`; what it
    adds is speed: where nothing but the product is asked for, it calls octavo past PyTorch's dispatcher.

    Args:
        in_features: k.
        out_features: n.
        bias: whether the layer has one.
        device: of all tensors.
        dtype: of the weight, as which it shows itself, and of the bias.
        options: see `octavo.Options`; or single ones by name, such as ``threshold=5.0``.

    Attributes:
        weight: Parameter, an `Int8Tensor` ``[n, k]``.
        bias: Parameter ``[n]`` or None.
        scheme, granularity, threshold, outliers, path: the options of `weight`; the last three may be set.
        int8_weight: the weight as `octavo.linear` takes it.
        codes, scale, zeropoint, outlier_columns, outlier_weight, code_sums: its arrays.

    A new layer is all zeros, to be filled by ``load_state_dict``. That also takes the state dict of a ``nn.Linear``,
    whose weight it quantizes, and that of a layer in the first checkpoint format (``weight`` int8, ``_extra_state``).
    Gradients flow to x (through the dequantized weight) and to the bias.
    """

    weight: Any
    bias: Any
    scheme = _option("scheme")
    granularity = _option("granularity")
    threshold = _option("threshold")
    outliers = _option("outliers")
    path = _option("path")
    codes = _array("codes")
    scale = _array("scale")
    zeropoint = _array("zeropoint")
    outlier_columns = _array("outlier_columns")
    outlier_weight = _array("outlier_weight")
    code_sums = _array("code_sums")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        options: Options | None = None,
        **keywords: Any,
    ) -> None:
        chosen = options_of("Int8Linear", options, **keywords)
        zeros = partial(torch.zeros, dtype=dtype, device="cpu")  # which the meta device has no values of to quantize
        weight = Int8Tensor.from_float(zeros(out_features, in_features), chosen)
        self._become(weight, nn.Parameter(zeros(out_features)) if bias else None)
        self.to(torch.get_default_device() if device is None else device)

    def _become(self, weight: Int8Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        watch_loading(self)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        outlier_columns: Tensor | Sequence[int] | None = None,
        options: Options | None = None,
        **keywords: Any,
    ) -> Int8Linear:
        """An Int8Linear with the quantized weight and the very bias of `linear`, which is left as it is.

        Args:
            outlier_columns: input features whose original weights are kept; default: those `calibrate_` recorded.
            options: see `octavo.Options`; or single ones by name.
        """
        chosen = options_of("from_linear", options, **keywords)
        if outlier_columns is None:
            outlier_columns = getattr(linear, CALIBRATED, None)
        layer = cls.__new__(cls)
        layer._become(Int8Tensor.from_float(linear.weight, chosen, outlier_columns), linear.bias)
        return layer.train(linear.training)

    @property
    def int8_weight(self) -> Int8Weight:
        """The weight as `octavo.linear` takes it; it shares the layer's memory."""
        return self.weight.int8_weight  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; where that would come to nothing but the product, at once."""
        if len(args) == 1 and not kwargs and not is_dynamo_compiling():
            y = _plain_call(self, args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n]`` in the dtype of input (under autocast: in autocast's dtype)."""
        if not is_dynamo_compiling():
            y: Tensor | None = _plain_product(self, input)
            if y is not None:
                return y
        return functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The layer's options, for ``print(model)``."""
        if not isinstance(self.weight, Int8Tensor):
            return super().extra_repr()
        arrays, options = self.weight._arrays, self.weight.options
        kept = "" if arrays.outlier_columns is None else f", outlier_columns={len(arrays.outlier_columns)}"
        return (
            f"{super().extra_repr()}, scheme={options.scheme!r}, granularity={options.granularity!r}, "
            f"threshold={options.threshold:g}, outliers={options.outliers!r}, path={options.path!r}{kept}"
        )


# The product of a layer and x where PyTorch wants nothing of it but its result, else None; the first only where a call
# of the layer comes to nothing but `forward`: nobody has hooked, compiled or replaced anything.
_plain_call = _core.plain_layer(Int8Tensor, Int8Linear)
_plain_product = _core.plain_layer(Int8Tensor, None)


# --- state dicts ------------------------------------------------------------------------------------------------------


def watch_loading(module: nn.Module) -> None:
    """Let `module`, a layer with an int8 weight, load every kind of state dict: see `_take_weight`."""
    module.register_load_state_dict_pre_hook(_take_weight)


def share_in_inference_mode(enabled: bool = True) -> None:
    """Let layers that take the same input be one call in `torch.inference_mode`, too. At first they are not.

    PyTorch does not count there how often a tensor is written to. So enable this only where nobody writes to an input
    between the layers that take it: a layer would be given what the input was before. It holds for the process.

    Raises:
        TypeError: `enabled` is no bool.
    """
    _core.share_in_inference_mode(enabled)


def _take_weight(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Make an Int8Tensor of what a state dict has in place of one.

    That is its parts (``weight.codes``, ``weight.scale``, ...); those of a layer in the first version of the format
    (``weight`` int8, ``scale``, ..., ``_extra_state``); a floating-point weight that is to be assigned, not copied.
    """
    key = f"{prefix}weight"
    present: Any = module._parameters.get("weight")
    value, made = state_dict.get(key), None
    if f"{key}.{names.CODES}" in state_dict:
        start = f"{key}."
        parts = {name[len(start) :]: state_dict.pop(name) for name in list(state_dict) if name.startswith(start)}
        made = Int8Tensor.from_parts(parts)
    elif value is not None and value.dtype == torch.int8 and f"{prefix}_extra_state" in state_dict:
        old = names.PARTS_OF_VERSION_1.items()
        parts = {part: state_dict.pop(prefix + name) for name, part in old if prefix + name in state_dict}
        made = Int8Tensor.from_parts(parts, torch.float32 if present is None else present.dtype)
    elif (
        isinstance(present, Int8Tensor)
        and local_metadata.get("assign_to_params_buffers", False)
        and isinstance(value, Tensor)
        and not isinstance(value, Int8Tensor)
        and value.is_floating_point()
        and value.shape == present.shape
    ):
        made = Int8Tensor.from_float(value.t() if present._transposed else value, present.options)
    if made is not None:  # a layer may have [k, n]
        state_dict[key] = made.t() if isinstance(present, Int8Tensor) and present._transposed else made
