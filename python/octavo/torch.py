"""octavo for PyTorch: `Int8Linear`, and the conversion of whole models in place.

>>> model = calibrate_(model, batches)      # doctest: +SKIP
>>> quantize_(model)                        # doctest: +SKIP

The operation is also registered as ``torch.ops.octavo.linear``, to be compiled, exported and differentiated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import octavo
from octavo import _core, _torch_layout
from octavo._layers import CALIBRATED, MIN_FRACTION, linears, replace, run_batches
from octavo._smoothing import smooth_
from octavo._types import Granularity, Outliers, Path, Scheme
from octavo.checkpoint.layers import DEFAULT_SKIP
from octavo.options import native_options
from octavo.weight import Int8Weight

__all__ = ["Int8Linear", "calibrate_", "quantize_", "smooth_"]

_FORMAT_VERSION = 1
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# --- the operation ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("octavo", "DEF")
_library.define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor code_sums, Tensor? zeropoint, Tensor? outlier_columns, "
    "Tensor? outlier_weight, Tensor? bias, str scheme, str granularity, float threshold, str outliers, str path, "
    "SymInt? in_features=None) -> Tensor"
)


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    code_sums: Tensor,
    zeropoint: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    granularity: Granularity,
    threshold: float,
    outliers: Outliers,
    path: Path,
    in_features: int | None = None,  # k, of packed codes, whose shape is that of the next multiple of 64
) -> Tensor:
    if _torch_layout.is_packed(codes) and in_features is None:
        raise ValueError("octavo::linear: in_features: expected a number with packed codes, got None")
    weight = Int8Weight(
        codes,
        scale,
        shape=(code_sums.shape[0], in_features) if _torch_layout.is_packed(codes) and in_features is not None else None,
        pack=False,
        zeropoint=zeropoint,
        outlier_columns=outlier_columns,
        outlier_weight=outlier_weight,
        code_sums=code_sums,
        scheme=scheme,
        granularity=granularity,
    )
    with torch.no_grad():  # autograd, where it is wanted, is registered below
        return octavo.linear(  # type: ignore[no-any-return]
            x, weight, bias, threshold=threshold, outliers=outliers, path=path
        )


def _linear_fake(x: Tensor, codes: Tensor, scale: Tensor, code_sums: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], code_sums.shape[0]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, code_sums, zeropoint, *_ = inputs
    ctx.save_for_backward(codes, scale, zeropoint)
    ctx.weight_shape = (code_sums.shape[0], x.shape[-1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x, through the dequantized weight, and of the bias."""
    codes, scale, zeropoint = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _torch_layout.unpack(codes, *ctx.weight_shape).to(torch.float32)
        if zeropoint is not None:
            weight = weight + zeropoint[:, None]
        grad_x = grad @ (weight * scale[:, None]).to(grad.dtype)
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, *[None] * 6, grad_bias, *[None] * 6)


_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("octavo::linear", _linear_fake, lib=_library)
torch.library.register_autograd("octavo::linear", _linear_backward, setup_context=_save_for_backward, lib=_library)

# --- the layer --------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight: LLM.int8() in place of `torch.nn.Linear`. See `octavo.linear`.

    Args:
        in_features: k.
        out_features: n.
        bias: whether the layer has one.
        scheme, granularity: see `octavo.quantize_weight`.
        threshold, outliers, path: see `octavo.linear`.
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        weight: int8 Parameter (it never requires grad): the codes as `octavo.Int8Weight` keeps them, that is packed in
            CPU memory (`packed`) and ``[n, k]`` on other devices. State dicts hold ``[n, k]`` always.
        codes: the codes, ``[n, k]``.
        scale, zeropoint, outlier_columns, outlier_weight: buffers, as in `octavo.Int8Weight`; None where not used.
        code_sums: buffer, not in the state dict: it is made anew from `weight`.
        bias: Parameter ``[n]`` or None.

    A new layer is all zeros, to be filled by ``load_state_dict``, which also takes the state dict of a ``nn.Linear``
    and quantizes it. The state dict carries scheme, granularity, threshold, outliers and path in ``_extra_state`` (JSON
    as a uint8 tensor). ``.half()``, ``.to(dtype)`` cast the bias only. Gradients flow to x (through the dequantized
    weight) and to the bias.
    """

    weight: nn.Parameter
    scale: Tensor
    zeropoint: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    code_sums: Tensor
    bias: nn.Parameter | None
    _int8_weight: Int8Weight | None  # made when it is first needed, dropped when an array changes
    _scheme: Scheme
    _granularity: Granularity

    _ARRAYS = ("scale", "zeropoint", "outlier_columns", "outlier_weight", "code_sums")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme = "absmax",
        granularity: Granularity = "vector",
        threshold: float = 6.0,
        outliers: Outliers = "columns",
        path: Path = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.threshold = float(threshold)
        self.outliers: Outliers = outliers
        self.path: Path = path
        weight = octavo.quantize_weight(torch.zeros(out_features, in_features), scheme=scheme, granularity=granularity)
        self._hold(weight)
        # A product with no rows costs nothing and refuses wrong options now rather than at the first batch.
        options: dict[str, Any] = {"threshold": threshold, "path": path}
        options["outliers"] = "none" if outliers == "static" else outliers
        octavo.linear(torch.zeros(0, in_features), weight, **options)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        if device is not None:
            self.to(device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        scheme: Scheme = "absmax",
        granularity: Granularity = "vector",
        threshold: float = 6.0,
        outliers: Outliers = "columns",
        path: Path = "auto",
        outlier_columns: Tensor | Sequence[int] | None = None,
    ) -> Int8Linear:
        """An Int8Linear with the quantized weight and the very bias of `linear`, which is left as it is.

        Args:
            outlier_columns: input features whose original weights are kept; default: those `calibrate_` recorded.
        """
        if outlier_columns is None:
            outlier_columns = getattr(linear, CALIBRATED, None)
        weight = octavo.quantize_weight(
            linear.weight, scheme=scheme, granularity=granularity, outlier_columns=outlier_columns
        )
        return cls._from_weight(
            weight, linear.bias, training=linear.training, threshold=threshold, outliers=outliers, path=path
        )

    @classmethod
    def _from_weight(
        cls,
        weight: Int8Weight,
        bias: nn.Parameter | None,
        *,
        training: bool,
        threshold: float,
        outliers: Outliers,
        path: Path,
    ) -> Int8Linear:
        layer = cls(0, 0, False, threshold=threshold, outliers=outliers, path=path)
        layer.out_features, layer.in_features = weight.shape
        layer._hold(weight)
        layer.bias = bias
        layer.train(training)
        return layer

    @property
    def scheme(self) -> Scheme:
        """Of the weight: "absmax" or "zeropoint"."""
        return self._scheme

    @property
    def granularity(self) -> Granularity:
        """Of the product: "tensor", "row" or "vector"."""
        return self._granularity

    @property
    def int8_weight(self) -> Int8Weight:
        """The weight as `octavo.linear` takes it; it shares the layer's memory."""
        if self._int8_weight is None:
            self._settle()
            self._int8_weight = Int8Weight(
                self.weight.detach(),
                **{name: getattr(self, name) for name in self._ARRAYS},
                scheme=self._scheme,
                granularity=self._granularity,
                shape=(self.out_features, self.in_features) if _torch_layout.is_packed(self.weight) else None,
            )
        return self._int8_weight

    @property
    def codes(self) -> Tensor:
        """int8 ``[n, k]``; a new tensor where the weight is packed."""
        return _torch_layout.unpack(self.weight.detach(), self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n]`` in the dtype of input (under autocast: in autocast's dtype)."""
        # A small layer's product takes less time than a few questions to PyTorch, hence their choice and their order.
        if torch.compiler.is_compiling():
            return self._registered(self._autocast(input), self.bias)
        if torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu"):
            input = self._autocast(input)
        # Not `self.bias`: where nn.Module looks for a parameter last, it is found at once.
        bias = self._parameters.get("bias")
        if bias is None:
            bias = self.bias
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            return self._registered(input, bias)
        weight = self._int8_weight
        if weight is None:
            weight = self.int8_weight
        # octavo.linear without its keywords.
        return _core.linear(  # type: ignore[no-any-return]
            input, weight._native, bias, self._call_options(), None
        )

    def _call_options(self) -> _core.Options:
        names = ("threshold", "outliers", "path")
        return native_options("linear", None, names, self.threshold, self.outliers, self.path)

    def _autocast(self, input: Tensor) -> Tensor:
        """The input in autocast's dtype where autocast is on."""
        device = input.device.type
        return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input

    def _registered(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The layer through ``torch.ops``, which the compiler and autograd know."""
        return torch.ops.octavo.linear(  # type: ignore[no-any-return]
            input,
            self.weight,
            self.scale,
            self.code_sums,
            self.zeropoint,
            self.outlier_columns,
            self.outlier_weight,
            bias,
            self._scheme,
            self._granularity,
            self.threshold,
            self.outliers,
            self.path,
            self.in_features,
        )

    def extra_repr(self) -> str:
        """The layer's options, for ``print(model)``."""
        kept = "" if self.outlier_columns is None else f", outlier_columns={len(self.outlier_columns)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self._scheme!r}, granularity={self._granularity!r}, threshold={self.threshold:g}, "
            f"outliers={self.outliers!r}, path={self.path!r}{kept}"
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def _hold(self, weight: Int8Weight) -> None:
        """Take the arrays of `weight` as parameter and buffers."""
        self._scheme = weight.scheme
        self._granularity = weight.granularity
        # A parameter, so that tied weights stay tied when a model is moved or copied.
        codes = weight.codes if weight.packed is None else weight.packed
        self.weight = nn.Parameter(codes, requires_grad=False)
        for name in self._ARRAYS:
            self.register_buffer(name, getattr(weight, name), persistent=name != "code_sums")
        self._int8_weight = None

    def _settle(self) -> None:
        """Bring the weight into the order of its device."""
        settled = _torch_layout.settled(self.weight, self.out_features, self.in_features)
        if settled is not self.weight:
            self.weight = settled

    def _complete(self) -> None:
        """Make what no state dict holds from the codes: their order and their sums."""
        self._settle()
        self.code_sums = _torch_layout.sum_codes(self.weight, self.out_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._ARRAYS or name == "weight":
            self.__dict__["_int8_weight"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_int8_weight": None}  # copies read their own arrays

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        exact = {name: getattr(self, name) for name in self._ARRAYS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in exact.items():
            moved = getattr(self, name)
            if original is not None and moved.dtype != original.dtype:
                setattr(self, name, original.to(moved.device))  # follow the device, not the dtype
        self._settle()
        self._int8_weight = None
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = _torch_layout.natural(self.weight, self.out_features, self.in_features)

    def get_extra_state(self) -> Tensor:
        """The options of the layer as JSON, in a uint8 tensor: what every checkpoint format can hold."""
        state = {
            "format_version": _FORMAT_VERSION,
            "scheme": self._scheme,
            "granularity": self._granularity,
            "threshold": self.threshold,
            "outliers": self.outliers,
            "path": self.path,
        }
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over options that `get_extra_state` returned. Raises ValueError for an unknown format version."""
        options = json.loads(bytes(state.cpu().numpy()))
        if options["format_version"] != _FORMAT_VERSION:
            raise ValueError(
                f"Int8Linear: _extra_state: expected format_version {_FORMAT_VERSION}, got {options['format_version']}"
            )
        self._scheme = options["scheme"]
        self._granularity = options["granularity"]
        self.threshold = float(options["threshold"])
        self.outliers = options["outliers"]
        self.path = options["path"]
        self._int8_weight = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        shape = (self.out_features, self.in_features)
        weight = state_dict.get(key)
        fits = weight is not None and tuple(weight.shape) == shape
        if weight is not None and weight.is_floating_point() and fits:
            quantized = octavo.quantize_weight(weight, scheme=self._scheme, granularity=self._granularity)
            arrays = {name: getattr(quantized, name) for name in self._ARRAYS if name != "code_sums"}
            entries = {"weight": quantized.codes, **arrays, "_extra_state": self.get_extra_state()}
            state_dict.update({prefix + name: entry for name, entry in entries.items() if entry is not None})
        extra_state = state_dict.get(prefix + "_extra_state")
        if extra_state is not None:
            self.set_extra_state(extra_state)
        # Which of these exist, and how large they are, depends on how the weight was made.
        for name in ("scale", "zeropoint", "outlier_columns", "outlier_weight"):
            entry = state_dict.get(prefix + name)
            if entry is not None:
                setattr(self, name, torch.empty_like(entry, device=self.weight.device))
            elif extra_state is not None and name != "scale":
                setattr(self, name, None)
        if fits and _torch_layout.is_packed(self.weight) and not local_metadata.get("assign_to_params_buffers", False):
            state_dict[key] = _torch_layout.pack(state_dict[key].cpu())  # to be copied into memory in that order
        if weight is not None and not fits:
            del state_dict[key]
            error_msgs.append(
                f"size mismatch for {key}: copying a param with shape {weight.shape} from checkpoint, "
                f"the shape in current model is {torch.Size(shape)}."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if weight is not None and not fits:
            missing_keys.remove(key)
        if self.weight.device.type != "meta":
            self._complete()


# --- models -----------------------------------------------------------------------------------------------------------


def quantize_(
    model: nn.Module,
    *,
    scheme: Scheme = "absmax",
    granularity: Granularity = "vector",
    threshold: float = 6.0,
    outliers: Outliers = "columns",
    path: Path = "auto",
    skip: Sequence[str] = DEFAULT_SKIP,
    progress: bool = True,
) -> nn.Module:
    """Replace every `torch.nn.Linear` of `model` by an `Int8Linear`, in place, one after the other.

    The 16/32-bit weight of a layer is released as soon as its int8 form exists. Layers that share a weight go on
    sharing it. Left as they are: layers whose qualified name matches a pattern of `skip` (by default the output head
    and the routers of mixtures of experts), subclasses of ``nn.Linear`` (their owners read the weight themselves), and
    layers whose weight is also used by another kind of module (a tied embedding). Columns that `calibrate_` recorded
    are kept in 16 bit.

    Args:
        scheme, granularity: see `octavo.quantize_weight`.
        threshold, outliers, path: see `octavo.linear`.
        skip: patterns as in a shell ("*", "?", "[...]") of qualified names ("decoder.layers.0.fc1").
        progress: show a progress bar.

    Returns:
        model.

    Raises (before anything is replaced):
        ValueError: a weight with NaN or Inf, or without memory (meta device); "static" and a layer that was not
            calibrated; `model` is itself an ``nn.Linear`` (use `Int8Linear.from_linear`).
        TypeError: a weight of another dtype than float32, float16 and bfloat16.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "quantize_: model: expected a module that holds layers, got an nn.Linear (use Int8Linear.from_linear)"
        )
    Int8Linear(1, 1, scheme=scheme, granularity=granularity, threshold=threshold, outliers=outliers, path=path)
    _check_layers(linears(model, skip), outliers)

    # By name only: nothing here may hold on to a weight that has been converted.
    for sharers in tqdm(_by_weight(linears(model, skip)), desc="quantize", unit="weight", disable=not progress):
        first: Int8Linear | None = None
        for names in sharers:
            layer = model.get_submodule(names[0])
            assert isinstance(layer, nn.Linear)
            if first is None:
                replacement = first = Int8Linear.from_linear(
                    layer, scheme=scheme, granularity=granularity, threshold=threshold, outliers=outliers, path=path
                )
            else:
                replacement = Int8Linear._from_weight(
                    first.int8_weight,
                    layer.bias,
                    training=layer.training,
                    threshold=threshold,
                    outliers=outliers,
                    path=path,
                )
                replacement.weight = first.weight
            for name in names:
                replace(model, name, replacement)
        del layer
    return model


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    threshold: float = 6.0,
    min_fraction: float = MIN_FRACTION,
    skip: Sequence[str] = DEFAULT_SKIP,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Find the systematic outlier columns of each linear layer, for `quantize_` to keep in 16 bit.

    Runs `batches` through the 16/32-bit model (it needs the original weights, so it comes before `quantize_`) and
    records, layer by layer, the input features whose magnitude is >= `threshold` at a fraction of at least
    `min_fraction` of all positions. The paper calls outliers systematic from 6 % of positions on (section 4).

    Args:
        batches: each a tensor (``model(batch)``), a tuple or list (``model(*batch)``), or a mapping
            (``model(**batch)``).
        threshold: as in `octavo.linear`.
        min_fraction: in [0, 1]; 0 records every column that was ever an outlier.
        skip: as in `quantize_`.
        progress: show a progress bar.

    Returns:
        Qualified name -> int32 ``[r]``, ascending, for every layer that the batches reached.

    The model is run in eval mode without autograd; its mode and parameters are left as they were.

    Raises:
        ValueError: `threshold` < 0 or `min_fraction` outside [0, 1], no batches, no linear layers, or layers that are
            quantized already.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("calibrate_: model: expected the 16/32-bit model, got one that quantize_ has converted")
    layers = dict(linears(model, skip))
    columns = systematic_columns(
        model, layers, batches, threshold=threshold, min_fraction=min_fraction, progress=progress
    )
    for name, own in columns.items():
        setattr(layers[name], CALIBRATED, own)
    return columns


def systematic_columns(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    threshold: float,
    min_fraction: float,
    progress: bool,
    function: str = "calibrate_",
) -> dict[str, Tensor]:
    """What `calibrate_` returns, of the modules `layers` of `model`, by any names; nothing is recorded in them.

    `function`: whose arguments these are, for its errors.
    """
    if not threshold >= 0:
        raise ValueError(f"{function}: threshold: expected a number >= 0, got {threshold}")
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"{function}: min_fraction: expected a number in [0, 1], got {min_fraction}")
    if not layers:
        raise ValueError(f"{function}: model: expected linear layers, got none")
    counts: dict[nn.Module, Tensor] = {}
    positions: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        rows = x.detach().reshape(-1, x.shape[-1])
        # As in find_outliers: compared in float32, and NaN and Inf count.
        found = (~(rows.float().abs() < threshold)).sum(0)
        counts[module] = counts[module] + found if module in counts else found
        positions[module] = positions.get(module, 0) + rows.shape[0]

    modules = {id(layer): layer for layer in layers.values()}.values()
    handles = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in modules]
    try:
        run_batches(model, batches, doing="calibrate", progress=progress)
    finally:
        for handle in handles:
            handle.remove()
    if not counts:
        raise ValueError(f"{function}: batches: expected at least one that reaches a linear layer, got none")

    columns: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer in counts:
            systematic = (counts[layer] > 0) & (counts[layer] >= min_fraction * positions[layer])
            columns[name] = systematic.nonzero().flatten().to(torch.int32).cpu()
    return columns


def _by_weight(layers: Iterable[tuple[str, nn.Linear]]) -> list[list[list[str]]]:
    """The names of linear layers: for each weight, for each layer that uses it, the names of that layer."""
    weights: dict[int, dict[int, list[str]]] = {}
    for name, layer in layers:
        weights.setdefault(id(layer.weight), {}).setdefault(id(layer), []).append(name)
    return [list(users.values()) for users in weights.values()]


def _check_layers(layers: Iterable[tuple[str, nn.Linear]], outliers: Outliers) -> None:
    """Raise now what would stop the conversion of a layer."""
    for name, layer in layers:
        weight = layer.weight
        if weight.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"quantize_: {name}.weight: expected float32, float16 or bfloat16, got {weight.dtype}")
        if weight.device.type == "meta":
            raise ValueError(f"quantize_: {name}.weight: expected a tensor with memory, got one on the meta device")
        if not torch.isfinite(weight).all():
            raise ValueError(f"quantize_: {name}.weight: expected finite values, got NaN or Inf")
        if outliers == "static" and not hasattr(layer, CALIBRATED):
            raise ValueError(
                f"quantize_: {name}: expected a calibrated layer for outliers='static' (run calibrate_ first), got none"
            )
