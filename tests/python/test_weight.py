"""octavo.quantize_weight and octavo.Int8Weight: codes, kept columns, validation, copies, pickles, size."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from support import VIEWS, Backend, Typed, equal, finite_kinds, make, names, seeds, sizes, unchanged, views

F = np.float32


def check(typed: Typed, w: ref.Floats, **options: Any) -> Any:
    native = typed.array(w)
    with unchanged(typed.backend, native):
        got = octavo.quantize_weight(native, **options)
    expected = ref.quantize_weight(w, **options)
    own = typed.backend.weight(got)
    equal(own.codes, expected.codes)
    if expected.zeropoint is None:
        assert own.zeropoint is None
        equal(own.scale, expected.scale)
    else:
        assert own.zeropoint is not None
        equal(own.zeropoint, expected.zeropoint)
        tolerances.check_zeropoint_scale(own.scale, expected.scale)
    if expected.outlier_columns is None:
        assert got.outlier_columns is None
        assert got.outlier_weight is None
    else:
        assert own.outlier_columns is not None
        assert own.outlier_weight is not None
        equal(own.outlier_columns, expected.outlier_columns)
        equal(own.outlier_weight, expected.outlier_weight)
        assert typed.backend.dtype_name(got.outlier_weight) == typed.dtype
    assert got.shape == w.shape
    assert tuple(got.shape) == w.shape
    assert (got.scheme, got.granularity) == (options.get("scheme", "absmax"), options.get("granularity", "vector"))
    return got


def same(backend: Backend, a: Any, b: Any) -> None:
    """Two Int8Weights hold the same."""
    for x, y in zip(vars(backend.weight(a)).values(), vars(backend.weight(b)).values(), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            equal(np.asarray(x), np.asarray(y))
    assert (a.scheme, a.granularity, a.shape, a.nbytes) == (b.scheme, b.granularity, b.shape, b.nbytes)
    if a.outlier_weight is not None:
        assert backend.dtype_name(a.outlier_weight) == backend.dtype_name(b.outlier_weight)


# (weight, options, codes, scale, zeropoint)
LITERAL: dict[str, tuple[Any, dict[str, Any], Any, Any, Any]] = {
    "vector": ([[1, -2], [127, 3]], {}, [[64, -127], [127, 3]], [2 / 127, 1], None),
    "row": ([[1, -2], [127, 3]], {"granularity": "row"}, [[1, -2], [127, 3]], [1], None),
    "tensor": ([[1, -2], [127, 3]], {"granularity": "tensor"}, [[1, -2], [127, 3]], [1], None),
    "zero feature": ([[0, 0], [1, 0]], {}, [[0, 0], [127, 0]], [0, 1 / 127], None),
    "affine": ([[10, 264], [-127, 127]], {"scheme": "zeropoint"}, [[-127, 127]] * 2, [1, 1], [137, 0]),
    "affine row": (
        [[0, 1], [127, 2]],
        {"scheme": "zeropoint", "granularity": "row"},
        [[-127, -125], [127, -123]],
        [0.5],
        [127],
    ),
    # Codes and scales are made over all columns: keeping column 1 changes neither.
    "kept": ([[1, -2], [127, 3]], {"outlier_columns": [1]}, [[64, -127], [127, 3]], [2 / 127, 1], None),
}


def test_literal(typed: Typed) -> None:
    for case, (w, options, codes, scale, zeropoint) in LITERAL.items():
        weight = octavo.quantize_weight(typed.array(np.array(w)), **options)
        equal(typed.host(weight.codes), np.array(codes, np.int8), case)
        equal(typed.host(weight.scale), np.array(scale, F), case)
        if zeropoint is None:
            assert weight.zeropoint is None
        else:
            equal(typed.host(weight.zeropoint), np.array(zeropoint, F), case)


def test_kept_columns_are_sorted_and_unique(typed: Typed) -> None:
    w = typed.round(np.arange(12).reshape(2, 6) + 0.25)
    for columns in ([4, 1, 4], np.array([4, 1, 4]), np.array([4, 4, 1], np.int32), (1, 4)):
        weight = octavo.quantize_weight(typed.array(w), outlier_columns=columns)
        equal(typed.host(weight.outlier_columns), np.array([1, 4], np.int32))
        equal(typed.host(weight.outlier_weight), w[:, [1, 4]])
    native = octavo.quantize_weight(typed.array(w), outlier_columns=typed.backend.array(np.array([4, 1], np.int64)))
    equal(typed.host(native.outlier_columns), np.array([1, 4], np.int32))


def test_no_kept_columns_and_none(typed: Typed) -> None:
    w = typed.array(make("normal", (3, 5), typed.dtype))
    empty = octavo.quantize_weight(w, outlier_columns=[])
    equal(typed.host(empty.outlier_columns), np.zeros(0, np.int32))
    assert tuple(empty.outlier_weight.shape) == (3, 0)
    weight = octavo.quantize_weight(w)
    assert weight.outlier_columns is None
    assert weight.outlier_weight is None


def test_empty(typed: Typed) -> None:
    for shape, scheme, granularity in itertools.product(((0, 4), (3, 0), (0, 0)), ref.SCHEMES, ref.GRANULARITIES):
        check(typed, np.zeros(shape, F), scheme=scheme, granularity=granularity, outlier_columns=[])


@given(st.data(), finite_kinds, sizes, sizes, seeds, st.sampled_from(ref.SCHEMES), st.sampled_from(ref.GRANULARITIES))
def test_oracle(
    typed: Typed, data: st.DataObject, kind: str, n: int, k: int, seed: int, scheme: str, granularity: str
) -> None:
    columns = data.draw(st.none() | st.lists(st.integers(0, k - 1), max_size=5))
    w = make(kind, (n, k), typed.dtype, seed)
    check(typed, w, scheme=scheme, granularity=granularity, outlier_columns=columns)


def test_views_equal_contiguous(typed: Typed) -> None:
    for view in views(typed.backend):
        w = typed.array(make("normal", (19, 37), typed.dtype))
        for options in ({"outlier_columns": [2, 30]}, {"scheme": "zeropoint"}, {"granularity": "tensor"}):
            strided = VIEWS[view](typed.backend, w)
            got = octavo.quantize_weight(strided, **options)
            same(typed.backend, got, octavo.quantize_weight(w, **options))


def test_a_weight_does_not_alias_its_source(typed: Typed) -> None:
    native = typed.array(make("normal", (6, 8), typed.dtype))
    weight = octavo.quantize_weight(native, outlier_columns=[1])
    before = typed.backend.weight(weight)
    native[...] = 0
    equal(typed.backend.weight(weight).outlier_weight, before.outlier_weight)


# ---------------------------------------------------------------------------------------------------------------
# Copies


def every_weight(typed: Typed) -> list[Any]:
    w = typed.array(make("outliers", (24, 40), typed.dtype))
    return [
        octavo.quantize_weight(w, scheme=s, granularity=g, outlier_columns=c)
        for s in ref.SCHEMES
        for g in ref.GRANULARITIES
        for c in (None, [], [3, 17])
    ]


def test_copies_hold_and_compute_the_same(typed: Typed) -> None:
    x = typed.array(make("outliers", (5, 40), typed.dtype))
    arrays = ("codes", "scale", "zeropoint", "outlier_columns", "outlier_weight", "scheme", "granularity")
    ways: tuple[Callable[[Any], Any], ...] = (
        lambda w: pickle.loads(pickle.dumps(w)),
        copy.deepcopy,
        copy.copy,
        lambda w: w.to(w.device),
        lambda w: octavo.Int8Weight(**{name: getattr(w, name) for name in arrays}),
    )
    for duplicated in ways:
        for weight in every_weight(typed):
            duplicate = duplicated(weight)
            assert isinstance(duplicate, octavo.Int8Weight)
            same(typed.backend, duplicate, weight)
            equal(typed.host(octavo.linear(x, duplicate)), typed.host(octavo.linear(x, weight)))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("granularity", ["tensor", "vector"])
@pytest.mark.parametrize("rotation", [0, 16])
def test_out_is_the_weight_made_anew(pack: bool, scheme: Any, granularity: Any, rotation: int) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 35, 70)).astype(F)
    options = octavo.Options(scheme=scheme, granularity=granularity, rotation=rotation)
    expected = octavo.quantize_weight(second, options=options)
    out = octavo.quantize_weight(first, options=options)
    if not pack:
        out = octavo.Int8Weight(**(out._arguments() | {"shape": (35, 70) if rotation else None}), pack=False)
    arrays = out._codes, out.scale, out.code_sums
    assert octavo.quantize_weight(second, options=options, out=out) is out
    assert all(a is b for a, b in zip((out._codes, out.scale, out.code_sums), arrays, strict=True))
    equal(out.codes, np.array(expected.codes))
    equal(out.scale, np.array(expected.scale))
    equal(out.code_sums, np.array(expected.code_sums))
    x = np.ones((3, 70), F)
    equal(octavo.linear(x, out), octavo.linear(x, expected))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stochastic_rounding(dtype: str) -> None:
    """Codes next to the exact quotient, right on average, the same for a seed, and not those of another."""
    w = np.random.default_rng(0).normal(size=(35, 70)).astype(dtype)
    out = octavo.quantize_weight(w)
    nearest, exact = np.array(out.codes), w.astype(F) / np.array(out.scale)[:, None]
    draws = []
    for seed in (*range(100), 2**64 - 1):
        octavo.quantize_weight(w, out=out, seed=seed)
        draws.append(np.array(out.codes))
        equal(out.code_sums, draws[-1].sum(1, dtype=np.int32))
    assert np.abs(draws - exact).max() < 1 + 1e-5
    assert np.abs(np.mean(draws, 0) - exact).max() < 5 * 0.5 / 10  # five standard errors, at most
    assert len({each.tobytes() for each in draws}) == 101
    equal(octavo.quantize_weight(w, out=out, seed=7).codes, draws[7])
    equal(octavo.quantize_weight(w, out=out).codes, nearest)


def test_seeds_that_are_none() -> None:
    w = np.ones((5, 7), F)
    out = octavo.quantize_weight(w)
    for arguments, error, message in [
        ({"seed": 1.0, "out": out}, TypeError, "seed: expected an int, got float"),
        ({"seed": -1, "out": out}, ValueError, r"seed: expected `out`, and 0 to 2\*\*64 - 1, got -1"),
        ({"seed": 2**64, "out": out}, ValueError, r"seed: expected `out`, and 0 to 2\*\*64 - 1, got 1844"),
        ({"seed": 1}, ValueError, r"seed: expected `out`, and 0 to 2\*\*64 - 1, got 1"),
    ]:
        with pytest.raises(error, match=f"quantize_weight: {message}"):
            octavo.quantize_weight(w, **arguments)
    for options in (octavo.Options(scheme="zeropoint"), octavo.Options(rotation=16)):
        out = octavo.quantize_weight(w, options=options)
        with pytest.raises(ValueError, match="quantize_weight: seed: expected scheme 'absmax' and rotation 0"):
            octavo.quantize_weight(w, options=options, out=out, seed=1)


def test_out_that_does_not_fit() -> None:
    w = np.ones((5, 7), F)
    good = octavo.quantize_weight(w)
    for other, message in [
        (
            octavo.quantize_weight(np.ones((5, 8), F)),
            "out: expected .5, 7., absmax, vector, rotation 0, got Int8",
        ),
        (octavo.quantize_weight(w, granularity="row"), "out: expected .5, 7., absmax, vector, rotation 0, got"),
        (octavo.quantize_weight(w, outlier_columns=[1]), "out: expected no kept columns, got some"),
    ]:
        with pytest.raises(ValueError, match=f"quantize_weight: {message}"):
            octavo.quantize_weight(w, out=other)
    good.scale.flags.writeable = False
    with pytest.raises(ValueError, match=r"quantize_weight: out.scale: expected"):
        octavo.quantize_weight(w, out=good)


def test_pickles_at_every_protocol_after_use(typed: Typed) -> None:
    """Packed codes or caches of a used weight are not in the way."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        weight = octavo.quantize_weight(typed.array(make("normal", (9, 21), typed.dtype)), outlier_columns=[2])
        octavo.linear(typed.array(make("normal", (3, 21), typed.dtype)), weight)
        same(typed.backend, pickle.loads(pickle.dumps(weight, protocol)), weight)


def test_a_pickle_opens_in_another_process(tmp_path: Any, backend: Backend) -> None:
    w = make("normal", (9, 21), "float16")
    weight = octavo.quantize_weight(backend.array(w, "float16"))
    (tmp_path / "weight").write_bytes(pickle.dumps(weight))
    code = (
        "import pickle, sys; w = pickle.load(open(sys.argv[1], 'rb'));"
        "print(type(w).__name__, tuple(w.shape), int(w.codes.sum()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "weight")], capture_output=True, text=True, timeout=120
    )
    total = int(ref.quantize_weight(w).codes.astype(int).sum())
    assert result.stdout.split() == ["Int8Weight", "(9,", "21)", str(total)], result.stderr


def test_deepcopy_does_not_alias(backend: Backend) -> None:
    weight = octavo.quantize_weight(backend.array(make("normal", (6, 8), "float32"), "float32"))
    duplicate = copy.deepcopy(weight)
    before = backend.weight(weight).scale
    duplicate.scale[...] = 0
    equal(backend.weight(weight).scale, before)


def test_nbytes_counts_what_is_held(typed: Typed) -> None:
    n, k, r = 256, 512, 3
    itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}[typed.dtype]
    w = typed.array(make("normal", (n, k), typed.dtype))
    plain = octavo.quantize_weight(w)
    kept = octavo.quantize_weight(w, outlier_columns=[1, 2, 3])
    assert n * k + 4 * n <= plain.nbytes < 1.25 * n * k, "about one byte per weight"
    assert kept.nbytes - plain.nbytes == r * (n * itemsize + 4)
    assert octavo.quantize_weight(w, granularity="tensor").nbytes < plain.nbytes
    assert octavo.quantize_weight(w, scheme="zeropoint").nbytes > plain.nbytes


def test_device_and_repr(typed: Typed) -> None:
    weight = octavo.quantize_weight(typed.array(make("normal", (4, 6), typed.dtype)))
    assert typed.backend.device in str(weight.device).lower()  # CuPy's is <CUDA Device 0>
    assert "Int8Weight" in repr(weight)
    assert "vector" in repr(weight)
    assert "absmax" in repr(weight)
    assert len(repr(octavo.quantize_weight(typed.array(make("normal", (64, 64), typed.dtype))))) < 1000


# ---------------------------------------------------------------------------------------------------------------
# Validation

GOOD: dict[str, Any] = {
    "codes": np.ones((3, 4), np.int8),
    "scale": np.ones(3, F),
    "scheme": "absmax",
    "granularity": "vector",
}
KEPT = {"outlier_columns": np.array([0, 2], np.int32), "outlier_weight": np.ones((3, 2), F)}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "codes dtype": ({"codes": np.ones((3, 4), np.uint8)}, TypeError, "codes"),
    "codes rank": ({"codes": np.ones(4, np.int8)}, ValueError, "codes"),
    "codes None": ({"codes": None}, TypeError, "codes"),
    "scale dtype": ({"scale": np.ones(3)}, TypeError, "scale"),
    "scale length": ({"scale": np.ones(4, F)}, ValueError, "scale"),
    "scale rank": ({"scale": np.ones((3, 1), F)}, ValueError, "scale"),
    "scale of a tensor": ({"granularity": "tensor"}, ValueError, "scale"),
    "scale None": ({"scale": None}, TypeError, "scale"),
    "zeropoint missing": ({"scheme": "zeropoint"}, (TypeError, ValueError), "zeropoint"),
    "zeropoint unexpected": ({"zeropoint": np.zeros(3, F)}, ValueError, "zeropoint"),
    "zeropoint length": ({"scheme": "zeropoint", "zeropoint": np.zeros(2, F)}, ValueError, "zeropoint"),
    "zeropoint dtype": ({"scheme": "zeropoint", "zeropoint": np.zeros(3)}, TypeError, "zeropoint"),
    "columns alone": ({"outlier_columns": KEPT["outlier_columns"]}, ValueError, "outlier_(weight|columns)"),
    "columns missing": ({"outlier_weight": KEPT["outlier_weight"]}, ValueError, "outlier_(weight|columns)"),
    "columns range": ({**KEPT, "outlier_columns": np.array([0, 4], np.int32)}, ValueError, "outlier_columns"),
    "columns negative": ({**KEPT, "outlier_columns": np.array([-1, 2], np.int32)}, ValueError, "outlier_columns"),
    "columns dtype": ({**KEPT, "outlier_columns": np.array([0, 2.0])}, TypeError, "outlier_columns"),
    "columns count": ({**KEPT, "outlier_weight": np.ones((3, 3), F)}, ValueError, "outlier_weight"),
    "kept dtype": ({**KEPT, "outlier_weight": np.ones((3, 2))}, TypeError, "outlier_weight"),
    "scheme": ({"scheme": "affine"}, ValueError, "scheme"),
    "granularity": ({"granularity": "column"}, ValueError, "granularity"),
}  # fmt: skip


def build(arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    return octavo.Int8Weight(arguments.pop("codes"), arguments.pop("scale"), **arguments)


def test_the_constructor_takes_views(backend: Backend) -> None:
    """Every array of a weight may be strided: the same products, the same values."""
    for view, name in itertools.product(
        views(backend), ("codes", "scale", "zeropoint", "outlier_columns", "outlier_weight")
    ):
        w, x = make("normal", (6, 20), "float32"), backend.array(make("outliers", (5, 20), "float32"))
        plain = octavo.quantize_weight(backend.array(w), scheme="zeropoint", outlier_columns=[1, 4, 9])
        arrays = {k: getattr(plain, k) for k in ("codes", "scale", "zeropoint", "outlier_columns", "outlier_weight")}
        arrays[name] = VIEWS[view](backend, arrays[name])
        strided = build({"scheme": "zeropoint", "granularity": "vector"} | arrays)
        equal(backend.host(strided.dequantize()), backend.host(plain.dequantize()))
        for options in ({}, {"outliers": "static"}, {"path": "weight_only"}):
            got, expected = (octavo.linear(x, weight, **options) for weight in (strided, plain))
            equal(backend.host(got), backend.host(expected))


def test_the_constructor_takes_good_arguments() -> None:
    for extra in ({}, KEPT, {"scheme": "zeropoint", "zeropoint": np.zeros(3, F)}):
        weight = build(GOOD | extra)
        assert weight.shape == (3, 4)
    assert build(GOOD | {"granularity": "row", "scale": np.ones(1, F)}).granularity == "row"


@pytest.mark.parametrize("case", BAD)
def test_the_constructor_refuses(case: str) -> None:
    arguments, error, word = BAD[case]
    with pytest.raises(error) as info:
        build(GOOD | arguments)
    names(info.value, rf"Int8Weight: (weight\.)?{word}")


def test_constructor_with_unsorted_columns_computes_right_or_refuses() -> None:
    """Kept columns in another order must stay with their weights."""
    columns, kept = np.array([2, 0], np.int32), np.array([[5, 7]] * 3, F)
    try:
        weight = build(GOOD | {"outlier_columns": columns, "outlier_weight": kept})
    except ValueError as error:
        names(error, r"Int8Weight: (weight\.)?outlier_columns")
        return
    y = octavo.linear(np.array([[100, 0, 0, 0]], F), weight)
    np.testing.assert_array_equal(y, [[700] * 3])
