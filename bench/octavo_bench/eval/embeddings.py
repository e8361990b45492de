"""An encoder's passages, and how near a variant's embeddings and attention are to float32's.

A passage is a line of text. Its embedding is the mean of the last hidden states over its tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo_bench.measuring.language import Language, Window
from octavo_bench.measuring.modules import top_probability
from octavo_bench.measuring.neighbors import nearest
from octavo_bench.measuring.progress import Progress

from .variants import Variant


@dataclass(frozen=True)
class Embedded:
    """Of each passage, in its order."""

    embeddings: Tensor  # float64 [passages, width], of length 1
    top_probability: float  # of attention: the largest softmax probability, mean over layers, heads and tokens


@dataclass(frozen=True)
class Similarity:
    """One row of the table."""

    key: str
    name: str
    mean_cosine: float  # of the passages' embeddings with float32's
    standard_error: float  # of the mean, passages being drawn; NaN where there is only one
    min_cosine: float
    neighbors_kept: int  # passages whose nearest other passage is the same one
    top_probability: float
    linear_bytes: int
    cosines: list[float]


def read_passages(language: Language, text: Path, window: int | None, limit: int | None = None) -> list[Window]:
    """Each line that is not blank; cut off behind `window` tokens (default: what the model takes, at most 512).

    Raises ValueError as `octavo_bench.measuring.language.read_windows` does.
    """
    window = language.window(window)
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: expected UTF-8, got {error}") from error
    parts = [language.tokenizer(line, truncation=True, max_length=window)["input_ids"] for line in lines[:limit]]
    if len(parts) < 2:
        raise ValueError(f"{text}: expected at least two lines of text, got {len(parts)}")
    begins = itertools.accumulate(map(len, parts), initial=0)
    return [Window(torch.tensor([part]), 1, begin) for part, begin in zip(parts, begins, strict=False)]


@torch.inference_mode()
def embed(model: Any, passages: Sequence[Window], progress: Progress, doing: str) -> Embedded:
    """Run the passages, one after the other."""
    found, top, tokens = [], 0.0, 0
    for passage in passages:
        with progress.step(doing):
            output = model(**passage.inputs, output_attentions=True)
            found.append(nn.functional.normalize(output.last_hidden_state[0].double().mean(0), dim=0))
            real = torch.ones_like(passage.ids, dtype=torch.bool)
            top += float(torch.stack([top_probability(p, real) for p in output.attentions]).double().mean())
            tokens += passage.ids.shape[1]
    return Embedded(torch.stack(found), top / tokens)


def compare(variant: Variant, found: Embedded, reference: Embedded, linear_bytes: int) -> Similarity:
    """A variant's row from its embeddings and float32's of the same passages."""
    cosines = (found.embeddings * reference.embeddings).sum(1)
    count = len(cosines)
    return Similarity(
        variant.key,
        variant.name,
        float(cosines.mean()),
        float(cosines.std() / math.sqrt(count)) if count > 1 else math.nan,
        float(cosines.min()),
        int((nearest(found.embeddings) == nearest(reference.embeddings)).sum()),
        found.top_probability,
        linear_bytes,
        cosines.tolist(),
    )
