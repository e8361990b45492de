"""Rotation: codes of blocks times the Hadamard matrix, products with them, and the way back."""

from __future__ import annotations

import copy
import pickle
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
ROTATIONS: Final = (16, 64, 256)
SIZES: Final = (1, 15, 16, 17, 64, 70, 72, 256, 264, 300)  # whole blocks and others, whole 16 bytes and others
rotations: Final = st.sampled_from(ROTATIONS)


def test_literal(typed: Typed) -> None:
    """One 16 in a block of 16 becomes 4 everywhere, with the signs of a row of Sylvester's matrix."""
    x = np.zeros((1, 16), F)
    x[0, 3] = 16
    q = octavo.quantize(typed.array(x), rotation=16)
    signs = [1, -1, -1, 1] * 4
    equal(typed.host(q.codes), np.array([[127 * sign for sign in signs]], np.int8))
    equal(typed.host(q.scale), np.array([F(4) / F(127)]))
    np.testing.assert_allclose(typed.host(octavo.dequantize(q)), x, atol=1e-5)


@given(kinds, rotations, st.sampled_from(SIZES), seeds)
def test_codes(typed: Typed, kind: str, rotation: int, k: int, seed: int) -> None:
    x = make(kind, (5, k), typed.dtype, seed)
    for scheme in ref.SCHEMES:
        for granularity in ("row", "tensor"):
            for exclude in (None, [0, k - 1]):
                options = {"scheme": scheme, "granularity": granularity, "rotation": rotation, "exclude": exclude}
                got, expected = octavo.quantize(typed.array(x), **options), ref.quantize(x, **options)
                equal(typed.host(got.codes), expected.codes, str(options))
                if scheme == "absmax":
                    equal(typed.host(got.scale), expected.scale)
                else:
                    tolerances.check_zeropoint_scale(typed.host(got.scale), expected.scale)
                    equal(typed.host(got.zeropoint), expected.zeropoint)
                    expected = ref.Quantized(expected.codes, typed.host(got.scale), expected.zeropoint)
                equal(typed.host(octavo.dequantize(got)), ref.dequantize(expected, rotation=rotation, k=k))


@pytest.mark.parametrize("granularity", ref.GRANULARITIES[:2])
@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("shape", [(3, 33000), (300, 72), (300, 2072)], ids=str)
def test_codes_of_long_and_of_many_rows(
    typed: Typed, shape: tuple[int, int], rotation: int, scheme: str, granularity: str
) -> None:
    """Rows that a device reads in several turns, and more of them than it has in hand, some of whose sums overflow."""
    x = make("normal", shape, typed.dtype)
    if typed.dtype != "float16":
        x[1::7] *= F(2**125)
    if granularity == "row":
        x[2, 5] = np.nan
    options = {"scheme": scheme, "granularity": granularity, "rotation": rotation}
    got, expected = octavo.quantize(typed.array(x), **options), ref.quantize(x, **options)
    equal(typed.host(got.codes), expected.codes)
    if scheme == "absmax":
        equal(typed.host(got.scale), expected.scale)
    else:
        tolerances.check_zeropoint_scale(typed.host(got.scale), expected.scale)


@pytest.mark.parametrize("granularity", ref.GRANULARITIES)
@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_linear(typed: Typed, rotation: int, scheme: str, granularity: str) -> None:
    for k in (70, 300):
        w = ref.round_to(make("normal", (19, k), "float32"), typed.dtype)
        x = make("outliers", (18, k), typed.dtype)
        bias = make("normal", (19,), typed.dtype)
        kept = [2, 40, k - 1]
        options = {"scheme": scheme, "granularity": granularity, "rotation": rotation, "outlier_columns": kept}
        weight, expected = octavo.quantize_weight(typed.array(w), **options), ref.quantize_weight(w, **options)
        equal(typed.host(weight.codes), expected.codes)
        assert tuple(weight.shape) == (19, k)
        for outliers in ref.OUTLIERS:
            for path in ref.PATHS:
                got = octavo.linear(typed.array(x), weight, typed.array(bias), outliers=outliers, path=path)
                output = ref.linear(
                    x, expected, bias, scheme=scheme, granularity=granularity, outliers=outliers, path=path
                )
                tolerances.check_output(typed.host(got), output, typed.dtype)


def test_weight_keeps_its_rotation(backend: Backend) -> None:
    w = make("normal", (7, 70), "float32")
    weight = octavo.quantize_weight(backend.array(w), options=octavo.Options(rotation=64))
    assert (weight.rotation, tuple(weight.shape), tuple(weight.codes.shape)) == (64, (7, 70), (7, 128))
    assert "rotation=64" in repr(weight)
    x = backend.array(make("normal", (3, 70), "float32"))
    y = backend.host(octavo.linear(x, weight))
    for other in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight)):
        equal(backend.host(octavo.linear(x, other)), y)
    again = octavo.Int8Weight(weight.codes, weight.scale, rotation=64, shape=(7, 70), pack=False)
    equal(backend.host(octavo.linear(x, again)), y)
    equal(backend.host(again.dequantize()), backend.host(octavo.dequantize(weight)))


def test_errors() -> None:
    x = np.ones((2, 70), F)
    for rotation, error in ((32, ValueError), (-16, ValueError), ("64", TypeError)):
        with pytest.raises(error, match="rotation: expected"):
            octavo.quantize_weight(x, rotation=rotation)  # type: ignore[arg-type]
    weight = octavo.quantize_weight(x, rotation=64)
    with pytest.raises(ValueError, match=r"^linear: x: expected k = 70 columns"):
        octavo.linear(np.ones((2, 128), F), weight)
    with pytest.raises(ValueError, match=r"^Int8Weight: weight.codes: expected 64 columns"):
        octavo.Int8Weight(weight.codes, weight.scale, rotation=64, shape=(2, 60))
    with pytest.raises(ValueError, match=r"^quantize_weight: weight: expected finite values"):
        octavo.quantize_weight(np.full((2, 64), np.inf, F), rotation=64)
