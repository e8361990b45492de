"""octavo.int8_matmul: exact, or refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from support import VIEWS, Backend, equal, seeds, sizes, unchanged, views

INT32_MAX = 2**31 - 1


def codes(rng: np.random.Generator, *shape: int) -> ref.Codes:
    return rng.integers(-128, 128, shape, dtype=np.int8)


def check(backend: Backend, a: Any, b: Any) -> None:
    native = backend.array(a), backend.array(b)
    with unchanged(backend, *native):
        got = octavo.int8_matmul(*native)
    expected = ref.int8_matmul(a, b)
    assert np.abs(expected).max(initial=0) <= INT32_MAX
    equal(backend.host(got), expected.astype(np.int32))


def test_literal(backend: Backend) -> None:
    a = np.array([[1, -2, 3], [127, 127, -128]], np.int8)
    b = np.array([[4, 5, 6], [-128, 0, 1], [0, 0, 0], [127, 127, -128]], np.int8)
    got = octavo.int8_matmul(backend.array(a), backend.array(b))
    expected = [[4 - 10 + 18, -128 + 3, 0, 127 - 254 - 384], [508 + 635 - 768, -16256 - 128, 0, 2 * 16129 + 16384]]
    equal(backend.host(got), np.array(expected, np.int32))


def test_extreme_codes_do_not_saturate(backend: Backend) -> None:
    """Pairwise 16-bit sums (maddubs and its like) saturate on these."""
    for value in ((127, 127), (-128, 127), (-128, -128), (127, -128)):
        for k in (1, 2, 3, 4, 31, 64, 65, 1000):
            a, b = np.full((3, k), value[0], np.int8), np.full((5, k), value[1], np.int8)
            got = octavo.int8_matmul(backend.array(a), backend.array(b))
            equal(backend.host(got), np.full((3, 5), value[0] * value[1] * k, np.int32))


def test_empty(backend: Backend) -> None:
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)):
        m, k, n = shape
        got = octavo.int8_matmul(backend.array(np.zeros((m, k), np.int8)), backend.array(np.zeros((n, k), np.int8)))
        equal(backend.host(got), np.zeros((m, n), np.int32))


def test_small_shapes_exhaustively(backend: Backend) -> None:
    """Every m, k, n up to 5, and every k up to 70 and n up to 37 with few rows: all tails."""
    rng = np.random.default_rng(3)
    small = [(m, k, n) for m in range(1, 6) for k in range(1, 6) for n in range(1, 6)]
    for m, k, n in [*small, *((2, k, 3) for k in range(6, 71)), *((3, 19, n) for n in range(6, 38))]:
        check(backend, codes(rng, m, k), codes(rng, n, k))


@given(sizes, sizes, sizes, seeds)
def test_oracle(backend: Backend, m: int, k: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check(backend, codes(rng, m, k), codes(rng, n, k))


def test_larger_than_a_tile(backend: Backend) -> None:
    for shape in ((257, 513, 129), (1, 4096, 1000), (70, 3001, 70)):
        m, k, n = shape
        rng = np.random.default_rng(4)
        check(backend, codes(rng, m, k), codes(rng, n, k))


def test_any_rank(backend: Backend) -> None:
    for shape in ((9,), (2, 9), (2, 3, 9), (1, 2, 1, 3, 9), (0, 3, 9)):
        rng = np.random.default_rng(5)
        check(backend, codes(rng, *shape), codes(rng, 4, 9))


# ---------------------------------------------------------------------------------------------------------------
# k above 133144 can overflow int32: never wrapped


def test_long_k_is_exact(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    check(backend, codes(rng, 2, 200_000), codes(rng, 3, 200_000))


def test_a_partial_sum_may_overflow(backend: Backend) -> None:
    """127 * 127 * 150000 is above int32; the second half takes it back: the result fits and is exact."""
    k = 300_000
    a = np.full((2, k), 127, np.int8)
    b = np.full((1, k), 127, np.int8)
    b[:, k // 2 :] = -127
    b[0, 0] = 126
    got = octavo.int8_matmul(backend.array(a), backend.array(b))
    equal(backend.host(got), np.full((2, 1), -127, np.int32))


def _extreme(total: int) -> tuple[ref.Codes, ref.Codes]:
    """a, b [1, k] with a . b = total, as large parts as there are."""
    sign, whole = (1, 127) if total >= 0 else (-1, -128)
    count, rest = divmod(abs(total), 127 * abs(whole))
    more, last = divmod(rest, 127)
    a = np.array([127] * count + [127, 1], np.int8)
    b = np.array([whole] * count + [sign * more, sign * last], np.int8)
    assert ref.int8_matmul(a[None], b[None])[0, 0] == total
    return a[None], b[None]


def test_the_largest_results_fit(backend: Backend) -> None:
    for total in (INT32_MAX, INT32_MAX - 1, -(2**31), -(2**31) + 1):
        a, b = _extreme(total)
        got = octavo.int8_matmul(backend.array(a), backend.array(b))
        equal(backend.host(got), np.array([[total]], np.int32))


def test_a_result_beyond_int32_is_refused(backend: Backend) -> None:
    """Also those that would wrap to a small number, and where the other results fit."""
    for total in (INT32_MAX + 1, -(2**31) - 1, 2**32, 2**32 + 5, -(2**32)):
        a, b = _extreme(total)
        a, b = np.concatenate([a, np.zeros_like(a)]), np.concatenate([np.zeros_like(b)] * 4 + [b])
        with pytest.raises(ValueError, match="int8_matmul"):
            octavo.int8_matmul(backend.array(a), backend.array(b))


# ---------------------------------------------------------------------------------------------------------------
# Layout and out


def test_views_equal_contiguous(backend: Backend) -> None:
    for view, which in itertools.product(views(backend), ("a", "b", "both")):
        rng = np.random.default_rng(7)
        for lead, k, n in (((5,), 33, 7), ((16,), 64, 32), ((1,), 17, 3), ((2, 3), 17, 5)):
            a, b = codes(rng, *lead, k), codes(rng, n, k)
            expected = ref.int8_matmul(a, b).astype(np.int32)
            x, y = backend.array(a), backend.array(b)
            x = VIEWS[view](backend, x) if which != "b" else x
            y = VIEWS[view](backend, y) if which != "a" else y
            with unchanged(backend, x, y):
                equal(backend.host(octavo.int8_matmul(x, y)), expected)


def test_out(backend: Backend) -> None:
    """`out` is what is returned, strided or not; nothing beside it is written."""
    for view in ("contiguous", *views(backend)):
        rng = np.random.default_rng(8)
        a, b = codes(rng, 6, 35), codes(rng, 10, 35)
        out = backend.array(np.zeros((6, 10), np.int32))
        if view != "contiguous":
            out = VIEWS[view](backend, out)
        assert octavo.int8_matmul(backend.array(a), backend.array(b), out=out) is out
        equal(backend.host(out), ref.int8_matmul(a, b).astype(np.int32))
        if view != "contiguous":
            whole = backend.host(out.base if backend.on_numpy else out._base)
            assert (whole == 77).sum() >= whole.size - 60  # the padding of support.VIEWS


@given(st.integers(0, 4), seeds)
def test_leading_axes_are_rows(backend: Backend, axes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lead = tuple(rng.integers(1, 4, axes).tolist())
    check(backend, codes(rng, *lead, 13), codes(rng, 5, 13))
