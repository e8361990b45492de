"""octavo.linear: hand-computed cases, the oracle over every scheme, granularity and policy, and the edges."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from support import KINDS, MAX, NUMPY, TORCH, VIEWS, Backend, Typed, equal, make, names, seeds, sizes, unchanged, views

# What is said here of outliers holds for this path, which "auto" is on the CPU, but not on a GPU for few rows.
linear = functools.partial(octavo.linear, path="int8")

F = np.float32
INF, NAN = np.inf, np.nan


def check(
    typed: Typed,
    x: ref.Floats,
    w: ref.Floats,
    bias: ref.Floats | None = None,
    *,
    scheme: str = "absmax",
    granularity: str = "vector",
    kept: list[int] | None = None,
    weight_dtype: str | None = None,
    **options: Any,
) -> Any:
    """octavo.linear is the oracle's, within tolerances.py, and touches no input. Returns the output."""
    backend = typed.backend
    native = typed.array(x)
    native_w = backend.array(w, weight_dtype or typed.dtype)
    weight = octavo.quantize_weight(native_w, scheme=scheme, granularity=granularity, outlier_columns=kept)
    oracle = ref.quantize_weight(w, scheme=scheme, granularity=granularity, outlier_columns=kept)
    native_bias = None if bias is None else typed.array(bias)
    with unchanged(backend, native, native_bias, weight.codes, weight.scale, weight.outlier_weight):
        y = linear(native, weight, native_bias, **options)
    assert backend.dtype_name(y) == typed.dtype
    options = {k: v for k, v in options.items() if v != "auto"}
    expected = ref.linear(x, oracle, bias, scheme=scheme, granularity=granularity, **options)
    tolerances.check_output(backend.host(y), expected, typed.dtype)
    return y


# ---------------------------------------------------------------------------------------------------------------
# Literal cases. Every scale below is 1, or a power of two, so results are exact in float32.

X = [[127, 1, 254], [127, 1, 1]]
W = [[127, 3, 2.25], [-127, 0, 8]]  # codes [127, 3, 2] and [-127, 0, 8], scale 1
KEPT_2 = {"outlier_columns": [2]}
AFFINE = {"scheme": "zeropoint"}
LITERAL: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any], Any]] = {
    # row 0: 127 * 127 + 3 + 2 * 2 = 16136; row 1 alike without the third feature
    "int8": ([[127, 1, 2]], W, {}, {"outliers": "none"}, [[16136, -16113]]),
    # column 2 is outlying (254 >= 200): its x are multiplied with dequantized weights 2 and 8
    "columns": (X, W, {}, {"threshold": 200.0}, [[16132 + 508, -16129 + 2032], [16132 + 2, -16129 + 8]]),
    "columns, kept": (
        X,
        W,
        KEPT_2,
        {"threshold": 200.0},
        [[16132 + 571.5, -16129 + 2032], [16132 + 2.25, -16129 + 8]],
    ),
    # row 1 has no outlier of its own: its third element goes the int8 way, code 1 times code 2
    "rows": (X, W, KEPT_2, {"threshold": 200.0, "outliers": "rows"}, [[16703.5, -14097], [16134, -16121]]),
    "static": (X, W, KEPT_2, {"threshold": INF, "outliers": "static"}, [[16703.5, -14097], [16134.25, -16121]]),
    # row 0: scale 254/127 = 2, codes [64 (63.5, tie), 0 (0.5, tie), 127]: 2 * (64*127 + 127*2), 2 * (127*8 - 64*127)
    "none": (X, W, KEPT_2, {"outliers": "none"}, [[16764, -14224], [16134, -16121]]),
    # a kept column that is not outlying goes the int8 way: 2, not 2.25
    "kept, not outlying": ([[127, 1, 2]], W, KEPT_2, {"threshold": 200.0}, [[16136, -16113]]),
    "at the threshold": ([[127, 1, 200]], W, KEPT_2, {"threshold": 200.0}, [[16132 + 450, -16129 + 1600]]),
    "weight only": (X, W, KEPT_2, {"path": "weight_only"}, [[16129 + 3 + 508, -16129 + 2032], [16134, -16121]]),
    # X: max - min = 254, nd = 1, zp = 137: codes [-127, 127]; W: zp = 0; 264 * 127 - 10 * 127
    "zeropoint x": ([[10, 264]], [[-127, 127], [127, -127]], AFFINE, {"outliers": "none"}, [[32258, -32258]]),
    "zeropoint both": ([[0, 254]], [[1, 255]], AFFINE, {"outliers": "none"}, [[64770]]),
    # the outlier column has neither code nor zero point: 254 * 255 - 1000 * 1
    "zeropoint, columns": (
        [[0, 254, -1000]],
        [[1, 255, 1]],
        AFFINE,
        {"threshold": 1000.0},
        [[63770]],
    ),
    # one scale of X for both rows
    "tensor": ([[127, 0], [1, 2]], [[127, 1]], {"granularity": "tensor"}, {"outliers": "none"}, [[16129], [129]]),
    "tensor, rows": (
        [[127, 512], [1, 2]],
        [[127, 1]],
        {"granularity": "tensor"},
        {"outliers": "rows", "threshold": 512.0},
        [[16129 + 512], [129]],
    ),
    "row": ([[127, 0], [1, 2]], [[127, 1], [64, 0]], {"granularity": "row"}, {"outliers": "none"}, None),
}  # fmt: skip


def test_literal(backend: Backend) -> None:
    for case, (x, w, of_weight, options, expected) in LITERAL.items():
        if expected is None:  # row 1: scale 2/127, codes [64 (63.5), 127]; no power of two, so from its float32 parts
            scale = F(2) / F(127)
            expected = [[16129, 127 * 64], [F(64 * 127 + 127) * scale, F(64 * 64) * scale]]
        weight = octavo.quantize_weight(backend.array(np.array(w, F)), **of_weight)
        for bias in (None, [100, -0.5]):
            b = None if bias is None else np.array(bias, F)[: len(w)]
            given_bias = None if b is None else backend.array(b)
            y = linear(backend.array(np.array(x, F)), weight, given_bias, **options)
            equal(backend.host(y), np.array(expected, F) + (0 if b is None else b), case)


def test_bfloat16_above_65504() -> None:
    """No float16 intermediate. 8 * 127 * 127 = 129032 is 129024 in bfloat16, infinity in float16."""
    for backend, dtype, expected in ((TORCH, "bfloat16", 129024), (TORCH, "float16", INF), (NUMPY, "float16", INF)):
        if backend.missing:
            continue
        ones = Typed(backend, dtype).array(np.full((1, 8), 127))
        y = linear(ones, octavo.quantize_weight(ones), outliers="none")
        assert backend.host(y).tolist() == [[expected]]


def test_float16_output_is_rounded_once(backend: Backend) -> None:
    """A float16 partial result would lose the last bits: steps are 2 here, and 4085 (a tie) would become 4084."""
    x = backend.array(np.array([[127, 1, 2048]], F), "float16")
    # int8 term 127*16 + 1*5 = 2037, outlier term 2048, bias 0.5: 4085.5
    w = backend.array(np.array([[16, 5, 1]], F), "float16")
    weight = octavo.Int8Weight(
        backend.array(np.array([[16, 5, 1]], np.int8)),
        backend.array(np.ones(1, F)),
        outlier_columns=backend.array(np.array([2], np.int32)),
        outlier_weight=w[:, 2:],
        scheme="absmax",
        granularity="vector",
    )
    bias = backend.array(np.array([0.5], F), "float16")
    y = linear(x, weight, bias, threshold=1000.0)
    assert backend.host(y).tolist() == [[4086]]


# ---------------------------------------------------------------------------------------------------------------
# The oracle


COMBINATIONS = tuple(itertools.product(ref.SCHEMES, ref.GRANULARITIES))
# Linear of the kinds of data whose output float32 can hold in any order of summation.
LINEAR_KINDS = tuple(kind for kind in KINDS if kind != "huge")
SHAPES = ((1, 1, 1), (3, 5, 2), (1, 64, 48), (7, 33, 19), (16, 64, 32), (67, 131, 65))


@pytest.mark.parametrize("outliers", [*ref.OUTLIERS, "weight_only"])
def test_every_combination(typed: Typed, outliers: str) -> None:
    """Every scheme, granularity and policy, with and without kept columns and bias, on outlying data."""
    for scheme, granularity in COMBINATIONS:
        options = {"path": "int8", "outliers": outliers}
        if outliers == "weight_only":
            options = {"path": "weight_only"}
        for m, k, n in SHAPES:
            x, w = make("outliers", (m, k), typed.dtype), make("normal", (n, k), typed.dtype)
            bias = make("normal", (n,), typed.dtype)
            columns = ref.find_outliers(x).tolist()
            # none; all that are outlying; one of them and one that is not
            kepts = [None, columns, sorted({*columns[:1], k // 2})]
            for kept, b in itertools.product(kepts, (None, bias)):
                if outliers == "static" and kept is None:
                    continue
                check(typed, x, w, b, scheme=scheme, granularity=granularity, kept=kept, **options)


@given(
    st.data(),
    sizes,
    sizes,
    sizes,
    st.sampled_from(LINEAR_KINDS),
    st.sampled_from(["normal", "outliers", "positive", "zero rows", "wide", "narrow", "constant rows"]),
    seeds,
    st.sampled_from(COMBINATIONS),
)
def test_oracle(
    typed: Typed,
    data: st.DataObject,
    m: int,
    k: int,
    n: int,
    kind: str,
    weight_kind: str,
    seed: int,
    combination: tuple[str, str],
) -> None:
    x, w = make(kind, (m, k), typed.dtype, seed), make(weight_kind, (n, k), typed.dtype, seed)
    finite = np.abs(x[np.isfinite(x)])
    kept = data.draw(st.none() | st.lists(st.integers(0, k - 1), max_size=6), label="kept")
    policies = [p for p in ref.OUTLIERS if p != "static" or kept is not None]
    bias = data.draw(st.sampled_from([None, make("normal", (n,), typed.dtype, seed)]), label="bias")
    check(
        typed,
        x,
        w,
        bias,
        scheme=combination[0],
        granularity=combination[1],
        kept=kept,
        threshold=data.draw(st.sampled_from([6.0, 0.0, INF, *finite[:2].tolist()]), label="threshold"),
        outliers=data.draw(st.sampled_from(policies), label="outliers"),
        path=data.draw(st.sampled_from(ref.PATHS), label="path"),
    )


@pytest.mark.parametrize("outliers", ref.OUTLIERS)
def test_larger_than_a_tile(typed: Typed, outliers: str) -> None:
    for shape in ((1, 4096, 257), (130, 515, 259), (5, 1031, 1), (300, 64, 7)):
        m, k, n = shape
        x, w = make("outliers", (m, k), typed.dtype), make("normal", (n, k), typed.dtype)
        check(typed, x, w, make("normal", (n,), typed.dtype), kept=[0, 3, k - 1], outliers=outliers)


def test_number_of_outlier_columns(typed: Typed) -> None:
    m, k, n = 9, 67, 21
    some = ([], [33], [0, k - 1], [*range(k - 1)], [*range(k)])
    for outliers, columns in itertools.product(("columns", "rows"), some):
        x = np.clip(make("normal", (m, k), typed.dtype), -5, 5)
        x[:, columns] = typed.round(np.where(x[:, columns] < 0, -1, 1) * 6.5)
        w = make("normal", (n, k), typed.dtype)
        for scheme in ref.SCHEMES:
            for kept in (None, [0, 33, k - 1]):
                check(typed, x, w, make("normal", (n,), typed.dtype), scheme=scheme, kept=kept, outliers=outliers)


def test_mixed_dtypes() -> None:
    """x, weight and bias each have their own dtype; the output has that of x."""
    for mixed in itertools.product(ref.DTYPES, repeat=3):
        of_x, of_w, of_bias = mixed
        backend = TORCH if "bfloat16" in mixed else NUMPY
        if backend.missing:
            continue
        x, w, b = make("outliers", (5, 33), of_x), make("normal", (11, 33), of_w), make("normal", (11,), of_bias)
        weight = octavo.quantize_weight(backend.array(w, of_w), outlier_columns=[1, 5])
        oracle = ref.quantize_weight(w, outlier_columns=[1, 5])
        y = linear(backend.array(x, of_x), weight, backend.array(b, of_bias))
        assert backend.dtype_name(y) == of_x
        tolerances.check_output(backend.host(y), ref.linear(x, oracle, b), of_x)


def test_auto_is_int8_on_the_cpu(typed: Typed) -> None:
    if typed.backend.device != "cpu":
        pytest.skip("on a GPU auto picks by shape")
    for m in (1, 4, 130):
        x = typed.array(make("outliers", (m, 64), typed.dtype))
        weight = octavo.quantize_weight(typed.array(make("normal", (32, 64), typed.dtype)))
        a, b = (typed.host(linear(x, weight, path=path)) for path in ("auto", "int8"))
        equal(a, b)
        equal(typed.host(linear(x, weight)), b)


def test_weight_only_ignores_outliers_threshold_and_kept_columns(typed: Typed) -> None:
    x = typed.array(make("outliers", (5, 64), typed.dtype))
    w = typed.array(make("normal", (32, 64), typed.dtype))
    plain = typed.host(linear(x, octavo.quantize_weight(w), path="weight_only"))
    kept = octavo.quantize_weight(w, outlier_columns=[1, 2, 3])
    for outliers in ref.OUTLIERS:
        for threshold in (0.0, 6.0, INF):
            y = linear(x, kept, outliers=outliers, threshold=threshold, path="weight_only")
            equal(typed.host(y), plain)


# ---------------------------------------------------------------------------------------------------------------
# Edges


def test_empty_dimensions(typed: Typed) -> None:
    """Zeros of the right shape, plus bias."""
    leads, sizes = ((0,), (4,), (), (2, 0), (2, 3)), ((0, 5), (7, 0), (0, 0), (7, 5))
    for lead, (k, n), path in itertools.product(leads, sizes, ref.PATHS):
        for scheme, granularity in COMBINATIONS:
            x, w = make("normal", (*lead, k), typed.dtype), make("normal", (n, k), typed.dtype)
            for bias in (None, make("normal", (n,), typed.dtype)):
                y = check(typed, x, w, bias, scheme=scheme, granularity=granularity, path=path)
                assert tuple(y.shape) == (*lead, n)
                if k == 0:
                    equal(typed.host(y), np.broadcast_to(np.zeros(n, F) if bias is None else bias, (*lead, n)))


def test_zero_rows_give_the_bias_exactly(typed: Typed) -> None:
    for path, outliers, scheme in itertools.product(ref.PATHS, ref.OUTLIERS, ref.SCHEMES):
        x = make("outliers", (5, 40), typed.dtype)
        x[[0, 3]] = 0
        w, bias = make("normal", (9, 40), typed.dtype), make("normal", (9,), typed.dtype)
        y = check(typed, x, w, bias, scheme=scheme, kept=[2], path=path, outliers=outliers)
        equal(typed.host(y)[[0, 3]], np.stack([bias, bias]))


def test_a_relu_row_of_zeros_is_zero_with_zero_points(backend: Backend) -> None:
    """Eq. (5)'s terms are near 6.6e7 and cancel: they are integers, and rounding one to float32 would show.

    Tensor-wise, so that the row's zero point is not that of a constant group: zp = 127, codes -127.
    """
    k, n = 4096, 33
    x = make("relu", (4, k), "float32")
    x[2] = 0
    w = make("normal", (n, k), "float32")
    y = check(Typed(backend, "float32"), x, w, scheme="zeropoint", granularity="tensor", outliers="none")
    equal(backend.host(y)[2], np.zeros(n, F))


def test_nonfinite_without_decomposition(typed: Typed) -> None:
    """Its scaling group's rows are NaN, every output of them, and no other row is."""
    for bad, (scheme, granularity) in itertools.product((NAN, INF, -INF), COMBINATIONS):
        x = make("normal", (6, 37), typed.dtype)
        x[2, 11] = bad
        w = make("normal", (13, 37), typed.dtype)
        for outliers, kept in (("none", None), ("static", [3])):
            y = check(typed, x, w, scheme=scheme, granularity=granularity, kept=kept, outliers=outliers)
            expected = np.zeros((6, 13), bool)
            expected[slice(None) if granularity == "tensor" else 2] = True
            np.testing.assert_array_equal(np.isnan(typed.host(y)), expected)


def test_nonfinite_with_decomposition(typed: Typed) -> None:
    """It propagates as IEEE says, in its own row only; the column is kept, or not, or only one of two is."""
    for outliers, (scheme, granularity) in itertools.product(("columns", "rows", "static"), COMBINATIONS):
        w = make("normal", (13, 37), typed.dtype)
        w[4, 11] = 0
        for bad, kept in itertools.product((NAN, INF, -INF), (None, [11], [11, 20], [20])):
            if outliers == "static" and (kept is None or 11 not in kept):
                continue
            x = make("normal", (6, 37), typed.dtype)
            x[2, 11] = bad
            y = typed.host(check(typed, x, w, scheme=scheme, granularity=granularity, kept=kept, outliers=outliers))
            assert np.isfinite(np.delete(y, 2, axis=0)).all()
            assert not np.isfinite(y[2]).any()
            if np.isinf(bad) and scheme == "absmax":
                kept_w = kept is not None and 11 in kept
                reached = w[:, 11] if kept_w else ref.quantize_weight(w, granularity=granularity).dequantize()[:, 11]
                assert np.isnan(y[2, 4])  # Inf * 0
                with np.errstate(invalid="ignore"):
                    equal(y[2], (F(bad) * reached).astype(F))


def test_infinities_of_both_signs_are_nan(typed: Typed) -> None:
    x = make("normal", (3, 20), typed.dtype)
    x[1, 3], x[1, 9] = INF, -INF
    w = np.abs(make("normal", (5, 20), typed.dtype)) + 1
    y = typed.host(linear(typed.array(x), octavo.quantize_weight(typed.array(typed.round(w)))))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_nonfinite_with_weight_only(typed: Typed) -> None:
    x = make("normal", (3, 20), typed.dtype)
    x[1, 3] = NAN
    y = typed.host(check(typed, x, make("normal", (5, 20), typed.dtype), path="weight_only"))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_nonfinite_bias_propagates(typed: Typed) -> None:
    bias = np.array([NAN, INF, -INF, 1], F)
    y = check(typed, make("normal", (3, 20), typed.dtype), make("normal", (4, 20), typed.dtype), bias)
    assert np.isnan(typed.host(y)[:, 0]).all()


def test_large_values(typed: Typed) -> None:
    """Activations near the largest float16, and of 1e30 where the dtype has it; outputs may overflow to infinity."""
    for outliers in ref.OUTLIERS:
        x = make("normal", (5, 64), typed.dtype) * F(1e4 if typed.dtype == "float16" else 1e30)
        x = typed.round(np.clip(x, -MAX[typed.dtype], MAX[typed.dtype]))
        w = make("normal", (33, 64), typed.dtype)
        check(typed, x, w, kept=[5], outliers=outliers)
        check(typed, x, w, scheme="zeropoint", kept=[5], outliers=outliers)


def test_long_k_does_not_wrap(backend: Backend) -> None:
    """With k = 200000 of codes 127: an accumulator of 3.2e9, above int32."""
    k = 200_000
    x, w = np.full((2, k), 127, F), np.full((3, k), 127, F)
    w[1] = -127
    w[2, ::2] = -127
    typed = Typed(backend, "float32")
    y = check(typed, x, w, outliers="none")
    assert backend.host(y)[0].tolist() == [F(127 * 127 * k), -F(127 * 127 * k), 0]
    check(typed, x + np.arange(k, dtype=F) % 3, w, scheme="zeropoint", outliers="none")


def test_threshold_at_the_exact_value(typed: Typed) -> None:
    """A column is outlying at the threshold and not one step below: seen in the scale of its row."""
    x = typed.round(np.array([[6.0, 1.0, -0.3, 0.7]]))
    w = make("normal", (8, 4), typed.dtype)
    above = F(6) + F(6) * {"float32": F(2**-20), "float16": F(2**-8), "bfloat16": F(2**-5)}[typed.dtype]
    at = typed.host(check(typed, x, w, threshold=6.0))
    over = typed.host(check(typed, x, w, threshold=float(above)))
    assert not np.array_equal(at, over)
    equal(over, typed.host(check(typed, x, w, outliers="none")))


# ---------------------------------------------------------------------------------------------------------------
# Properties


def test_batch_invariance(typed: Typed) -> None:
    """A row's result does not depend on the other rows, bit for bit, at any batch size."""
    ways = [("rows", "int8"), ("static", "int8"), ("none", "int8")]
    if typed.backend.device == "cpu":  # on a GPU the order of weight-only sums depends on the number of rows
        ways.append(("none", "weight_only"))
    for (outliers, path), granularity, scheme in itertools.product(ways, ("row", "vector"), ref.SCHEMES):
        x = make("outliers", (37, 131), typed.dtype)
        w = typed.array(make("normal", (45, 131), typed.dtype))
        weight = octavo.quantize_weight(w, scheme=scheme, granularity=granularity, outlier_columns=[4, 99])
        bias = typed.array(make("normal", (45,), typed.dtype))
        whole = typed.host(linear(typed.array(x), weight, bias, outliers=outliers, path=path))
        for start, stop in ((0, 1), (3, 5), (7, 8), (10, 26), (36, 37)):
            part = linear(typed.array(x[start:stop]), weight, bias, outliers=outliers, path=path)
            equal(typed.host(part), whole[start:stop])
        x[1:] = typed.round(np.roll(x[1:], 5, axis=0) * F(0.5))
        equal(typed.host(linear(typed.array(x), weight, bias, outliers=outliers, path=path))[0], whole[0])


def test_columns_depend_on_the_batch(typed: Typed) -> None:
    """So the test above can fail: under "columns" another row's outlier changes the result."""
    x = np.clip(make("normal", (2, 64), typed.dtype), -5, 5)
    weight = octavo.quantize_weight(typed.array(make("normal", (32, 64), typed.dtype)))
    alone = typed.host(linear(typed.array(x[:1]), weight))
    x[1, np.abs(x[0]).argmax()] = 100
    together = typed.host(linear(typed.array(x), weight))[:1]
    assert not np.array_equal(alone, together)


def test_powers_of_two_scale_the_output(backend: Backend) -> None:
    """Scaling x, the threshold and so the scales by 2^e scales y by 2^e exactly (float32, no subnormals)."""
    for exponent, outliers in itertools.product((-6, 3), ref.OUTLIERS):
        x, w = make("outliers", (9, 65), "float32"), make("normal", (17, 65), "float32")
        weight = octavo.quantize_weight(backend.array(w), outlier_columns=[3])
        factor = F(2.0**exponent)
        a = linear(backend.array(x), weight, outliers=outliers, threshold=6.0)
        b = linear(backend.array(x * factor), weight, outliers=outliers, threshold=6.0 * float(factor))
        equal(backend.host(a) * factor, backend.host(b))


def test_leading_axes_are_rows(typed: Typed) -> None:
    for shape in ((33,), (2, 33), (2, 3, 33), (1, 2, 1, 3, 33), (0, 2, 33)):
        x, w = make("outliers", shape, typed.dtype), make("normal", (7, 33), typed.dtype)
        y = check(typed, x, w)
        flat = linear(typed.array(x.reshape(-1, 33)), octavo.quantize_weight(typed.array(w)))
        equal(typed.host(y).reshape(-1, 7), typed.host(flat))


def test_views_equal_contiguous(typed: Typed) -> None:
    for view, path in itertools.product(views(typed.backend), ref.PATHS):
        for shape in ((5, 33), (16, 64), (2, 3, 17)):
            x = typed.array(make("outliers", shape, typed.dtype))
            weight = octavo.quantize_weight(
                typed.array(make("normal", (19, shape[-1]), typed.dtype)), outlier_columns=[1, 2]
            )
            bias = typed.array(make("normal", (19,), typed.dtype))
            for outliers in ref.OUTLIERS:
                strided = VIEWS[view](typed.backend, x), VIEWS[view](typed.backend, bias)
                with unchanged(typed.backend, *strided):
                    got = linear(strided[0], weight, strided[1], outliers=outliers, path=path)
                expected = linear(x, weight, bias, outliers=outliers, path=path)
                if path == "weight_only" and typed.backend.device == "cuda":
                    # Operands that cannot be read 16 bytes at a time have a kernel of their own: another order of sums.
                    oracle = ref.linear(typed.host(x), typed.backend.weight(weight), typed.host(bias), path=path)
                    tolerances.check_output(typed.host(got), oracle, typed.dtype)
                    continue
                equal(typed.host(got), typed.host(expected))


def test_out(typed: Typed) -> None:
    """`out` is returned, in its own dtype and layout; nothing beside it is written."""
    for view in ("contiguous", *views(typed.backend)):
        x, w = make("outliers", (6, 35), typed.dtype), make("normal", (10, 35), typed.dtype)
        weight = octavo.quantize_weight(typed.array(w))
        for dtype in typed.backend.dtypes:
            for path in ("int8", "weight_only"):
                out = typed.backend.array(np.zeros((6, 10), F), dtype)
                if view != "contiguous":
                    out = VIEWS[view](typed.backend, out)
                assert linear(typed.array(x), weight, out=out, path=path) is out
                got = typed.backend.host(out)
                expected = ref.linear(x, ref.quantize_weight(w), path=path)
                tolerances.check_output(got, expected, dtype)
                if view != "contiguous":
                    whole = typed.backend.host(out.base if typed.backend.on_numpy else out._base)
                    assert np.isnan(whole).sum() == whole.size - 60


def test_repeated_calls_are_equal(typed: Typed) -> None:
    x, w = make("outliers", (65, 129), typed.dtype), make("normal", (67, 129), typed.dtype)
    weight = octavo.quantize_weight(typed.array(w))
    first = typed.host(linear(typed.array(x), weight))
    for _ in range(5):
        equal(typed.host(linear(typed.array(x), weight)), first)


def test_a_weight_of_another_framework() -> None:
    """The output is of x's framework, whatever made the weight; or the mix is refused by name, never wrong."""
    if TORCH.missing:
        pytest.skip(TORCH.missing)
    x, w = make("outliers", (3, 20), "float32"), make("normal", (5, 20), "float32")
    expected = ref.linear(x, ref.quantize_weight(w))
    for of_x, of_w in ((NUMPY, TORCH), (TORCH, NUMPY)):
        weight = octavo.quantize_weight(of_w.array(w))
        try:
            y = linear(of_x.array(x), weight)
        except TypeError as error:
            names(error, "linear: weight")
        else:
            tolerances.check_output(of_x.host(y), expected, "float32")


# ---------------------------------------------------------------------------------------------------------------
# Several weights of one X


@pytest.mark.parametrize("policy", ["columns", "rows", "static", "none"])
def test_many_are_those_alone(typed: Typed, policy: Any) -> None:
    backend = typed.backend
    x = typed.array(make("outliers", (3, 5, 70), typed.dtype))
    weights, biases = [], []
    for n, options in ((40, {}), (33, {}), (0, {}), (8, {"scheme": "zeropoint"}), (24, {"rotation": 16})):
        w = typed.array(make("normal", (n, 70), typed.dtype, n))
        weights.append(octavo.quantize_weight(w, outlier_columns=[3, 50], **options))  # type: ignore[arg-type]
        biases.append(typed.array(make("normal", (n,), typed.dtype)) if n % 16 else None)
    many = octavo.linear_many(x, weights, biases, outliers=policy, path="int8")
    assert isinstance(many, list)
    for y, weight, bias in zip(many, weights, biases, strict=True):
        equal(backend.host(y), backend.host(linear(x, weight, bias, outliers=policy)))
    out = backend.array(np.zeros((3, 5, 33)), typed.dtype)
    again = octavo.linear_many(x, weights[:2], out=[None, out], outliers=policy, path="int8")
    assert again[1] is out
    equal(backend.host(out), backend.host(linear(x, weights[1], outliers=policy)))
    assert octavo.linear_many(x, []) == []


def test_errors_of_many() -> None:
    x, weight = np.ones((2, 4), F), octavo.quantize_weight(np.ones((3, 4), F))
    other = octavo.quantize_weight(np.ones((3, 5), F))
    many, out = octavo.linear_many, np.empty((2, 3), F)
    for call, error, message in (
        (lambda: many(x, [weight, other]), ValueError, r"linear_many\[1\]: x: expected k = 5 columns"),
        (lambda: many(x, [weight, W]), TypeError, r"linear_many\[1\]: weight: expected an Int8Weight"),  # type: ignore[list-item]
        (lambda: many(x, [weight], [out]), ValueError, r"linear_many\[0\]: bias: expected"),
        (lambda: many(x, [weight], []), ValueError, "linear_many: biases: expected 1 of them, as of w"),
        (
            lambda: many(x, [weight] * 2, out=[out, out]),
            ValueError,
            r"linear_many\[0\]: out: expected mem",
        ),
        (lambda: many(x, (w for w in [weight])), TypeError, "linear_many: weights: expected a list or"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


# ---------------------------------------------------------------------------------------------------------------
# Memory of the framework's own, on a device

CUPY = Backend("cupy", "cuda")


@pytest.fixture
def cupy_problem() -> tuple[Any, Any, Any]:
    """CuPy, X and a weight of it."""
    if CUPY.missing:
        pytest.skip(CUPY.missing)
    import cupy  # type: ignore[import-not-found]

    x = CUPY.array(make("outliers", (5, 64), "float16"), "float16")
    return cupy, x, octavo.quantize_weight(CUPY.array(make("normal", (24, 64), "float16"), "float16"))


def test_scratch_memory_is_of_the_pool_of_cupy(cupy_problem: tuple[Any, Any, Any]) -> None:
    cupy, x, weight = cupy_problem
    pool = cupy.get_default_memory_pool()
    out = octavo.linear(x, weight, path="int8")
    expected, used, made = CUPY.host(out), pool.used_bytes(), []

    def allocate(size: int) -> Any:
        made.append(size)
        return pool.malloc(size)

    def refuse(size: int) -> Any:
        raise MemoryError(size)

    try:
        cupy.cuda.set_allocator(allocate)
        octavo.linear(x, weight, path="int8", out=out)
        assert made
        assert made[0] >= 5 * 64
        assert pool.used_bytes() == used
        equal(CUPY.host(out), expected)
        cupy.cuda.set_allocator(refuse)
        with pytest.raises(RuntimeError, match=r"^linear: CUDA: scratch: expected \d+ bytes .*, got none$"):
            octavo.linear(x, weight, path="int8", out=out)
    finally:
        cupy.cuda.set_allocator(pool.malloc)


def test_cupy_before_14(cupy_problem: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `__dlpack__` knows no `max_version`."""
    cupy, x, weight = cupy_problem
    if cupy.__version__ != "0+simt":
        pytest.skip("CuPy's own class cannot be changed")
    expected, today = CUPY.host(octavo.linear(x, weight, path="int8")), cupy.ndarray.__dlpack__
    monkeypatch.setattr(cupy.ndarray, "__dlpack__", lambda self, stream=None: today(self, stream=stream))
    equal(CUPY.host(octavo.linear(x, weight, path="int8")), expected)
