"""octavo.find_outliers: O = { j : exists i with not (|x[i, j]| < threshold) }."""

from __future__ import annotations

from typing import Any

import numpy as np
import octavo
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from support import VIEWS, Typed, around, equal, kinds, make, seeds, sizes, unchanged, views

INF, NAN = np.inf, np.nan


def check(typed: Typed, x: ref.Floats, **options: Any) -> None:
    native = typed.array(x)
    with unchanged(typed.backend, native):
        got = octavo.find_outliers(native, **options)
    equal(typed.host(got), ref.find_outliers(x, **options))


LITERAL: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    "default is 6": ([[5, 6, -7, 0], [0, 0, 0, 6.5]], {}, [1, 2, 3]),
    "at the threshold": ([[2, -2, 1.9921875, -1.9921875]], {"threshold": 2.0}, [0, 1]),
    "none": ([[1, 2], [3, 4]], {}, []),
    "all": ([[7, 8], [3, -9]], {}, [0, 1]),
    "NaN and Inf": ([[NAN, 1, INF], [1, 1, 1], [1, 1, -INF]], {}, [0, 2]),
    "only NaN and Inf": ([[NAN, 100, -INF]], {"threshold": INF}, [0, 2]),
    "threshold 0 takes zeros": ([[0, -0.0, 1]], {"threshold": 0.0}, [0, 1, 2]),
    "threshold -0.0 is 0": ([[0, 1]], {"threshold": -0.0}, [0, 1]),
    "an integer threshold": ([[1, 2, 3]], {"threshold": 2}, [1, 2]),
    "a threshold between two 16-bit values": ([[6, 6.03125]], {"threshold": 6.001}, [1]),
    "rank 1": ([1, 10, 2], {}, [1]),
    "rank 3": ([[[1, 2], [3, 4]], [[5, 6], [0, 0]]], {}, [1]),
    "last row only": ([[0, 0, 0]] * 70 + [[0, 0, 6]], {}, [2]),
}


def test_literal(typed: Typed) -> None:
    for case, (x, options, columns) in LITERAL.items():
        got = octavo.find_outliers(typed.array(np.array(x)), **options)
        equal(typed.host(got), np.array(columns, np.int32), case)


def test_empty(typed: Typed) -> None:
    """No row is an outlier's row, whatever the threshold."""
    for shape in ((0, 5), (3, 0), (0, 0), (0,), (2, 0, 3)):
        got = octavo.find_outliers(typed.array(np.zeros(shape)), threshold=0.0)
        equal(typed.host(got), np.zeros(0, np.int32))


def test_neighbors_of_the_threshold(typed: Typed) -> None:
    for threshold in (6.0, 1.0, 2.0**-10, 1000.0, 0.75):
        x = around(threshold, typed.dtype)
        x = np.append(x, [NAN, 0])
        expected = [j for j, v in enumerate(x) if not abs(v) < threshold]
        assert 0 < len(expected) < len(x)
        for rows in (1, 2, 5):
            for repeat in (1, 7):  # past one vector register
                wide = np.tile(x, (rows, repeat))
                got = octavo.find_outliers(typed.array(wide), threshold=threshold)
                columns = [j + len(x) * r for r in range(repeat) for j in expected]
                equal(typed.host(got), np.array(columns, np.int32))


def test_every_single_column_is_found(typed: Typed) -> None:
    """One outlier at a time, at every column and in several rows: no tail is missed."""
    for k in (1, 5, 16, 33, 67, 131):
        for j in range(k):
            x = np.full((3, k), 5.5)
            x[j % 3, j] = -6
            equal(typed.host(octavo.find_outliers(typed.array(x))), np.array([j], np.int32))


@given(st.data(), kinds, sizes, sizes, seeds)
def test_oracle(typed: Typed, data: st.DataObject, kind: str, m: int, k: int, seed: int) -> None:
    x = make(kind, (m, k), typed.dtype, seed)
    finite = np.abs(x[np.isfinite(x)])
    values = [0.0, 6.0, INF, *finite[:3].tolist()]  # values of x themselves: the exact threshold
    check(typed, x, threshold=data.draw(st.sampled_from(values)))


def test_views_equal_contiguous(typed: Typed) -> None:
    for view in views(typed.backend):
        for shape in ((5, 33), (16, 64), (2, 3, 17)):
            x = make("outliers", shape, typed.dtype)
            strided = VIEWS[view](typed.backend, typed.array(x))
            equal(typed.host(octavo.find_outliers(strided, threshold=2.0)), ref.find_outliers(x, threshold=2.0))


def test_feeds_exclude_and_outlier_columns(typed: Typed) -> None:
    """What find_outliers returns is what quantize and quantize_weight take."""
    x = make("outliers", (8, 40), typed.dtype)
    columns = octavo.find_outliers(typed.array(x))
    expected = ref.find_outliers(x)
    assert len(expected)
    got = octavo.quantize(typed.array(x), exclude=columns)
    equal(typed.host(got.codes), ref.quantize(x, exclude=expected).codes)
    weight = octavo.quantize_weight(typed.array(x), outlier_columns=columns)
    equal(typed.host(weight.outlier_columns), expected)
