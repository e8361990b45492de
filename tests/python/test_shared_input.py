"""Int8 layers that take the same input: computed in one call of the core, and never anything but what they would be."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import octavo.torch as ot
import torch
from octavo.torch.compilation import ShareInputs
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

K = 32
M = 80  # rows, so that there is enough to share
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper"},
    "best": {"recipe": "best"},
    "affine": {"scheme": "zeropoint", "granularity": "row"},
    "tensor": {"granularity": "tensor", "threshold": 2.5},
    "weight only": {"path": "weight_only", "outliers": "none"},
    "static": {"outlier_columns": [1, 5], "outliers": "static"},
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Attention(nn.Module):
    """Three products of one input, and one of another."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, n in (("q", 24), ("k", 16), ("v", 17), ("o", K)):
            linear = nn.Linear(K, n, bias=name != "q", device=device, dtype=dtype)
            setattr(self, name, ot.Int8Linear.from_linear(linear, **options))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        y = x if y is None else y
        return self.q(x), self.k(y), self.v(y), self.o(x + 1)


def new_x(m: int = M, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(m, K)
    x[:, 3] *= 20
    return x.to(device, dtype)


def trained(**how: Any) -> Attention:
    """One whose layers have shown who follows whom."""
    model = Attention(**how)
    model(new_x(device=how.get("device", "cpu"), dtype=how.get("dtype", torch.float32)))
    model(new_x(device=how.get("device", "cpu"), dtype=how.get("dtype", torch.float32)))
    return model


def assert_alone(model: Any, x: Tensor, alone: Attention | None = None) -> None:
    """Assert that the products of x are what each would be alone."""
    alone = Attention() if alone is None else alone
    for y, layer in zip(model(x), (alone.q, alone.k, alone.v), strict=False):
        assert torch.equal(y, layer(x.clone()))


def is_shared(first: Any, second: Any, x: Tensor | None = None) -> bool:
    """Whether the product of `second` is computed when `first` is called: a change that PyTorch does not see tells."""
    x = new_x(device=first.weight.device.type) if x is None else x
    expected = second(x.clone())
    first(x)
    second.scale.data.mul_(2)
    y = second(x)
    second.scale.data.div_(2)
    return torch.equal(y, expected)


# --- what is shared ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_bits_are_those_of_separate_calls(options: str, dtype: torch.dtype, device: str) -> None:
    how = {"device": device, "dtype": dtype}
    model = trained(**how, **OPTIONS[options])
    for m in (0, 1, 64, 80):
        x = new_x(m, **how)
        assert_alone(model, x, Attention(**how, **OPTIONS[options]))
    assert is_shared(model.q, model.k, new_x(**how))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_products_of_a_captured_graph_are_its_own() -> None:
    how: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    model, alone = trained(**how), Attention(**how)
    x = new_x(**how)
    outside = model.q(x)  # k and v wait, outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of_k, of_v = model.k(x), model.v(x)
        captured = model(x)
    after = model.k(x)  # what waits in the graph is not taken, either
    assert torch.equal(outside, alone.q(x.clone()))
    assert torch.equal(after, alone.k(x.clone()))
    x.copy_(new_x(**how))
    graph.replay()
    expected = [layer(x.clone()) for layer in (alone.q, alone.k, alone.v)]
    for found, right in zip([*captured[:3], of_k, of_v], [*expected, *expected[1:]], strict=True):
        assert torch.equal(found, right)


def test_what_has_followed_is_computed_ahead() -> None:
    model = Attention()
    assert not is_shared(model.q, model.k)
    model(new_x())
    model(new_x())
    for first, second, shared in (("q", "k", True), ("q", "v", True), ("k", "v", False), ("q", "o", False)):
        assert is_shared(getattr(model, first), getattr(model, second)) is shared
        for _ in range(20):
            model(new_x())


def test_what_is_computed_in_vain_is_not_for_a_while() -> None:
    model = trained()
    model.q(new_x())
    model.q(new_x())
    for _ in range(16):
        assert not is_shared(model.q, model.k)
    model(new_x())
    assert is_shared(model.q, model.k)


def test_little_is_not_shared() -> None:
    model = trained()
    assert not is_shared(model.q, model.k, new_x(2))


def test_another_input_for_some() -> None:
    model = Attention()
    for _ in range(3):
        model(new_x(), new_x())
    assert not is_shared(model.q, model.k)
    for _ in range(20):
        model(new_x(), new_x())
    assert is_shared(model.k, model.v)


@pytest.mark.parametrize("other", [{"threshold": 5.0}, {"outliers": "none"}, {"path": "weight_only"}])
def test_other_options(other: dict[str, Any]) -> None:
    model = Attention()
    model.k = ot.Int8Linear.from_linear(nn.Linear(K, 8), **other)
    for _ in range(3):
        model(new_x())
    assert not is_shared(model.q, model.k)


def test_the_same_input_again_and_again() -> None:
    model, x = trained(), new_x()
    first = model(x)
    for _ in range(3):
        for a, b in zip(first, model(x), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    again = model.k(x)
    assert torch.equal(again, first[1])
    assert again.data_ptr() != model.k(x).data_ptr()


# --- what changes between two calls -----------------------------------------------------------------------------------


def _replace(model: Attention) -> None:
    model.k = ot.Int8Linear.from_linear(nn.Linear(K, 16))


def _load(model: Attention) -> None:
    model.k.load_state_dict(ot.Int8Linear.from_linear(nn.Linear(K, 16)).state_dict())


CHANGES: dict[str, Callable[[Attention, Tensor], Any]] = {
    "x in place": lambda model, x: x.add_(1),
    "x through a view": lambda model, x: x[1].zero_(),
    "other memory for x": lambda model, x: setattr(x, "data", torch.randn(M, K)),
    "another shape": lambda model, x: setattr(x, "data", x.data[: M - 8]),
    "other strides": lambda model, x: setattr(x, "data", x.data.as_strided((M, K), (0, 1))),
    "the weight in place": lambda model, x: model.k.weight.mul_(2),
    "a scale in place": lambda model, x: model.k.scale.mul_(2),
    "the codes in place": lambda model, x: model.k.weight._arrays.codes.neg_(),
    "another weight": lambda model, x: setattr(
        model.k, "weight", nn.Parameter(ot.Int8Tensor.from_float(torch.randn(16, K)), requires_grad=False)
    ),
    "the bias in place": lambda model, x: model.k.bias.add_(1),
    "another bias": lambda model, x: setattr(model.k, "bias", nn.Parameter(torch.randn(16))),
    "other memory for the bias": lambda model, x: setattr(model.k.bias, "data", torch.randn(16)),
    "no bias": lambda model, x: setattr(model.k, "bias", None),
    "an option": lambda model, x: setattr(model.k, "threshold", 1.0),
    "another dtype": lambda model, x: model.k.half(),
    "another layer": lambda model, x: _replace(model),
    "a state dict": lambda model, x: _load(model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_computed_before_a_change_is_given_out(change: str) -> None:
    model, x = trained(), new_x()
    before = model.k(x.clone())
    assert is_shared(model.q, model.k)
    model(new_x())
    model.q(x)
    CHANGES[change](model, x)
    y = model.k(x)
    assert torch.equal(y, model.k(x.clone()))
    assert change == "another dtype" or not torch.equal(y, before)


def test_hooks() -> None:
    model, plain = trained(), Attention()
    model.k.register_forward_pre_hook(lambda layer, args: (args[0].add_(1),))
    model.v.register_forward_hook(lambda layer, args, y: y.mul_(2))
    x = new_x()
    q, k, v, _ = model(x.clone())
    for y, expected in ((q, plain.q(x)), (k, plain.k(x + 1)), (v, plain.v(x + 1) * 2)):
        assert torch.equal(y, expected)


def test_a_fault_of_one_layer_is_told_by_its_own_call() -> None:
    model, alone = trained(), Attention()
    model.k.bias.data = torch.zeros(3)
    for _ in range(3):
        x = new_x()
        assert torch.equal(model.q(x), alone.q(x))
        with pytest.raises(ValueError, match="linear: bias"):
            model.k(x)
        assert torch.equal(model.v(x), alone.v(x))


# --- modes of PyTorch -------------------------------------------------------------------------------------------------


def test_inference_mode_counts_no_changes() -> None:
    model, x = trained(), new_x()
    with torch.inference_mode():
        inside = model.q(x)
    assert inside.is_inference()
    assert not model.k(x).is_inference()
    with torch.inference_mode():
        x = new_x()
        model.q(x)
        x += 1
        y = model.k(x)
    assert torch.equal(y, model.k(x.clone()))
    made = trained()
    with torch.inference_mode():
        x = new_x()
    assert_alone(made, x)


@pytest.fixture
def _shares_in_inference_mode() -> Iterator[None]:
    ot.share_in_inference_mode()
    yield
    ot.share_in_inference_mode(False)


@pytest.mark.usefixtures("_shares_in_inference_mode")
def test_inference_mode_where_nobody_writes_to_inputs() -> None:
    model, alone = trained(), Attention()
    with torch.inference_mode():
        for _ in range(3):
            assert_alone(model, new_x(), alone)
        x = new_x()
        model.q(x)
        before = x.clone()
        x += 1  # what was promised not to happen
        assert torch.equal(model.k(x), alone.k(before))
        x = new_x()
        assert model.q(x).is_inference()
    assert not model.k(x).is_inference()  # results of the other mode are no use here,
    x = new_x()
    model.q(x)
    with torch.inference_mode():
        assert model.k(x).is_inference()  # nor there
    x = new_x()
    model.q(x)
    x += 1
    assert torch.equal(model.k(x), alone.k(x))
    with pytest.raises(TypeError):
        ot.share_in_inference_mode("yes")  # type: ignore[arg-type]


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = trained()
    for _ in range(3):
        assert_alone(model, new_x())


def test_gradients() -> None:
    model = trained()
    with torch.enable_grad():
        x = new_x()
        q, k, _, _ = model(x)
        assert not q.requires_grad  # it has no bias
        k.sum().backward()
        assert torch.equal(model.k.bias.grad, torch.full((16,), float(M)))
        model(x.requires_grad_())[0].sum().backward()
        assert x.grad is not None


# --- what lives how long ----------------------------------------------------------------------------------------------


def tensors_of(shape: tuple[int, ...]) -> int:
    gc.collect()
    return sum(type(each) is Tensor and tuple(each.shape) == shape for each in gc.get_objects())


def test_nothing_stays_alive() -> None:
    model = trained()
    x = new_x(93)
    alive = weakref.ref(x)
    y = model(x)
    assert tensors_of((93, 16)) == 1
    del y
    assert tensors_of((93, 16)) == tensors_of((93, 24)) == 0
    model.q(x)
    assert tensors_of((93, 16)) == tensors_of((93, 17)) == 1  # until somebody asks for them, or x is no more
    del x
    assert alive() is None
    assert tensors_of((93, 16)) == tensors_of((93, 17)) == 0
    layers = [weakref.ref(layer) for layer in (model.q, model.k)]
    arrays = weakref.ref(model.k.weight._arrays)
    del model
    gc.collect()
    assert [layer() for layer in (*layers, arrays)] == [None] * 3


def test_copies_and_files() -> None:
    model, x = trained(), new_x()
    model.q(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), copy.deepcopy(model.q)):
        layers = [other] if isinstance(other, ot.Int8Linear) else [other.q, other.k, other.v]
        for layer, own in zip(layers, (model.q, model.k, model.v), strict=False):
            assert torch.equal(layer(x), own(x.clone()))
    assert set(model.state_dict()) == {f"{name}.weight" for name in "qkvo"} | {f"{name}.bias" for name in "kvo"}


def test_a_layer_that_goes_while_its_result_waits() -> None:
    model, x = trained(), new_x()
    model.q(x)
    del model.k
    gc.collect()
    assert torch.equal(model.v(x), model.v(x.clone()))
    for _ in range(3):
        x = new_x()
        assert torch.equal(model.q(x), model.q(x.clone()))


def test_threads() -> None:
    model, shared = trained(), new_x()
    expected = [layer(shared.clone()) for layer in (model.q, model.k, model.v, model.o)]
    expected[3] = model.o(shared + 1)
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for i in range(200):
                x = shared if (i + number) % 3 == 0 else shared.clone()
                if not all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True)):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- models of others -------------------------------------------------------------------------------------------------

GROUPS = {
    "LlamaForCausalLM": ("model.layers.1", ("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    "Qwen2ForCausalLM": ("model.layers.1", ("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    "BertForMaskedLM": (
        "bert.encoder.layer.1.attention.self",
        ("query", "key"),
        ("query", "value"),
    ),
    "T5ForConditionalGeneration": (
        "decoder.block.1.layer",
        ("0.SelfAttention.q", "0.SelfAttention.v"),
        ("1.EncDecAttention.k", "1.EncDecAttention.v"),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from tiny_models import tiny_model

    model, (where, *groups) = ot.quantize_(tiny_model(name), progress=False), GROUPS[name]
    ids = (torch.arange(M) % 17).reshape(2, -1)
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if name.startswith("T5") else {})}
    first_logits = model(**given).logits
    for _ in range(3):
        assert torch.equal(model(**given).logits, first_logits)
    for first, second in groups:
        block = model.get_submodule(where)
        assert is_shared(block.get_submodule(first), block.get_submodule(second))
        for _ in range(20):
            model(**given)


# --- compiled models --------------------------------------------------------------------------------------------------

LINEAR, MANY = torch.ops.octavo.linear.default, torch.ops.octavo.linear_many.default


def calls(graph: torch.fx.Graph) -> list[int]:
    """How many products each call of the graph has."""
    nodes = [node for node in graph.nodes if node.target in (LINEAR, MANY)]
    return [len(node.args[1]) // 7 if node.target is MANY else 1 for node in nodes]


def shared(model: Callable[..., Any], *inputs: Tensor) -> tuple[Any, list[int]]:
    """The graph of a model in which products share their inputs, to be called, and its calls."""
    module = make_fx(model)(*inputs)
    ShareInputs()(module.graph)
    module.graph.lint()
    module.recompile()
    return module, calls(module.graph)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_graph_has_one_call_for_one_input(options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = Attention(dtype=dtype, **options), new_x(dtype=dtype)
    module, found = shared(model, x)
    assert found == [3, 1]
    for other in (x, new_x(dtype=dtype)):
        for y, alone in zip(module(other), model(other), strict=True):
            assert torch.equal(y, alone)


def test_a_graph_keeps_apart_what_differs() -> None:
    """Inputs, options, and weights or biases that are not there yet when the first product is computed."""
    model, x, y = Attention(), new_x(), new_x()
    assert shared(model, x, y)[1] == [1, 2, 1]
    model.k = Attention(rotation=64).k
    assert shared(model, x)[1] == [2, 1, 1]
    model = Attention()

    def late(x: Tensor) -> tuple[Tensor, ...]:
        q, codes, *others = model.q(x), *model.k.weight._arrays.tensors()
        k = LINEAR(x, codes, *others, q.sum(0)[:16], model.k.weight._arrays.text)
        return q, k, model.v(x)

    module, found = shared(late, x)
    assert found == [2, 1]
    for y, alone in zip(module(x), late(x), strict=True):
        assert torch.equal(y, alone)


def sharing(found: list[int]) -> ShareInputs:
    """The pass, which adds to `found` how many products each call has; the compiler may copy it."""

    class Sharing(ShareInputs):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            found.extend(calls(graph))

        def uuid(self) -> Any:
            return None  # not of a cache, where it would not be called

    return Sharing()


def test_a_compiled_model_shares_inputs() -> None:
    """What is an output of one product can be the input of others."""
    first, second = Attention(), Attention()
    found: list[int] = []

    def model(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, o = first(x)
        return (*second(o), q, k, v)

    x = new_x()
    compiled = torch.compile(model, options={"post_grad_custom_pre_pass": sharing(found)})
    for y, alone in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)  # x + 1 is the compiler's
    assert sorted(found) == [1, 1, 3, 3]
    assert ShareInputs().uuid() == ShareInputs().uuid()


def test_a_package_shares_inputs(tmp_path: Path) -> None:
    """Compiled ahead of time, for any number of rows."""
    model = Attention()
    found: list[int] = []
    program = torch.export.export(model, (new_x(9),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    configs = {"post_grad_custom_pre_pass": sharing(found)}
    path = str(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=configs)
    x = new_x()
    for y, alone in zip(torch._inductor.aoti_load_package(package)(x), model(x), strict=True):
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)
    assert found == [3, 1]


def test_the_operation_of_many() -> None:
    model, x = Attention(**OPTIONS["best"]), new_x()
    weights = [layer.weight._arrays for layer in (model.q, model.v)]
    arrays = [*weights[0].tensors(), None, *weights[1].tensors(), model.v.bias]
    text = weights[0].text
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(MANY, (x, arrays, text), test_utils=tests)
    assert MANY(x, [], text) == []
    with pytest.raises(ValueError, match=r"arrays: expected seven for each layer, got 13"):
        MANY(x, arrays[:-1], text)
    with pytest.raises(ValueError, match=r"codes: expected a tensor, got None"):
        MANY(x, [None, *arrays[1:]], text)
    with pytest.raises(ValueError, match=r"linear_many\[1\]: bias: expected"):
        MANY(x, [*arrays[:-1], torch.zeros(3)], text)
