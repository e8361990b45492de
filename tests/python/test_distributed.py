"""octavo.distributed: layers over 2 and 4 processes against the same layers in one.

A function whose name starts with an underscore and that takes a mesh runs in every process; see ranks.py.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
import tolerances
from support import TORCH, make

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no torch.distributed with gloo", allow_module_level=True)

import octavo.torch as ot
from octavo.distributed import (
    ColumnParallelInt8Linear,
    ColwiseInt8Parallel,
    RowParallelInt8Linear,
    RowwiseInt8Parallel,
    offloadable_,
    shard_column,
    shard_row,
    transformers_plan,
)
from ranks import Ranks, pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "affine": {"scheme": "zeropoint", "granularity": "row"},
    "affine, vector": {"scheme": "zeropoint", "outliers": "rows"},
    "tensor": {"granularity": "tensor", "threshold": 2.5, "outliers": "rows"},
    "no outliers": {"outliers": "none"},
    "weight only": {"path": "weight_only", "outliers": "none"},
    "kept": {"outlier_columns": [1, 5, 30]},
    "static": {"outlier_columns": [1, 5, 30], "outliers": "static", "scheme": "zeropoint"},
}
# k, n: both even; uneven; fewer features than 4 ranks need to have one each (torch.chunk deals out 2, 2, 1, 0).
SHAPES = ((64, 48), (33, 19), (33, 5), (70, 1))
FEW = ((33, 19), (5, 6))


def _gpus(size: int) -> str | None:
    """Why NCCL cannot be tested here, or None."""
    if torch.cuda.device_count() < size:
        return f"{size} GPUs are needed for NCCL, found {torch.cuda.device_count()}"
    return None if "cuda" in octavo.info()["backends"] else "this build of octavo has no cuda backend"


def _of(size: int, device: str) -> Any:
    reason = _gpus(size) if device == "cuda" else None
    name = f"{size} {'nccl' if device == 'cuda' else 'gloo'}"
    return pytest.param((size, device), id=name, marks=[pytest.mark.skip(reason=reason)] if reason else [])


@pytest.fixture(params=[_of(2, "cpu"), _of(4, "cpu")])
def ranks(request: pytest.FixtureRequest, rank_pools: dict[tuple[int, str], Ranks]) -> Ranks:
    return pool(rank_pools, *request.param)


@pytest.fixture(params=[_of(2, "cpu"), _of(4, "cpu"), _of(2, "cuda"), _of(4, "cuda")])
def ranks_or_gpus(request: pytest.FixtureRequest, rank_pools: dict[tuple[int, str], Ranks]) -> Ranks:
    return pool(rank_pools, *request.param)


@pytest.fixture
def two(rank_pools: dict[tuple[int, str], Ranks]) -> Ranks:
    return pool(rank_pools, 2, "cpu")


@pytest.fixture
def four(rank_pools: dict[tuple[int, str], Ranks]) -> Ranks:
    return pool(rank_pools, 4, "cpu")


# ---------------------------------------------------------------------------------------------------------------
# The same values in every process


def _layer(options: str, k: int, n: int, dtype: str = "float32", *, bias: bool = True) -> ot.Int8Linear:
    of_layer = dict(OPTIONS[options])
    if "outlier_columns" in of_layer:
        of_layer["outlier_columns"] = [column for column in of_layer["outlier_columns"] if column < k]
    linear = nn.Linear(k, n, bias, dtype=getattr(torch, dtype))
    with torch.no_grad():
        linear.weight.copy_(TORCH.array(make("normal", (n, k), dtype), dtype))
        if bias:
            linear.bias.copy_(TORCH.array(make("normal", (n,), dtype, 1), dtype))
    return ot.Int8Linear.from_linear(linear, **of_layer)


def _inputs(k: int, dtype: str = "float32", m: int = 6) -> Tensor:
    x: Tensor = TORCH.array(make("outliers", (m, k), dtype, 3), dtype)
    return x.reshape(2, m // 2, k)


def _parts(size: int, mesh: DeviceMesh) -> list[slice]:
    """What torch.chunk gives each rank."""
    indices = list(torch.arange(size).chunk(mesh.size()))
    parts = [slice(int(part[0]), int(part[-1]) + 1) for part in indices]
    return parts + [slice(size, size)] * (mesh.size() - len(parts))


def _part(size: int, mesh: DeviceMesh) -> slice:
    return _parts(size, mesh)[mesh.get_local_rank()]


def _same(a: Tensor, b: Tensor) -> None:
    assert type(a) is Tensor, type(a)
    assert a.dtype == b.dtype
    assert torch.equal(a, b), (a, b)


def _same_everywhere(a: Tensor, mesh: DeviceMesh) -> None:
    """Sums over ranks may not depend on the rank: what follows would go apart."""
    everybody = [torch.empty_like(a) for _ in range(mesh.size())]
    dist.all_gather(everybody, a.contiguous(), group=mesh.get_group())
    for other in everybody:
        _same(other, a)


# ---------------------------------------------------------------------------------------------------------------
# Column-parallel: equal


def _column_is_equal(mesh: DeviceMesh, options: str) -> None:
    for (k, n), dtype in [(SHAPES[0], "bfloat16"), *[(shape, "float32") for shape in SHAPES]]:
        layer, x = _layer(options, k, n, dtype).to(mesh.device_type), _inputs(k, dtype).to(mesh.device_type)
        before = layer.codes
        with torch.no_grad():
            expected = layer(x)
            sharded = shard_column(layer, mesh)
            assert isinstance(sharded, ColumnParallelInt8Linear)
            here = _part(n, mesh)
            assert (sharded.out_features, sharded.in_features) == (here.stop - here.start, k)
            _same(sharded.codes, before[here])
            _same(sharded(x), expected[..., here])
            _same(shard_column(layer, mesh, output_layouts=Replicate())(x), expected)
            # A process group in place of a mesh.
            _same(shard_column(layer, mesh.get_group())(x), expected[..., here])
        assert type(layer) is ot.Int8Linear
        _same(layer.codes, before)
        # With gradients on, so through DTensor and the registered operation.
        _same(sharded(x).detach(), expected[..., here])


@pytest.mark.parametrize("options", OPTIONS)
def test_column_parallel_is_equal(ranks_or_gpus: Ranks, options: str) -> None:
    ranks_or_gpus.run(_column_is_equal, options)


# ---------------------------------------------------------------------------------------------------------------
# Row-parallel: the sum of what the ranks' features contribute, each with its own scales of X


def _expected_sum(layer: ot.Int8Linear, x: Tensor, mesh: DeviceMesh) -> ref.Output:
    """The oracle's products of all ranks, added up in float64; `terms` grows by the additions."""
    weight = TORCH.weight(layer.int8_weight)
    outputs = []
    for part in _parts(layer.in_features, mesh):
        columns, kept = weight.outlier_columns, weight.outlier_weight
        if columns is not None and kept is not None:
            here = (columns >= part.start) & (columns < part.stop)
            columns, kept = columns[here] - part.start, kept[:, here]
        shard = ref.Weight(weight.codes[:, part], weight.scale, weight.zeropoint, columns, kept)
        path = "int8" if layer.path == "auto" else layer.path
        form = {"scheme": layer.scheme, "granularity": layer.granularity}
        outputs.append(
            ref.linear(
                TORCH.host(x)[..., part], shard, threshold=layer.threshold, outliers=layer.outliers, path=path, **form
            )
        )
    bias = 0.0 if layer.bias is None else TORCH.host(layer.bias).astype(np.float64)
    return ref.Output(
        sum(output.value for output in outputs) + bias,
        sum(output.magnitude for output in outputs) + np.abs(bias),
        max(output.terms for output in outputs) + mesh.size(),
        sum(output.unscaled for output in outputs),
    )


def _row_is_the_sum(mesh: DeviceMesh, options: str) -> None:
    for (k, n), dtype in [(SHAPES[0], "bfloat16"), (SHAPES[1], "float16"), *[(shape, "float32") for shape in SHAPES]]:
        layer, x = _layer(options, k, n, dtype), _inputs(k, dtype)
        here = _part(k, mesh)
        expected = _expected_sum(layer, x, mesh)
        layer, x = layer.to(mesh.device_type), x.to(mesh.device_type)
        sharded = shard_row(layer, mesh)
        assert isinstance(sharded, RowParallelInt8Linear)
        assert (sharded.in_features, sharded.out_features) == (here.stop - here.start, n)
        _same(sharded.codes, layer.codes[:, here])
        _same(sharded.scale, layer.scale)
        with torch.no_grad():
            y = sharded(x[..., here])
            _same_everywhere(y, mesh)
            tolerances.check_output(TORCH.host(y.cpu()), expected, dtype)
            whole = shard_row(layer, mesh, input_layouts=Replicate())
            tolerances.check_output(TORCH.host(whole(x).cpu()), expected, dtype)
        # With gradients on, so through DTensor and the registered operation.
        tolerances.check_output(TORCH.host(sharded(x[..., here]).cpu()), expected, dtype)


@pytest.mark.parametrize("options", OPTIONS)
def test_row_parallel_is_the_float32_sum(ranks_or_gpus: Ranks, options: str) -> None:
    ranks_or_gpus.run(_row_is_the_sum, options)


def _row_distance(mesh: DeviceMesh) -> None:
    k, n = 128, 40
    layer, x = _layer("default", k, n), _inputs(k)
    with torch.no_grad():
        one = TORCH.host(layer(x)).astype(np.float64)
        many = TORCH.host(shard_row(layer, mesh, input_layouts=Replicate())(x)).astype(np.float64)
    # Rounding x to codes moves each element by half a scale at most, in one process and in many, and a rank's scale
    # is at most the whole one. So the two differ by at most a scale of x times the sum of |w|, and float32 rounding.
    weight = TORCH.weight(layer.int8_weight)
    values = TORCH.host(x).reshape(-1, k)
    mask = ref.outlier_mask(values, weight, outliers="columns", threshold=layer.threshold)
    scale = np.where(mask, 0, np.abs(values)).max(axis=1, keepdims=True).astype(np.float64) / 127
    limit = scale * np.where(mask[0], 0, np.abs(weight.dequantize().astype(np.float64))).sum(axis=1)
    limit = limit.reshape(one.shape) + tolerances.bound(_expected_sum(layer, x, mesh)) * 2
    assert (np.abs(many - one) <= limit).all()
    assert (many != one).any(), "scales of X are a rank's own"

    # Where every rank has the row's largest magnitude, its scale is the whole one, and only the summation differs.
    values = np.clip(values, -5, 5)
    values[:, :: k // mesh.size()] = 5
    x = TORCH.array(values)
    with torch.no_grad():
        one = TORCH.host(layer(x)).astype(np.float64)
        many = TORCH.host(shard_row(layer, mesh, input_layouts=Replicate())(x)).astype(np.float64)
    assert (np.abs(many - one) <= 2 * tolerances.bound(_expected_sum(layer, x, mesh))).all()


def test_row_parallel_differs_from_one_process_by_the_scales_of_x_only(ranks: Ranks) -> None:
    ranks.run(_row_distance)


def _bfloat16_sum(mesh: DeviceMesh) -> None:
    """The first rank's product is 256 and each other's 1: bfloat16, whose step there is 2, would lose the ones."""
    k = 4 * mesh.size()
    linear = nn.Linear(k, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.fill_(1)
    x = torch.zeros(1, k, dtype=torch.bfloat16)
    x[:, ::4] = 1
    x[:, 0] = 256
    layer = ot.Int8Linear.from_linear(linear, outliers="none")
    with torch.no_grad():
        y = shard_row(layer, mesh, input_layouts=Replicate())(x)
    exact = torch.tensor([[256.0 + mesh.size() - 1]])
    _same(y, exact.to(torch.bfloat16))
    if mesh.size() > 2:
        assert y.item() != 256


def test_row_parallel_sums_in_float32(ranks: Ranks) -> None:
    ranks.run(_bfloat16_sum)


# ---------------------------------------------------------------------------------------------------------------
# In torch's parallelize_module


class _Mlp(nn.Module):
    def __init__(self, k: int = 24, hidden: int = 44) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(k)
        self.up = nn.Linear(k, hidden)
        self.down = nn.Linear(hidden, k)
        self.head = nn.Linear(k, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = functional.gelu(self.up(self.norm(x)))
        result: Tensor = self.head(self.down(hidden))
        return result


def _mlp() -> nn.Module:
    torch.manual_seed(5)
    return ot.quantize_(_Mlp(), recipe="paper", path="weight_only", skip=("head",), progress=False)


def _parallelize(mesh: DeviceMesh) -> None:
    """Int8 layers beside one that torch shards. Weight-only, so that all differences are those of float32 sums."""
    model, x = _mlp(), _inputs(24)
    plan = {
        "up": ColwiseInt8Parallel(),
        "down": RowwiseInt8Parallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallel = parallelize_module(copy.deepcopy(model), mesh, plan)
    assert isinstance(parallel.up, ColumnParallelInt8Linear)
    assert f"rank={mesh.get_local_rank()} of {mesh.size()}, total_features=44" in repr(parallel)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(parallel(x), model(x), rtol=1e-5, atol=1e-5)  # 44 terms of about 1, 2^-24 each

    # Our styles take what torch's take, too.
    ours = {"up": ColwiseInt8Parallel(), "head": ColwiseInt8Parallel(output_layouts=Replicate())}
    ours["down"] = RowwiseInt8Parallel()  # type: ignore[assignment]
    dense = _Mlp()
    for parameter in dense.parameters():
        dist.broadcast(parameter.detach(), 0)
    torch.testing.assert_close(
        parallelize_module(copy.deepcopy(dense), mesh, ours)(x).detach(), dense(x).detach(), rtol=1e-5, atol=1e-5
    )


def test_parallelize_module(ranks: Ranks) -> None:
    ranks.run(_parallelize)


def _layouts(mesh: DeviceMesh) -> None:
    """Inputs and outputs in other layouts, as plain tensors and as DTensor; the results are those of torch's styles."""
    k, n, tokens = 16, 8, 4 * mesh.size()
    linear = nn.Linear(k, n)
    with torch.no_grad():  # integers: float32 and int8 alike are exact
        linear.weight.copy_(torch.from_numpy(make("normal", (n, k), "float32")).mul(40).round().clamp(-126, 126))
        linear.weight[:, 0] = 127
        linear.bias.copy_(torch.arange(n))
    x = torch.from_numpy(make("normal", (2, tokens, k), "float32", 2)).round()
    layer = ot.Int8Linear.from_linear(linear, path="weight_only")
    assert torch.equal(layer.codes.float(), linear.weight)
    placements = {"replicate": Replicate(), "sequence": Shard(1), "features": Shard(-1), "features, counted": Shard(2)}

    def local(placement: Any) -> Tensor:
        if isinstance(placement, Replicate):
            return x
        dim = placement.dim % 3
        return x.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()

    for torchs, ours in ((ColwiseParallel, ColwiseInt8Parallel), (RowwiseParallel, RowwiseInt8Parallel)):
        for name_in, placement_in in placements.items():
            for name_out, placement_out in placements.items():
                for as_local in (True, False):
                    form: dict[str, Any] = {"input_layouts": placement_in, "output_layouts": placement_out}
                    expected_style, style = (s(use_local_output=as_local, **form) for s in (torchs, ours))
                    expected = parallelize_module(copy.deepcopy(linear), mesh, expected_style)(local(placement_in))
                    got_layer = parallelize_module(copy.deepcopy(layer), mesh, style)
                    got = got_layer(local(placement_in))
                    where = f"{torchs.__name__}: {name_in} -> {name_out}, local {as_local}"
                    assert isinstance(got, DTensor) is (not as_local), where
                    if isinstance(got, DTensor):
                        assert got.placements == expected.placements, where
                        got, expected = got.full_tensor(), expected.full_tensor()
                    assert torch.equal(got, expected), where
                    given = DTensor.from_local(local(placement_in), mesh, [placement_in], run_check=False)
                    assert torch.equal(_plain(got_layer(given)), _plain(got_layer(local(placement_in)))), where


def _plain(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def test_layouts_are_those_of_torch(two: Ranks) -> None:
    two.run(_layouts)


def _gradients(mesh: DeviceMesh) -> None:
    model, x = _mlp(), _inputs(24)
    plan = {"up": ColwiseInt8Parallel(), "down": RowwiseInt8Parallel()}
    parallel = parallelize_module(copy.deepcopy(model), mesh, plan)
    results = []
    for each in (model, parallel):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        results.append((leaf.grad, grads))
    (one_x, one), (many_x, many) = results

    def close(a: Any, b: Any) -> None:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    close(many_x, one_x)
    assert set(one) == set(many) == {"norm.weight", "norm.bias", "up.bias", "down.bias", "head.weight", "head.bias"}
    for name, grad in one.items():
        close(many[name], grad[_part(44, mesh)] if name == "up.bias" else grad)


def test_gradients(ranks: Ranks) -> None:
    ranks.run(_gradients)


def _autocast(mesh: DeviceMesh) -> None:
    layer, x = _layer("default", 64, 48), _inputs(64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = layer(x)
        assert expected.dtype == torch.bfloat16
        _same(shard_column(layer, mesh, output_layouts=Replicate())(x), expected)
        row = shard_row(layer, mesh, input_layouts=Replicate())(x)
    assert row.dtype == torch.bfloat16
    tolerances.check_output(TORCH.host(row), _expected_sum(layer, x.bfloat16(), mesh), "bfloat16")


def test_autocast(two: Ranks) -> None:
    two.run(_autocast)


def _memory(mesh: DeviceMesh) -> None:
    layer = _layer("kept", 512, 256)
    whole = layer.int8_weight.nbytes
    for sharded in (shard_column(layer, mesh), shard_row(layer, mesh)):
        weight = sharded.int8_weight
        held = sum(array.nbytes for array in (weight.packed, weight.scale, weight.code_sums))
        assert held < whole / mesh.size() + 8 * 256, "of the codes only a rank's own; of row shards all scales and sums"


def test_a_rank_holds_its_part_only(ranks: Ranks) -> None:
    ranks.run(_memory)


def _state(mesh: DeviceMesh) -> None:
    """State dicts are a rank's own; those of a whole layer do not fit."""
    layer, x = _layer("static", 64, 48), _inputs(64)
    empty = ot.Int8Linear(64, 48, scheme="zeropoint")
    for shard, mine in ((shard_column, x), (shard_row, x[..., _part(64, mesh)])):
        sharded, other = shard(layer, mesh), shard(empty, mesh)
        other.load_state_dict(sharded.state_dict())
        with torch.no_grad():
            _same(other(mine), sharded(mine))
        _raises(RuntimeError, "size mismatch for weight", lambda other=other: other.load_state_dict(layer.state_dict()))


def test_state_dicts_are_of_the_rank(two: Ranks) -> None:
    two.run(_state)


def _replicas(mesh: DeviceMesh) -> None:
    """Two groups of two ranks, as of two machines: tensor parallelism in each, a batch of its own for each."""
    plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("machine", "tp"))
    layer, x = _layer("default", 33, 19), _inputs(33)
    mine = x[plane.get_local_rank("machine")]
    with torch.no_grad():
        _same(shard_column(layer, plane["tp"], output_layouts=Replicate())(mine), layer(mine))
        y = shard_row(layer, plane["tp"], input_layouts=Replicate())(mine)
    tolerances.check_output(TORCH.host(y), _expected_sum(layer, mine, plane["tp"]), "float32")


def test_replicas_of_a_sharded_layer(four: Ranks) -> None:
    four.run(_replicas)


def _raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def _faults(mesh: DeviceMesh) -> None:
    layer = _layer("default", 16, 8)
    sharded = shard_row(layer, mesh)
    _raises(TypeError, "shard_column: layer: expected an Int8Linear, got RowPar", lambda: shard_column(sharded, mesh))
    _raises(TypeError, "shard_row: layer: expected an Int8Linear, got Linear", lambda: shard_row(nn.Linear(2, 2), mesh))
    for style in (ColwiseInt8Parallel(), RowwiseInt8Parallel()):
        name = type(style).__name__
        _raises(ValueError, f"{name}: module: expected a whole", lambda s=style: parallelize_module(sharded, mesh, s))
        meta = copy.deepcopy(layer).to("meta")
        _raises(ValueError, f"{name}: module: .*meta device", lambda s=style, m=meta: parallelize_module(m, mesh, s))
        plane = DeviceMesh("cpu", torch.arange(mesh.size()).reshape(1, -1))
        _raises(ValueError, f"{name}: device_mesh: expected one dim", lambda s=style, p=plane: s._apply(layer, p))
    _raises(ValueError, "expected", lambda: sharded(torch.zeros(2, 16)))  # all features, to a layer that has some


def test_faults(two: Ranks) -> None:
    two.run(_faults)


# ---------------------------------------------------------------------------------------------------------------
# Transformers


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def _transformers(mesh: DeviceMesh, path: str) -> None:
    model = ot.quantize_(_llama(), recipe="paper", path=path, progress=False)
    tokens = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(1))
    parallel = parallelize_module(copy.deepcopy(model), mesh, transformers_plan(model))
    layer = parallel.model.layers[1]
    assert all(isinstance(each, ColumnParallelInt8Linear) for each in (layer.self_attn.q_proj, layer.mlp.up_proj))
    assert all(isinstance(each, RowParallelInt8Linear) for each in (layer.self_attn.o_proj, layer.mlp.down_proj))
    with torch.no_grad():
        exact, one, many = _llama()(tokens).logits, model(tokens).logits, parallel(tokens).logits
        _same_everywhere(many + 0, mesh)
        assert one.shape == many.shape == (2, 11, 97)
        if path == "weight_only":  # float32 sums in another order: 2^-24 for each of some 100 terms, in two layers
            assert (many - one).abs().max() <= 1e-5 * one.abs().max()
            # With keys and values of the rank's own heads, token by token.
            form = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(parallel.generate(tokens, **form), model.generate(tokens, **form))
        else:
            # Scales of X are a rank's own, and finer: as close to the float32 model, give or take chance.
            assert 0 < (many - exact).norm() <= 1.1 * (one - exact).norm()


@pytest.mark.parametrize("path", ["weight_only", "int8"])
def test_transformers(ranks: Ranks, path: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    ranks.run(_transformers, path)


def test_transformers_plan() -> None:
    class Model:
        tp_plan: dict[str, str] | None = None

    with pytest.raises(ValueError, match=r"transformers_plan: model: expected one with a tp_plan, got Model"):
        transformers_plan(Model())
    model = Model()
    model.tp_plan = {"layers.*.up": "colwise", "layers.*.experts": "moe_tp_experts"}
    with pytest.raises(ValueError, match=r"transformers_plan: model: expected .*, got .*moe_tp_experts"):
        transformers_plan(model)
    model.tp_plan = {
        "up": "colwise",
        "head": "colwise_gather_output",
        "down": "rowwise",
        "split": "rowwise_split_input",
    }
    plan = {name: (type(s), s.input_layouts, s.output_layouts) for name, s in transformers_plan(model).items()}  # type: ignore[attr-defined]
    assert plan == {
        "up": (ColwiseInt8Parallel, (Replicate(),), (Shard(-1),)),
        "head": (ColwiseInt8Parallel, (Replicate(),), (Replicate(),)),
        "down": (RowwiseInt8Parallel, (Shard(-1),), (Replicate(),)),
        "split": (RowwiseInt8Parallel, (Replicate(),), (Replicate(),)),
    }


# ---------------------------------------------------------------------------------------------------------------
# FSDP2: adapters over frozen int8 layers


class _Adapted(nn.Module):
    """An int8 layer that stays as it is, and a low-rank correction that is trained."""

    def __init__(self, base: nn.Module, k: int, n: int, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(k, rank, bias=False)
        self.up = nn.Linear(rank, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def _adapted() -> nn.Sequential:
    torch.manual_seed(11)
    first, second = (ot.Int8Linear.from_linear(nn.Linear(k, n), outliers="rows") for k, n in ((24, 70), (70, 24)))
    return nn.Sequential(_Adapted(first, 24, 70), nn.GELU(), _Adapted(second, 70, 24))


def _train(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _fsdp(mesh: DeviceMesh, ignored: bool) -> None:
    one = _adapted()
    model = copy.deepcopy(one)
    codes = [layer.codes for layer in one.modules() if isinstance(layer, ot.Int8Linear)]
    int8 = {p for p in model.parameters() if isinstance(p, ot.Int8Tensor)}
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, ignored_params=int8 if ignored else None)
    x = torch.from_numpy(make("normal", (8 * mesh.size(), 24), "float32"))
    mine = x.chunk(mesh.size())[mesh.get_local_rank()]  # each row has scales of its own, so a batch can be split
    with torch.no_grad():
        for _ in range(2):  # the second call's codes are elsewhere in memory than the first one's
            torch.testing.assert_close(model(mine), one(mine))
    _train(one, x)
    _train(model, mine)
    for (name, trained), expected in zip(model.named_parameters(), one.parameters(), strict=True):
        if isinstance(expected, ot.Int8Tensor):
            assert isinstance(trained, ot.Int8Tensor if ignored else DTensor), name
            continue
        whole = trained.full_tensor() if isinstance(trained, DTensor) else trained
        # AdamW divides by the size of a gradient: rounding in sums over the batch shows at the size of its eps.
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
        if isinstance(trained, DTensor):
            assert trained.to_local().numel() < whole.numel(), name
    with torch.no_grad():
        torch.testing.assert_close(model(mine), one(mine), rtol=1e-4, atol=1e-4)
    # A state dict needs no other rank: it has each weight's own shard, in int8.
    state = model.state_dict() if mesh.get_local_rank() == 0 else {}
    dist.barrier(mesh.get_group())
    for name, expected in zip(("0.base.weight", "2.base.weight"), codes, strict=True):
        if not ignored and name in state:
            own = state[name].to_local()
            assert type(own) is ot.Int8Tensor
            _same(own.int8_weight.codes, expected.chunk(mesh.size())[0])
    with torch.no_grad():
        torch.testing.assert_close(model(mine), one(mine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ignored", [True, False], ids=["int8 ignored", "int8 sharded"])
def test_fsdp_trains_adapters(ranks: Ranks, ignored: bool) -> None:
    ranks.run(_fsdp, ignored)


# ---------------------------------------------------------------------------------------------------------------
# accelerate: layers in several places, in one process


def _layers() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 70), nn.GELU(), nn.Linear(70, 24), nn.Linear(24, 24))
    return ot.quantize_(model, recipe="paper", progress=False)


PLACES: dict[str, Callable[[Any, nn.Module, Any], nn.Module]] = {
    "cpu and cpu": lambda accelerate, model, _: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "cpu", "3": "cpu"}, force_hooks=True
    ),
    "cpu and disk": lambda accelerate, model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk"}, offload_dir=folder
    ),
    "cpu and disk, buffers too": lambda accelerate, model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk"}, offload_dir=folder, offload_buffers=True
    ),
    "cpu_offload": lambda accelerate, model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda accelerate, model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
}
AWAY = {"cpu and cpu": 0, "cpu and disk": 2, "cpu and disk, buffers too": 2, "cpu_offload": 3, "disk_offload": 3}


@pytest.mark.parametrize("used", [True, False], ids=["used before", "new"])
@pytest.mark.parametrize("place", PLACES)
def test_accelerate(place: str, used: bool, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, x = _layers(), _inputs(24)
    with torch.no_grad():
        expected = _layers()(x)
        if used:
            _same(model(x), expected)
        if "disk" in place:
            model = offloadable_(model)
        dispatched = PLACES[place](accelerate, model, tmp_path)
        for _ in range(2):
            _same(dispatched(x), expected)
    away = [name for name, p in dispatched.named_parameters() if p.device.type == "meta" and "scale" not in name]
    assert len([name for name in away if name.endswith(("weight", "codes"))]) == AWAY[place]


def test_offloadable_layers_compute_the_same() -> None:
    model = _layers()
    tied = nn.ModuleList([model[0], model[0], model[2]])
    x = _inputs(24)
    codes = model[0].codes
    with torch.no_grad():
        expected = model(x)
        assert offloadable_(tied) is tied
        assert tied[0] is tied[1]
        _same(model(x), expected)
    _same(model[0].codes.detach(), codes)


def test_layer_sharding_over_gpus(tmp_path: Any) -> None:
    """Needs two GPUs and a backend for them; what can be tested without is tested above."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    reason = _gpus(2)
    if reason is not None:
        pytest.skip(reason)
    x = _inputs(24)
    places = {"0": 0, "1": 0, "2": 1, "3": "cpu"}
    with torch.no_grad():
        expected = _layers()(x)
        got = accelerate.dispatch_model(offloadable_(_layers()), places)(x.to(0))
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# torchrun


def test_the_example_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = Path(__file__).resolve().parents[2] / "examples" / "torch_distributed.py"
    run = subprocess.run([*command, str(example)], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    assert "2 processes" in run.stdout
