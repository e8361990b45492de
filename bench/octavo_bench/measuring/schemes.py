"""The rows of the paper's Table 1, and models whose linear layers run as a row says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import octavo.torch
from octavo import _types
from torch import Tensor, nn

from .modules import copy_modules, linear_layers, output_head

THRESHOLD = 6.0  # of the paper: from this magnitude on, a feature is an outlier


@dataclass(frozen=True)
class Scheme:
    """One way to run the linear layers; its options are those of octavo.torch.quantize_."""

    key: str  # for a command line
    name: str
    scheme: _types.Scheme | None  # None leaves the model in float32
    granularity: _types.Granularity = "vector"
    outliers: _types.Outliers = "none"
    kept: bool = False  # keep the 16-bit weights of the columns that a calibration pass finds
    smooth: bool = False  # SmoothQuant (arXiv 2211.10438), from the same calibration pass


TABLE_1 = (
    Scheme("float32", "float32", None),
    Scheme("absmax", "absmax (tensor)", "absmax", "tensor"),
    Scheme("zeropoint", "zeropoint (tensor)", "zeropoint", "tensor"),
    Scheme("absmax-row", "absmax row-wise", "absmax", "row"),
    Scheme("absmax-vector", "absmax vector-wise", "absmax", "vector"),
    Scheme("zeropoint-vector", "zeropoint vector-wise", "zeropoint", "vector"),
    Scheme("absmax-row-decomposition", "absmax row-wise + decomposition", "absmax", "row", "columns"),
    Scheme("llm-int8", "absmax LLM.int8() (vector-wise + decomp)", "absmax", "vector", "columns"),
    Scheme("llm-int8-zeropoint", "zeropoint LLM.int8() (vector-wise + decomp)", "zeropoint", "vector", "columns"),
)
FLOAT32, VECTOR_WISE, LLM_INT8 = TABLE_1[0], TABLE_1[4], TABLE_1[7]

# Table 1's LLM.int8() rows multiply outlier columns with dequantized weights, and choose them from the whole call.
ROWS = Scheme("llm-int8-rows", "absmax LLM.int8(), outliers row by row", "absmax", "vector", "rows")
# These keep the outlier columns' 16-bit weights.
KEPT_COLUMNS = Scheme(
    "kept-columns", "absmax LLM.int8(), kept 16-bit outlier weights", "absmax", "vector", "columns", kept=True
)
KEPT_ZEROPOINT = Scheme(
    "kept-zeropoint", "zeropoint LLM.int8(), kept 16-bit outlier weights", "zeropoint", "vector", "columns", kept=True
)
KEPT_ROWS = Scheme("kept-rows", "absmax LLM.int8(), kept 16-bit, row by row", "absmax", "vector", "rows", kept=True)
KEPT_STATIC = Scheme(
    "kept-static", "absmax LLM.int8(), kept 16-bit, static columns", "absmax", "vector", "static", kept=True
)

SMOOTH_VECTOR = Scheme("smoothquant", "SmoothQuant, absmax vector-wise", "absmax", "vector", smooth=True)
SMOOTH_LLM_INT8 = Scheme(
    "smoothquant-llm-int8", "SmoothQuant, absmax LLM.int8()", "absmax", "vector", "columns", smooth=True
)


def calibrated(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """A copy of the float32 `model` that knows its systematic outlier columns, for conversion to keep.

    `inputs`: the model's keyword arguments, batch by batch.
    """
    model = copy_modules(model)
    octavo.torch.calibrate_(model, inputs, threshold=THRESHOLD, skip=_skip(model), progress=False)
    return model


def smoothed(model: nn.Module, inputs: Sequence[Mapping[str, Tensor]], *, insert: bool = False) -> nn.Module:
    """A copy of the float32 `model` that computes the same function with smoothed inputs of its linear layers.

    `inputs`: as in `calibrated`; `insert`: as in octavo.torch.smooth_. Raises ValueError where nothing can be smoothed.
    """
    model = copy_modules(model)
    octavo.torch.smooth_(model, inputs, insert=insert, skip=_skip(model), progress=False)
    return model


def convert(model: nn.Module, scheme: Scheme, path: _types.Path = "int8") -> nn.Module:
    """A copy of the float32 `model` whose linear layers run as `scheme` says; `model` is left as it is.

    Weights are rounded to float16 first: LLM.int8() starts from 16-bit weights, and kept ones are to be 16-bit.
    Where `scheme.kept`, the model must be a `calibrated` one, and otherwise must not; where `scheme.smooth`, a
    `smoothed` one. The output head is not converted.
    """
    if scheme.scheme is None:
        return model
    model = copy_modules(model)
    for _, linear in linear_layers(model):
        linear.weight = nn.Parameter(linear.weight.half(), requires_grad=False)
    return octavo.torch.quantize_(
        model,
        scheme=scheme.scheme,
        granularity=scheme.granularity,
        threshold=THRESHOLD,
        outliers=scheme.outliers,
        path=path,
        skip=_skip(model),
        progress=False,
    )


def _skip(model: nn.Module) -> tuple[str, ...]:
    head = output_head(model)
    return () if head is None else (head,)
