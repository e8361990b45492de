"""The rows of the paper's Table 1, and how good the embeddings are with each.

Quality is measured against the float32 model's embeddings of the same sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import octavo.torch
from octavo import _types

from .model import Batch, copy_modules, embed, linear_bytes, linear_layers

THRESHOLD = 6.0  # of the paper: from this magnitude on, a feature is an outlier


@dataclass(frozen=True)
class Scheme:
    """One way to run the linear layers; its options are those of octavo.torch.quantize_."""

    name: str
    scheme: _types.Scheme | None  # None leaves the model in float32
    granularity: _types.Granularity = "vector"
    outliers: _types.Outliers = "none"
    kept: bool = False  # keep the 16-bit weights of the columns that a calibration pass finds


TABLE_1 = (
    Scheme("float32", None),
    Scheme("absmax (tensor)", "absmax", "tensor"),
    Scheme("zeropoint (tensor)", "zeropoint", "tensor"),
    Scheme("absmax row-wise", "absmax", "row"),
    Scheme("absmax vector-wise", "absmax", "vector"),
    Scheme("zeropoint vector-wise", "zeropoint", "vector"),
    Scheme("absmax row-wise + decomposition", "absmax", "row", "columns"),
    Scheme("absmax LLM.int8() (vector-wise + decomp)", "absmax", "vector", "columns"),
    Scheme("zeropoint LLM.int8() (vector-wise + decomp)", "zeropoint", "vector", "columns"),
)
FLOAT32, VECTOR_WISE, LLM_INT8 = TABLE_1[0], TABLE_1[4], TABLE_1[7]

# Table 1's LLM.int8() rows multiply outlier columns with dequantized weights. These keep the 16-bit ones.
KEPT_COLUMNS = Scheme("absmax LLM.int8(), kept 16-bit outlier weights", "absmax", "vector", "columns", kept=True)
KEPT_STATIC = Scheme("absmax LLM.int8(), kept 16-bit, static columns", "absmax", "vector", "static", kept=True)
KEPT = (KEPT_COLUMNS, KEPT_STATIC)


@dataclass(frozen=True)
class Quality:
    """How near a model's embeddings are to float32's."""

    mean_cosine: float
    min_cosine: float
    neighbors_kept: int  # sentences whose nearest other sentence is the same one


@dataclass(frozen=True)
class Row:
    """A scheme, what it came to, and the bytes that its linear layers hold."""

    name: str
    quality: Quality
    linear_bytes: int


def calibrated(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """A copy of the float32 `model` that knows its systematic outlier columns, for conversion to keep."""
    model = copy_modules(model)
    octavo.torch.calibrate_(model, [b.inputs for b in batches], threshold=THRESHOLD, progress=False)
    return model


def convert(model: nn.Module, scheme: Scheme, path: _types.Path = "int8") -> nn.Module:
    """A copy of the float32 `model` whose linear layers run as `scheme` says; `model` is left as it is.

    Weights are rounded to float16 first: LLM.int8() starts from 16-bit weights, and kept ones are to be 16-bit.
    Where `scheme.kept`, the model must be a `calibrated` one, and otherwise must not.
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
        progress=False,
    )


def evaluate(model: nn.Module, scheme: Scheme, batches: Sequence[Batch], reference: Tensor) -> Row:
    """Converts a copy, embeds the batches and compares with `reference`, float32 [count, 384]."""
    converted = convert(model, scheme)
    return row(scheme, converted, embed(converted, batches), reference)


def row(scheme: Scheme, converted: nn.Module, embeddings: Tensor, reference: Tensor) -> Row:
    """The row of a scheme from its embeddings, float32 [count, 384]."""
    return Row(scheme.name, quality(embeddings, reference), linear_bytes(converted))


def quality(embeddings: Tensor, reference: Tensor) -> Quality:
    """Cosines row by row and the nearest neighbors kept; both [count, width]. Not finite: cosine NaN."""
    cosine = nn.functional.cosine_similarity(embeddings.double(), reference.double(), dim=1)
    kept = int((nearest(embeddings) == nearest(reference)).sum())
    return Quality(float(cosine.mean()), float(cosine.min()), kept)


def nearest(embeddings: Tensor) -> Tensor:
    """The index of each row's nearest other row by cosine, int64 [count]."""
    unit = nn.functional.normalize(embeddings.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1)
