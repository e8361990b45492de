"""Whether what was measured is in the paper's order: said of each pair of rows with its error, never assumed.

A loss is what a scheme takes from float32's log-likelihood per token, or, of an encoder, 1 - the cosine of an embedding
with float32's. Two losses differ where they do by more than twice the standard error of their difference, paired over
the windows or passages; one is within a bound where it is so with twice the standard error added, and not within it
where it is not with twice the standard error taken away. In between, the text was too short to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .embeddings import Similarity
from .perplexity import Result, Scores, paired_difference

TOLERANCE = 2e-4  # of the log-likelihood per token: what decomposition may cost


Verdict = Literal["met", "not met", "undecided"]


@dataclass(frozen=True)
class Check:
    """A claim about two rows, and whether it is met."""

    claim: str
    left: str  # keys of the rows
    right: str
    difference: float  # of the losses, left - right
    standard_error: float
    wanted: str
    verdict: Verdict


# Of the losses of two rows; "near": the left one is within TOLERANCE of float32's. The paper multiplies outlier columns
# with the original 16-bit weights, which is decomposition with kept weights here.
CLAIMS = (
    ("absmax loses more than row-wise", "absmax", "absmax-row", "more"),
    ("row-wise loses no less than vector-wise", "absmax-row", "absmax-vector", "no less"),
    ("vector-wise loses more than zeropoint vector-wise", "absmax-vector", "zeropoint-vector", "more"),
    ("zeropoint vector-wise loses more than decomposition", "zeropoint-vector", "llm-int8", "more"),
    (
        "zeropoint vector-wise loses more than decomposition with kept weights",
        "zeropoint-vector",
        "kept-columns",
        "more",
    ),
    ("decomposition is as good as float32", "llm-int8", "float32", "near"),
    ("decomposition of zeropoint is as good as float32", "llm-int8-zeropoint", "float32", "near"),
    ("decomposition with kept weights is as good as float32", "kept-columns", "float32", "near"),
    ("decomposition of zeropoint with kept weights is as good as float32", "kept-zeropoint", "float32", "near"),
    ("dequantized outlier weights lose more than kept ones", "llm-int8", "kept-columns", "more"),
)


def checks(results: Sequence[Result | Similarity]) -> list[Check]:
    """The claims about rows that are there. Of an encoder none of closeness: TOLERANCE is one of log-likelihoods."""
    rows: Mapping[str, Result | Similarity] = {result.key: result for result in results}
    return [
        _check(claim, rows[left], rows[right], wanted)
        for claim, left, right, wanted in CLAIMS
        if left in rows and right in rows and not (wanted == "near" and isinstance(rows[left], Similarity))
    ]


def _scores(row: Result | Similarity) -> Scores:
    """Of an encoder: the cosines, each of one passage."""
    return row.scores if isinstance(row, Result) else Scores([1] * len(row.cosines), row.cosines, row.top_probability)


def _check(claim: str, left: Result | Similarity, right: Result | Similarity, wanted: str) -> Check:
    gain, error = paired_difference(_scores(left), _scores(right))
    difference = -gain
    # One window has no error: then nothing is known but what is infinitely so.
    margin = math.inf if math.isnan(error) else 2 * error

    def check(verdict: Verdict, said: str) -> Check:
        return Check(claim, left.key, right.key, difference, error, said, verdict)

    if wanted == "near":
        said = f"within {TOLERANCE:g}, with 2 standard errors"
        if abs(difference) + margin <= TOLERANCE:
            return check("met", said)
        return check("undecided" if abs(difference) - margin <= TOLERANCE else "not met", said)
    if wanted == "more":
        return check("met" if difference > margin else "not met", "> 2 standard errors")
    return check("met" if difference >= -margin else "not met", ">= -2 standard errors")
