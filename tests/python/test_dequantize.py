"""octavo.dequantize: (codes + zeropoint) * scale in float32, rounded once more only to a 16-bit dtype. Exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import octavo
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from support import VIEWS, Backend, Typed, equal, kinds, make, seeds, sizes, unchanged, views

F = np.float32


def quantized(backend: Backend, codes: Any, scale: Any, zeropoint: Any = None) -> Any:
    z = None if zeropoint is None else backend.array(np.array(zeropoint, F))
    return octavo.Quantized(backend.array(np.array(codes, np.int8)), backend.array(np.array(scale, F)), z)


LITERAL: dict[str, tuple[Any, Any, Any, Any]] = {
    "row": ([[1, -2], [127, 0]], [0.5, 2], None, [[0.5, -1], [254, 0]]),
    "tensor": ([[1, -2], [127, 0]], [2], None, [[2, -4], [254, 0]]),
    "rank 1": ([4, -8], [0.25], None, [1, -2]),
    "rank 3": ([[[1], [2]], [[3], [4]]], [[1, 2], [3, 4]], None, [[[1], [4]], [[9], [16]]]),
    "affine": ([[-127, 127]], [0.5], [127], [[0, 127]]),
    "affine rows": ([[-127, 1], [0, 2]], [3, 1], [128, -1], [[3, 387], [-1, 1]]),
    "NaN scale": ([[0, 0], [1, 2]], [np.nan, 1], None, [[np.nan, np.nan], [1, 2]]),
    "zero scale": ([[0, 0]], [0], None, [[0, 0]]),
    "empty": (np.zeros((0, 3)), np.zeros(0), None, np.zeros((0, 3))),
    "no columns": (np.zeros((2, 0)), [0, 0], None, np.zeros((2, 0))),
}


def test_literal(backend: Backend) -> None:
    for case, (codes, scale, zeropoint, expected) in LITERAL.items():
        got = octavo.dequantize(quantized(backend, codes, scale, zeropoint))
        equal(backend.host(got), np.array(expected, F), case)
        assert backend.dtype_name(got) == "float32"


def test_every_dtype_argument(backend: Backend) -> None:
    q = quantized(backend, [[1, 127]], [1 + 2.0**-9])
    for name in backend.dtypes:
        expected = ref.round_to(np.array([[1 + 2.0**-9, 127 * (1 + 2.0**-9)]]), name)
        for dtype in (name, backend.dtype(name)):
            got = octavo.dequantize(q, dtype=dtype)
            assert backend.dtype_name(got) == name
            equal(backend.host(got), expected)


def test_rounds_half_to_even_and_overflows_to_infinity(backend: Backend) -> None:
    for name, ulp, largest in (("float16", 2.0**-10, 65504.0), ("bfloat16", 2.0**-7, 3.3895313892515355e38)):
        if name not in backend.dtypes:
            continue
        scales = np.array([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.75 * ulp, largest * (1 + ulp / 2), largest])
        got = octavo.dequantize(quantized(backend, np.ones((5, 1)), scales), dtype=name)
        equal(backend.host(got)[:, 0], np.array([1, 1 + 2 * ulp, 1 + ulp, np.inf, largest], F))
        subnormal = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[name]
        got = octavo.dequantize(quantized(backend, [[1, 2, 3, 7]], [subnormal / 2]), dtype=name)
        equal(backend.host(got)[0], np.array([0, subnormal, 2 * subnormal, 4 * subnormal], F))


def test_every_code_is_exact(backend: Backend) -> None:
    codes = np.arange(-128, 128, dtype=np.int8)[None]
    for scale in (F(1) / F(127), F(3.7), F(1e-40), F(2e36)):
        for zeropoint in (None, F(137), F(-3e7)):
            z = None if zeropoint is None else np.array([zeropoint])
            expected = ref.dequantize(ref.Quantized(codes, np.array([scale]), z))
            for name in backend.dtypes:
                got = octavo.dequantize(quantized(backend, codes, [scale], z), dtype=name)
                equal(backend.host(got), ref.round_to(expected, name))


@given(kinds, sizes, sizes, seeds, st.sampled_from(ref.SCHEMES), st.sampled_from(["tensor", "row"]))
def test_oracle(typed: Typed, kind: str, m: int, k: int, seed: int, scheme: str, granularity: str) -> None:
    x = make(kind, (m, k), typed.dtype, seed)
    q = octavo.quantize(typed.array(x), scheme=scheme, granularity=granularity)
    own = ref.Quantized(*(None if v is None else typed.host(v) for v in q))  # scales as the library made them
    given_arrays = [v for v in q if v is not None]
    with unchanged(typed.backend, *given_arrays):
        got = octavo.dequantize(q, dtype=typed.dtype)
    expected = ref.round_to(ref.dequantize(own), typed.dtype)
    equal(typed.host(got), expected)


@given(st.sampled_from(ref.SCHEMES), st.sampled_from(ref.GRANULARITIES), sizes, sizes, seeds)
def test_weights(typed: Typed, scheme: str, granularity: str, n: int, k: int, seed: int) -> None:
    """An Int8Weight goes the same way; kept columns are not substituted."""
    w = make("outliers", (n, k), typed.dtype, seed)
    weight = octavo.quantize_weight(typed.array(w), scheme=scheme, granularity=granularity, outlier_columns=[0])
    expected = typed.backend.weight(weight).dequantize()
    equal(typed.host(octavo.dequantize(weight)), expected)
    equal(typed.host(weight.dequantize()), expected)
    equal(typed.host(octavo.dequantize(weight, dtype=typed.dtype)), typed.round(expected))
    assert typed.backend.dtype_name(weight.dequantize(typed.dtype)) == typed.dtype


def test_views_equal_contiguous(backend: Backend) -> None:
    for view in views(backend):
        rng = np.random.default_rng(0)
        for shape in ((6, 37), (2, 3, 17)):
            codes = rng.integers(-127, 128, shape, dtype=np.int8)
            scale = rng.uniform(0.1, 2, shape[:-1]).astype(F)
            strided = VIEWS[view](backend, backend.array(codes)), VIEWS[view](backend, backend.array(scale))
            got = octavo.dequantize(octavo.Quantized(*strided, None))
            equal(backend.host(got), ref.dequantize(ref.Quantized(codes, scale, None)))


@given(kinds.filter(lambda kind: kind not in ("nonfinite", "tiny")), sizes, sizes, seeds)
def test_round_trip_is_within_half_a_step(typed: Typed, kind: str, m: int, k: int, seed: int) -> None:
    """The property a user relies on, without the oracle: 0.5 for the code, the rest for the rounding of x/a."""
    x = make(kind, (m, k), typed.dtype, seed)
    q = octavo.quantize(typed.array(x))
    back = typed.host(octavo.dequantize(q)).astype(float)
    step = typed.host(q.scale).astype(float)[:, None]
    assert (np.abs(back - x) <= step * (0.5 + 2.0**-15)).all()
