"""from_pretrained over 2 and 4 processes, int8 layers sharded while they are read, against the same model in one.

A function whose name starts with an underscore and that takes a mesh runs in every process; see ranks.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)
if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no torch.distributed with gloo", allow_module_level=True)

import transformers
from octavo import checkpoint
from octavo.distributed import ColumnParallelInt8Linear, RowParallelInt8Linear
from octavo.torch import Int8Linear
from octavo.transformers import Int8Stack, OctavoConfig
from ranks import Ranks, pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    # Biases of column- and of row-parallel layers; 92 is not a multiple of 4 ranks times 16.
    "LlamaForCausalLM": {"intermediate_size": 92, "attention_bias": True, "mlp_bias": True},
    "Qwen2ForCausalLM": {"intermediate_size": 88, "tie_word_embeddings": True},
    "MixtralForCausalLM": {"intermediate_size": 88, "num_local_experts": 4},
}


@pytest.fixture(params=[2, 4], ids=["2 gloo", "4 gloo"])
def ranks(request: pytest.FixtureRequest, rank_pools: dict[tuple[int, str], Ranks]) -> Ranks:
    return pool(rank_pools, request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: architecture -> folder of its float32 model of random weights, biases too."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(3)
            model_class = getattr(transformers, name)
            model = model_class(model_class.config_class(**SIZES, **TOKENS, **MODELS[name]))
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    nn.init.normal_(parameter)
            model.save_pretrained(root / name)
        return root / name

    return folder


def _load(folder: Path, mesh: DeviceMesh | None = None, *, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """The model of a folder, in one process or over those of the mesh; converted where there are options."""
    from transformers.distributed import DistributedConfig

    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    if options is not None:
        more["quantization_config"] = OctavoConfig(**({"recipe": "paper"} | options))
    if mesh is not None:
        more["distributed_config"] = DistributedConfig(tp_size=mesh.size())
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **more)


def _logits(model: Any) -> Tensor:
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def _same_everywhere(tensor: Tensor, mesh: DeviceMesh) -> None:
    first = tensor.clone()
    dist.broadcast(first, 0, group=mesh.get_group())
    assert torch.equal(first, tensor)


def _int8_bytes(model: nn.Module) -> int:
    return sum(m.int8_weight.nbytes for m in model.modules() if isinstance(m, Int8Linear))


def _agrees(mesh: DeviceMesh, many: Any, one: Any) -> None:
    """A model over the ranks of the mesh and one that is whole, both weight-only: only the order of sums differs."""
    got, expected = _logits(many), _logits(one)
    _same_everywhere(got + 0, mesh)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    ids = torch.tensor([[5, 7, 11]])
    form = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(many.generate(ids, **form), one.generate(ids, **form))


# ---------------------------------------------------------------------------------------------------------------


def _converted(mesh: DeviceMesh, folder: Path, head: bool) -> None:
    options: dict[str, Any] = {"path": "weight_only", "head": head}
    many, one = _load(folder, mesh, options=options), _load(folder, options=options)
    rank, size = mesh.get_local_rank(), mesh.size()
    for name, layer in one.named_modules():
        if type(layer) is not Int8Linear:
            continue
        own = many.get_submodule(name)
        if ".experts." in name:
            assert isinstance(own, Int8Linear)
            assert own.weight.nbytes < layer.weight.nbytes
            continue
        rows = name.endswith(("o_proj", "down_proj"))
        assert type(own) is (RowParallelInt8Linear if rows else ColumnParallelInt8Linear), name
        assert torch.equal(own.codes, layer.codes.chunk(size, 1 if rows else 0)[rank]), name
        assert torch.equal(own.scale, layer.scale if rows else layer.scale.chunk(size)[rank]), name
        assert (own.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert torch.equal(own.bias, layer.bias if rows else layer.bias.chunk(size)[rank]), name
    assert isinstance(many.get_input_embeddings().weight, DTensor), "Transformers shards what stays in 16 bit"
    # Packed codes round n up to 16 and k to 64, scales of row-parallel layers are whole: not quite 1/R of these.
    assert _int8_bytes(many) < (0.75 if size == 2 else 0.6) * _int8_bytes(one)
    _agrees(mesh, many, one)


@pytest.mark.parametrize("head", [False, True], ids=["", "and its head"])
@pytest.mark.parametrize("name", MODELS)
def test_a_16_bit_model_is_converted_and_sharded_while_it_is_read(
    ranks: Ranks, folders: Any, name: str, head: bool
) -> None:
    ranks.run(_converted, folders(name), head)


def _int8(mesh: DeviceMesh, folder: Path) -> None:
    many, one = _load(folder, mesh), _load(folder)
    assert any(isinstance(module, ColumnParallelInt8Linear) for module in many.modules())
    _agrees(mesh, many, one)


@pytest.mark.parametrize("name", MODELS)
def test_an_int8_model(ranks: Ranks, folders: Any, tmp_path: Path, name: str) -> None:
    """One that save_pretrained wrote."""
    _load(folders(name), options={"path": "weight_only"}).save_pretrained(tmp_path / "int8")
    ranks.run(_int8, tmp_path / "int8")


def test_what_octavo_quantize_wrote(ranks: Ranks, folders: Any, tmp_path: Path) -> None:
    """Some layers in 16 bit: those that config.json names, and one that it does not."""
    columns = {f"model.layers.{i}.mlp.down_proj": [1, 40, 91] for i in range(2)}
    options: dict[str, Any] = {"include": ["*_proj"], "skip": ["*.1.self_attn.*"], "path": "weight_only"}
    checkpoint.quantize(
        folders("LlamaForCausalLM"),
        tmp_path / "int8",
        outlier_columns=columns,
        recipe="paper",
        progress=False,
        **options,
    )
    ranks.run(_int8, tmp_path / "int8")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "int8")
    config.quantization_config["modules_to_not_convert"] = ["lm_head"]
    config.save_pretrained(tmp_path / "int8")
    ranks.run(_int8, tmp_path / "int8")


def test_experts_whose_projections_are_stored_apart(ranks: Ranks, folders: Any, tmp_path: Path) -> None:
    """As octavo quantize writes them: each rank's rows are those of both projections, once they are together."""
    checkpoint.quantize(
        folders("MixtralForCausalLM"), tmp_path / "int8", recipe="paper", progress=False, path="weight_only"
    )
    ranks.run(_int8, tmp_path / "int8")


def _llm_int8(mesh: DeviceMesh, folder: Path) -> None:
    """Scales of X are a rank's own, and finer: as close to the float32 model, give or take chance."""
    exact = _logits(_load(folder))
    one, many = _logits(_load(folder, options={})), _logits(_load(folder, mesh, options={}))
    _same_everywhere(many + 0, mesh)
    assert 0 < (many - exact).norm() <= 1.1 * (one - exact).norm()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_llm_int8(ranks: Ranks, folders: Any, name: str) -> None:
    ranks.run(_llm_int8, folders(name))


def _left(mesh: DeviceMesh, folder: Path) -> None:
    options: dict[str, Any] = {"path": "weight_only", "modules_to_not_convert": ["model.layers.0", "lm_head"]}
    many, one = _load(folder, mesh, options=options), _load(folder, options=options)
    left, converted = many.model.layers[0].mlp.up_proj, many.model.layers[1].mlp.up_proj
    assert type(left) is nn.Linear
    assert isinstance(left.weight, DTensor)
    assert type(converted) is ColumnParallelInt8Linear
    _agrees(mesh, many, one)


def test_layers_that_stay_are_sharded_by_transformers(ranks: Ranks, folders: Any) -> None:
    ranks.run(_left, folders("LlamaForCausalLM"))


def _faults(mesh: DeviceMesh, folder: Path, target: Path) -> None:
    from transformers.distributed import DistributedConfig

    with pytest.raises(ValueError, match="save_pretrained: expected a whole int8 model, got one that is spread"):
        _load(folder, mesh, options={}).save_pretrained(target)
    assert not list(target.glob("*.safetensors"))
    config = DistributedConfig(tp_size=mesh.size(), tp_plan={"model.layers.*.mlp.up_proj": "sequence_parallel"})
    with pytest.raises(
        ValueError, match=r"tp_plan: expected one of colwise, .* for model.layers.0.mlp.up_proj, .* got sequence_par"
    ):
        _load(folder, options={}, distributed_config=config)
    config = DistributedConfig(fsdp_size=mesh.size())
    with pytest.raises(ValueError, match=r"expected tensor parallelism alone \(tp_size\) .* got dp_size="):
        _load(folder, options={}, distributed_config=config)


def test_faults(ranks: Ranks, folders: Any, tmp_path: Path) -> None:
    ranks.run(_faults, folders("LlamaForCausalLM"), tmp_path / "saved")


def test_tp_plan_auto_under_torchrun(folders: Any, tmp_path: Path) -> None:
    """As a user starts it: `tp_plan="auto"`, and nothing of torch.distributed in the program."""
    program = tmp_path / "serve.py"
    program.write_text(
        textwrap.dedent("""\
        import os, sys, torch
        from octavo.transformers import Int8Stack, OctavoConfig
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        more = {"tp_plan": "auto"} if "WORLD_SIZE" in os.environ else {}
        model = AutoModelForCausalLM.from_pretrained(
            sys.argv[1], quantization_config=OctavoConfig(recipe="paper", path="weight_only"), **more
        )
        made = model.generate(torch.tensor([[5, 7, 11]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        sharded = sum("ParallelInt8Linear" in type(module).__name__ for module in model.modules())
        if os.environ.get("RANK", "0") == "0":
            print("MADE", sharded, made.tolist())
        """)
    )
    folder = str(folders("LlamaForCausalLM"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def made(command: list[str]) -> list[str]:
        result = subprocess.run(
            [*command, str(program), folder], capture_output=True, text=True, check=False, timeout=900
        )
        assert result.returncode == 0, result.stderr
        return next(line for line in result.stdout.splitlines() if line.startswith("MADE")).split(maxsplit=2)

    one, many = made([sys.executable]), made(torchrun)
    assert (one[1], many[1]) == ("0", "14")
    assert many[2] == one[2]


def test_experts_of_one_process_are_as_they_were(folders: Any) -> None:
    """Nothing is sharded, and nothing of the plan is left behind, where nobody asked for it."""
    model = _load(folders("MixtralForCausalLM"), options={})
    assert "_resolve_parallel_plans" not in vars(model)
    assert any(isinstance(module, Int8Stack) for module in model.modules())
    assert not any(isinstance(module, ColumnParallelInt8Linear) for module in model.modules())
