"""The outlier criterion: absolute or relative to the median of the column maxima, and the cap."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from support import Backend, Typed, equal, kinds, make, seeds

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


def exact(typed: Typed, x: ref.Floats) -> bool:
    return bool(np.array_equal(ref.round_to(x, typed.dtype), x, equal_nan=True))


def test_literal(typed: Typed) -> None:
    for case, (rows, options, expected) in LITERAL.items():
        x = np.array(rows, F)
        if exact(typed, x):
            equal(typed.host(octavo.find_outliers(typed.array(x), **options)), np.array(expected, np.int32), case)


CRITERIA: Final[tuple[dict[str, float], ...]] = (
    {"relative": 4.0},
    {"relative": 1.5, "cap": 0.06},
    {"relative": 0.3},
    {"threshold": 1.0, "cap": 0.03},
    {"threshold": 0.0, "cap": 0.5},
)


@given(kinds, st.sampled_from((1, 2, 7, 33)), st.sampled_from((1, 3, 32, 70, 300)), seeds)
def test_oracle(typed: Typed, kind: str, m: int, k: int, seed: int) -> None:
    x = make(kind, (m, k), typed.dtype, seed)
    for options in CRITERIA:
        got = octavo.find_outliers(typed.array(x), **options)
        equal(typed.host(got), ref.find_outliers(x, **options), str(options))


def test_a_float32_below_every_bfloat16_counts(backend: Backend) -> None:
    """A maximum whose upper 16 bits are 0 is above 0 all the same: the median is 0, and so is t."""
    x = np.array([[2.0**-140, 2.0**-149, 0, 3]], F)
    assert ref.find_outliers(x, relative=4).tolist() == [0, 1, 3]
    equal(backend.host(octavo.find_outliers(backend.array(x), relative=4)), np.array([0, 1, 3], np.int32))


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_linear(typed: Typed, scheme: str) -> None:
    w = ref.round_to(make("normal", (19, 131), "float32"), typed.dtype)
    weight = octavo.quantize_weight(typed.array(w), scheme=scheme, outlier_columns=[3, 130])
    expected = ref.quantize_weight(w, scheme=scheme, outlier_columns=[3, 130])
    for kind in ("outliers", "nonfinite", "wide"):
        x = make(kind, (9, 131), typed.dtype)
        for options in CRITERIA:
            for outliers in ("columns", "rows"):
                got = octavo.linear(typed.array(x), weight, outliers=outliers, path="int8", **options)
                output = ref.linear(x, expected, scheme=scheme, outliers=outliers, **options)
                tolerances.check_output(typed.host(got), output, typed.dtype)


def test_rows_do_not_depend_on_each_other(typed: Typed) -> None:
    x = make("outliers", (40, 200), typed.dtype)
    weight = octavo.quantize_weight(typed.array(make("normal", (33, 200), typed.dtype)), rotation=64)
    options = octavo.Options(outliers="rows", relative=4.0, cap=0.02, rotation=64, path="int8")
    whole = typed.host(octavo.linear(typed.array(x), weight, options=options))
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20)):
        equal(typed.host(octavo.linear(typed.array(x[rows]), weight, options=options)), whole[rows])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"relative": 0}, "relative: expected a number above 0 or None, got 0"),
        ({"relative": -1.0}, "relative: expected a finite number >= 0, got -1"),
        ({"relative": math.inf}, "relative: expected a finite number >= 0, got inf"),
        ({"cap": 1.5}, "cap: expected a number from 0 to 1, got 1.5"),
        ({"cap": math.nan}, "cap: expected a number from 0 to 1, got nan"),
    ],
)
def test_errors(options: dict[str, float], error: str) -> None:
    with pytest.raises(ValueError, match=f"^find_outliers: {error}"):
        octavo.find_outliers(np.ones((2, 3), F), **options)
    with pytest.raises(ValueError, match=f"^Options: {error}"):
        octavo.Options(**options)
