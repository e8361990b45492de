"""`octavo.torch.train_`: what layers compute while they are trained in int8, and that tools take them as they were."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import octavo  # noqa: E402
from octavo import _core  # noqa: E402
from octavo.torch import Int8Linear, Int8Tensor, quantize_, train_, untrain_  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(32, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Any) -> Any:
        x = x + self.attention(x)
        return x + self.down(functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def new_model() -> Any:
    torch.manual_seed(0)
    return Model()


def trained(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


X = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 4
FFN = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
ATTENTION = [f"blocks.{i}.attention" for i in (0, 1)]


def step(model: Any, optimizer: Any, x: Any = X) -> float:
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), Y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def relative(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decomposition", [True, False])
def test_a_layer_by_its_definition(dtype: Any, decomposition: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40)).to(dtype)
    layer: Any = model[0]
    x = torch.randn(7, 3, 48)
    x[..., 5] *= 30  # outliers
    x = x.to(dtype).requires_grad_()
    grad = torch.randn(7, 3, 40).to(dtype)
    weight = octavo.quantize_weight(layer.weight)
    policy: Any = "columns" if decomposition else "none"
    expected = octavo.linear(x.detach(), weight, layer.bias.detach(), outliers=policy)
    int8 = octavo.Options(path="int8")._native
    of_x = _core.linear_backward(grad, weight._native, int8, None)

    assert train_(model, ["0"], decomposition=decomposition) is model
    y = model(x)
    y.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, of_x)
    assert relative(x.grad.float(), grad.float() @ layer.weight.detach().float()) < 0.02
    rows, columns = grad.reshape(-1, 40), x.detach().reshape(-1, 48)
    assert torch.equal(layer.weight.grad, rows.t() @ columns)
    assert torch.equal(layer.bias.grad, rows.sum(0))


def test_gradient_of_x_in_16_bit() -> None:
    model = new_model()
    train_(model, ["*.up"], grad_input="16bit")
    layer, x = model.blocks[0].up, X.clone().requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(24, 64) @ layer.weight.detach())


def test_only_what_needs_a_gradient_gets_one() -> None:
    model = new_model()
    train_(model).requires_grad_(False)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "names"), [("ffn", FFN), ("ffn+attention", FFN + ATTENTION), (["*.1.down", "classifier"], None)]
)
def test_which_layers(modules: Any, names: Any) -> None:
    model = new_model()
    before = dict(model.named_parameters())
    train_(model, modules)
    assert sorted(trained(model)) == sorted(names or ["blocks.1.down", "classifier"])
    assert all(type(model.get_submodule(name)) is nn.Linear for name in trained(model))
    assert dict(model.named_parameters()) == before  # the very parameters, by the same names
    plain = new_model()(X)
    assert not torch.equal(model(X), plain)
    assert trained(untrain_(model)) == []
    assert torch.equal(model(X), plain)


def test_attention_of_pytorch_is_left_alone() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
    train_(model, "ffn+attention")
    assert trained(model) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]


def test_arguments() -> None:
    model: Any = new_model()
    for arguments, error, message in [
        ({"modules": "all"}, ValueError, "train_: modules: expected 'ffn', 'ffn[+]attention' or patterns, got 'all'"),
        ({"modules": [3]}, TypeError, "train_: modules: expected patterns that are strings, got int"),
        (
            {"modules": 3},
            TypeError,
            "train_: modules: expected 'ffn', 'ffn[+]attention' or a list of patterns, got int",
        ),
        ({"modules": ["*.nothing"]}, ValueError, "train_: modules: expected layers of the model, got .*finds none"),
        ({"grad_input": "8bit"}, ValueError, "train_: grad_input: expected 'int8' or '16bit', got '8bit'"),
        ({"decomposition": 1}, TypeError, "train_: decomposition: expected a bool, got int"),
        ({"threshold": -1.0}, ValueError, "train_: threshold: expected"),
        ({"seed": 0.5}, TypeError, "train_: seed: expected an int or None, got float"),
        (
            {"seed": 1, "rotation": 16},
            ValueError,
            "train_: seed: expected scheme 'absmax' and rotation 0, got 'absmax'",
        ),
        (
            {"seed": 1, "scheme": "zeropoint"},
            ValueError,
            "train_: seed: expected scheme 'absmax' and rotation 0, got 'z",
        ),
        ({"outliers": "static"}, ValueError, "train_: outliers: expected 'columns', 'rows' or 'none', got 'static'"),
    ]:
        with pytest.raises(error, match=message):
            train_(model, **arguments)
    with pytest.raises(TypeError, match=r"train_: blocks.0.up.weight: expected float32, .*, got torch.float64"):
        train_(new_model().double())
    own: Any = type("Own", (nn.Linear,), {"forward": lambda self, x: x})
    model.blocks[0].up = own(32, 64)
    with pytest.raises(ValueError, match=r"train_: blocks.0.up: expected the forward of nn.Linear, got a Own"):
        train_(model, ["blocks.*"])
    assert trained(model) == []


# --- the codes follow the weight --------------------------------------------------------------------------------------


def changes() -> dict[str, Callable[[Any], Any]]:
    def fused(weight: Any) -> None:
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()

    def foreach(weight: Any) -> None:
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1, foreach=True).step()

    def preserved(weight: Any) -> None:  # as FSDP2 gathers it
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.mul_(1.5)

    return {
        "in place": lambda weight: weight.detach().mul_(1.5),
        "one value": lambda weight: weight.detach()[1, 3].add_(1.0),
        "data": lambda weight: weight.data.mul_(1.5),
        "other memory": lambda weight: setattr(weight, "data", weight.data * 1.5),
        "fused": fused,
        "foreach": foreach,
        "preserved version": preserved,
    }


@pytest.mark.parametrize("change", list(changes()))
def test_codes_are_made_anew_when_the_weight_changes(change: str) -> None:
    model = nn.Sequential(nn.Linear(48, 40, bias=False))
    train_(model, ["0"])
    x = torch.randn(5, 48)
    first = model(x)
    changes()[change](model[0].weight)
    assert not torch.equal(model(x), first)
    assert torch.equal(model(x), octavo.linear(x, octavo.quantize_weight(model[0].weight)))


def test_codes_are_made_once_and_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.torch import training

    made = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(octavo.quantize_weight(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(training, "quantize_weight", counted)
    model = nn.Sequential(nn.Linear(48, 40))
    train_(model, ["0"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for steps in range(3):
        for _ in range(2):  # gradients that are accumulated
            model(torch.randn(5, 48)).sum().backward()
        assert len(made) == steps + 1
        optimizer.step()
    assert made[0] is made[1] is made[2]


def test_codes_on_a_device_are_made_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is compared: every forward pass makes codes, which its backward pass takes."""
    from octavo.torch import training

    def waits(*_: Any) -> bool:
        raise AssertionError("it compares values")

    made = []
    quantize_weight = octavo.quantize_weight
    monkeypatch.setattr(training, "_compares", lambda weight: False)
    monkeypatch.setattr(
        training, "quantize_weight", lambda *args, **more: made.append(1) or quantize_weight(*args, **more)
    )
    model = nn.Sequential(nn.Linear(48, 40))
    train_(model, ["0"])
    x = torch.randn(5, 48, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", waits)
        for passes in range(1, 4):
            changes()["preserved version"](model[0].weight)
            model(x).sum().backward()
            assert len(made) == passes
    expected = octavo.linear(x.detach(), octavo.quantize_weight(model[0].weight), model[0].bias.detach())
    assert torch.equal(model(x), expected)


def test_weights_are_rounded_stochastically() -> None:
    """By a seed: another draw for each layer and change, the same ones again, right on average."""

    def codes(seed: int) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False))
        model[1].load_state_dict(model[0].state_dict())
        train_(model, ["*"], seed=seed)
        found = []
        for _ in range(2):
            x = torch.eye(48)
            found += [model[0](x), model[1](x)]
            with torch.no_grad():
                model[0].weight.add_(0)  # changed, to what it was
        weights.append(model[0].weight.detach())
        return found

    weights: list[Any] = []
    first, again, other = codes(3), codes(3), codes(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], first[3])  # whose weight did not change
    different = [first[0], first[1], first[2], other[0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    exact = weights[0].T
    nearest = octavo.linear(torch.eye(48), octavo.quantize_weight(weights[0]))
    mean = torch.stack([codes(seed)[0] for seed in range(64)]).mean(0)
    assert relative(mean, exact) < 0.5 * relative(nearest, exact)


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    train_(model, ["0"])
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="quantize_weight: weight: expected finite values"):
            model(torch.ones(1, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = 1
    assert torch.equal(
        model(torch.ones(1, 8)),
        octavo.linear(torch.ones(1, 8), octavo.quantize_weight(model[0].weight), model[0].bias.detach()),
    )


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor, torch.optim.NAdam])
def test_it_learns_as_float32_does(optimizer: Any) -> None:
    plain, int8 = new_model(), train_(new_model(), "ffn+attention")
    losses = []
    for model in (plain, int8):
        made = optimizer(model.parameters(), lr=0.1 if optimizer is torch.optim.SGD else 3e-3)
        losses.append([step(model, made) for _ in range(30)])
    assert losses[1][-1] < 0.7 * losses[1][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)


def test_autocast() -> None:
    model = train_(new_model())
    with torch.autocast("cpu", torch.bfloat16):
        y = model.blocks[0].up(X)
    y.float().sum().backward()
    expected = octavo.linear(
        X.bfloat16(), octavo.quantize_weight(model.blocks[0].up.weight), model.blocks[0].up.bias.detach()
    )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert model.blocks[0].up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = train_(new_model())
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if is_checkpointed else model(x)
        y.sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_without_a_break() -> None:
    runs = []
    for compiles in (False, True):
        model = train_(new_model(), "ffn+attention")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        runs.append([step(called, optimizer) for _ in range(3)])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


def test_operations_as_pytorch_checks_them() -> None:
    model = train_(new_model())
    layer = model.blocks[0].up
    number = layer.__dict__["forward"].number
    args = (X.clone().requires_grad_(), layer.weight, layer.bias, number, True)
    for checked in ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"):
        torch.library.opcheck(torch.ops.octavo.train_linear.default, args, test_utils=checked)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_trained_on_their_own(how: str) -> None:
    model = train_(new_model())
    model(X)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert trained(other) == trained(model)
    before = model(X)
    assert torch.equal(other(X), before)
    with torch.no_grad():
        other.blocks[0].up.weight.mul_(2)
    assert not torch.equal(other(X), before)
    assert torch.equal(model(X), before)


def test_state_dicts_are_those_of_plain_layers() -> None:
    model = train_(new_model())
    assert list(model.state_dict()) == list(new_model().state_dict())
    other = new_model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model(X)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), train_(other)(X))


def test_quantize_freezes_what_was_trained() -> None:
    model = train_(new_model())
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    expected = model.eval()(X)
    quantize_(model, recipe="paper", skip=["*attention", "classifier"], progress=False)
    assert trained(model) == []
    assert all(type(model.get_submodule(name)) is Int8Linear for name in FFN)
    assert all(isinstance(model.get_submodule(name).weight, Int8Tensor) for name in FFN)
    assert torch.equal(model(X), expected)


def test_sharded_and_replicated(tmp_path: Path) -> None:
    """FSDP2 and DDP in one process: what they do to parameters is what they do in many."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not dist.is_available():
        pytest.skip("PyTorch without torch.distributed")
    plain = train_(new_model())
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2)
    expected = [step(plain, optimizer) for _ in range(4)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for order in ("train first", "shard first"):
            model = new_model()
            if order == "train first":
                train_(model)
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            if order == "shard first":
                train_(model)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            np.testing.assert_allclose([step(model, optimizer) for _ in range(4)], expected, rtol=1e-6)
        replicated = nn.parallel.DistributedDataParallel(train_(new_model()))
        optimizer = torch.optim.AdamW(replicated.parameters(), 1e-2)
        np.testing.assert_allclose([step(replicated, optimizer) for _ in range(4)], expected, rtol=1e-6)
    finally:
        dist.destroy_process_group()
