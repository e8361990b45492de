"""LLM.int8() (arXiv 2208.07339) in NumPy: the oracle that octavo is tested against.

Independent of the library under test: it imports NumPy only. Values are float32 arrays, whatever the dtype under
test; a float16 or bfloat16 tensor is the float32 array of the values it holds (`round_to` makes one).

- Codes, scales and zero points are the definition, bit for bit: float32, one rounding per operation.
  (`ideal_absmax_codes` has the same codes straight from the real numbers, in float64.)
- Products and epilogues are float64: the exact answer that a float32 epilogue is compared to, with the magnitudes that
  `tolerances.py` needs to bound its rounding.

Equation numbers are the paper's: (1) absmax, (2-3) zeropoint, (4-5) zeropoint product, (6) absmax product,
(7) vector-wise product, (8) mixed-precision decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]

F = np.float32
SCHEMES: Final = ("absmax", "zeropoint")
GRANULARITIES: Final = ("tensor", "row", "vector")  # of a product
OUTLIERS: Final = ("columns", "rows", "static", "none")
PATHS: Final = ("int8", "weight_only")
DTYPES: Final = ("float32", "float16", "bfloat16")
ROTATIONS: Final = (0, 16, 64, 256)
DEFAULT_THRESHOLD: Final = 6.0


# ---------------------------------------------------------------------------------------------------------------
# 16-bit types


def bfloat16_to_float32(bits: Array) -> Floats:
    """The float32 values of bfloat16 bit patterns (uint16): the upper half of a float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """bfloat16 bit patterns (uint16) of float32 values, rounded half to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a carry into the exponent is right, up to infinity
    return np.where(np.isnan(values), (bits >> 16) | 0x0040, rounded).astype(np.uint16)


def round_to(values: Array, dtype: str) -> Floats:
    """`values` rounded to float32 and from there, half to even, to `dtype`; returned as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(values).astype(np.float32)
        match dtype:
            case "float32":
                return values
            case "float16":
                return values.astype(np.float16).astype(np.float32)
            case "bfloat16":
                return bfloat16_to_float32(float32_to_bfloat16(values)).reshape(values.shape)
    raise ValueError(f"round_to: dtype: expected one of {DTYPES}, got {dtype!r}")


# ---------------------------------------------------------------------------------------------------------------
# Quantization of groups: `x` is [groups, size], `keep` marks the elements that take part


class Quantized(NamedTuple):
    """x ~ (codes + zeropoint) * scale. `zeropoint` is None for absmax."""

    codes: Codes
    scale: Floats
    zeropoint: Floats | None


def _quantize_groups_absmax(x: Floats, keep: Mask, *, rotated: bool) -> Quantized:
    """Eq. (1): q = rint(127 x / max|x|), with scale = max|x| / 127.

    Of rotated x, which has been rounded already: q = rint(x (127 / max|x|)), one division for all.
    """
    with np.errstate(all="ignore"):
        absmax = np.max(np.abs(x), axis=1, keepdims=True, where=keep, initial=0)
        product = x * F(127)
        q = np.where(np.isfinite(product), product / absmax, (x / absmax) * F(127))
        inverse = F(127) / absmax
        if rotated:
            q = np.where(np.isfinite(inverse), x * inverse, (x / absmax) * F(127))
        q = np.clip(np.rint(q), -127, 127)
        scale = absmax[:, 0] / F(127)
    # A zero group (0/0) has codes 0. A group with NaN or Inf has no codes: 0, and scale NaN.
    finite = np.all(np.isfinite(np.where(keep, x, 0)), axis=1, keepdims=True)
    q = np.where(keep & (absmax > 0) & finite, q, 0).astype(np.int8)
    return Quantized(q, np.where(finite[:, 0], scale, F(np.nan)).astype(np.float32), None)


def _zeropoint_formula(x: Array, lo: Array, hi: Array, one: Any) -> tuple[Array, Array, Array, Array]:
    """Eq. (2-3) in the precision of `one`: (q, zp, nd, max - min).

    nd = 254 / (max - min);  zp = rint(nd * min) + 127;  q = clip(rint(nd * x) - zp, -127, 127).
    A constant group m has nd = 1 / |m|, or 1 where m = 0.
    """
    width = hi - lo
    nd = np.where(width == 0, one / np.where(lo == 0, one, np.abs(lo)), (254 * one) / width)
    zp = np.rint(nd * lo) + 127 * one
    return np.clip(np.rint(nd * x) - zp, -127, 127), zp, nd, width


def _quantize_groups_zeropoint(x: Floats, keep: Mask, *, rotated: bool) -> Quantized:
    """Eq. (2-3), placed so that [min, max] becomes [-127, 127]; the same for rotated x."""
    del rotated
    used = np.any(keep, axis=1, keepdims=True)
    finite = np.all(np.isfinite(np.where(keep, x, 0)), axis=1, keepdims=True)
    lo = np.min(x, axis=1, keepdims=True, where=keep, initial=np.inf)
    hi = np.max(x, axis=1, keepdims=True, where=keep, initial=-np.inf)
    live = used & finite
    lo, hi = np.where(live, lo, F(0)), np.where(live, hi, F(0))
    with np.errstate(all="ignore"):
        q, zp, nd, width = _zeropoint_formula(x, lo, hi, F(1))
        x64, lo64, hi64 = (np.asarray(v, np.float64) for v in (x, lo, hi))
        q64, zp64, nd64, width64 = _zeropoint_formula(x64, lo64, hi64, np.float64(1))
        overflow = ~(np.isfinite(width) & np.isfinite(nd))  # of float32: that group runs in float64
        q, zp = np.where(overflow, q64, q), np.where(overflow, zp64, zp)
        # scale = 1 / nd, rounded once: (max - min) / 254, or |m|, or 1
        scale = np.where(width64 == 0, 1 / nd64, width64 / 254)
        scale = np.where((width64 == 0) & (lo != 0), np.abs(lo), scale)
        q = np.where(keep & live, q, 0).astype(np.int8)
    scale = np.where(used, np.where(finite, scale, np.nan), 1)
    zp = np.where(live, zp, 0)
    return Quantized(q, scale[:, 0].astype(np.float32), zp[:, 0].astype(np.float32))


def ideal_absmax_codes(x: Array, absmax: Array) -> Doubles:
    """Eq. (1) from the real numbers, in float64. Equals the float32 codes for float16 and bfloat16 values."""
    return np.clip(np.rint(x.astype(np.float64) * 127 / absmax.astype(np.float64)), -127, 127)


# ---------------------------------------------------------------------------------------------------------------
# Rotation: every block of b consecutive features is multiplied by H, the Sylvester-Hadamard matrix over sqrt(b)


def rotated_size(k: int, rotation: int) -> int:
    """Features after rotation: k, padded with zeros to whole blocks."""
    return k if rotation == 0 else -(-k // rotation) * rotation


def rotate(x: Floats, rotation: int) -> Floats:
    """H of every block of x [..., k], as float32 [..., rotated_size].

    Butterflies (u, v) -> (u + v, u - v) of distance 1, 2, 4, ..., b / 2 in this order, each rounded once, then the
    factor 1 / sqrt(b), a power of two.
    """
    if rotation == 0:
        return x
    padding = rotated_size(x.shape[-1], rotation) - x.shape[-1]
    x = np.concatenate([x, np.zeros((*x.shape[:-1], padding), np.float32)], axis=-1)
    distance = 1
    with np.errstate(all="ignore"):
        while distance < rotation:
            pairs = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * distance), 2, distance)
            u, v = pairs[..., 0, :], pairs[..., 1, :]
            x = np.stack([u + v, u - v], axis=-2).reshape(x.shape)
            distance *= 2
        return x * F(1 / math.sqrt(rotation))


# ---------------------------------------------------------------------------------------------------------------
# The operations


def as_mask(exclude: Sequence[int] | Array | None, shape: tuple[int, ...]) -> Mask:
    """Excluded columns, or a mask of x's shape, as a mask of x's shape."""
    mask = np.zeros(shape, bool)
    if exclude is not None:
        exclude = np.asarray(exclude)
        if exclude.dtype == bool:
            return exclude.reshape(shape)
        mask[..., exclude.astype(np.int64)] = True
    return mask


def quantize(
    x: Floats,
    *,
    scheme: str = "absmax",
    granularity: str = "row",
    rotation: int = 0,
    exclude: Sequence[int] | Array | None = None,
) -> Quantized:
    """Codes of `x` [..., k]; one scale per tensor ([1]) or per row ([...], and [1] for a rank-1 x).

    `exclude` (columns, or a mask of x's shape) takes elements out of the scale and sets their codes to 0 (Eq. 8). With
    `rotation` they become 0 before x is rotated; then all of the rotated x takes part, and there are
    `rotated_size(k, rotation)` codes in a row. A group whose rotated values float32 does not hold is rotated times
    2^-8, and its scale is times 2^8.
    """
    x = np.asarray(x, np.float32)
    keep = ~as_mask(exclude, x.shape)
    if rotation != 0:
        small = rotate(np.where(keep, x, F(0)) * F(2**-8), rotation)
        x = rotate(np.where(keep, x, F(0)), rotation)
        keep = np.ones(x.shape, bool)
    groups = (1, x.size) if granularity == "tensor" else (int(np.prod(x.shape[:-1])), x.shape[-1])
    factor = F(1)
    if rotation != 0:
        held = np.isfinite(x.reshape(groups)).all(1)
        x = np.where(held[:, None], x.reshape(groups), small.reshape(groups)).reshape(x.shape)
        factor = np.where(held, F(1), F(2**8))
    formula = {"absmax": _quantize_groups_absmax, "zeropoint": _quantize_groups_zeropoint}[scheme]
    codes, scale, zeropoint = formula(x.reshape(groups), keep.reshape(groups), rotated=rotation != 0)
    scale = scale * factor
    scale_shape = (1,) if granularity == "tensor" or x.ndim == 1 else x.shape[:-1]
    zeropoint = None if zeropoint is None else zeropoint.reshape(scale_shape)
    return Quantized(codes.reshape(x.shape), scale.reshape(scale_shape), zeropoint)


def dequantize(q: Quantized, *, rotation: int = 0, k: int | None = None) -> Floats:
    """(codes + zeropoint) * scale in float32, one rounding per operation; k columns.

    With `rotation` (H codes + H zeropoint) * scale, as H is its own inverse: H codes is exact, and H zeropoint is
    sqrt(b) zeropoint in the first feature of each block and 0 in the others.
    """
    values = rotate(q.codes.astype(np.float32), rotation)
    per_group = (*q.scale.shape, 1) if q.scale.ndim == q.codes.ndim - 1 else q.scale.shape
    with np.errstate(all="ignore"):
        if q.zeropoint is not None:
            ones = rotate(np.ones(values.shape[-1:], np.float32), rotation)
            values = values + q.zeropoint.reshape(per_group) * ones
        return (values * q.scale.reshape(per_group))[..., :k]


def relative_threshold(maxima: Floats, rows: int, relative: float) -> np.float32:
    """Returns t = relative f(m) med of the column maxima a_j > 0, in float32; infinity where there are none.

    med is their lower median, of the maxima cut to their upper 16 bits; f(m) = sqrt(ln 1024 / ln 2m) for m < 512, else
    1: what the maximum of few normal values lacks.
    """
    positive = np.sort(maxima[maxima > 0])
    if positive.size == 0:
        return F(np.inf)
    median = (positive[(positive.size - 1) // 2 :][:1].view(np.uint32) & 0xFFFF0000).view(np.float32)[0]
    factor = F(math.sqrt(math.log(1024) / math.log(2 * rows))) if rows < 512 else F(1)
    with np.errstate(over="ignore"):
        return F(relative) * factor * median


def outliers_among(maxima: Floats, rows: int, *, threshold: float, relative: float | None, cap: float | None) -> Mask:
    """Which of the column maxima [k] of `rows` rows are outliers, NaN being infinite.

    Absolute: not (a_j < threshold). Relative: a_j > 0 and not (a_j < t), see `relative_threshold`. Of more than
    floor(cap * k) only the largest (of equal ones the first), and all that are infinite.
    """
    a = np.where(np.isnan(maxima), F(np.inf), maxima)
    t = F(threshold) if relative is None else relative_threshold(a, rows, relative)
    found = ~(a < t) & ((a > 0) | (relative is None))
    if cap is not None and found.sum() > (most := math.floor(cap * a.size)):
        order = np.lexsort((np.arange(a.size), -a))  # the largest first
        order = order[found[order]]
        found = np.isinf(a)
        found[order[:most]] = True
    return found


def find_outliers(
    x: Floats, *, threshold: float = DEFAULT_THRESHOLD, relative: float | None = None, cap: float | None = None
) -> npt.NDArray[np.int32]:
    """O = { j : exists i with not (|x[i, j]| < threshold) }, ascending (section 3.2); or as in `outliers_among`."""
    k = x.shape[-1]
    rows = int(np.prod(x.shape[:-1]))
    if rows == 0:
        return np.empty(0, np.int32)
    maxima = np.max(np.abs(x.reshape(rows, k)), axis=0)  # NaN where there is one
    found = outliers_among(maxima, rows, threshold=threshold, relative=relative, cap=cap)
    return np.nonzero(found)[0].astype(np.int32)


def int8_matmul(a: Array, b: Array) -> npt.NDArray[np.int64]:
    """Product of a [..., k] and b [n, k], transposed, exact."""
    # float64 holds every integer below 2^53, and |sum| <= 2^14 k: exact for k < 2^39, and BLAS makes it fast.
    return np.asarray(a.astype(np.float64) @ b.astype(np.float64).T, np.int64)


def zeropoint_product(qx: Array, zx: Array, qw: Array, zw: Array) -> npt.NDArray[np.int64]:
    """Eq. (5), unrolled: acc + zw sum_k qx + zx sum_k qw + k zx zw. qx [m,k], zx [m], qw [n,k], zw [n], integers."""
    qx, zx, qw, zw = (np.asarray(v).astype(np.int64) for v in (qx, zx, qw, zw))
    acc = int8_matmul(qx, qw)
    return acc + zw * qx.sum(1)[:, None] + zx[:, None] * qw.sum(1) + qx.shape[1] * zx[:, None] * zw


# ---------------------------------------------------------------------------------------------------------------
# Weights and the linear layer


@dataclass(frozen=True)
class Weight:
    """An int8 weight [n, k]: codes, scale [1] or [n], zeropoint alike or None; kept columns in their own dtype.

    With `rotation` there are `rotated_size(k, rotation)` codes in a row, and k is given.
    """

    codes: Codes
    scale: Floats
    zeropoint: Floats | None
    outlier_columns: npt.NDArray[np.int32] | None
    outlier_weight: Floats | None
    rotation: int = 0
    k: int | None = None

    def dequantize(self) -> Floats:
        """The weight from its codes, [n, k] float32. Kept columns are not substituted."""
        return dequantize(Quantized(self.codes, self.scale, self.zeropoint), rotation=self.rotation, k=self.k)

    def outlier_path(self) -> Floats:
        """What the outlier columns of x are multiplied with: kept columns where there are, else dequantized codes."""
        weight = self.dequantize()
        if self.outlier_columns is not None and self.outlier_weight is not None:
            weight[:, self.outlier_columns] = self.outlier_weight
        return weight


def quantize_weight(
    weight: Floats,
    *,
    scheme: str = "absmax",
    granularity: str = "vector",
    rotation: int = 0,
    outlier_columns: Sequence[int] | Array | None = None,
) -> Weight:
    """Codes of `weight` [n, k], made over all k columns. Only "vector" has one scale per output feature."""
    if not np.isfinite(weight).all():
        raise ValueError("quantize_weight: weight: expected finite values")
    groups = "row" if granularity == "vector" else "tensor"
    q = quantize(weight, scheme=scheme, granularity=groups, rotation=rotation)
    columns = None if outlier_columns is None else np.unique(np.asarray(outlier_columns, np.int32))
    return Weight(*q, columns, None if columns is None else weight[:, columns], rotation, weight.shape[1])


class Output(NamedTuple):
    """A product in float64, [..., n], and what its float32 rounding is bounded by (see tolerances.py)."""

    value: Doubles
    magnitude: Doubles  # sum of the absolute values of the float32 terms
    terms: int  # how many float32 products are added up in one output
    unscaled: Doubles  # the integer of the int8 term, for scales that underflow


def outlier_mask(
    x: Floats,
    weight: Weight,
    *,
    outliers: str,
    threshold: float,
    relative: float | None = None,
    cap: float | None = None,
) -> Mask:
    """The elements of `x` [m, k] that go the 16-bit way."""
    match outliers:
        case "columns":  # Eq. (8): O, a set of columns
            return as_mask(find_outliers(x, threshold=threshold, relative=relative, cap=cap), x.shape)
        case "rows":  # every row as a call of its own
            rows = [as_mask(find_outliers(r, threshold=threshold, relative=relative, cap=cap), r.shape) for r in x]
            return np.array(rows, bool).reshape(x.shape)
        case "static":
            assert weight.outlier_columns is not None
            return as_mask(weight.outlier_columns, x.shape)
        case "none":
            return np.zeros(x.shape, bool)
    raise ValueError(f"outlier_mask: outliers: expected one of {OUTLIERS}, got {outliers!r}")


def linear(
    x: Floats,
    weight: Weight,
    bias: Floats | None = None,
    *,
    scheme: str = "absmax",
    granularity: str = "vector",
    threshold: float = DEFAULT_THRESHOLD,
    relative: float | None = None,
    cap: float | None = None,
    outliers: str = "columns",
    path: str = "int8",
) -> Output:
    """Y = X W^T + bias for X [..., k], W [n, k] by Eq. (8).

    y[i,j] = s_x[i] s_w[j] sum_{h not in O} (qx[i,h] + zx[i]) (qw[j,h] + zw[j]) + sum_{o in O} x[i,o] w[j,o] + bias[j]

    Eq. (6) is granularity "tensor", Eq. (7) "vector", Eq. (4) the zero points. With a rotated weight qx are the codes
    of the rotated x (h counts rotated features), whose elements in O were 0 before; the sum over O is as without.
    """
    lead, k, n = x.shape[:-1], x.shape[-1], weight.codes.shape[0]
    x = x.reshape(int(np.prod(lead)), k)
    b = np.zeros(n) if bias is None else bias.astype(np.float64)
    zw = np.zeros(1) if weight.zeropoint is None else weight.zeropoint.astype(np.float64)
    sw = weight.scale.astype(np.float64)
    qw = weight.codes.astype(np.float64)

    with np.errstate(all="ignore"):
        if path == "weight_only":  # y = s_w sum_h x (qw + zw) + bias
            x64 = rotate(x, weight.rotation).astype(np.float64)
            value = (x64 @ (qw + zw[:, None]).T) * sw + b
            # A kernel may unroll the zero point, as in Eq. (5): its terms are bounded by |qw| + |zw|.
            magnitude = (np.abs(x64) @ (np.abs(qw) + np.abs(zw)[:, None]).T) * sw + np.abs(b)
            terms, unscaled = x64.shape[1], np.zeros_like(value)
        else:
            mask = outlier_mask(x, weight, outliers=outliers, threshold=threshold, relative=relative, cap=cap)
            groups = "tensor" if granularity == "tensor" else "row"
            q = quantize(x, scheme=scheme, granularity=groups, rotation=weight.rotation, exclude=mask)
            zx = np.zeros(1) if q.zeropoint is None else q.zeropoint.astype(np.float64)
            sx = q.scale.astype(np.float64)[:, None]
            # Eq. (4): (A + zp_a)(B + zp_b), over the elements that are not outliers. Same integer as Eq. (5).
            left_out = mask if weight.rotation == 0 else np.zeros(q.codes.shape, bool)
            integer = np.where(left_out, 0, q.codes + zx[:, None]) @ (qw + zw[:, None]).T
            int8_term = integer * (sx * sw)
            x16 = np.where(mask, x, F(0)).astype(np.float64)
            w16 = weight.outlier_path().astype(np.float64)
            outlier_term = x16 @ w16.T
            value = int8_term + outlier_term + b
            magnitude = np.abs(int8_term) + np.abs(x16) @ np.abs(w16).T + np.abs(b)
            terms = int(mask.sum(axis=1).max(initial=0))
            if outliers == "rows" and q.zeropoint is not None:
                # A kernel may multiply the codes 0 of these elements, too, and take out what zx made of each by itself.
                made_of_zeros = left_out @ np.abs((qw + zw[:, None]).T * sw) * np.abs(zx[:, None] * sx)
                magnitude, terms = magnitude + 2 * made_of_zeros, 2 * terms
            unscaled = np.abs(integer)
    y = (*lead, n)
    return Output(value.reshape(y), magnitude.reshape(y), terms, unscaled.reshape(y))
