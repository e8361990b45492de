"""octavo.torch.Int8Tensor: what keeps it int8, what dequantizes it, and how models and state dicts carry it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import octavo.torch as ot
import torch
from octavo import Options
from octavo.torch import tensor as module
from octavo.torch.choice import choose_layers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

OPTIONS = {
    "default": (Options(), None),
    "zeropoint": (Options(scheme="zeropoint"), None),
    "kept": (Options(outliers="static"), [1, 5]),
    "one scale": (Options(granularity="tensor"), None),
}


@pytest.fixture(params=OPTIONS)
def weight(request: pytest.FixtureRequest) -> ot.Int8Tensor:
    """``[40, 24]``."""
    options, columns = OPTIONS[request.param]
    return ot.Int8Tensor.from_float(values(40, 24), options, columns)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_int8(value: Any, like: Tensor) -> None:
    """An Int8Tensor of these values; nothing was dequantized on the way."""
    assert type(value) is ot.Int8Tensor
    torch.testing.assert_close(value.dequantize(), like)


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """A weight that is dequantized says so: an error here, unless a test expects it."""
    module._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Int8Tensor")
        yield


def test_shows_itself_as_the_weight_it_replaces() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = ot.Int8Tensor.from_float(values(40, 24).to(dtype))
        assert (weight.shape, weight.dtype, weight.device.type) == ((40, 24), dtype, "cpu")
        assert (weight.requires_grad, weight.is_leaf, weight.numel()) == (False, True, 960)
        assert weight.dequantize().dtype == dtype
        assert (weight.dequantize().float() - values(40, 24)).abs().max() < 0.03
        assert "shape=(40, 24)" in repr(weight)
    parameter = nn.Parameter(weight, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert type(parameter) is ot.Int8Tensor


def test_products_are_those_of_octavo_linear(weight: ot.Int8Tensor) -> None:
    """However they are spelled."""
    x, bias = values(3, 24, seed=1), values(40, seed=2)
    expected = functional.linear(x, weight, bias)
    plain = functional.linear(x, weight.dequantize(), bias)
    assert (expected - plain).norm() < 0.02 * plain.norm()
    for found in (
        torch.addmm(bias, x, weight.t()),
        x @ weight.t() + bias,
        torch.matmul(x, weight.T) + bias,
        torch.mm(x, weight.transpose(0, 1)) + bias,
        (weight @ x.t()).t() + bias,
        torch.nn.functional.linear(input=x, weight=weight, bias=bias),
    ):
        torch.testing.assert_close(found, expected)
    other = values(3, 40, seed=3)
    torch.testing.assert_close(other @ weight, other @ weight.dequantize())
    torch.testing.assert_close(weight @ x[0], functional.linear(x[0], weight))
    with torch.inference_mode():
        torch.testing.assert_close(torch.addmm(bias, x, weight.t()), expected)


def test_what_keeps_it_int8(weight: ot.Int8Tensor) -> None:
    exact = weight.dequantize()
    for found in (weight.detach(), weight.clone(), weight.data, weight.t().t(), weight[:], weight.permute(0, 1)):
        is_int8(found, exact)
    is_int8(weight.t(), exact.t())
    is_int8(weight.transpose(-1, -2), exact.t())
    is_int8(weight.to(torch.bfloat16), exact.bfloat16())
    assert weight.to(torch.bfloat16)._scale.dtype == torch.float32
    is_int8(weight[8:20], exact[8:20])
    is_int8(weight.narrow(0, 3, 4), exact[3:7])
    is_int8(weight.t()[:, :5], exact.t()[:, :5])
    for found, expected in zip(weight.split(16), exact.split(16), strict=True):
        is_int8(found, expected)
    for found, expected in zip(weight.split([30, 10]), exact.split([30, 10]), strict=True):
        is_int8(found, expected)
    for found, expected in zip(weight.t().chunk(3, dim=1), exact.t().chunk(3, dim=1), strict=True):
        is_int8(found, expected)
    is_int8(weight * 2, exact * 2)
    is_int8(weight / 4.0, exact / 4)
    assert (torch.empty_like(weight).shape, type(torch.empty_like(weight))) == (weight.shape, ot.Int8Tensor)


WAYS_THAT_KEEP_INT8 = {
    "to": lambda weight: weight.to(torch.bfloat16),
    "half": lambda weight: weight.half(),
    "cpu": lambda weight: weight.cpu(),
    "contiguous": lambda weight: weight.contiguous(),
    "T": lambda weight: weight.T,
    "mT": lambda weight: weight.mT,
    "slice": lambda weight: weight[2:5],
    "chunk": lambda weight: weight.chunk(2)[0],
    "split": lambda weight: weight.split(4)[1],
    "vstack": lambda weight: torch.vstack([weight, weight]),
    "reshape": lambda weight: weight.reshape(40, 24),
    "parameter": lambda weight: nn.Parameter(weight, requires_grad=False),
}


@pytest.mark.parametrize("way", WAYS_THAT_KEEP_INT8)
def test_inference_mode_keeps_it_int8(way: str) -> None:
    """There PyTorch does not take operations apart before it asks a tensor subclass."""
    weight = ot.Int8Tensor.from_float(values(40, 24))
    change = WAYS_THAT_KEEP_INT8[way]
    expected = change(weight).dequantize()
    with torch.inference_mode():
        for own in (weight, ot.Int8Tensor.from_parts(weight.parts())):
            is_int8(change(own), expected)


def test_parts_are_put_together_again() -> None:
    weight = ot.Int8Tensor.from_float(values(40, 24), Options(scheme="zeropoint"), [3])
    is_int8(torch.cat(weight.chunk(3)), weight.dequantize())
    is_int8(torch.cat([weight.t(), weight.t()], dim=1), weight.dequantize().repeat(2, 1).t())
    other = ot.Int8Tensor.from_float(values(8, 24), Options())
    with pytest.warns(UserWarning, match="cat"):
        torch.testing.assert_close(torch.cat([weight, other]), torch.cat([weight.dequantize(), other.dequantize()]))


def test_scaled_in_place(weight: ot.Int8Tensor) -> None:
    """Also through an alias, and products see it."""
    exact, x = weight.dequantize(), values(3, 24)
    before = functional.linear(x, weight)
    weight.data.div_(8)
    is_int8(weight, exact / 8)
    torch.testing.assert_close(functional.linear(x, weight), before / 8)
    weight.mul_(torch.tensor(4.0))
    is_int8(weight, exact / 2)
    with pytest.warns(UserWarning, match="mul"):  # no scale is negative
        weight.mul_(-1)
    torch.testing.assert_close(weight.dequantize(), -exact / 2, atol=0.02, rtol=0)


def test_copies_into_it_are_quantized(weight: ot.Int8Tensor) -> None:
    alias, new = weight.detach(), values(40, 24, seed=5)
    weight.copy_(new)
    expected = ot.Int8Tensor.from_float(new, weight.options)
    is_int8(weight, expected.dequantize())
    is_int8(alias, expected.dequantize())
    weight.data.copy_(ot.Int8Tensor.from_float(new, Options(), [2, 3]))
    assert weight.int8_weight.outlier_columns.tolist() == [2, 3]
    alias.t().copy_(new.t())
    torch.testing.assert_close(weight.dequantize(), new, atol=0.03, rtol=0)
    plain = torch.empty(40, 24, dtype=torch.float16)
    assert torch.equal(plain.copy_(weight), weight.dequantize(torch.float16))


def test_everything_else_dequantizes_and_says_so_once(weight: ot.Int8Tensor) -> None:
    exact = weight.dequantize()
    with pytest.warns(UserWarning, match=r"aten\.sum"):
        assert torch.equal(weight.sum(), exact.sum())
    assert torch.equal(weight.sum(), exact.sum())
    with pytest.warns(UserWarning, match=r"aten\.index"):
        assert torch.equal(weight[torch.tensor([1, 3])], exact[[1, 3]])
    with pytest.warns(UserWarning, match=r"aten\.slice"):
        assert torch.equal(weight[:, 2:9], exact[:, 2:9])


def test_what_writes_to_it_is_not_lost(weight: ot.Int8Tensor) -> None:
    with pytest.warns(UserWarning, match=r"aten\.fill_|aten\.zero_"):
        nn.init.zeros_(weight)
    assert not weight.dequantize().any()
    weight[3] = 2.0
    assert (weight.dequantize()[3] == 2).all()
    weight.data = ot.Int8Tensor.from_float(values(40, 24))
    torch.testing.assert_close(weight.dequantize(), values(40, 24), atol=0.03, rtol=0)


def test_never_requires_grad() -> None:
    weight = ot.Int8Tensor.from_float(values(8, 4))
    with pytest.warns(UserWarning, match="requires_grad"):
        weight.requires_grad_()
    weight.requires_grad = True
    assert not weight.requires_grad


def test_a_part_is_a_copy_and_says_so(weight: ot.Int8Tensor) -> None:
    warnings.filterwarnings("ignore", message=".*zero_")
    for change in (lambda part: part.mul_(2), lambda part: part.zero_(), lambda part: part.copy_(values(8, 24))):
        with pytest.raises(RuntimeError, match="copy"):
            change(weight[:8])


def test_memory_is_not_handed_out(tmp_path: Path) -> None:
    """Who reads a tensor's memory must not take it for the weight's: safetensors, NumPy, DLPack."""
    from safetensors.torch import save_file

    weight = ot.Int8Tensor.from_float(values(8, 4))
    for read in (
        lambda: save_file({"w": weight}, tmp_path / "file"),
        lambda: weight.untyped_storage().data_ptr(),
        lambda: torch.from_dlpack(weight),
    ):
        with pytest.raises(RuntimeError, match=r"Int8Tensor|invalid python storage"):
            read()
    assert not (tmp_path / "file").exists()
    assert (weight.numpy() == weight.dequantize().numpy()).all()


def test_copies(weight: ot.Int8Tensor, tmp_path: Path) -> None:
    parameter = nn.Parameter(weight, requires_grad=False)
    torch.save(parameter, tmp_path / "file")
    for other in (
        copy.deepcopy(parameter),
        pickle.loads(pickle.dumps(parameter)),
        torch.load(tmp_path / "file", weights_only=True),
        torch.load(tmp_path / "file", weights_only=True, mmap=True),
    ):
        is_int8(other, weight.dequantize())
        assert isinstance(other, nn.Parameter)
        assert other.options == weight.options
        other.mul_(2)
    is_int8(ot.Int8Tensor.from_parts(weight.parts()), weight.dequantize())
    assert ot.Int8Tensor.from_parts(weight.t().parts()).options == weight.options
    is_int8(weight, weight.dequantize())


def test_flattens_for_the_compiler(weight: ot.Int8Tensor) -> None:
    for tensor in (weight, weight.t()):
        names, context = tensor.__tensor_flatten__()
        inner = {name: getattr(tensor, name) for name in names}
        assert all(type(array) is Tensor for array in inner.values())
        is_int8(ot.Int8Tensor.__tensor_unflatten__(inner, context, None, None), tensor.dequantize())


def test_the_compiler_finds_what_it_has_compiled(weight: ot.Int8Tensor) -> None:
    """By all that its code depends on, in every process the same; not by values."""
    other = ot.Int8Tensor.from_float(values(40, 24, seed=1), *OPTIONS["default"])
    changed = copy.deepcopy(other)
    changed.options = Options(outliers="rows")
    kinds = [weight, weight.t(), weight.half(), weight[:39], changed]
    keys = [tensor._stable_hash_for_caching() for tensor in kinds]
    assert len({*keys}) == len(kinds)
    assert copy.deepcopy(weight)._stable_hash_for_caching() == keys[0]
    assert (other._stable_hash_for_caching() == keys[0]) == (weight.options == Options())
    code = "import octavo.torch as ot, torch; made = ot.Int8Tensor.from_float(torch.ones(40, 24))"
    code += "; print(made._stable_hash_for_caching())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == other._stable_hash_for_caching()


# --- layers that are not Int8Linear -----------------------------------------------------------------------------------


class Transposed(nn.Linear):
    """As Falcon's: a subclass that multiplies by itself."""

    def forward(self, x: Tensor) -> Tensor:
        result = x @ self.weight.T
        return result if self.bias is None else result + self.bias


class Reader(nn.Module):
    """A module that reads the weight of the layer it owns."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.query.weight.dtype), self.query.weight, self.query.bias)


def test_layers_stay_the_models_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transposed(24, 24), Reader(), nn.Linear(24, 24), nn.MultiheadAttention(24, 2))
    model[2].note = "kept"
    model[2].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    x = values(5, 24)
    exact = model[2](model[1](model[0](x)))
    attended = model[3](x, x, x)[0]
    count = sum(parameter.numel() for parameter in model.parameters())
    ot.quantize_(model, recipe="paper", progress=False)
    assert sum(type(parameter) is ot.Int8Tensor for parameter in model.parameters()) == 4
    assert (type(model[0]), type(model[2]), model[2].note) == (Transposed, ot.Int8Linear, "kept")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    found = model[2](model[1](model[0](x)))
    assert (found - exact).norm() < 0.02 * exact.norm()
    assert (model[3](x, x, x)[0] - attended).norm() < 0.02 * attended.norm()
    with pytest.warns(UserWarning, match=r"aten\.fill_"):
        nn.init.constant_(model[2].weight, 0.5)
    assert (model[2].weight.dequantize() == 0.5).all()


# --- what is done with models -----------------------------------------------------------------------------------------


def converted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).eval()
    return ot.quantize_(model, recipe="paper", progress=False)  # type: ignore[return-value]


def close(found: Tensor, expected: Tensor, most: float = 0.02) -> None:
    assert (found - expected).norm() <= most * expected.norm()


def twice(*args: Any) -> Tensor:
    return args[-1] * 2


class Doubled(ot.Int8Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def change(layer: ot.Int8Linear, way: str, patch: pytest.MonkeyPatch) -> Any:
    """Double what calls of the layer give."""
    modules = torch.nn.modules.module
    if way == "hook":
        layer.register_forward_hook(twice)
    elif way == "hook of all":
        return modules.register_module_forward_hook(twice)
    elif way == "pre-hook":
        layer.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    elif way == "pre-hook of all":
        return modules.register_module_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    elif way == "forward":
        before = layer.forward
        layer.forward = lambda x: before(x) * 2  # type: ignore[method-assign]
    elif way == "compiled":
        layer._compiled_call_impl = lambda x: layer._call_impl(x) * 2  # type: ignore[assignment]
    elif way == "class":
        layer.__class__ = Doubled
    elif way == "every module's call":
        call = nn.Module._call_impl
        patch.setattr(nn.Module, "__call__", lambda self, x: call(self, x) * 2)
    return None


@pytest.mark.parametrize("way", ["hook", "hook of all", "pre-hook", "pre-hook of all", "forward", "compiled", "class",
                                 "every module's call"])  # fmt: skip
def test_a_call_is_what_others_have_made_of_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ot.Int8Linear.from_linear(nn.Linear(24, 40, bias=False), recipe="paper")
    x = values(3, 24)
    y, forward = layer(x), layer.forward(x)
    assert torch.equal(y, forward)
    handle = change(layer, way, monkeypatch)
    try:
        assert torch.equal(layer(x), y * 2)
    finally:
        if handle is not None:
            handle.remove()


def test_a_weight_that_layers_share() -> None:
    """It stays one: converted, copied, pickled, saved, and counted."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model[1].weight = model[0].weight
    ot.quantize_(model, progress=False)
    for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert own[0].weight is own[1].weight
        assert sum(parameter.numel() for parameter in own.parameters()) == 24 * 24 + 2 * 24
        state = own.state_dict()
        assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_weights_that_are_computed() -> None:
    """Parametrized, normalized and pruned."""
    x = values(5, 24)

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    model = converted()
    y, bias = model[0](x), model[0].bias
    nn.utils.parametrize.register_parametrization(model[0], "weight", Twice())
    close(model[0](x) - bias, 2 * (y - bias), 1e-5)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    close(model[0](x), y, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of these dequantize
        close(nn.utils.parametrizations.weight_norm(copy.deepcopy(model[0]))(x), y)
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        pruned = model[0](x)
        prune.remove(model[0], "weight")
        close(model[0](x), pruned)
        assert (model[0].weight == 0).float().mean() >= 0.5


def test_biases_that_are_computed() -> None:
    """A bias that is no parameter of its layer any more counts like one that is."""

    class Negative(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return -bias

    x = values(5, 24)
    for change in (
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", Negative()),
    ):
        layer = converted()[0]
        nn.init.constant_(layer.bias, 3)
        before = layer(x)
        change(layer)
        assert not torch.equal(layer.bias, torch.full((40,), 3.0))
        torch.testing.assert_close(layer(x), before - 3 + layer.bias)


def test_models_computed_from_models() -> None:
    """Moving averages, calls with other parameters, and gradients with a step of an optimizer."""
    model, x = converted(), values(5, 24)
    y = model(x)
    average = AveragedModel(model)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            average.update_parameters(model)
    close(average(x), y, 1e-3)
    other = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    called = torch.func.functional_call(model, dict(other.named_parameters()), x)
    torch.testing.assert_close(called, other(x))
    assert torch.equal(torch.func.functional_call(other, dict(model.named_parameters()), x), y)
    codes = model[0].weight.int8_weight.codes.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight.int8_weight.codes, codes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0].weight.add_(torch.zeros(40, 24))  # as LBFGS does to whatever has no gradient
    assert torch.equal(model[0].weight.int8_weight.codes, codes)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("way", ["swap", "overwrite", "data"])
def test_casts_of_models(way: str) -> None:
    """However Module.to replaces parameters, and by hand."""
    model, x = converted(), values(5, 24)
    y = model(x)
    if way == "data":
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    else:
        change = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
        change(True)
        try:
            model.half()
        finally:
            change(False)
    assert model[0].weight.dtype == torch.float16
    assert type(model[0].weight) is ot.Int8Tensor
    assert model(x.half()).dtype == torch.float16
    close(model(x.half()).float(), y)


def test_memory_is_shared_and_counted() -> None:
    model, x = converted(), values(5, 24)
    weight = model[0].weight
    assert not weight.is_shared()
    y = model(x)
    assert torch.equal(model.share_memory()(x), y)
    assert weight.is_shared()
    assert weight.numel() * weight.element_size() == 40 * 24  # as get_memory_footprint of Transformers counts
    assert weight.nbytes == weight.int8_weight.nbytes
    assert weight.tolist() == weight.dequantize().tolist()


def test_sizes() -> None:
    """As docs/guide/what-works-with-what.md has them: MB in 16 bit, in format 1, and now."""
    layer = nn.Linear(4096, 4096, dtype=torch.bfloat16)
    int8 = ot.Int8Linear.from_linear(layer)
    options = int8.weight.parts()["options"]
    first = {"weight": int8.codes, "scale": int8.scale, "bias": int8.bias, "_extra_state": options}

    def saved(state: Any) -> int:
        file = io.BytesIO()
        torch.save(state, file)
        return file.tell()

    held = [sum(parameter.nbytes for parameter in of.parameters()) for of in (layer, int8)]
    states = [saved(state) for state in (layer.state_dict(), first, int8.state_dict())]
    assert [round(size / 1e6, 2) for size in (*held, *states)] == [33.56, 16.82, 33.56, 16.80, 16.80]
    assert sum(part.nbytes for part in int8.weight.parts().values()) + int8.bias.nbytes < 16.81e6


def test_layers_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(ot.Int8Linear(24, 40), nn.Tanh(), ot.Int8Linear(40, 8))
    assert model[0].weight.is_meta
    assert model[0].bias.is_meta
    model.to_empty(device="cpu").load_state_dict(converted().state_dict())
    assert torch.equal(model(values(5, 24)), converted()(values(5, 24)))


def test_a_transposed_weight_in_a_layer() -> None:
    layer = ot.Int8Linear.from_linear(nn.Linear(24, 24, bias=False))
    x, expected = values(5, 24), values(5, 24) @ layer.weight.dequantize()
    layer.weight = nn.Parameter(layer.weight.t(), requires_grad=False)
    close(layer(x), expected)


def test_plain_arrays_make_no_weight() -> None:
    """A tool that holds weights as plain arrays and calls their class, as accelerate's disk_offload does."""
    weight = converted()[0].weight
    with pytest.raises(TypeError, match=r"Int8Tensor: expected an Int8Tensor, got Tensor.*disk_offload"):
        type(weight)(torch.zeros(40, 24), requires_grad=False)


def test_conv1d() -> None:
    """GPT-2's linear layer, whose weight is ``[in, out]``."""
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    model, x = nn.Sequential(utils.Conv1D(40, 24), nn.Tanh(), utils.Conv1D(8, 40)), values(5, 24)
    exact = model(x)
    ot.quantize_(model, progress=False)
    assert type(model[0].weight) is ot.Int8Tensor
    assert tuple(model[0].weight.shape) == (24, 40)
    assert (model(x) - exact).norm() < 0.02 * exact.norm()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = ot.quantize_(nn.Sequential(utils.Conv1D(40, 24), nn.Tanh(), utils.Conv1D(8, 40)), progress=False)
    again.load_state_dict(state)
    assert torch.equal(again(x), model(x))


# --- state dicts ------------------------------------------------------------------------------------------------------


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval()


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", ["int8", "16 bit", "parts"])
def test_state_dicts(kind: str, assign: bool, tmp_path: Path) -> None:
    """Into an int8 model: the same result, whatever the state dict holds, and however it is loaded."""
    exact, x = mlp(), values(3, 24)
    model = ot.quantize_(copy.deepcopy(exact), scheme="zeropoint", progress=False)
    state = (exact if kind == "16 bit" else model).state_dict()
    if kind == "parts":
        int8 = {name: value for name, value in state.items() if isinstance(value, ot.Int8Tensor)}
        state = {name: value for name, value in state.items() if name not in int8}
        for name, value in int8.items():
            state |= {f"{name}.{part}": array for part, array in value.parts().items()}
    torch.save(state, tmp_path / "state")
    other = ot.quantize_(mlp(seed=1), scheme="zeropoint", progress=False)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True, mmap=True), assign=assign)
    assert torch.equal(other(x), model(x))
    assert sum(type(parameter) is ot.Int8Tensor for parameter in other.parameters()) == 2


@pytest.mark.parametrize("assign", [True, False])
def test_int8_weights_in_a_16_bit_model(assign: bool) -> None:
    """They are dequantized, or taken as they are; never codes."""
    model, other, x = ot.quantize_(mlp(), progress=False), mlp(seed=1), values(3, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its parameters required gradients, which int8 ones do not
        other.load_state_dict(model.state_dict(), strict=False, assign=assign)
    assert (other(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other, x = ot.quantize_(mlp(), progress=False), ot.quantize_(mlp(seed=1), progress=False), values(3, 24)
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(other(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp")
        other = ot.quantize_(mlp(seed=2), progress=False)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def _fsdp(mesh: Any, options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, x = mlp(), values(3, 24)
    for layer in (model[0], model[2]):
        layer.octavo_outlier_columns = torch.tensor([1, 5])
    ot.quantize_(model, **options, progress=False)
    whole = model[0].weight.dequantize()
    y = x.clone().requires_grad_()
    expected = model(y)
    expected.sum().backward()
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    for _ in range(2):  # the second call's memory is the first one's, taken away and given back
        assert torch.equal(model(x), expected)
    z = x.clone().requires_grad_()
    model(z).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, y.grad)
    if mesh.get_local_rank() == 0:
        model.state_dict()  # by one rank alone: it waits for nobody
    state = model.state_dict()
    for name, n in (("0.weight", 40), ("2.weight", 8)):
        assert type(state[name]) is DTensor
        assert type(state[name].to_local()) is ot.Int8Tensor
        assert state[name].to_local().shape[0] == n // mesh.size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(state["0.weight"].full_tensor(), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="processes meet over gloo, as Linux has it")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("options", [{"scheme": "zeropoint"}, {"granularity": "tensor"}], ids=["vector", "tensor"])
def test_fsdp(rank_pools: Any, options: dict[str, Any], size: int) -> None:
    """A rank holds its rows of the weight; results are those of one process. One rank alone has all of them."""
    from ranks import pool

    pool(rank_pools, size).run(_fsdp, options)


# --- DDP --------------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """An int8 layer, and beside it what is trained, as LoRA has it; each rank begins with values of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.base = ot.Int8Linear.from_linear(mlp(seed=rank)[0].requires_grad_(False))
        self.down, self.up = nn.Linear(24, 4, bias=False), nn.Linear(4, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def _ddp(mesh: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    rank, x = mesh.get_local_rank(), values(4, 24)
    model, alone = DistributedDataParallel(Adapted(rank)), Adapted(0)
    assert type(model.module.base.weight) is ot.Int8Tensor
    alone(x).square().mean().backward()
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for (name, own), (_, expected) in zip(model.module.named_parameters(), alone.named_parameters(), strict=True):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, expected.grad, msg=name)


@pytest.mark.skipif(sys.platform != "linux", reason="processes meet over gloo, as Linux has it")
def test_ddp(rank_pools: Any) -> None:
    """Ranks begin with the parameters of the first one, the int8 weights too, and share gradients."""
    from ranks import pool

    pool(rank_pools, 2).run(_ddp)


# --- the choice of layers ---------------------------------------------------------------------------------------------


class Model(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.fc = nn.Linear(24, 24)
        self.own = Transposed(24, 24)
        self.attention = nn.MultiheadAttention(24, 2)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(24, 4), "gate_proj": nn.Linear(24, 24)})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
        self.tied = nn.Linear(24, 50, bias=False)
        self.tied.weight = self.embed.weight
        self.adapted = nn.Module()
        self.adapted.base_layer = nn.Linear(24, 24)
        self.adapted.lora_A = nn.ModuleDict({"default": nn.Linear(24, 4, bias=False)})
        self.score = nn.Linear(24, 3)
        self.head = nn.Linear(24, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_choose_layers(device: str) -> None:
    with torch.device(device):
        choice = choose_layers(Model())
    expected = {"fc", "own", "attention.out_proj", "mlp.gate_proj", "adapted.base_layer"}
    assert set(choice.layers) == expected
    assert {name: next(word for word in words if word in choice.kept[name]) for name, words in {
        "mlp.gate": ["router"], "normed": ["computed"], "tied": ["embed"], "adapted.lora_A.default": ["adapter"],
        "head": ["head"], "score": ["head"],
    }.items()}.keys() == choice.kept.keys()  # fmt: skip


def test_patterns_are_of_whole_names() -> None:
    assert set(choose_layers(Model(), include=["fc", "*.gate", "head"]).layers) == {"fc", "mlp.gate", "head"}
    assert "gate" not in choose_layers(Model(), include=["gate"]).layers
    skipped = choose_layers(Model(), skip=["f?", "a*"])
    assert set(skipped.layers) == {"own", "mlp.gate", "mlp.gate_proj", "score", "head"}
    assert skipped.kept["fc"] == "skipped"
    with pytest.raises(TypeError, match="skip"):
        choose_layers(Model(), skip="fc")
