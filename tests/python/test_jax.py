"""octavo.jax: the core's results inside and outside of jit, and what JAX does with operations."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
from octavo import Options

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy
jax.config.update("jax_num_cpu_devices", 4)  # for shard_map
oj = importlib.import_module("octavo.jax")

RNG = np.random.default_rng(0)
POLICIES = [
    Options(),
    Options(outliers="rows", rotation=64),
    Options(outliers="static"),
    Options(scheme="zeropoint", granularity="tensor", outliers="none"),
    Options(path="weight_only"),
    Options(relative=4.0, cap=0.1),
]


def made(n: int = 40, k: int = 100, dtype: Any = np.float32, options: Options | None = None) -> Any:
    """X with two large columns, W, bias; the weight in octavo and in octavo.jax."""
    x = RNG.standard_normal((5, k)).astype(dtype)
    x[:, [3, 70]] *= 20
    w, bias = (RNG.standard_normal(shape).astype(dtype) for shape in ((n, k), (n,)))
    columns = np.asarray([3, 70], np.int32)
    native = octavo.quantize_weight(w, options=options or Options(), outlier_columns=columns)
    weight = oj.quantize_weight(jnp.asarray(w), options=options, outlier_columns=jnp.asarray(columns))
    return x, w, bias, native, weight


def same(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("options", POLICIES, ids=lambda options: options.outliers + options.path)
def test_linear_is_the_core(options: Options) -> None:
    x, _, bias, native, weight = made(options=options)
    expected = octavo.linear(x, native, bias, options=options)
    same(oj.linear(jnp.asarray(x), weight, jnp.asarray(bias)), expected)
    same(jax.jit(oj.linear)(jnp.asarray(x), weight, jnp.asarray(bias)), expected)
    same(oj.linear(jnp.asarray(x), oj.Int8Weight.from_int8_weight(native, options), jnp.asarray(bias)), expected)
    same(jax.jit(lambda w: w.dequantize())(weight), np.asarray(native.dequantize()))


@pytest.mark.parametrize("options", POLICIES, ids=lambda options: options.outliers + options.path)
def test_many_are_those_alone(options: Options) -> None:
    x, _, bias, _, weight = made(options=options)
    other = made(n=24, options=options)[4]
    x, weights, biases = jnp.asarray(x), [weight, other, weight], [jnp.asarray(bias), None, None]
    alone = [oj.linear(x, *each) for each in zip(weights, biases, strict=True)]
    for many in (oj.linear_many(x, weights, biases), jax.jit(oj.linear_many)(x, weights, biases)):
        assert len(many) == 3
        for y, expected in zip(many, alone, strict=True):
            same(y, expected)
    many_grad = jax.grad(lambda x: sum((y * y).sum() for y in oj.linear_many(x, weights, biases)))
    each_grad = jax.grad(lambda x: sum((oj.linear(x, *each) ** 2).sum() for each in zip(weights, biases, strict=True)))
    np.testing.assert_allclose(many_grad(x), each_grad(x), rtol=1e-5, atol=1e-3)
    assert oj.linear_many(x, []) == []
    with pytest.raises(ValueError, match=r"^linear_many: biases: expected 3 of them, as of weights, got 1$"):
        oj.linear_many(x, weights, [None])
    with pytest.raises(ValueError, match=r"^linear_many: options: expected scheme"):
        oj.linear_many(x, [weight, oj.quantize_weight(jnp.ones((2, 100)), options=Options(rotation=256))])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype: Any) -> None:
    x, _, _, native, weight = made(dtype=dtype)
    y = jax.jit(oj.linear)(jnp.asarray(x).reshape(1, 5, 1, -1), weight)
    assert y.shape == (1, 5, 1, 40)
    same(y.reshape(5, 40), octavo.linear(jnp.asarray(x), native))


def test_quantized_within_jit() -> None:
    w = RNG.standard_normal((33, 65)).astype(np.float32)
    inside = jax.jit(oj.quantize_weight)(w)
    outside = octavo.quantize_weight(w)
    assert inside.shape == (33, 65)
    same(inside.codes, np.asarray(outside.packed))
    same(inside.code_sums, np.asarray(outside.code_sums))


def test_other_operations() -> None:
    x, *_ = made()
    same(oj.find_outliers(jnp.asarray(x)), octavo.find_outliers(x))
    found = jax.jit(lambda x: oj.find_outliers(x, size=4))(jnp.asarray(x))
    assert found.tolist() == [3, 70, 100, 100]
    a, b = (RNG.integers(-128, 128, shape, dtype=np.int8) for shape in ((3, 20), (7, 20)))
    same(jax.jit(oj.int8_matmul)(jnp.asarray(a), jnp.asarray(b)), octavo.int8_matmul(a, b))


def test_vmap_calls_one_example_at_a_time() -> None:
    x, _, _, native, weight = made()
    batch = np.stack([x, x / 20])  # the second has no outliers
    y = jax.vmap(lambda x: oj.linear(x, weight))(jnp.asarray(batch))
    for row, example in zip(y, batch, strict=True):
        same(row, octavo.linear(example, native))


def test_gradients() -> None:
    """Those of x W'^T + bias, W' dequantized with its kept columns."""
    x, w, bias, native, weight = made()
    known = np.asarray(native.dequantize())
    known[:, [3, 70]] = w[:, [3, 70]]
    back = RNG.standard_normal((5, 40)).astype(np.float32)
    loss = jax.jit(jax.grad(lambda x, bias: (oj.linear(x, weight, bias) * back).sum(), (0, 1)))
    grad_x, grad_bias = loss(jnp.asarray(x), jnp.asarray(bias))
    np.testing.assert_allclose(grad_x, back @ known, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_bias, back.sum(0), rtol=1e-5, atol=1e-5)


def test_donation_and_repetition() -> None:
    x, _, _, native, weight = made(n=100, k=100)
    function = jax.jit(lambda x: oj.linear(x, weight), donate_argnums=0)
    for _ in range(3):
        same(function(jnp.array(x)), octavo.linear(x, native))


@pytest.mark.parametrize("count", [2, 4])
def test_shard_map(count: int) -> None:
    from jax.sharding import Mesh, PartitionSpec

    x, _, bias, native, weight = made(n=128)
    mesh = Mesh(jax.devices()[:count], ("model",))
    function = jax.shard_map(
        lambda x, weight, bias: oj.linear(x, weight, bias),
        mesh=mesh,
        in_specs=(PartitionSpec(), weight.specs("model"), PartitionSpec("model")),
        out_specs=PartitionSpec(None, "model"),
        check_vma=False,
    )
    same(jax.jit(function)(jnp.asarray(x), weight, jnp.asarray(bias)), octavo.linear(x, native, bias))


def test_flax() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Model(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(64, 48, rngs=rngs)
            self.others = nnx.List(
                [nnx.Linear(48, 48, use_bias=False, rngs=rngs), self.first.__class__(48, 8, rngs=rngs)]
            )

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.first(x))
            for layer in self.others:
                x = layer(x)
            return x

    model = Model(nnx.Rngs(0))
    x = jnp.asarray(RNG.standard_normal((6, 64)).astype(np.float32))
    before = model(x)
    from octavo.flax import quantize_

    assert quantize_(model, Options(rotation=16)) == ["first", "others.0", "others.1"]
    after = nnx.jit(lambda model, x: model(x))(model, x)
    assert 0 < float(jnp.abs(after - before).max()) < 0.1 * float(jnp.abs(before).max())
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), after)


def test_errors() -> None:
    x, w, _, _, weight = made()
    with pytest.raises(TypeError, match=r"^linear: x: expected an array of float32, float16, bfloat16, got float64$"):
        oj.linear(np.zeros((2, 100)), weight)
    with pytest.raises(ValueError, match=r"^linear: x: expected k = 100 columns, got shape \(2, 99\)$"):
        oj.linear(jnp.zeros((2, 99)), weight)
    with pytest.raises(ValueError, match=r"^linear: options: expected scheme, granularity, rotation of the weight"):
        oj.linear(jnp.asarray(x), weight, options=Options(rotation=64))
    with pytest.raises(ValueError, match=r"quantize_weight: weight: expected two dimensions"):
        oj.quantize_weight(jnp.zeros(3))
    with pytest.raises(ValueError, match="quantize_weight: weight: expected finite"):
        jax.block_until_ready(oj.quantize_weight(jnp.asarray(w).at[1, 2].set(jnp.nan)))


def test_what_is_declared_is_xlas(tmp_path: Path) -> None:
    """Sizes and offsets in bindings/xla_ffi.hpp, by a compiler."""
    import jaxlib

    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = Path(__file__).resolve().parents[2]
    ours = (root / "bindings/xla_ffi.hpp").read_text(encoding="utf-8")
    names = {
        "Extension": "XLA_FFI_Extension_Base",
        "Version": "XLA_FFI_Api_Version",
        "Metadata": "XLA_FFI_Metadata",
        "MetadataExtension": "XLA_FFI_Metadata_Extension",
        "Buffer": "XLA_FFI_Buffer",
        "Text": "XLA_FFI_ByteSpan",
        "Scalar": "XLA_FFI_Scalar",
        "Values": "XLA_FFI_Args",
        "Attributes": "XLA_FFI_Attrs",
        "ErrorArguments": "XLA_FFI_Error_Create_Args",
        "StreamArguments": "XLA_FFI_Stream_Get_Args",
        "DeviceArguments": "XLA_FFI_DeviceOrdinal_Get_Args",
        "Api": "XLA_FFI_Api",
        "CallFrame": "XLA_FFI_CallFrame",
    }
    assert sorted(names) == sorted(re.findall(r"^struct (\w+) \{", ours, re.MULTILINE))
    checks = [f"static_assert(sizeof({own}) == sizeof({theirs}));" for own, theirs in names.items()]
    for own, field, theirs, named in (
        ("Api", "create_error", "XLA_FFI_Api", "XLA_FFI_Error_Create"),
        ("Api", "get_stream", "XLA_FFI_Api", "XLA_FFI_Stream_Get"),
        ("Api", "get_device", "XLA_FFI_Api", "XLA_FFI_DeviceOrdinal_Get"),
        ("Buffer", "dims", "XLA_FFI_Buffer", "dims"),
        ("Metadata", "traits", "XLA_FFI_Metadata", "traits"),
        ("CallFrame", "arguments", "XLA_FFI_CallFrame", "args"),
        ("CallFrame", "attributes", "XLA_FFI_CallFrame", "attrs"),
    ):
        checks.append(f"static_assert(offsetof({own}, {field}) == offsetof({theirs}, {named}));")
    for own, theirs in (("s8", "S8"), ("s32", "S32"), ("s64", "S64"), ("f16", "F16"), ("f32", "F32"), ("bf16", "BF16")):
        checks.append(f"static_assert(static_cast<int>(DataType::{own}) == XLA_FFI_DataType_{theirs});")
    source = tmp_path / "check.cpp"
    lines = [
        '#include "bindings/xla_ffi.hpp"',
        '#include "xla/ffi/api/c_api.h"',
        "using namespace octavo::python::xla;",
    ]
    source.write_text("\n".join([*lines, *checks]), encoding="utf-8")
    include = Path(jaxlib.__file__).parent / "include"
    subprocess.run([compiler, "-std=c++20", "-fsyntax-only", f"-I{root}", f"-I{include}", source], check=True)


def test_octavo_does_not_need_jax() -> None:
    code = "import sys, octavo; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
