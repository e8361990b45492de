"""Whether what was measured is in the paper's order: said of each pair of rows with its error, never assumed.

Two losses differ where they do by more than twice the standard error of their difference, paired over the windows or
passages; one is within a bound where it is so with twice the standard error added, and not within it where it is not
with twice the standard error taken away. In between, the text was too short to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..tables import Table
from .scores import Scores

TOLERANCE = 2e-4  # nats per token: what decomposition may cost

# Of the losses of two rows; "near": the left one is within TOLERANCE of float32's. The paper multiplies outlier columns
# with the original 16-bit weights, which is decomposition with kept weights here.
CLAIMS = (
    ("absmax loses more than row-wise", "absmax", "absmax-row", "more"),
    ("row-wise loses no less than vector-wise", "absmax-row", "absmax-vector", "no less"),
    ("vector-wise loses more than zeropoint vector-wise", "absmax-vector", "zeropoint-vector", "more"),
    ("zeropoint vector-wise loses more than decomposition", "zeropoint-vector", "llm-int8", "more"),
    ("zeropoint vector-wise loses more than kept decomposition", "zeropoint-vector", "kept-columns", "more"),
    ("decomposition is as good as float32", "llm-int8", "float32", "near"),
    ("decomposition of zeropoint is as good as float32", "llm-int8-zeropoint", "float32", "near"),
    ("decomposition with kept weights is as good as float32", "kept-columns", "float32", "near"),
    ("decomposition of zeropoint with kept weights is as good as float32", "kept-zeropoint", "float32", "near"),
    ("dequantized outlier weights lose more than kept ones", "llm-int8", "kept-columns", "more"),
)
# The schemes that are claimed to be as good as float32, and float32.
CLOSE = ("float32", *(left for _, left, _, wanted in CLAIMS if wanted == "near"))
WANTED = {
    "near": f"within {TOLERANCE:g}, with 2 standard errors",
    "more": "> 2 standard errors",
    "no less": ">= -2 standard errors",
}


def table(scores: Mapping[str, Scores], *, causal: bool) -> Table:
    """The claims about the variants that are there, by key. Of an encoder none of closeness: TOLERANCE is in nats."""
    rows = []
    for claim, left, right, wanted in CLAIMS:
        if left in scores and right in scores and (causal or wanted != "near"):
            difference, error = scores[left].paired(scores[right])
            rows.append([claim, difference, error, WANTED[wanted], verdict(difference, error, wanted)])
    return Table(
        "The paper's order of losses",
        {"claim": "", "difference": "+.6f", "±": ".6f", "wanted": "", "verdict": ""},
        rows,
        "Difference: of the two losses, left - right; ±: its standard error, paired over the windows.",
    )


def verdict(difference: float, error: float, wanted: str) -> str:
    """One of "met", "not met", "undecided"."""
    # One window has no error: then nothing is known but what is infinitely so.
    margin = math.inf if math.isnan(error) else 2 * error
    if wanted == "near":
        if abs(difference) + margin <= TOLERANCE:
            return "met"
        return "undecided" if abs(difference) - margin <= TOLERANCE else "not met"
    return "met" if (difference > margin if wanted == "more" else difference >= -margin) else "not met"
