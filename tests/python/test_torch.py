"""octavo.torch: Int8Linear, quantize_, calibrate_."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from support import TORCH, Typed, equal, make

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import octavo.torch as ot
import torch
from torch import Tensor, nn

DTYPES = {name: getattr(torch, name) for name in ref.DTYPES}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "affine": {"scheme": "zeropoint", "granularity": "row"},
    "tensor": {"granularity": "tensor", "threshold": 2.5, "outliers": "rows"},
    "weight only": {"path": "weight_only", "outliers": "none"},
    "kept": {"outlier_columns": [1, 5]},
    "static": {"outlier_columns": [1, 5], "outliers": "static", "scheme": "zeropoint"},
}


def dense(k: int, n: int, *, bias: bool = True, dtype: str = "float32", seed: int = 0) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, dtype=DTYPES[dtype])
    with torch.no_grad():
        layer.weight.copy_(TORCH.array(make("normal", (n, k), dtype, seed), dtype))
        if bias:
            layer.bias.copy_(TORCH.array(make("normal", (n,), dtype, seed), dtype))
    return layer


def inputs(k: int, m: int = 7, dtype: str = "float32", kind: str = "outliers") -> Tensor:
    result: Tensor = TORCH.array(make(kind, (m, k), dtype), dtype)
    return result


def same(a: Tensor | None, b: Tensor | None) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def same_layer(a: ot.Int8Linear, b: ot.Int8Linear, x: Tensor) -> None:
    for name in ("codes", "scale", "zeropoint", "outlier_columns", "outlier_weight", "bias"):
        same(getattr(a, name), getattr(b, name))
    for name in ("scheme", "granularity", "threshold", "outliers", "path", "in_features", "out_features"):
        assert getattr(a, name) == getattr(b, name), name
    with torch.no_grad():
        same(a(x), b(x))


# ---------------------------------------------------------------------------------------------------------------
# Int8Linear


def test_literal() -> None:
    """test_linear's first case, as a layer: 127 * 127 + 3 + 2 * 2 + 0.5."""
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[127, 3, 2.25], [-127, 0, 8]]))
        linear.bias.copy_(torch.tensor([0.5, 0]))
    layer = ot.Int8Linear.from_linear(linear, outliers="none")
    assert layer.codes.tolist() == [[127, 3, 2], [-127, 0, 8]]
    assert layer(torch.tensor([127.0, 1, 2])).tolist() == [16136.5, -16113]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_is_octavo_linear(options: str, dtype: str, bias: bool) -> None:
    """The layer, its functional form and the oracle are one."""
    linear, x = dense(33, 19, bias=bias, dtype=dtype), inputs(33, dtype=dtype)
    layer = ot.Int8Linear.from_linear(linear, **OPTIONS[options])
    of_weight = {k: v for k, v in OPTIONS[options].items() if k in ("scheme", "granularity", "outlier_columns")}
    of_product = {k: v for k, v in OPTIONS[options].items() if k in ("threshold", "outliers", "path")}
    weight = octavo.quantize_weight(linear.weight, **of_weight)
    with torch.no_grad():
        y = layer(x)
        same(y, octavo.linear(x, weight, linear.bias, **of_product))
    w = TORCH.host(linear.weight)
    b = None if linear.bias is None else TORCH.host(linear.bias)
    form = {k: v for k, v in of_weight.items() if k != "outlier_columns"}
    expected = ref.linear(TORCH.host(x), ref.quantize_weight(w, **of_weight), b, **form, **of_product)
    tolerances.check_output(TORCH.host(y), expected, dtype)


def test_attributes() -> None:
    layer = ot.Int8Linear.from_linear(dense(8, 4), outlier_columns=[3, 1])
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, ot.Int8Tensor)
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (torch.float32, (4, 8)), "those of the weight it replaces"
    assert not layer.weight.requires_grad
    assert (layer.codes.dtype, tuple(layer.codes.shape)) == (torch.int8, (4, 8))
    assert layer.scale.dtype == torch.float32
    assert tuple(layer.scale.shape) == (4,)
    assert layer.zeropoint is None
    assert layer.outlier_columns is not None
    assert layer.outlier_columns.tolist() == [1, 3]
    assert layer.outlier_weight is not None
    assert tuple(layer.outlier_weight.shape) == (4, 2)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.bias.requires_grad
    assert (layer.in_features, layer.out_features) == (8, 4)
    assert (layer.scheme, layer.granularity, layer.threshold) == ("absmax", "vector", 6.0)
    assert (layer.outliers, layer.path) == ("columns", "auto")
    weight = layer.int8_weight
    assert isinstance(weight, octavo.Int8Weight)
    assert weight.shape == (4, 8)
    assert weight is layer.weight.int8_weight, "the codes are held once"
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


def test_a_new_layer() -> None:
    layer = ot.Int8Linear(5, 3, dtype=torch.float16)
    assert tuple(layer.codes.shape) == (3, 5)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert ot.Int8Linear(5, 3, False).bias is None
    with torch.no_grad():
        assert tuple(layer(torch.ones(2, 5, dtype=torch.float16)).shape) == (2, 3)
    for bad in (
        {"scheme": "foo"},
        {"granularity": "foo"},
        {"outliers": "foo"},
        {"path": "foo"},
        {"threshold": -1.0},
        {"threshold": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ot.Int8Linear(5, 3, **bad)
    with pytest.raises(TypeError):
        ot.Int8Linear(5, 3, True, "absmax")  # type: ignore[misc]


def test_extra_repr() -> None:
    layer = ot.Int8Linear.from_linear(dense(8, 4, bias=False), scheme="zeropoint", threshold=5.5, outliers="rows")
    text = repr(layer)
    for part in ("Int8Linear", "in_features=8", "out_features=4", "bias=False", "zeropoint", "vector", "5.5", "rows"):
        assert part in text, text


def test_shapes() -> None:
    layer = ot.Int8Linear.from_linear(dense(8, 4))
    with torch.no_grad():
        for shape in ((8,), (0, 8), (2, 3, 8), (1, 2, 1, 3, 8)):
            assert tuple(layer(torch.ones(shape)).shape) == (*shape[:-1], 4)
        x = inputs(8, m=6).reshape(2, 3, 8)
        same(layer(x.transpose(0, 1)), layer(x.transpose(0, 1).contiguous()))
        same(layer(x.mT.contiguous().mT), layer(x))


# --- copies, casts, state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "torch.save", "safetensors", "module"])
def test_copies(options: str, how: str, tmp_path: Path) -> None:
    """Every way to carry a layer elsewhere gives the same layer, options and all, in a fresh one made without them."""
    layer, x = ot.Int8Linear.from_linear(dense(33, 19), **OPTIONS[options]), inputs(33)
    if how == "safetensors" and not importlib.util.find_spec("safetensors"):
        pytest.skip("safetensors is not installed")
    with torch.no_grad():
        layer(x)  # whatever is cached on first use must not be in the way
    if how in ("deepcopy", "pickle", "module"):
        duplicate = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda o: pickle.loads(pickle.dumps(o)),
            "module": through_torch_save,
        }[how](layer)
        same_layer(duplicate, layer, x)
        assert duplicate.int8_weight.packed.data_ptr() != layer.int8_weight.packed.data_ptr()
        return
    state = layer.state_dict()
    if how == "torch.save":
        torch.save(state, tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
    elif how == "safetensors":
        from safetensors.torch import load_file, save_file

        with pytest.raises(RuntimeError):  # not the codes under the weight's name, nor nothing
            save_file(state, tmp_path / "state")
        save_file(plain(state), tmp_path / "state")
        state = load_file(tmp_path / "state")
    fresh = ot.Int8Linear(33, 19)
    with torch.no_grad():
        fresh(x)
    result = fresh.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    same_layer(fresh, layer, x)


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a file holds it: the parts of int8 weights in their place."""
    result = {}
    for name, value in state.items():
        parts = (
            {f".{part}": own for part, own in value.parts().items()}
            if isinstance(value, ot.Int8Tensor)
            else {"": value}
        )
        result |= {name + part: own for part, own in parts.items()}
    return result


def through_torch_save(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_state_dict_keys() -> None:
    """Those of nn.Linear; in a file there is no `weight` that a reader without octavo could take for one."""
    state = ot.Int8Linear.from_linear(dense(8, 4), scheme="zeropoint", outlier_columns=[2]).state_dict()
    assert set(state) == {"weight", "bias"}
    assert isinstance(state["weight"], ot.Int8Tensor)
    held = plain(state)
    names = ("codes", "scale", "zeropoint", "outlier_columns", "outlier_weight", "options")
    assert set(held) == {"bias", *(f"weight.{name}" for name in names)}
    assert all(type(value) is Tensor for value in held.values())
    assert b"zeropoint" in bytes(held["weight.options"].tolist())  # JSON


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dicts_of_the_first_version(options: str) -> None:
    """As octavo's first checkpoint format has a layer: int8 `weight`, its arrays beside it, `_extra_state`."""
    layer, x = ot.Int8Linear.from_linear(dense(33, 19), **OPTIONS[options]), inputs(33)
    named = {"format_version": 1, **layer.weight.options.to_dict()}
    state = {
        "weight": layer.codes,
        "bias": layer.bias.detach(),
        "_extra_state": torch.frombuffer(bytearray(json.dumps(named).encode()), dtype=torch.uint8),
        **{name: getattr(layer, name) for name in ("scale", "zeropoint", "outlier_columns", "outlier_weight")},
    }
    fresh = ot.Int8Linear(33, 19)
    fresh.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=True)
    same_layer(fresh, layer, x)


def test_loading_replaces_what_was_there() -> None:
    """A layer with kept columns and zero points loads a plain one, and computes with what it loaded."""
    x = inputs(33)
    plain = ot.Int8Linear.from_linear(dense(33, 19, seed=1))
    other = ot.Int8Linear.from_linear(dense(33, 19, seed=2), scheme="zeropoint", outlier_columns=[1, 2])
    other.load_state_dict(plain.state_dict())
    same_layer(other, plain, x)


def test_loading_the_wrong_thing_is_refused() -> None:
    layer = ot.Int8Linear(8, 4)
    for state, word in (
        (ot.Int8Linear.from_linear(dense(9, 4)).state_dict(), "weight"),
        ({}, "weight"),
        ({**ot.Int8Linear.from_linear(dense(8, 4)).state_dict(), "more": torch.zeros(1)}, "more"),
    ):
        with pytest.raises(RuntimeError, match=word):
            layer.load_state_dict(state)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to float16", "to bfloat16", "cpu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_casts_keep_the_scales(options: str, cast: str) -> None:
    """A scale of 7 bits would be another weight: .half() and .to(dtype) leave the int8 weight as it is, bit for bit."""
    layer = ot.Int8Linear.from_linear(dense(33, 19), **OPTIONS[options])
    held = [name for name in ("codes", "scale", "zeropoint") if getattr(layer, name) is not None]
    before = {name: getattr(layer, name).clone() for name in held}
    model = nn.Sequential(layer)
    moved = model.to(DTYPES[cast.removeprefix("to ")]) if cast.startswith("to ") else getattr(model, cast)()
    for name, value in before.items():
        same(getattr(moved[0], name), value)
    columns = moved[0].outlier_columns
    assert columns is None or columns.dtype == torch.int32
    dtype = {"half": "float16", "to float16": "float16", "bfloat16": "bfloat16", "to bfloat16": "bfloat16"}.get(cast)
    if dtype:
        assert moved[0].bias.dtype == DTYPES[dtype]
        x = inputs(33, dtype=dtype)
        with torch.no_grad():
            y = moved(x)
        assert y.dtype == x.dtype
        assert torch.isfinite(y).all()


def test_to_an_empty_device_and_back() -> None:
    """Deferred initialization: a layer on meta is filled by assign."""
    layer, x = ot.Int8Linear.from_linear(dense(33, 19)), inputs(33)
    empty = ot.Int8Linear(33, 19, device="meta")
    assert empty.weight.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    same_layer(empty, layer, x)


def test_in_place_changes_of_the_weight_are_seen() -> None:
    """Loading, or assigning, after the first call must not leave a stale cache behind."""
    x = inputs(33)
    a, b = (ot.Int8Linear.from_linear(dense(33, 19, seed=seed), scheme="zeropoint") for seed in (1, 2))
    with torch.no_grad():
        a(x)
        a.load_state_dict(b.state_dict())
        same(a(x), b(x))
        assert a.int8_weight.packed.data_ptr() != b.int8_weight.packed.data_ptr()


def test_the_codes_are_held_once_wherever_they_move() -> None:
    """What is cached on first use does not keep the memory that a move or a cast has left."""
    layer, x = ot.Int8Linear.from_linear(dense(33, 19), outlier_columns=[1]), inputs(33)
    with torch.no_grad():
        expected = layer(x)
        for change in (lambda: layer._apply(torch.clone), layer.share_memory, lambda: layer.to(torch.float32)):
            change()
            same(layer(x), expected)
            assert layer.int8_weight.packed.data_ptr() == layer.weight._codes.data_ptr()


# --- autograd


@pytest.mark.parametrize("dtype", ref.DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_of_x_is_that_of_the_dequantized_weight(options: str, dtype: str) -> None:
    linear = dense(33, 19, dtype=dtype)
    layer = ot.Int8Linear.from_linear(linear, **OPTIONS[options])
    x = inputs(33, dtype=dtype).reshape(7, 1, 33).requires_grad_()
    y = layer(x)
    assert y.requires_grad
    assert y.dtype == x.dtype
    with torch.no_grad():
        same(y.detach(), layer(x))
    g = TORCH.array(make("normal", (7, 1, 19), dtype, 3), dtype)
    y.backward(g)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert x.grad.dtype == x.dtype
    w = TORCH.host(layer.weight.dequantize(torch.float32)).astype(float)  # with the kept columns
    g64 = TORCH.host(g).astype(float)
    expected, magnitude = g64 @ w, np.abs(g64) @ np.abs(w)
    error = np.abs(TORCH.host(x.grad) - expected)
    assert (error <= tolerances.gradient_bound(magnitude, 19, dtype)).all()
    assert layer.weight.grad is None
    if layer.bias is not None:
        assert layer.bias.grad is not None
        error = np.abs(TORCH.host(layer.bias.grad) - g64.sum((0, 1)))
        assert (error <= tolerances.gradient_bound(np.abs(g64).sum((0, 1)), 7, dtype)).all()


def test_gradients_reach_layers_below() -> None:
    """Frozen int8 layers in a model that trains: what an adapter needs."""
    first, second = dense(8, 16), ot.Int8Linear.from_linear(dense(16, 4))
    model = nn.Sequential(first, nn.ReLU(), second)
    model(inputs(8)).square().sum().backward()
    assert first.weight.grad is not None
    assert first.weight.grad.abs().sum() > 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = second.weight.clone()
    optimizer.step()
    same(second.weight, before)


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    layer = ot.Int8Linear.from_linear(dense(8, 4))
    x = inputs(8).requires_grad_()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast(dtype: str) -> None:
    """As nn.Linear: the output is of autocast's dtype, and is that of an input of that dtype."""
    layer, x = ot.Int8Linear.from_linear(dense(33, 19)), inputs(33)
    with torch.no_grad(), torch.autocast("cpu", DTYPES[dtype]):
        y = layer(x)
    assert y.dtype == DTYPES[dtype]
    with torch.no_grad():
        same(y, layer(x.to(DTYPES[dtype])))


# --- the compiler


@pytest.mark.parametrize("options", ["default", "static"])
def test_compiles(options: str) -> None:
    """One graph, with gradients; aot_eager traces like a compiler and needs none."""
    torch._dynamo.reset()
    layer = ot.Int8Linear.from_linear(dense(33, 19), **OPTIONS[options])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs(33).requires_grad_()
    y, expected = compiled(x), layer(x)
    same(y.detach(), expected.detach())
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    same(grad, expected_grad)


def test_exports() -> None:
    model, x = nn.Sequential(ot.Int8Linear.from_linear(dense(33, 19))), inputs(33)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        same(exported(x), model(x))


# ---------------------------------------------------------------------------------------------------------------
# quantize_


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = dense(24, 40, seed=1), dense(40, 24, bias=False, seed=2)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x + self.fc2(torch.relu(self.fc1(x))))
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = dense(24, 50, bias=False, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.lm_head(x)
        return result


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, ot.Int8Linear)}


BLOCKS = {f"blocks.{i}.{fc}" for i in (0, 1) for fc in ("fc1", "fc2")}


def test_quantize_replaces_linears_in_place() -> None:
    model = Model()
    originals = {name: copy.deepcopy(model.get_submodule(name)) for name in BLOCKS}
    x = inputs(24, kind="normal")
    with torch.no_grad():
        exact = model(x)
    assert ot.quantize_(model, recipe="paper", progress=False) is model
    assert quantized_names(model) == BLOCKS
    assert type(model.lm_head) is nn.Linear
    for name, linear in originals.items():
        with torch.no_grad():
            same_layer(model.get_submodule(name), ot.Int8Linear.from_linear(linear), inputs(linear.in_features))
    with torch.no_grad():
        y = model(x)
    assert torch.nn.functional.cosine_similarity(y, exact).min() > 0.999
    assert not torch.equal(y, exact)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (("*lm_head",), BLOCKS),
        ((), BLOCKS | {"lm_head"}),
        (["*"], set()),
        (("*.fc1",), {"blocks.0.fc2", "blocks.1.fc2", "lm_head"}),
        (("blocks.0.*", "lm_head"), {"blocks.1.fc1", "blocks.1.fc2"}),
        (("fc1",), BLOCKS | {"lm_head"}),  # the qualified name is meant, not its end
        (("blocks.[1-9].fc?",), {"blocks.0.fc1", "blocks.0.fc2", "lm_head"}),
        (("LM_HEAD",), BLOCKS | {"lm_head"}),  # case matters
    ],
)
def test_skip(skip: Any, expected: set[str]) -> None:
    assert quantized_names(ot.quantize_(Model(), skip=skip, progress=False)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "zeropoint", "granularity": "tensor", "threshold": 3.0, "outliers": "rows", "path": "int8"},
        {"path": "weight_only", "granularity": "row", "outliers": "none"},
    ],
)
def test_options_reach_every_layer(options: dict[str, Any]) -> None:
    model = ot.quantize_(Model(), **options, progress=False)
    for name in quantized_names(model):
        layer = model.get_submodule(name)
        assert {key: getattr(layer, key) for key in options} == options


def test_bad_options_leave_the_model_alone() -> None:
    model = Model()
    for options in ({"scheme": "foo"}, {"outliers": "foo"}, {"threshold": -1.0}, {"path": "foo"}, {"granularity": ""}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ot.quantize_(model, **options, progress=False)
    with torch.no_grad():
        model.blocks[1].fc2.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.fc2"):
        ot.quantize_(model, progress=False)
    assert quantized_names(model) == set()


def test_a_model_without_linears_and_twice() -> None:
    model = nn.Sequential(nn.ReLU())
    assert ot.quantize_(model, progress=False) is model
    model = ot.quantize_(Model(), progress=False)
    layer = model.get_submodule("blocks.0.fc1")
    assert ot.quantize_(model, progress=False).get_submodule("blocks.0.fc1") is layer


def test_training_mode_is_kept() -> None:
    for training in (True, False):
        model = ot.quantize_(Model().train(training), progress=False)
        assert all(module.training is training for module in model.modules())


def test_memory() -> None:
    """What this is for: about a quarter of float32."""

    def size(model: nn.Module) -> int:
        layers = [layer for layer in model if isinstance(layer, ot.Int8Linear)]
        held = sum(layer.int8_weight.nbytes + layer.bias.nbytes for layer in layers)
        return held or sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))

    model = nn.Sequential(dense(512, 1024), dense(1024, 512))
    before = size(model)
    assert size(ot.quantize_(model, progress=False)) < 0.27 * before


def test_progress_goes_to_stderr_or_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    ot.quantize_(Model(), progress=False)
    ot.calibrate_(Model(), [inputs(24)], progress=False)
    assert capsys.readouterr() == ("", "")
    ot.quantize_(Model())
    ot.calibrate_(Model(), [inputs(24)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


# --- tied weights


class Tied(nn.Module):
    """Two layers with one weight and their own biases, one layer under two names, an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = dense(24, 24, seed=1), dense(24, 24, seed=2)
        self.b.weight = self.a.weight
        self.c = self.a
        self.embedding = nn.Embedding(50, 24)
        self.lm_head = nn.Linear(24, 50, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.lm_head(self.c(self.b(self.a(self.embedding(ids)))))
        return result


@pytest.mark.parametrize("then", ["nothing", "deepcopy", "half", "pickle", "state_dict"])
def test_tied_weights_stay_tied(then: str) -> None:
    model = ot.quantize_(Tied(), progress=False)
    ids = torch.arange(9)
    dtype = torch.float32
    if then == "deepcopy":
        model = copy.deepcopy(model)
    elif then == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif then == "half":
        model, dtype = model.half(), torch.float16
    elif then == "state_dict":
        fresh = ot.quantize_(Tied(), progress=False)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            same(fresh(ids), model(ids))
        model = fresh
    assert isinstance(model.a, ot.Int8Linear)
    assert isinstance(model.b, ot.Int8Linear)
    assert model.a.weight is model.b.weight, "one parameter"
    assert model.c is model.a
    assert not torch.equal(model.a.bias, model.b.bias)
    assert model.lm_head.weight is model.embedding.weight
    assert model.lm_head.weight.dtype == dtype
    with torch.no_grad():
        assert torch.isfinite(model(ids)).all()
    state = model.state_dict()
    assert state["a.weight"]._codes.data_ptr() == state["b.weight"]._codes.data_ptr(), (
        "one memory in the state dict too"
    )


def test_weights_are_released_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is converted, no weight that came before it is still in memory."""
    model = nn.Sequential(*(dense(4, 4, seed=seed) for seed in range(5)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    quantize = ot.Int8Tensor.from_float

    def count(*args: Any) -> ot.Int8Tensor:
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(*args)

    monkeypatch.setattr(ot.Int8Tensor, "from_float", count)
    ot.quantize_(model, progress=False)
    assert alive == [5, 4, 3, 2, 1]


def test_a_weight_tied_to_an_embedding_is_never_broken() -> None:
    """With skip=() the head shares its weight with an embedding, which cannot look up codes."""
    model, ids = Tied(), torch.arange(9)
    with torch.no_grad():
        exact = model(ids)
        ot.quantize_(model, skip=(), progress=False)
        y = model(ids)
    assert model.embedding.weight.dtype == torch.float32
    assert model.lm_head.weight is model.embedding.weight
    assert torch.nn.functional.cosine_similarity(y, exact).min() > 0.99


# --- modules that read the weight of a layer they own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make_module",
    [
        lambda: nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0), 2),
        lambda: nn.TransformerDecoderLayer(24, 4, 40, batch_first=True, dropout=0),
    ],
    ids=["encoder layer", "encoder", "decoder layer"],
)
def test_attention_modules_still_work(make_module: Callable[[], nn.Module], training: bool) -> None:
    """PyTorch's own fast paths read linear1.weight and out_proj.weight as floats."""
    torch.manual_seed(0)
    model = make_module().train(training)
    x = inputs(24, m=10, kind="normal").reshape(2, 5, 24)
    arguments = (x, x) if isinstance(model, nn.TransformerDecoderLayer) else (x,)
    with torch.no_grad():
        exact = model(*arguments)
        ot.quantize_(model, progress=False)
        y = model(*arguments)
    assert quantized_names(model)
    assert torch.nn.functional.cosine_similarity(y, exact, dim=-1).min() > 0.99


# ---------------------------------------------------------------------------------------------------------------
# calibrate_


def outlying_batches() -> list[Tensor]:
    """Column 3 is outlying in every row, column 7 in 1 of 10, column 9 in 1 of 100 rows: 100 rows in two batches."""
    x = np.clip(make("normal", (100, 24), "float32"), -5, 5)
    x[:, 3] = -8
    x[::10, 7] = 6  # at the threshold
    x[50, 9] = 9
    x[:, 11] = np.nextafter(np.float32(6), np.float32(0))
    return [TORCH.array(x[:40]), TORCH.array(x[40:])]


def test_calibrate_finds_systematic_columns() -> None:
    model = nn.Sequential(dense(24, 16))
    for fraction, expected in (
        (0.06, [3, 7]),
        (0.5, [3]),
        (0.1, [3, 7]),
        (0.11, [3]),
        (0.0, [3, 7, 9]),
        (0.01, [3, 7, 9]),
    ):
        found = ot.calibrate_(model, outlying_batches(), recipe="paper", min_fraction=fraction, progress=False)
        assert set(found) == {"0"}
        assert found["0"].dtype == torch.int32
        assert found["0"].tolist() == expected, fraction
    found = ot.calibrate_(model, outlying_batches(), recipe="paper", threshold=7.0, progress=False)
    assert found["0"].tolist() == [3]


def test_calibrate_by_the_relative_criterion() -> None:
    """Over all batches together what octavo.find_outliers says of one call; the cap takes the largest."""
    model, batches = nn.Sequential(dense(24, 16)), outlying_batches()
    together = torch.cat(batches)
    for options in (octavo.Options(relative=1.5), octavo.Options(relative=1.5, cap=0.1), octavo.Options(cap=0.05)):
        criterion = {"threshold": options.threshold, "relative": options.relative, "cap": options.cap}
        expected = octavo.find_outliers(together, **criterion).tolist()
        assert expected, options
        found = ot.calibrate_(model, batches, min_fraction=0.0, options=options, progress=False)["0"]
        assert (found.dtype, found.tolist()) == (torch.int32, expected)
    assert ot.calibrate_(model, batches, recipe="paper", relative=1.5, progress=False)["0"].tolist() == [3, 7, 9, 11]
    with pytest.raises(TypeError, match="calibrate_: options"):
        ot.calibrate_(model, batches, relative=4.0, options=octavo.Options())


def test_calibrate_without_batches() -> None:
    """Random token ids of the model's vocabulary; a model that has none is told so."""
    pytest.importorskip("transformers", reason="transformers makes the language model")
    from tiny_models import tiny_model

    model = tiny_model("LlamaForCausalLM")
    found = ot.calibrate_(model, relative=2.0, cap=0.1, progress=False)
    assert len(found) == len(ot.choice.choose_layers(model, head=True).layers)
    assert any(len(columns) for columns in found.values())
    again = ot.calibrate_(model, relative=2.0, cap=0.1, progress=False)
    assert all(torch.equal(again[name], columns) for name, columns in found.items())
    with pytest.raises(ValueError, match="calibrate_: batches: expected some for a model whose config has no vocab"):
        ot.calibrate_(nn.Sequential(dense(24, 16)), progress=False)


def test_quantize_keeps_what_calibrate_found() -> None:
    linear = dense(24, 16)
    model = nn.Sequential(copy.deepcopy(linear))
    x = outlying_batches()[0]
    ot.calibrate_(model, [x], recipe="paper", progress=False)
    ot.quantize_(model, recipe="paper", progress=False)
    assert model[0].outlier_columns.tolist() == [3, 7]
    same(model[0].outlier_weight, linear.weight[:, [3, 7]].detach())
    larger = x.clone()
    larger[:, 3] *= 10  # the error of its dequantized weights is now most of the error
    with torch.no_grad():
        kept, exact = model(larger), linear(larger)
        plain = ot.Int8Linear.from_linear(linear)(larger)
    assert (kept - exact).norm() < 0.3 * (plain - exact).norm(), "the point of keeping them"
    model = nn.Sequential(copy.deepcopy(linear))
    ot.calibrate_(model, [x], recipe="paper", progress=False)
    ot.quantize_(model, recipe="paper", outliers="static", progress=False)
    weight = octavo.quantize_weight(linear.weight, outlier_columns=[3, 7])
    with torch.no_grad():
        same(model(x), octavo.linear(x, weight, linear.bias, outliers="static"))


def test_static_needs_calibration() -> None:
    with pytest.raises(ValueError, match="calibrat"):
        ot.quantize_(Model(), outliers="static", progress=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_calibrate_compares_in_float32(dtype: str) -> None:
    """As find_outliers: the threshold is not rounded to the dtype of x, where 6.001 would become 6."""
    model = nn.Sequential(dense(24, 16, dtype=dtype))
    x = torch.full((5, 24), 6.0, dtype=DTYPES[dtype])
    assert octavo.find_outliers(x, threshold=6.001).numel() == 0
    assert ot.calibrate_(model, [x], threshold=6.001, progress=False)["0"].numel() == 0


class Keyword(nn.Module):
    """Calls its layer by the name that nn.Linear gives its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = dense(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(input=x)
        return result


def test_layers_called_by_keyword() -> None:
    model, x = Keyword(), outlying_batches()[0]
    assert ot.calibrate_(model, [x], recipe="paper", progress=False)["fc"].tolist() == [3, 7]
    ot.quantize_(model, progress=False)
    with torch.no_grad():
        same(model(x), model.fc(x))


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = dense(24, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.fc(x * scale)
        return result


def test_kinds_of_batches() -> None:
    """A tensor is the argument; a tuple or list, the arguments; a mapping, the keywords. A generator is fine."""
    x = outlying_batches()[0]
    model = Arguments()
    for batches in ([x], [(x,)], [[x, 1.0]], [{"x": x}], [{"x": x, "scale": 1.0}], (b for b in [x])):
        assert ot.calibrate_(model, batches, recipe="paper", progress=False)["fc"].tolist() == [3, 7]
    assert 1 in ot.calibrate_(model, [(x, 100.0)], recipe="paper", progress=False)["fc"].tolist()


def test_calibrate_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(dense(24, 16), nn.Dropout(0.5), nn.BatchNorm1d(16)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    ot.calibrate_(model, outlying_batches(), progress=False)
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    for key, value in model.state_dict().items():
        same(value, before[key])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_calibrate_cleans_up_after_an_error() -> None:
    model = nn.Sequential(dense(24, 16)).train()
    with pytest.raises(RuntimeError):
        ot.calibrate_(model, [torch.zeros(2, 23)], progress=False)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calibrate_skips_and_covers_like_quantize() -> None:
    model = Model()
    assert set(ot.calibrate_(model, [inputs(24)], progress=False)) == BLOCKS
    assert set(ot.calibrate_(model, [inputs(24)], skip=("blocks.*",), progress=False)) == {"lm_head"}
    ranks = ot.calibrate_(model, [inputs(24, m=6).reshape(2, 3, 24)], progress=False)
    flat = ot.calibrate_(model, [inputs(24, m=6)], progress=False)
    assert {k: v.tolist() for k, v in ranks.items()} == {k: v.tolist() for k, v in flat.items()}


def test_calibrate_refuses() -> None:
    for arguments, word in (
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"min_fraction": 1.5}, "min_fraction"),
        ({"min_fraction": -0.1}, "min_fraction"),
    ):
        with pytest.raises(ValueError, match=word):
            ot.calibrate_(Model(), [inputs(24)], progress=False, **arguments)
    with pytest.raises(ValueError, match="quantize"):
        ot.calibrate_(ot.quantize_(Model(), progress=False), [inputs(24)], progress=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_models(dtype: str) -> None:
    model = Model().to(DTYPES[dtype])
    x = inputs(24, dtype=dtype, kind="normal")
    with torch.no_grad():
        exact = model(x)
        ot.calibrate_(model, [x], progress=False)
        ot.quantize_(model, progress=False)
        y = model(x)
    assert y.dtype == DTYPES[dtype]
    assert torch.nn.functional.cosine_similarity(y.float(), exact.float()).min() > 0.995


def test_whole_model_state_dict(tmp_path: Path) -> None:
    """Calibrated, quantized, saved; loaded into a model that was quantized but never calibrated."""
    model, x = Model(), TORCH.array(make("outliers", (9, 24), "float32"))
    ot.calibrate_(model, [x], progress=False)
    ot.quantize_(model, scheme="zeropoint", progress=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = ot.quantize_(Model(), progress=False)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    with torch.no_grad():
        same(fresh(x), model(x))


def test_layers_of_several_threads_agree() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layer, x = ot.Int8Linear.from_linear(dense(64, 48)), inputs(64)
    with torch.no_grad():
        expected = layer(x)

    def work(_: int) -> Tensor:
        with torch.no_grad():  # per thread
            result: Tensor = layer(x)
            return result

    layer = copy.deepcopy(layer)  # nothing cached yet
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(work, range(32)):
            same(got, expected)


def test_oracle_on_a_layer_of_another_dtype() -> None:
    """A float32 layer fed bfloat16: the output is bfloat16, with the layer's float32 bias and kept weights."""
    linear = dense(33, 19)
    layer = ot.Int8Linear.from_linear(linear, outlier_columns=[1, 5])
    x = inputs(33, dtype="bfloat16")
    w, b = TORCH.host(linear.weight), TORCH.host(linear.bias)
    with torch.no_grad():
        y = layer(x)
    expected = ref.linear(TORCH.host(x), ref.quantize_weight(w, outlier_columns=[1, 5]), b)
    tolerances.check_output(Typed(TORCH, "bfloat16").host(y), expected, "bfloat16")
    equal(TORCH.host(layer.codes), ref.quantize_weight(w).codes)
