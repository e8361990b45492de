"""The one tolerance table: how far a float output may be from the float64 oracle, and why.

Integers (codes, zero points, accumulators, outlier columns) have no tolerance: they are equal or wrong. Neither have
absmax scales and dequantized values: they are one or two float32 operations, each rounded once.

An output y is made in float32 and rounded once to its dtype. So there is a float32 v with |v - y64| <= `bound`, and
y = round(v). Rounding is monotone, hence round(y64 - bound) <= y <= round(y64 + bound), with no further slack for the
output dtype: its unit roundoff, subnormals and overflow to infinity are in the rounding itself.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import reference as ref

# Unit roundoff (half an ulp, relative) and half the smallest subnormal (absolute) of what is rounded to.
ROUNDING: Final = {
    "float32": (2.0**-24, 2.0**-150),
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-134),
}

# float32 roundings that one term of an output can meet, besides the additions of the outlier terms to each other.
FLOAT32_ROUNDINGS: Final = {
    "accumulator to float": 1,
    "scale_x * scale_w": 1,
    "accumulator * scale": 1,
    "scale_x or scale_w of the zeropoint scheme one ulp off (two halves each)": 4,
    "dequantized outlier weight, its product with x": 2,
    "int8 term + outlier term, + bias": 2,
}

# A zeropoint scale is (max - min)/254 rounded once; max - min may be rounded to float32 on the way: one ulp.
ZEROPOINT_SCALE_ULPS: Final = 1

# Gradients are framework matmuls in the dtype of x, accumulated in float32 over n terms and rounded to the dtype; the
# dequantized weight is itself rounded to the dtype first. Relative to sum |g| |w|: 1 (weight) + 1 (result), doubled
# since a framework may also round g or a partial sum once.
GRADIENT_ROUNDINGS: Final = 4


def bound(output: ref.Output) -> npt.NDArray[np.float64]:
    """How far the float32 value before the last rounding may be from `output.value`.

    Every term is rounded a fixed number of times, plus once per addition of the outlier (or weight-only) sum,
    whatever its order; each rounding is at most 2^-24 of the sum of magnitudes (1.01: second-order terms), or half a
    subnormal: once for the scale product, multiplied up by the accumulator, and once per term.
    """
    unit, tiny = ROUNDING["float32"]
    roundings = sum(FLOAT32_ROUNDINGS.values()) + output.terms
    return 1.01 * unit * roundings * output.magnitude + tiny * (output.unscaled + roundings)


def check_output(got: npt.NDArray[np.float32], output: ref.Output, dtype: str) -> None:
    """Assert that `got` (values of `dtype`, as float32) is what a float32 epilogue may give for `output`."""
    assert got.shape == output.value.shape, f"shape {got.shape}, expected {output.value.shape}"
    value = output.value
    finite = np.isfinite(value)
    with np.errstate(invalid="ignore"):
        slack = np.where(finite, bound(output), 0)
        low, high = ref.round_to(value - slack, dtype), ref.round_to(value + slack, dtype)
        good = np.where(np.isnan(value), np.isnan(got), (low <= got) & (got <= high))
    if not good.all():
        i = tuple(int(v[0]) for v in np.nonzero(~good))
        raise AssertionError(
            f"{int((~good).sum())} of {good.size} outputs wrong; first at {i}: got {got[i]!r}, expected "
            f"{value[i]!r} in [{low[i]!r}, {high[i]!r}] ({dtype}, magnitude {output.magnitude[i]:.6g})"
        )


def check_zeropoint_scale(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Assert that zeropoint scales agree to ZEROPOINT_SCALE_ULPS; NaN equals NaN."""
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    ulps: Any = np.abs(got.view(np.int32).astype(np.int64) - expected.view(np.int32).astype(np.int64))
    assert (np.where(np.isnan(expected), 0, ulps) <= ZEROPOINT_SCALE_ULPS).all(), (got, expected)


def gradient_bound(magnitude: npt.NDArray[np.float64], terms: int, dtype: str) -> npt.NDArray[np.float64]:
    """How far a gradient of `terms` products may be from float64."""
    return GRADIENT_ROUNDINGS * ROUNDING[dtype][0] * magnitude + terms * ROUNDING["float32"][0] * magnitude
