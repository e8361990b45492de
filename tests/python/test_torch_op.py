"""torch.ops.octavo.*: what PyTorch's tracers, transforms and exporters see of an int8 layer is what it computes."""

from __future__ import annotations

import copy
import io
import shutil
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
from torch import Tensor, nn
from torch.nn import functional

POLICIES: dict[str, dict[str, Any]] = {
    "columns": {},
    "rows": {"outliers": "rows", "scheme": "zeropoint"},
    "static": {"outliers": "static"},
    "none": {"outliers": "none", "granularity": "tensor"},
    "rotated": {"rotation": 16, "outliers": "rows", "relative": 4.0, "cap": 0.1},
    "weight only": {"path": "weight_only", "granularity": "row"},
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> dict[str, Any]:
    result: dict[str, Any] = POLICIES[request.param]
    return result


def mlp(policy: dict[str, Any], seed: int = 0) -> nn.Sequential:
    """Two int8 layers with something between them; of the first, columns 1 and 5 are kept."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 70), nn.Tanh(), nn.Linear(70, 20)).eval().requires_grad_(False)
    for layer in (model[0], model[2]):
        setattr(layer, "octavo_outlier_columns", torch.tensor([1, 5]))  # noqa: B010 (what calibrate_ leaves)
    return ot.quantize_(model, **policy, progress=False)  # type: ignore[return-value]


def inputs(m: int = 6, seed: int = 1) -> Tensor:
    x = torch.randn(m, 48, generator=torch.Generator().manual_seed(seed))
    x[:, 5] *= 20
    return x


def arguments(weight: ot.Int8Tensor, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return (x, *weight._arrays.tensors(), bias, weight._arrays.text)


def backward_arguments(weight: ot.Int8Tensor, grad: Tensor) -> tuple[Any, ...]:
    return (grad, *weight._arrays.tensors(), weight._arrays.text)


# --- the operations ---------------------------------------------------------------------------------------------------


def test_is_octavo_linear(policy: dict[str, Any]) -> None:
    """The registered operation gives what the core gives, bit for bit, whatever the strides of x."""
    layer = mlp(policy)[0]
    x = inputs(12)
    for given in (x, x.view(3, 4, 48), x.view(3, 4, 48).transpose(0, 1), x[::2], x.t().contiguous().t(), x[0], x[:0]):
        expected = layer(given)
        assert torch.equal(torch.ops.octavo.linear(*arguments(layer.weight, given, layer.bias)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_octavo_linear_in_16_bit(dtype: torch.dtype) -> None:
    layer, x = mlp({})[0].to(dtype), inputs().to(dtype)
    assert torch.equal(torch.ops.octavo.linear(*arguments(layer.weight, x, layer.bias)), layer(x))


def test_backward_is_the_product_with_the_dequantized_weight(policy: dict[str, Any]) -> None:
    """With the kept columns that the forward pass reads."""
    weight = mlp(policy)[0].weight
    options = weight.options
    whole = weight.dequantize()
    if options.path == "weight_only" or options.outliers == "none":
        whole = weight.int8_weight.dequantize()
    grad = torch.randn(2, 3, 70)
    for given in (grad, grad.transpose(0, 1), grad[0, 0], grad.bfloat16()):
        found = torch.ops.octavo.linear_backward(*backward_arguments(weight, given))
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if given.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(found, (given.float() @ whole).to(given.dtype), **tolerance)


def test_refuses_what_does_not_fit() -> None:
    weight = mlp({})[0].weight
    good = arguments(weight, inputs())
    for position, wrong, word in (
        (0, torch.zeros(2, 47), "x"),
        (0, torch.zeros(2, 48, dtype=torch.int32), "x"),
        (1, good[1][:1], "codes"),
        (2, good[2][:5], "scale"),
        (8, "48 {}x", "JSON|Extra|options"),
        (8, '48 {"outliers": "some"}', "outliers"),
        (8, weight.options.text, "options: expected in_features"),
        (8, "-48 {}", "options: expected in_features"),
        (8, "48", "options: expected in_features"),
        (8, "", "options: expected in_features"),
    ):
        given = list(good)
        given[position] = wrong
        with pytest.raises((ValueError, TypeError), match=word):
            torch.ops.octavo.linear(*given)
        with torch.inference_mode(), pytest.raises((ValueError, TypeError), match=word):
            torch.ops.octavo.linear(*given)


def test_opcheck(policy: dict[str, Any]) -> None:
    weight = mlp(policy)[0].weight
    bias = torch.randn(70, requires_grad=True)
    torch.library.opcheck(torch.ops.octavo.linear.default, arguments(weight, inputs().requires_grad_(), bias))
    grad = torch.randn(6, 70, requires_grad=True)
    torch.library.opcheck(torch.ops.octavo.linear_backward.default, backward_arguments(weight, grad))


# --- tracers and compilers --------------------------------------------------------------------------------------------


def test_jit_trace(policy: dict[str, Any]) -> None:
    model, other = mlp(policy), inputs(seed=2)
    traced = torch.jit.trace(model, inputs())
    assert torch.equal(traced(other), model(other))


def test_jit_save() -> None:
    """A traced model has the weights as constants; frozen, it has nothing else of them."""
    model, x = mlp({}).eval(), inputs()
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(torch.jit.trace(model, x)), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), model(x))


def test_make_fx(policy: dict[str, Any]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model, other = mlp(policy), inputs(seed=2)
    graph = make_fx(model)(inputs())
    assert [str(node.target) for node in graph.graph.nodes].count("octavo.linear.default") == 2
    assert torch.equal(graph(other), model(other))


@pytest.mark.parametrize("name", ["columns", "static"])
def test_compile_with_a_gradient_and_any_number_of_rows(name: str) -> None:
    """One graph, for all sizes; aot_eager traces like a compiler and needs none."""
    torch._dynamo.reset()
    model = mlp(POLICIES[name])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (6, 9):
        x, y = inputs(m).requires_grad_(), inputs(m).requires_grad_()
        found, expected = compiled(x), model(y)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_export() -> None:
    rows = torch.export.Dim("rows", min=2)
    model, other = mlp({}), inputs(9)
    program = torch.export.export(model, (inputs(),), dynamic_shapes=({0: rows},))
    assert torch.equal(program.module()(other), model(other))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_ahead_of_time_compilation(tmp_path: Path) -> None:
    """A package of AOTInductor calls the operation without Python's dispatcher."""
    rows = torch.export.Dim("rows", min=2)
    model, other = mlp(POLICIES["static"]), inputs(9, seed=2)
    program = torch.export.export(model, (inputs(),), dynamic_shapes=({0: rows},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(other), model(other))


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = mlp({})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert tuple(model(mode.from_tensor(inputs())).shape) == (6, 20)
    meta = copy.deepcopy(model).to("meta")
    assert tuple(meta(inputs().to("meta")).shape) == (6, 20)


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = mlp({})
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs())
    assert counter.get_total_flops() == 2 * 6 * (48 * 70 + 70 * 20)


# --- derivatives ------------------------------------------------------------------------------------------------------


def test_gradients_and_tangents_agree(policy: dict[str, Any]) -> None:
    """jvp, func.grad, .backward() and dual numbers differentiate the same function: <grad, v> is the tangent."""
    from torch.autograd import forward_ad

    model, x, v = mlp(policy), inputs(), inputs(seed=3)
    y = x.clone().requires_grad_()
    model(y).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(torch.func.grad(lambda a: model(a).sum())(x), y.grad)
    _, tangent = torch.func.jvp(model, (x,), (v,))
    torch.testing.assert_close(tangent.sum(), (y.grad * v).sum(), rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v)))
    assert dual.tangent is not None
    torch.testing.assert_close(dual.tangent, tangent)


def test_second_derivatives() -> None:
    """Of a function with two int8 layers; against the same function of the dequantized weights."""
    model, x = mlp({"path": "weight_only"}), inputs(2)
    plain = [layer.int8_weight.dequantize() for layer in (model[0], model[2])]

    def same(a: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(a, plain[0], model[0].bias)), plain[1], model[2].bias)

    def hessian(f: Any) -> Any:
        return torch.func.hessian(lambda a: f(a).square().sum())(x)

    torch.testing.assert_close(hessian(model), hessian(same), rtol=1e-3, atol=1e-2)


def test_vmap_is_a_call_for_each_example(policy: dict[str, Any]) -> None:
    """Also of a batched bias, and with the outliers of an example its own."""
    model, batch = mlp(policy), torch.stack([inputs(3, seed=seed) for seed in range(4)])
    batch[1, :, 7] *= 30
    torch.testing.assert_close(torch.func.vmap(model)(batch), torch.stack([model(x) for x in batch]))
    found = torch.func.vmap(model, in_dims=1)(batch)
    torch.testing.assert_close(found, torch.stack([model(x) for x in batch.unbind(1)]))
    weight, biases = model[0].weight, torch.randn(4, 70)
    found = torch.func.vmap(lambda x, b: functional.linear(x, weight, b))(batch, biases)
    torch.testing.assert_close(
        found, torch.stack([functional.linear(x, weight, b) for x, b in zip(batch, biases, strict=True)])
    )
    per_sample = torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(batch)
    expected = [torch.func.grad(lambda x: model(x).sum())(x) for x in batch]
    torch.testing.assert_close(per_sample, torch.stack(expected))


def peak_of_resident_memory() -> int:
    """Bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_the_backward_pass_dequantizes_a_tile_at_a_time() -> None:
    """Beyond the result, PyTorch allocates nothing, and the process less than a tenth of the dequantized weight."""
    options = Options(scheme="zeropoint", rotation=16)
    weight = ot.Int8Tensor.from_float(torch.randn(4096, 4096), options, [3])
    grad = torch.randn(8, 4096)
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    clear_refs.write_text("5")  # the peak begins anew
    before = peak_of_resident_memory()
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.octavo.linear_backward(*backward_arguments(weight, grad))
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sum(size for size in sizes if size > 0) == 8 * 4096 * 4
    assert peak_of_resident_memory() - before < 0.1 * 4096 * 4096 * 4


# --- modes and modules of PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_reaches_the_operation(dtype: torch.dtype) -> None:
    layer, x = mlp({})[0], inputs()
    expected = layer(x.to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(torch.ops.octavo.linear(*arguments(layer.weight, x, layer.bias)), expected)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_encoder_with_a_padding_mask(grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = nn.TransformerEncoder(layer, 2).eval()
    model = ot.quantize_(copy.deepcopy(exact), progress=False)
    assert sum(isinstance(parameter, ot.Int8Tensor) for parameter in model.parameters()) == 6
    x = torch.randn(2, 7, 48)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 5:] = True
    with torch.set_grad_enabled(grad):
        found, expected = model(x, src_key_padding_mask=mask)[~mask], exact(x, src_key_padding_mask=mask)[~mask]
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_nested_tensors() -> None:
    layer = mlp({"outliers": "rows"})[0]
    parts = [inputs(3), inputs(5, seed=2)]
    for layout in (torch.strided, torch.jagged):
        found = layer(torch.nested.nested_tensor(parts, layout=layout)).unbind()
        for own, x in zip(found, parts, strict=True):
            assert torch.equal(own, layer(x))


# Each is exported for ten seconds: those that have all there is between them.
ONNX: dict[str, dict[str, Any]] = {name: POLICIES[name] for name in ("columns", "static", "none", "rotated")} | {
    "rotated columns": {"rotation": 16, "relative": 2.5, "scheme": "zeropoint", "cap": 0.1},
    "rotated weight only": {"rotation": 64, "path": "weight_only"},
}


@pytest.mark.parametrize("name", ONNX)
def test_onnx_is_a_graph_of_standard_operators(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    import onnx

    model, other = mlp(ONNX[name])[:1], inputs(9, seed=2)
    path = str(tmp_path / "model.onnx")
    rows = torch.export.Dim("rows", min=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (inputs(),), path, dynamo=True, dynamic_shapes=({0: rows},), verbose=False)
    loaded = onnx.load(path)
    assert {node.domain for node in loaded.graph.node} == {""}
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(other), rtol=1e-4, atol=1e-4)
