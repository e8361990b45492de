"""octavo.quantize: literal cases, every pair of 16-bit values that matters, then the oracle on generated data."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DTYPES_16,
    KINDS,
    NUMPY,
    TORCH,
    VIEWS,
    Backend,
    Typed,
    equal,
    finite_kinds,
    kinds,
    make,
    seeds,
    sizes,
    unchanged,
    values_16,
    views,
)

F = np.float32
INF, NAN = np.inf, np.nan


def check(typed: Typed, x: ref.Floats, **options: Any) -> None:
    """octavo.quantize gives the oracle's codes and zero points bit for bit, and its scales."""
    native = typed.array(x)
    with unchanged(typed.backend, native):
        got = octavo.quantize(native, **options)
    expected = ref.quantize(x, **options)
    equal(typed.host(got.codes), expected.codes)
    scale = typed.host(got.scale)
    assert typed.backend.dtype_name(got.scale) == "float32"
    if expected.zeropoint is None:
        assert got.zeropoint is None
        equal(scale, expected.scale)
    else:
        equal(typed.host(got.zeropoint), expected.zeropoint)
        tolerances.check_zeropoint_scale(scale, expected.scale)


# ---------------------------------------------------------------------------------------------------------------
# Literal cases: (x, options, codes, scale, zeropoint), all values exact in every dtype

AFFINE = {"scheme": "zeropoint"}
LITERAL: dict[str, tuple[Any, dict[str, Any], Any, Any, Any]] = {
    # 127/2 = 63.5 is a tie, to even 64; 31.75 is 32
    "row": ([[1, -2, 0.5, 0], [127, -3, 4, 5]], {}, [[64, -127, 32, 0], [127, -3, 4, 5]], [2 / 127, 1], None),
    "ties to even": ([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], {}, [[127, 0, 2, 2, 0, -2, 126]], [1], None),
    "tensor": (
        [[1, 2], [-3, 4]],
        {"granularity": "tensor"},
        [[32, 64], [-95, 127]],  # 31.75, 63.5 (tie), -95.25
        [4 / 127],
        None,
    ),
    "rank 1 is one row": ([1, -2], {}, [64, -127], [2 / 127], None),
    "rank 3": ([[[1, 2]], [[3, 0]]], {}, [[[64, 127]], [[127, 0]]], [[2 / 127], [3 / 127]], None),
    "zero row": ([[0, -0.0], [0, 1]], {}, [[0, 0], [0, 127]], [0, 1 / 127], None),
    "zero tensor": ([[0, 0]], {"granularity": "tensor"}, [[0, 0]], [0], None),
    "one value": ([[-5]], {}, [[-127]], [5 / 127], None),
    "exclude": ([[100, 1, -2], [3, 0, 0]], {"exclude": [0]}, [[0, 64, -127], [0, 0, 0]], [2 / 127, 0], None),
    "exclude tensor": (
        [[100, 1, -2], [3, 0, 4]],
        {"exclude": [0], "granularity": "tensor"},
        [[0, 32, -64], [0, 0, 127]],
        [4 / 127],
        None,
    ),
    "exclude all": ([[1, 2]], {"exclude": [1, 0]}, [[0, 0]], [0], None),
    "exclude none": ([[1, 2]], {"exclude": []}, [[64, 127]], [2 / 127], None),
    "exclude twice": ([[1, 2, 4]], {"exclude": [2, 2]}, [[64, 127, 0]], [2 / 127], None),
    "exclude NaN": ([[NAN, 2]], {"exclude": [0]}, [[0, 127]], [2 / 127], None),
    "NaN row": ([[NAN, 2], [1, 2]], {}, [[0, 0], [64, 127]], [NAN, 2 / 127], None),
    "Inf row": ([[1, -INF], [1, 2]], {}, [[0, 0], [64, 127]], [NAN, 2 / 127], None),
    "NaN tensor": ([[NAN, 2], [1, 2]], {"granularity": "tensor"}, [[0, 0], [0, 0]], [NAN], None),
    # zeropoint: nd = 254/(max - min), zp = rint(nd min) + 127, q = rint(nd x) - zp
    "affine": ([[10, 100, 264]], AFFINE, [[-127, -37, 127]], [1], [137]),
    "affine, zero to the right": ([[-254, 0]], AFFINE, [[-127, 127]], [1], [-127]),
    "affine, symmetric": ([[-127, 0, 127]], AFFINE, [[-127, 0, 127]], [1], [0]),
    "affine, tie": ([[0, 0.5, 1.5, 254]], AFFINE, [[-127, -127, -125, 127]], [1], [127]),
    "affine, constant": ([[3, 3], [-5, -5], [0, 0]], AFFINE, [[-127, -127]] * 3, [3, 5, 1], [128, 126, 127]),
    "affine, tensor": (
        [[0, 1], [2, 127]],
        {"scheme": "zeropoint", "granularity": "tensor"},
        [[-127, -125], [-123, 127]],
        [0.5],
        [127],
    ),
    "affine, exclude": ([[-9, 10, 264]], {"scheme": "zeropoint", "exclude": [0]}, [[0, -127, 127]], [1], [137]),
    "affine, exclude all": ([[4, 5]], {"scheme": "zeropoint", "exclude": [0, 1]}, [[0, 0]], [1], [0]),
    "affine, NaN": ([[1, NAN], [0, 254]], AFFINE, [[0, 0], [-127, 127]], [NAN, 1], [0, 127]),
}  # fmt: skip


def test_literal(typed: Typed) -> None:
    for case, (x, options, codes, scale, zeropoint) in LITERAL.items():
        got = octavo.quantize(typed.array(np.array(x, F)), **options)
        equal(typed.host(got.codes), np.array(codes, np.int8), case)
        equal(typed.host(got.scale), np.array(scale, F), case)
        if zeropoint is None:
            assert got.zeropoint is None
        else:
            equal(typed.host(got.zeropoint), np.array(zeropoint, F), case)


def test_is_a_named_tuple(typed: Typed) -> None:
    got = octavo.quantize(typed.array(np.ones((2, 3))))
    assert got._fields == ("codes", "scale", "zeropoint")
    codes, scale, zeropoint = got
    assert typed.backend.dtype_name(codes) == "int8"
    assert typed.backend.dtype_name(scale) == "float32"
    assert zeropoint is None
    assert isinstance(got, octavo.Quantized)


def test_empty(typed: Typed) -> None:
    """An empty group has scale 0 (zeropoint: scale 1, zero point 0)."""
    for shape, scheme, granularity in itertools.product(
        ((0, 5), (3, 0), (0, 0), (0,), (2, 0, 3), (2, 3, 0)), ref.SCHEMES, ("tensor", "row")
    ):
        check(typed, np.zeros(shape, F), scheme=scheme, granularity=granularity)


# ---------------------------------------------------------------------------------------------------------------
# Every code of the 16-bit types
#
# A code depends on a = absmax and x, and both are 16-bit values: 5e8 pairs per type. They need not all be computed.
# 1. 127 x is exact in float32 (11 + 7 bits at most; float32 holds 16-bit subnormals and does not overflow, but for
#    bfloat16 above 2.7e36, where the quotient comes first). A float32 division is correctly rounded. So, where neither
#    quotient is subnormal, q(2^e x, 2^e a) = q(x, a): only the ratio of the significands and the distance of the
#    exponents matter. A quotient that is subnormal is far below 1/2 and its code is 0 in any case.
# 2. q = 0 where 127 x / a < 1/2, which holds for every x <= a/256. So for each a only x in (a/256, a] matter: eight
#    binades.
# 3. Pairs with subnormals are coarser than those of a normal binade (fewer bits), so no new ratios come up.
# Hence one binade of a with eight binades of x below it (8.4e6 pairs for float16, 1.3e5 for bfloat16) are all the
# ratios there are. The oracle makes their codes once, `table`, and checks them against float64.
# That is the argument for the oracle. The library may use other forms, and may treat ranges of exponents differently
# (subnormals, overflow), so it is run for EVERY positive finite a with every x in (a/256, a], both signs: 2.5e8 pairs
# of float16, 4e7 of bfloat16. Expected are the table's codes where the whole block of x is normal, which also tests the
# invariance, and the oracle's own at the lower end, where x are subnormal. Smaller x are sampled.


def ratios(a: ref.Floats, dtype: str) -> ref.Floats:
    """For one binade `a` [s, 1]: all x of (a/256, a], [s, p], as multiples that are exact in `dtype`; 0 elsewhere."""
    binade = a[0, 0]
    unit = np.arange(len(a), dtype=F)[None] / F(len(a)) + 1  # significands
    scales = F(2) ** -np.arange(9, dtype=F)[:, None]
    x = (unit * scales).reshape(1, -1) * binade
    return np.where((x <= a) & (x > a / 256), x, F(0))


def binades(dtype: str) -> list[ref.Floats]:
    """All positive finite values, one column [s, 1] per binade. The subnormals are the first, of other lengths."""
    positive = values_16(dtype)
    exponent = np.frexp(positive)[1]
    return [positive[exponent == e][:, None] for e in np.unique(exponent)]


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_every_pair_of_values(dtype: str) -> None:
    backend = NUMPY if dtype == "float16" else TORCH
    if backend.missing:
        pytest.skip(backend.missing)
    typed = Typed(backend, dtype)
    steps = {"float16": 1024, "bfloat16": 128}[dtype]
    one = (np.arange(steps, dtype=F) / F(steps) + 1)[:, None]
    x_one = np.concatenate([ratios(one, dtype), one], axis=1)
    table = ref.quantize(x_one).codes
    np.testing.assert_array_equal(table, ref.ideal_absmax_codes(x_one, one))
    assert np.abs(table.astype(np.int16)).max() == 127
    assert (table[x_one > 0] != 0).mean() > 0.98

    smallest_normal = {"float16": 2.0**-14, "bfloat16": 2.0**-126}[dtype]
    positive = values_16(dtype)
    rng = np.random.default_rng(2)
    seen = 0
    for a in binades(dtype):
        binade = F(2.0 ** np.floor(np.log2(float(a[0, 0]))))
        if len(a) == steps and binade >= 512 * smallest_normal:  # all x are normal
            x, expected = x_one * binade, table
        else:  # subnormals: every x there is
            below = positive[positive <= a[-1, 0]]
            x = np.concatenate([np.where(below[None] <= a, below[None], F(0)), a], axis=1)
            expected = ref.quantize(x).codes
            np.testing.assert_array_equal(expected, ref.ideal_absmax_codes(x, a))
        native = typed.array(x)
        for sign in (1, -1):
            got = octavo.quantize(native if sign > 0 else -native)
            codes = typed.host(got.codes) * np.int8(sign)
            if not np.array_equal(codes, expected):
                i, j = np.argwhere(codes != expected)[0]
                raise AssertionError(f"x {sign * x[i, j]}, absmax {a[i, 0]}: {sign * codes[i, j]}")
        equal(typed.host(got.scale), (a / F(127))[:, 0])
        small = rng.choice(positive[positive <= a[0, 0] / 256], 64) if positive[0] <= a[0, 0] / 256 else a[0]
        x = np.concatenate([np.broadcast_to(small, (len(a), len(small))), a], axis=1)
        equal(typed.host(octavo.quantize(typed.array(x)).codes), ref.quantize(x).codes)
        seen += len(a)
    assert seen == len(positive) == {"float16": 31743, "bfloat16": 32639}[dtype]


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_other_absmax_kernels_agree(dtype: str) -> None:
    """The same ratios as one tensor-wise group, long rows and odd lengths: other code paths, the same codes."""
    backend = NUMPY if dtype == "float16" else TORCH
    if backend.missing:
        pytest.skip(backend.missing)
    typed = Typed(backend, dtype)
    positive = values_16(dtype)
    for a in (F(1), F(1.3828125), F(1.9921875), positive[-1], positive[0], positive[77]):
        x = positive[positive <= a]
        x = np.concatenate([x, -x])[None]
        for options in ({"granularity": "tensor"}, {"granularity": "row"}, {"exclude": [0]}):
            check(typed, x, **options)


@given(
    st.sampled_from([-80, -14, -1, 1, 13, 80]),
    finite_kinds.filter(lambda kind: kind not in ("tiny", "huge", "wide")),
    sizes,
    sizes,
    seeds,
)
def test_codes_are_invariant_to_powers_of_two(
    typed: Typed, exponent: int, kind: str, m: int, k: int, seed: int
) -> None:
    """The codes of 2^e x are those of x, short of subnormals: of x, or of a scale or a 1/scale."""
    if typed.dtype == "float16":
        exponent = max(-4, min(6, exponent))
    x = make(kind, (m, k), typed.dtype, seed)
    x = np.where(np.abs(x) < 2.0**-9, F(0), x)  # room for the float16 exponent
    scaled = x * F(2.0**exponent)
    assert np.array_equal(typed.round(scaled), scaled)
    for scheme in ref.SCHEMES:
        a, b = (octavo.quantize(typed.array(v), scheme=scheme) for v in (x, scaled))
        if scheme == "absmax":
            equal(typed.host(a.codes), typed.host(b.codes))
            equal(typed.host(a.scale) * F(2.0**exponent), typed.host(b.scale))
        else:  # a zero group keeps its scale of 1
            live = (x != 0).any(axis=1)
            equal(typed.host(a.codes), typed.host(b.codes))
            equal(typed.host(a.zeropoint), typed.host(b.zeropoint))
            equal(typed.host(a.scale)[live] * F(2.0**exponent), typed.host(b.scale)[live])


# ---------------------------------------------------------------------------------------------------------------
# The oracle


def test_oracle_every_kind(typed: Typed) -> None:
    for kind, scheme in itertools.product(KINDS, ref.SCHEMES):
        for shape in ((1, 1), (1, 4099), (7, 64), (33, 67), (2, 3, 5, 4, 17)):
            x = make(kind, shape, typed.dtype)
            for granularity in ("tensor", "row"):
                check(typed, x, scheme=scheme, granularity=granularity)
                check(typed, x, scheme=scheme, granularity=granularity, exclude=[0, shape[-1] - 1])


@given(st.data(), kinds, sizes, sizes, seeds, st.sampled_from(ref.SCHEMES), st.sampled_from(["tensor", "row"]))
def test_oracle(
    typed: Typed, data: st.DataObject, kind: str, m: int, k: int, seed: int, scheme: str, granularity: str
) -> None:
    exclude = data.draw(st.none() | st.lists(st.integers(0, k - 1), max_size=8))
    check(typed, make(kind, (m, k), typed.dtype, seed), scheme=scheme, granularity=granularity, exclude=exclude)


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_oracle_any_float(typed: Typed, rows: list[list[float]]) -> None:
    """Hypothesis' own floats: signed zeros, subnormals, the largest values, NaN and Inf."""
    x = typed.round(np.array(rows, F))
    for scheme in ref.SCHEMES:
        for granularity in ("tensor", "row"):
            check(typed, x, scheme=scheme, granularity=granularity)


FLOAT32_EDGES: dict[str, list[float]] = {
    "127 x overflows": [3.4e38, 1.7e38, -2.7e36, 2.6e36, 1.0],
    # where 127 x does not overflow but 127 absmax does, x goes the usual way: 10, and (x / absmax) * 127 would be 11
    "127 absmax overflows": [2.0089053589948258e37, 1.6609060815771066e36],
    "largest": [3.4028234663852886e38, -3.4028234663852886e38, 3.0e38],
    "largest, one sided": [3.4028234663852886e38, 1.0e38],
    "smallest": [2.0**-149, -(2.0**-149), 0.0],
    "subnormal": [3 * 2.0**-149, 2.0**-127, -(2.0**-140)],
    "subnormal, one sided": [2.0**-127, 2.0**-128, 2.0**-126],
    "narrow range": [1.0, 1 + 2.0**-23, 1 + 2.0**-22],
    "narrow range, large": [1e30, 1.0000001e30],
    "nd overflows": [1e-37, 1.0000002e-37, 1.0000001e-37],
    "range overflows": [-3e38, 3e38, 0.0, 1e38],
    "constant, largest": [3.4028234663852886e38] * 3,
    "constant, subnormal": [-(2.0**-140)] * 3,
    "constant, smallest": [2.0**-149] * 3,
}


def test_float32_edges(backend: Backend) -> None:
    for values, scheme in itertools.product(FLOAT32_EDGES.values(), ref.SCHEMES):
        x = np.array([values], F)
        check(Typed(backend, "float32"), x, scheme=scheme)
        check(Typed(backend, "float32"), -x, scheme=scheme)
        mixed = np.concatenate([x, np.ones_like(x)])  # a group that overflows does not change the way of its neighbor
        check(Typed(backend, "float32"), mixed, scheme=scheme)


# ---------------------------------------------------------------------------------------------------------------
# Layout


def test_views_equal_contiguous(typed: Typed) -> None:
    for view, shape in itertools.product(views(typed.backend), ((5, 33), (16, 64), (2, 3, 17))):
        for kind in ("normal", "outliers", "nonfinite"):
            x = typed.array(make(kind, shape, typed.dtype))
            strided = VIEWS[view](typed.backend, x)
            for options in ({}, {"granularity": "tensor"}, {"scheme": "zeropoint"}, {"exclude": [1, 4]}):
                with unchanged(typed.backend, strided):
                    got = octavo.quantize(strided, **options)
                for a, b in zip(got, octavo.quantize(x, **options), strict=True):
                    assert (a is None) == (b is None)
                    if a is not None:
                        equal(typed.host(a), typed.host(b))


def test_broadcast_input(typed: Typed) -> None:
    """Strides of zero."""
    row = make("normal", (1, 19), typed.dtype)
    native = typed.array(row)
    wide = typed.backend.broadcast(native, (4, 19))
    codes = typed.host(octavo.quantize(wide).codes)
    equal(codes, np.repeat(ref.quantize(row).codes, 4, axis=0))


def test_exclude_as_any_integers(typed: Typed) -> None:
    x = make("normal", (3, 11), typed.dtype)
    expected = ref.quantize(x, exclude=[7, 0, 7]).codes
    arrays = [typed.backend.array(np.array([7, 0, 7], dtype)) for dtype in ("int64", "int32")]
    for exclude in (*arrays, [7, 0, 7], (7, 0, 7)):
        equal(typed.host(octavo.quantize(typed.array(x), exclude=exclude).codes), expected)


def test_rows_do_not_depend_on_each_other(typed: Typed) -> None:
    x = make("outliers", (9, 65), typed.dtype)
    together = typed.host(octavo.quantize(typed.array(x)).codes)
    for i in range(len(x)):
        equal(typed.host(octavo.quantize(typed.array(x[i : i + 1])).codes), together[i : i + 1])
