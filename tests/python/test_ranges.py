"""Results that float32 holds come out, however large the numbers are that they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from support import Backend, Typed, equal, make

LARGE, SMALL = np.float32(1e36), np.float32(1e-34)


def quantized(backend: Backend, values: np.ndarray[Any, Any], rotation: int = 0) -> octavo.Int8Weight:
    options = octavo.Options(rotation=rotation)
    return octavo.quantize_weight(backend.array(values), outlier_columns=[], options=options)


@pytest.mark.parametrize("outliers", ["none", "static"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_scales_whose_product_overflows(backend: Backend, outliers: Any, rows: int) -> None:
    def linear(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> Any:
        y = octavo.linear(backend.array(x), quantized(backend, w), outliers=outliers, path="int8")
        return backend.host(y)

    x = np.zeros((rows, 64), np.float32)
    w = np.zeros((20, 64), np.float32)
    x[:, 0] = w[:, 1] = LARGE  # never meet: the exact result is what is left of them, 0
    np.testing.assert_array_equal(linear(x, w), np.zeros((rows, 20), np.float32))
    # Without the large ones in W nothing changes by a bit.
    w[:, 1] = 1
    x[:, 1] = LARGE
    np.testing.assert_allclose(linear(x, w), np.full((rows, 20), LARGE), rtol=1e-6)
    # What is too large for float32 stays infinite.
    w[:, 1] = LARGE
    np.testing.assert_array_equal(linear(x, w), np.full((rows, 20), np.inf, np.float32))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("scale", [1, 1e-30])
@pytest.mark.parametrize("rotation", [0, 64])
def test_weight_only_of_large_activations(backend: Backend, rows: int, scale: float, rotation: int) -> None:
    x = np.full((rows, 64), 3e38, np.float32)
    x[:, 1::2] *= -1
    x[1::2] = 1  # rows of ordinary size are not touched
    w = np.full((20, 64), scale, np.float32)
    w[:, 0] *= 0.5
    weight = quantized(backend, w, rotation)
    exact = x.astype(np.float64) @ backend.host(weight.dequantize()).astype(np.float64).T
    y = octavo.linear(backend.array(x), weight, path="weight_only")
    # What rotation leaves of a sum of +-3e38 is rounded in relation to those.
    atol = 2e-6 * np.abs(x).max(1, keepdims=True) * scale if rotation else 0
    assert (np.abs(backend.host(y) - exact.astype(np.float32)) <= 2e-6 * np.abs(exact) + atol).all()


@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("rotation", [16, 64, 256])
def test_codes_of_rotated_rows_that_overflow(typed: Typed, scheme: Any, granularity: Any, rotation: int) -> None:
    """A rotated number can be 16 times the largest of its block, and the sums that make it 256 times."""
    largest = 6e4 if typed.dtype == "float16" else 3e38  # sums of float16 do not overflow
    x = make("normal", (12, 600), "float32", 3)
    x[:4] /= np.abs(x[:4]).max()
    x[0] *= largest  # sums overflow, whole rows of them
    x[1] *= largest / 100  # the sums of some blocks at most
    x[2] = np.where(x[2] < 0, -largest, largest)
    x[3, 256:] = 0  # one block of 256 alone
    x[3] *= largest
    x[4, 300], x[5, 7] = np.nan, np.inf
    x[6] *= 1e-40  # subnormal
    if granularity == "tensor":
        x[4:6] = 1
    x = ref.round_to(x, typed.dtype)
    options = {"scheme": scheme, "granularity": granularity, "rotation": rotation}
    for exclude in (None, [0, 301]):
        got = octavo.quantize(typed.array(x), exclude=exclude, **options)
        expected = ref.quantize(x, exclude=exclude, **options)
        equal(typed.host(got.codes), expected.codes)
        scale = typed.host(got.scale)
        assert np.isfinite(scale).sum() == (1 if granularity == "tensor" else 10)
        if scheme == "absmax":
            equal(scale, expected.scale)
        else:
            tolerances.check_zeropoint_scale(scale, expected.scale)
            equal(typed.host(got.zeropoint), expected.zeropoint)
    q = octavo.quantize(typed.array(x), **options)
    error = np.abs(typed.host(octavo.dequantize(q)).astype(np.float64)[:4] - x[:4])
    assert (error.max(1) <= 0.1 * np.abs(x[:4]).max()).all()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("outliers", ["none", "static"])
def test_rotated_activations_that_overflow(backend: Backend, rows: int, outliers: Any) -> None:
    x = np.full((rows, 128), 3e38, np.float32)
    x[:, 1::2] *= -1
    x[1::2] = 1
    w = np.random.default_rng(0).normal(size=(20, 128)).astype(np.float32)
    w *= 1e-3
    weight = quantized(backend, w, 64)
    y = backend.host(octavo.linear(backend.array(x), weight, outliers=outliers, path="int8"))
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert (np.abs(y - exact) <= 0.02 * np.abs(x).max(1, keepdims=True) * np.abs(w).sum(1)).all()
    # The same as of rows that do not overflow, but for the power of two.
    less = backend.host(octavo.linear(backend.array(x * np.float32(2**-20)), weight, outliers=outliers, path="int8"))
    np.testing.assert_array_equal(y, less * np.float32(2**20))
