"""The ways to run a model's linear layers that are compared: the rows of the paper's Table 1, and others.

Every variant starts from weights that are rounded to float16, as LLM.int8() does, and leaves all that is not a linear
layer as it is, and the output head, which the recipe "best" alone makes int8, where the model is on a CPU.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import octavo.torch
import torch
from octavo import Options, recipe
from torch import Tensor, nn

from ..commands import expect_known
from .modules import copy_modules, hooked, linear_layers

# What a package that is not installed, or that is and does not run here, may raise.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)
THRESHOLD = 6.0  # of the paper: from this magnitude on, a feature is an outlier


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def attempt(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Where what is inside does not run here, it ends there, and `left_out` has the reason by the name."""
    try:
        yield
    except BROKEN as error:
        left_out[name] = reason(error)


def told(left_out: Iterable[tuple[str, str]]) -> str:
    """What a table's note says of what was left out, and why."""
    return "".join(f" Left out: {name}: {why}." for name, why in left_out)


@dataclass(frozen=True)
class Variant:
    """One way."""

    key: str  # its name on a command line
    name: str  # in tables
    options: Options | None = None  # of octavo's layers; None where they are not octavo's
    kept: Options | None = None  # whose criterion `calibrate_` finds the columns by that keep their 16-bit weights
    smooth: bool = False  # SmoothQuant (arXiv 2211.10438) first, from the same calibration pass
    peer: Callable[[nn.Linear], nn.Module] | None = None  # makes another implementation's layer of a linear layer


def _options(scheme: Any, granularity: Any, outliers: Any = "none", path: Any = "int8") -> Options:
    return Options(scheme=scheme, granularity=granularity, outliers=outliers, threshold=THRESHOLD, path=path)


_VECTOR, _COLUMNS = _options("absmax", "vector"), _options("absmax", "vector", "columns")
_BY_ROW, _STATIC = _options("absmax", "vector", "rows"), _options("absmax", "vector", "static")
_ZEROPOINT = _options("zeropoint", "vector", "columns")
_BEST, _CALIBRATED = recipe("best"), recipe("best", calibrated=True)
_ROWS = Options(rotation=64, outliers="rows", relative=6.3, cap=0.02)  # 20 times the median magnitude of a row

FLOAT32 = Variant("float32", "float32")
ABSMAX = Variant("absmax", "absmax (tensor)", _options("absmax", "tensor"))
VECTOR_WISE = Variant("absmax-vector", "absmax vector-wise", _VECTOR)
ZEROPOINT_VECTOR = Variant("zeropoint-vector", "zeropoint vector-wise", _options("zeropoint", "vector"))
LLM_INT8 = Variant("llm-int8", "absmax LLM.int8() (vector-wise + decomp)", _COLUMNS)
TABLE_1 = (
    FLOAT32,
    ABSMAX,
    Variant("zeropoint", "zeropoint (tensor)", _options("zeropoint", "tensor")),
    Variant("absmax-row", "absmax row-wise", _options("absmax", "row")),
    VECTOR_WISE,
    ZEROPOINT_VECTOR,
    Variant("absmax-row-decomposition", "absmax row-wise + decomposition", _options("absmax", "row", "columns")),
    LLM_INT8,
    Variant("llm-int8-zeropoint", "zeropoint LLM.int8() (vector-wise + decomp)", _ZEROPOINT),
)
# Table 1's LLM.int8() rows multiply outlier columns with dequantized weights, and choose them from the whole call.
# These keep the outlier columns' 16-bit weights, or choose them row by row, or once.
KEPT_COLUMNS = Variant("kept-columns", "absmax LLM.int8(), kept 16-bit outlier weights", _COLUMNS, kept=_COLUMNS)
BEST = Variant("best", "recipe best", _BEST)
BEST_KEPT = Variant("best-calibrated", "recipe best, calibrated", _CALIBRATED, kept=_CALIBRATED)
OTHERS = (
    Variant("llm-int8-rows", "absmax LLM.int8(), outliers row by row", _BY_ROW),
    KEPT_COLUMNS,
    Variant("kept-zeropoint", "zeropoint LLM.int8(), kept 16-bit outlier weights", _ZEROPOINT, kept=_COLUMNS),
    Variant("kept-rows", "absmax LLM.int8(), kept 16-bit, row by row", _BY_ROW, kept=_COLUMNS),
    Variant("kept-static", "absmax LLM.int8(), kept 16-bit, static columns", _STATIC, kept=_COLUMNS),
    Variant("relative", "columns from 4 times the median on", Options(relative=4.0, cap=0.02)),
    BEST,
    BEST_KEPT,
    Variant("rotation", "rotation alone", Options(rotation=64, outliers="none")),
    Variant("rotation-rows", "rotation, outliers row by row", _ROWS),
    Variant("rotation-rows-kept", "rotation, outliers row by row, kept", _ROWS, kept=_ROWS),
    Variant("weight-only", "int8 weights alone", _options("absmax", "vector", path="weight_only")),
    Variant("smoothquant", "SmoothQuant, absmax vector-wise", _VECTOR, smooth=True),
    Variant("smoothquant-llm-int8", "SmoothQuant, absmax LLM.int8()", _COLUMNS, smooth=True),
)


class _In16Bit(nn.Module):
    """A layer that computes in a 16-bit dtype, for inputs of any dtype."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n]`` in the dtype of x."""
        return self.layer(x.to(self.dtype)).to(x.dtype)


def bitsandbytes_layer(linear: nn.Linear, threshold: float = THRESHOLD) -> Any:
    """`Linear8bitLt`, the official implementation of LLM.int8(), for the float16 that it computes in."""
    import bitsandbytes

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = bitsandbytes.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=threshold)
    weight = linear.weight.detach().half().cpu()  # where it is quantized on its way to the device
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias:
        layer.bias = nn.Parameter(linear.bias.detach().half(), requires_grad=False)
    return layer.to(linear.weight.device).eval()


def torchao_layer(linear: nn.Linear) -> Any:
    """Int8 weights, and activations quantized row by row in each call; no outlier columns."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta").eval()
    layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    layer.bias = linear.bias
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return layer


PEERS = (
    Variant("bfloat16", "torch bfloat16", peer=lambda x: _In16Bit(copy.deepcopy(x).bfloat16(), torch.bfloat16)),
    Variant("bitsandbytes", "bitsandbytes", peer=lambda linear: _In16Bit(bitsandbytes_layer(linear), torch.float16)),
    Variant("torchao", "torchao", peer=torchao_layer),
)
ALL = (*TABLE_1, *OTHERS, *PEERS)


def chosen(keys: Sequence[str] | None, *, peers: bool = False) -> list[Variant]:
    """The variants of these names, in the order of the tables; for None all, peers where they are asked for.

    Raises ValueError for a name that there is not.
    """
    known = [variant.key for variant in ALL]
    expect_known("--schemes", keys or (), known)
    wanted = set(known[: -len(PEERS)] if keys is None else keys) | {peer.key for peer in PEERS if peers}
    return [variant for variant in ALL if variant.key in wanted]


class Maker:
    """Makes variants of a model. Calibrates once, and only where a variant needs it.

    `calibration`: the model's keyword arguments, batch by batch. `insert`: for SmoothQuant, divide in front of layers
    where nothing in front of them can take the scales.
    """

    def __init__(self, model: nn.Module, calibration: Sequence[Mapping[str, Tensor]], *, insert: bool = False) -> None:
        self.model, self._calibration, self._insert = model, calibration, insert
        self.dtype = next(model.parameters()).dtype
        self._bases: dict[tuple[bool, Options | None], Any] = {}

    def _calibrated(self, variant: Variant) -> Any:
        """The model that a variant is made of."""
        key = variant.smooth, variant.kept
        if key not in self._bases:
            model = self._bases[key] = copy_modules(self.model)
            given: Any = (model, self._calibration)
            if variant.smooth:
                octavo.torch.smooth_(*given, insert=self._insert, progress=False)
            else:
                octavo.torch.calibrate_(*given, options=variant.kept, progress=False)
        return self._bases[key]

    def make(self, variant: Variant, **options: Any) -> Any:
        """The model as `variant`, with other options where they are given (``path="auto"``).

        Raises ValueError where the model cannot be smoothed, one of `BROKEN` where a peer's package does not run.
        """
        base = self._calibrated(variant) if variant.smooth or variant.kept is not None else self.model
        if variant.options is None and variant.peer is None:
            return base
        model = copy_modules(base)
        for name, linear in list(linear_layers(model)):
            linear.weight = nn.Parameter(linear.weight.half(), requires_grad=False)
            if variant.peer is not None:
                linear.weight = nn.Parameter(linear.weight.to(self.dtype), requires_grad=False)
                model.set_submodule(name, variant.peer(linear).eval())
        if variant.options is None:
            return model
        head = None if variant in (BEST, BEST_KEPT) else False
        return octavo.torch.quantize_(model, head=head, **{**variant.options.to_dict(), **options}, progress=False)


@torch.inference_mode()
def share_in_16_bit(model: nn.Module, inputs: Mapping[str, Tensor], rows: int | None = None) -> float | None:
    """Of the elements that octavo's layers are given, `rows` at a time, the part that goes through 16 bit.

    None where there are no such layers, and where X is not quantized at all.
    """
    outlying, total = 0, 0

    def count(module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal outlying, total
        x, weight = args[0].flatten(0, -2), module.weight
        own = weight.options
        if own.outliers == "static":
            outlying += len(x) * len(weight.int8_weight.outlier_columns)
        elif own.outliers in ("columns", "rows"):
            calls = x.split(1 if own.outliers == "rows" else rows or len(x))
            outlying += sum(len(call) * len(octavo.find_outliers(call, **own.criterion)) for call in calls)
        total += x.numel()

    layers: list[Any] = [each for _, each in linear_layers(model) if isinstance(each.weight, octavo.torch.Int8Tensor)]
    if not layers or layers[0].weight.options.path == "weight_only":
        return None
    with hooked((layer, count) for layer in layers):
        model(**inputs)
    return outlying / total
