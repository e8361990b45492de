"""How good the embeddings are with each row of the paper's Table 1.

Quality is measured against the float32 model's embeddings of the same sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from octavo_bench.measuring import schemes
from octavo_bench.measuring.modules import linear_bytes
from octavo_bench.measuring.neighbors import nearest
from octavo_bench.measuring.schemes import (
    FLOAT32,
    KEPT_COLUMNS,
    KEPT_STATIC,
    LLM_INT8,
    TABLE_1,
    VECTOR_WISE,
    Scheme,
    convert,
)

from .model import Batch, embed

KEPT = (KEPT_COLUMNS, KEPT_STATIC)

__all__ = [
    "FLOAT32",
    "KEPT",
    "KEPT_COLUMNS",
    "LLM_INT8",
    "TABLE_1",
    "VECTOR_WISE",
    "Quality",
    "Row",
    "Scheme",
    "calibrated",
    "convert",
    "evaluate",
    "quality",
    "row",
]


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
    return schemes.calibrated(model, [batch.inputs for batch in batches])


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
