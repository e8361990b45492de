"""The outlier criterion: absolute or relative to the median of the column maxima, and the cap."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import pytest
import reference as ref

F = np.float32
INF, NAN = np.inf, np.nan
ONE_ROW: Final = math.sqrt(math.log(1024) / math.log(2))  # f(1) = sqrt(10)

# name: (rows of x, options, outlier columns by hand)
LITERAL: Final[dict[str, tuple[list[list[float]], dict[str, float], list[int]]]] = {
    # Maxima 1, 2, 3, 40: c = 4, the lower median is 2, f(2) = sqrt(5) = 2.236, t = 4 * 2.236 * 2 = 17.9.
    "lower median": ([[1, -2, 3, 17], [0, 1, 3, -40]], {"relative": 4}, [3]),
    "below t": ([[1, -2, 3, 17], [0, 1, 3, -17.5]], {"relative": 4}, []),
    # One row: f(1) = sqrt(10) = 3.162, t = 2 * 3.162 * 1 = 6.32.
    "one row": ([[1, 1, 1, 6.25, 6.5]], {"relative": 2}, [4]),
    # Zero columns are not counted: maxima 2, 4, 30, median 4, t = 1 * 3.162 * 4 = 12.6.
    "zero columns": ([[0, 0, 0, 0, 2, 4, 30]], {"relative": 1}, [6]),
    "all zero": ([[0, 0, 0]], {"relative": 4}, []),
    # As bfloat16, cut: 1.0078 - 2^-10 becomes 1, so that t = 4 sqrt(10) = 12.649, not 12.7.
    "median is cut": ([[1.0068359375, 1.0068359375, 1.0068359375, 12.6875]], {"relative": 4}, [3]),
    # NaN and Inf count as infinite; the median of 1, 1, 1, Inf, Inf is 1, of 1, Inf, Inf is Inf.
    "NaN and Inf": ([[1, NAN, 1, -INF, 1]], {"relative": 4}, [1, 3]),
    "median is Inf": ([[1, NAN, -INF]], {"relative": 4}, [1, 2]),
    "cap": ([[9, 7, 8, 1], [1, 1, 1, 1]], {"cap": 0.5}, [0, 2]),
    "cap, ties to the first": ([[7, 9, 7, 7]], {"cap": 0.5}, [0, 1]),
    "cap is rounded down": ([[7, 9, 8]], {"cap": 0.66}, [1]),
    "cap of none": ([[7, 9, 8]], {"cap": 0}, []),
    "cap spares NaN and Inf": ([[7, NAN, INF, -INF]], {"cap": 0.25}, [1, 2, 3]),
    "cap and NaN": ([[7, NAN, 9, 8]], {"cap": 0.5}, [1, 2]),
    "cap not reached": ([[7, 1, 1, 1]], {"cap": 0.25}, [0]),
    "cap of relative": ([[1, 1, 1, 1, 20, 30, 25, 1, 1, 1]], {"relative": 4, "cap": 0.2}, [5, 6]),
}


@pytest.mark.parametrize("case", LITERAL)
def test_oracle_literal(case: str) -> None:
    rows, options, expected = LITERAL[case]
    assert ref.find_outliers(np.array(rows, F), **options).tolist() == expected


def test_oracle_rows_are_calls_of_their_own() -> None:
    x = np.array([[1, 1, 1, 20], [20, 20, 20, 20], [0, 0, 0, 1]], F)
    weight = ref.quantize_weight(np.ones((2, 4), F))
    mask = ref.outlier_mask(x, weight, outliers="rows", threshold=6, relative=4)
    assert mask.tolist() == [[False, False, False, True], [False] * 4, [False] * 4]
    capped = ref.outlier_mask(x, weight, outliers="rows", threshold=6, cap=0.25)
    assert capped.tolist() == [[False, False, False, True], [True, False, False, False], [False] * 4]


@pytest.mark.parametrize(("rows", "factor"), [(1, ONE_ROW), (16, math.sqrt(2)), (511, 1.00014), (512, 1), (4096, 1)])
def test_oracle_few_rows(rows: int, factor: float) -> None:
    """The threshold of few rows is higher, as the maximum of few values is lower."""
    assert ref.relative_threshold(np.ones(8, F), rows, 4) == pytest.approx(4 * factor, rel=1e-5)
