"""``_core.linear_backward``, which PyTorch's autograd calls (octavo.torch): what `tests/cpp` cannot ask, arrays."""

import numpy as np
import octavo
import pytest
from octavo import _core

NATIVE = octavo.Options()._native


def test_leading_dimensions_out_and_dtypes() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 7)).astype(np.float32)
    weight = octavo.quantize_weight(w, outlier_columns=np.array([2], np.int32))
    exact = np.array(weight.dequantize())
    exact[:, 2] = w[:, 2]
    grad = rng.normal(size=(2, 3, 5)).astype(np.float32)
    expected = grad.astype(np.float64) @ exact.astype(np.float64)
    np.testing.assert_allclose(_core.linear_backward(grad, weight._native, NATIVE, None), expected, rtol=0, atol=1e-6)
    out = np.empty((2, 3, 7), np.float16)
    assert _core.linear_backward(grad, weight._native, NATIVE, out) is out
    np.testing.assert_allclose(out, expected, rtol=2**-11, atol=1e-6)


def test_errors() -> None:
    weight = octavo.quantize_weight(np.ones((5, 7), np.float32))
    with pytest.raises(ValueError, match=r"linear_backward: grad: expected n = 5 columns .*, got \[2, 7\]"):
        _core.linear_backward(np.ones((2, 7), np.float32), weight._native, NATIVE, None)
    with pytest.raises(TypeError, match=r"linear_backward: weight: expected .*Int8Weight"):
        _core.linear_backward(np.ones((2, 5), np.float32), np.ones((5, 7), np.int8), NATIVE, None)  # type: ignore[arg-type]
