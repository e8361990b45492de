"""Results that float32 holds come out, however large the numbers are that they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import octavo
import pytest
from support import Backend

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
