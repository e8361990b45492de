"""Log-likelihoods of a text under a model, and how they differ from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from octavo_bench.measuring.language import Window, log_likelihoods
from octavo_bench.measuring.progress import Progress

from .variants import Variant


@dataclass(frozen=True)
class Scores:
    """Of each window: how many tokens were scored, and the sum of their log-likelihoods (natural logarithm)."""

    tokens: list[int]
    log_likelihoods: list[float]
    top_probability: float  # mean over the tokens


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    key: str
    name: str
    perplexity: float
    log_likelihood: float  # per token
    difference: float  # of the log-likelihood per token from float32's; negative: worse
    standard_error: float  # of the difference, paired over the windows; NaN where there is only one
    top_probability: float
    linear_bytes: int
    scores: Scores


def set_aside(windows: Sequence[Window], count: int) -> tuple[list[Window], list[Window]]:
    """The first `count` windows, and those after them that share no token with them."""
    end = max((window.begin + window.ids.shape[1] for window in windows[:count]), default=0)
    return list(windows[:count]), [window for window in windows[count:] if window.begin >= end]


def score(model: nn.Module, windows: Sequence[Window], progress: Progress, doing: str) -> Scores:
    """Run the windows, one after the other."""
    tokens, sums, top = [], [], 0.0
    for window in windows:
        with progress.step(doing):
            own, largest = log_likelihoods(model, window)
            tokens.append(window.scored)
            sums.append(float(own.sum()))
            top += float(largest.sum())
    return Scores(tokens, sums, top / sum(tokens))


def compare(variant: Variant, found: Scores, reference: Scores, linear_bytes: int) -> Result:
    """A variant's row from its scores and float32's of the same windows."""
    count = sum(found.tokens)
    mean = math.fsum(found.log_likelihoods) / count
    difference, error = paired_difference(found, reference)
    perplexity = math.exp(-mean) if -mean < 700 else math.inf
    return Result(
        variant.key, variant.name, perplexity, mean, difference, error, found.top_probability, linear_bytes, found
    )


def paired_difference(found: Scores, reference: Scores) -> tuple[float, float]:
    """The mean difference per token, sum(d) / sum(n) over windows of n tokens, and its standard error.

    The error is that of a ratio of sums, windows being drawn independently:
    sqrt(w / (w - 1) * sum((d - mean * n)**2)) / sum(n) for w windows.
    """
    tokens = np.array(found.tokens, np.float64)
    differences = np.array(found.log_likelihoods) - np.array(reference.log_likelihoods)
    mean = float(differences.sum() / tokens.sum())
    count = len(tokens)
    if count < 2:
        return mean, math.nan
    rest = differences - mean * tokens
    return mean, float(np.sqrt(count / (count - 1) * (rest**2).sum()) / tokens.sum())
