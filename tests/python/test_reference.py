"""The oracle, tested on its own: hand-computed cases, what it claims of codes, and PyTorch's bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES_16, FINITE_KINDS, HAS_TORCH, finite_kinds, make, seeds, sizes, values_16

F = np.float32


def test_bfloat16_rounds_half_to_even() -> None:
    ulp = 2.0**-7
    cases = {
        1.0: 1.0,
        1 + ulp / 2: 1.0,  # tie, down to even
        1 + 3 * ulp / 2: 1 + 2 * ulp,  # tie, up to even
        1 + ulp / 2 + 2.0**-20: 1 + ulp,
        -(1 + ulp / 2): -1.0,
        3.4e38: np.inf,  # past the largest finite value, by more than half an ulp
        2.0**-133: 2.0**-133,
        2.0**-134: 0.0,
        1.5 * 2.0**-133: 2.0**-132,
        0.0: 0.0,
    }
    np.testing.assert_array_equal(ref.round_to(np.array([*cases]), "bfloat16"), np.array([*cases.values()], F))
    assert np.isnan(ref.round_to(np.array([np.nan, -np.nan]), "bfloat16")).all()
    assert np.array_equal(ref.float32_to_bfloat16(np.array([1, -2, np.inf], F)), [0x3F80, 0xC000, 0x7F80])


def test_bfloat16_is_its_own_inverse() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = ref.bfloat16_to_float32(bits)
    number = ~np.isnan(values)
    assert number.sum() == 2**16 - 2 * 127
    np.testing.assert_array_equal(ref.float32_to_bfloat16(values)[number], bits[number])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_bfloat16_equals_torch() -> None:
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    values = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    ours = ref.float32_to_bfloat16(values)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_float32_codes_are_the_ideal_codes(dtype: str) -> None:
    """127 x is exact for 16-bit values, so one float32 division gives the codes of the real numbers."""
    positive = values_16(dtype)
    for a in np.random.default_rng(1).choice(positive, 100):
        x = positive[positive <= a]
        q = ref.quantize(np.append(x, a)[None]).codes[0, :-1]
        np.testing.assert_array_equal(q, ref.ideal_absmax_codes(x, a))


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_the_other_forms_misround(dtype: str) -> None:
    """Neither x * (127/absmax) nor x / (absmax/127) gives those codes. So the tests of codes can tell them."""
    a, x = {"float16": (1.126953125, 0.5634765625), "bfloat16": (1.3828125, 0.69140625)}[dtype]
    a, x = F(a), F(x)
    assert x * 2 == a  # the quotient is 63.5 exactly: a tie, to 64
    assert ref.quantize(np.array([[x, a]], F)).codes[0, 0] == 64
    assert np.rint(x * (F(127) / a)) == 63
    assert np.rint(x / (a / F(127))) == 63


@given(finite_kinds, sizes, sizes, seeds, st.sampled_from(ref.DTYPES))
def test_absmax_error_is_half_a_step(kind: str, m: int, k: int, seed: int, dtype: str) -> None:
    x = make(kind, (m, k), dtype, seed).astype(np.float64)
    q = ref.quantize(x.astype(F))
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    assert (np.abs(q.codes * step - x) <= step * (0.5 + 1e-5)).all()
    zero = (x == 0).all(axis=1)
    assert (np.abs(q.codes.astype(int)).max(axis=1) == np.where(zero, 0, 127)).all()


@given(finite_kinds, sizes, sizes, seeds, st.sampled_from(ref.DTYPES))
def test_zeropoint_error_is_one_step(kind: str, m: int, k: int, seed: int, dtype: str) -> None:
    """Two roundings, rint(nd x) and rint(nd min), of half a step each; nd * x itself is rounded to float32."""
    x = make(kind, (m, k), dtype, seed)
    q = ref.quantize(x, scheme="zeropoint")
    assert q.zeropoint is not None
    values = ref.dequantize(q).astype(np.float64)
    scale = q.scale[:, None].astype(np.float64)
    error = np.abs(values - x)
    rounding = 2.0**-22 * np.abs(x).max(axis=1, keepdims=True) + 2.0**-141  # 254 half subnormals of the scale
    assert (error <= scale * 1.001 + rounding).all()
    constant = (x == x[:, :1]).all(axis=1)
    assert (values[constant] == x[constant]).all()


def test_zeropoint_maps_the_range_onto_the_codes() -> None:
    q = ref.quantize(np.array([[10, 100, 264]], F), scheme="zeropoint")
    assert q.zeropoint is not None
    assert (q.codes.tolist(), q.zeropoint.tolist(), q.scale.tolist()) == ([[-127, -37, 127]], [137], [1])


@given(sizes, sizes, sizes, seeds)
def test_zeropoint_product_unrolls(m: int, k: int, n: int, seed: int) -> None:
    """Eq. (4) equals Eq. (5)."""
    rng = np.random.default_rng(seed)
    qx, qw = (rng.integers(-127, 128, (r, k)) for r in (m, n))
    zx, zw = (rng.integers(-5000, 5000, r) for r in (m, n))
    np.testing.assert_array_equal(ref.zeropoint_product(qx, zx, qw, zw), (qx + zx[:, None]) @ (qw + zw[:, None]).T)


@pytest.mark.parametrize("rotation", [16, 64, 256])
def test_rotation_is_its_own_inverse(rotation: int) -> None:
    """H is symmetric and orthogonal, and its first row is 1 / sqrt(b): integers come back exactly."""
    x = np.random.default_rng(0).integers(-100, 101, (3, 300)).astype(F)
    rotated = ref.rotate(x, rotation)
    assert rotated.shape == (3, ref.rotated_size(300, rotation))
    np.testing.assert_array_equal(rotated[:, 0], x[:, :rotation].sum(1) / np.sqrt(rotation))
    back = ref.rotate(rotated, rotation)
    np.testing.assert_array_equal(back[:, :300], x)
    assert (back[:, 300:] == 0).all()


def test_rotation_of_units() -> None:
    """Of unit vectors: the columns of Sylvester's matrix, whose entry (i, j) has the sign of the parity of i & j."""
    index = np.arange(16)
    parity = np.array([[(int(i & j).bit_count() & 1) for j in index] for i in index])
    np.testing.assert_array_equal(ref.rotate(np.eye(16, dtype=F), 16), ((1 - 2 * parity) / 4).astype(F))


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_dequantizing_rotates_back(scheme: str) -> None:
    w = make("positive", (5, 70), "float32")
    rotated = ref.rotate(w, 64)
    weight = ref.quantize_weight(w, scheme=scheme, rotation=64)
    assert weight.codes.shape == (5, 128)
    step = weight.scale[:, None].astype(float)
    values = weight.dequantize()
    assert values.shape == w.shape
    # Codes are off by at most a step (zeropoint), of errors that add up like the rows of H.
    assert (np.abs(values - w) <= step * 8).all()
    assert np.sqrt(np.mean((values - w) ** 2)) < step.max()
    plain = ref.dequantize(ref.Quantized(weight.codes, weight.scale, weight.zeropoint))
    np.testing.assert_allclose(plain, rotated, atol=step.max())


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("outliers", ref.OUTLIERS)
@pytest.mark.parametrize("granularity", ref.GRANULARITIES)
@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_linear_is_close_to_the_float_product(scheme: str, granularity: str, outliers: str, rotation: int) -> None:
    """An upper bound that no algebra slip passes: each operand is off by at most one step per element."""
    x, w = make("outliers", (17, 65), "float32"), make("normal", (13, 65), "float32")
    weight = ref.quantize_weight(
        w, scheme=scheme, granularity=granularity, rotation=rotation, outlier_columns=[3, 1, 3]
    )
    output = ref.linear(x, weight, scheme=scheme, granularity=granularity, outliers=outliers)
    mask = ref.outlier_mask(x, weight, outliers=outliers, threshold=6.0)
    groups = "tensor" if granularity == "tensor" else "row"
    q = ref.quantize(x, scheme=scheme, granularity=groups, rotation=rotation, exclude=mask)
    sx, sw = q.scale.astype(float)[:, None], weight.scale.astype(float)[None]
    if rotation == 0:
        error_x, error_w = np.where(mask, 0, sx), np.broadcast_to(sw.T, w.shape)
        slack = error_x @ np.abs(w).T + np.abs(x) @ error_w.T + error_x @ error_w.T
    else:  # the int8 product is of the rotated operands; what is not kept of the outliers, rotated back
        inside, rotated = np.abs(ref.rotate(np.where(mask, F(0), x), rotation)), np.abs(ref.rotate(w, rotation))
        error_x, error_w = np.broadcast_to(sx, inside.shape), np.broadcast_to(sw.T, rotated.shape)
        slack = error_x @ rotated.T + inside @ error_w.T + error_x @ error_w.T
        slack += np.where(mask, np.abs(x), 0).sum(1, keepdims=True) * sw * np.sqrt(rotation)
        slack += 1e-5 * np.abs(x).sum(1, keepdims=True)  # rotations are rounded to float32
    assert (np.abs(output.value - x.astype(float) @ w.T.astype(float)) <= slack).all()


def test_decomposition_beats_none_and_kept_weights_beat_codes() -> None:
    """What the paper is about: with outlier columns, each step of it lowers the error."""
    x, w = make("outliers", (64, 128), "float32"), make("normal", (64, 128), "float32")
    exact = x.astype(float) @ w.T.astype(float)
    columns = ref.find_outliers(x)
    errors = []
    for outliers, kept in (("none", None), ("columns", None), ("columns", columns)):
        y = ref.linear(x, ref.quantize_weight(w, outlier_columns=kept), outliers=outliers).value
        errors.append(np.sqrt(np.mean((y - exact) ** 2)))
    assert errors[0] > 2 * errors[1] > 2 * errors[2], errors


@pytest.mark.parametrize("kind", FINITE_KINDS)
def test_weight_only_error_is_that_of_the_weight(kind: str) -> None:
    x, w = make(kind, (5, 33), "float16"), make("normal", (7, 33), "float16")
    weight = ref.quantize_weight(w)
    y = ref.linear(x, weight, path="weight_only").value
    exact = x.astype(float) @ (weight.codes * weight.scale.astype(float)[:, None]).T
    np.testing.assert_allclose(y, exact, rtol=1e-12, atol=1e-12 * np.abs(x).max())


def test_check_output_can_fail() -> None:
    output = ref.Output(np.array([1.0]), np.array([1.0]), 0, np.array([1.0]))
    ulp = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
    for dtype, step in ulp.items():
        tolerances.check_output(np.array([1], F), output, dtype)
        for wrong in (1 + (40 if dtype == "float32" else 1) * step, np.nan, np.inf):
            with pytest.raises(AssertionError):
                tolerances.check_output(np.array([wrong], F), output, dtype)
    nan = ref.Output(np.array([np.nan]), np.array([1.0]), 0, np.array([1.0]))
    with pytest.raises(AssertionError):
        tolerances.check_output(np.array([0], F), nan, "float32")
