"""Results that float32 holds come out, however large the numbers are that they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import octavo
import pytest

LARGE, SMALL = np.float32(1e36), np.float32(1e-34)


def quantized(values: np.ndarray[Any, Any]) -> octavo.Int8Weight:
    columns = [] if values.shape[1] else None
    return octavo.quantize_weight(values, outlier_columns=columns)


@pytest.mark.parametrize("outliers", ["none", "static"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_scales_whose_product_overflows(outliers: Any, rows: int) -> None:
    x = np.zeros((rows, 64), np.float32)
    w = np.zeros((20, 64), np.float32)
    x[:, 0] = w[:, 1] = LARGE  # never meet: the exact result is what is left of them, 0
    y = octavo.linear(x, quantized(w), outliers=outliers, path="int8")
    np.testing.assert_array_equal(y, np.zeros((rows, 20), np.float32))
    # Without the large ones in W nothing changes by a bit.
    w[:, 1] = 1
    x[:, 1] = LARGE
    y = octavo.linear(x, quantized(w), outliers=outliers, path="int8")
    np.testing.assert_allclose(y, np.full((rows, 20), LARGE), rtol=1e-6)
    # What is too large for float32 stays infinite.
    w[:, 1] = LARGE
    y = octavo.linear(x, quantized(w), outliers=outliers, path="int8")
    np.testing.assert_array_equal(y, np.full((rows, 20), np.inf, np.float32))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("scale", [1, 1e-30])
def test_weight_only_of_large_activations(rows: int, scale: float) -> None:
    x = np.full((rows, 64), 3e38, np.float32)
    x[:, 1::2] *= -1
    x[1::2] = 1  # rows of ordinary size are not touched
    w = np.full((20, 64), scale, np.float32)
    w[:, 0] *= 0.5
    weight = quantized(w)
    exact = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    y = octavo.linear(x, weight, path="weight_only")
    np.testing.assert_allclose(y, exact.astype(np.float32), rtol=2e-6)
