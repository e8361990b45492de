"""octavo.vllm: the plugin, called as vLLM calls it.

Where vLLM is not installed, what the plugin uses of it stands in here: the signatures are those of vLLM 0.33. Its
wheels are for CUDA; of one without its kernels (`pip install --no-deps`, and what it then asks for) the layers run here
on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import octavo
import pytest
from octavo import Options

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
LAYERS = "vllm.model_executor.layers"
INSTALLED = importlib.util.find_spec("vllm") is not None


def stand_in() -> dict[str, ModuleType]:
    """VLLM's modules with what the plugin uses, abridged."""
    names = ["vllm", "vllm.model_executor", LAYERS]
    modules = {name: ModuleType(name) for name in [*names, f"{LAYERS}.linear", f"{LAYERS}.quantization"]}
    base = modules[f"{LAYERS}.quantization.base_config"] = ModuleType("base_config")
    configs: dict[str, type] = {}

    class QuantizationConfig:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    def register_quantization_config(name: str) -> Callable[[type], type]:
        def wrapper(config: type) -> type:
            assert issubclass(config, QuantizationConfig)
            return configs.setdefault(name, config)

        return wrapper

    class UnquantizedLinearMethod:
        def create_weights(
            self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
            output_size: int, params_dtype: Any, **extra_weight_attrs: Any,
        ) -> None:  # fmt: skip
            shape = sum(output_partition_sizes), input_size_per_partition
            layer.register_parameter("weight", torch.nn.Parameter(torch.empty(shape, dtype=params_dtype)))

    modules[f"{LAYERS}.linear"].__dict__.update(
        LinearBase=type("LinearBase", (torch.nn.Module,), {}), UnquantizedLinearMethod=UnquantizedLinearMethod
    )
    modules[f"{LAYERS}.quantization"].__dict__.update(
        register_quantization_config=register_quantization_config, get_quantization_config=configs.__getitem__
    )
    base.__dict__["QuantizationConfig"] = QuantizationConfig
    return modules


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM's layers ask for: a platform, a config and a group of this process alone."""
    if not INSTALLED:
        yield
        return
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # a wheel for CUDA finds none without a GPU
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    store = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


@pytest.fixture
def config_class(monkeypatch: pytest.MonkeyPatch, one_process: None) -> Iterator[Any]:
    if not INSTALLED:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="octavo")
    entry.load()()
    yield importlib.import_module(f"{LAYERS}.quantization").get_quantization_config("octavo")
    if not INSTALLED:
        sys.modules.pop("octavo.vllm", None)


def made(config: Any, sizes: list[int], dtype: Any) -> tuple[Any, Any, Any]:
    """A layer, its method and its weight, after what vLLM does before the first product."""
    layer = importlib.import_module(f"{LAYERS}.linear").LinearBase.__new__(
        importlib.import_module(f"{LAYERS}.linear").LinearBase
    )
    torch.nn.Module.__init__(layer)
    method = config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    method.create_weights(layer, 64, sizes, 64, sum(sizes), dtype, weight_loader=lambda *_: None)
    weight = torch.randn(sum(sizes), 64).to(dtype)
    layer.weight.data.copy_(weight)
    method.process_weights_after_loading(layer)
    return layer, method, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layers_compute_what_linear_does(config_class: Any, dtype: Any) -> None:
    options = Options(rotation=16, outliers="rows")
    config = config_class.from_config_dict_json(options.text)
    assert (config.get_name(), config.get_min_capability(), config.get_config_filenames()) == ("octavo", 75, [])
    assert dtype in config.get_supported_act_dtypes()
    layer, method, weight = made(config, [32, 16, 16], dtype)
    x, bias = torch.randn(3, 64).to(dtype), torch.randn(64).to(dtype)
    with torch.inference_mode():
        y = method.apply(layer, x, bias)
    expected = octavo.linear(x, octavo.quantize_weight(weight, options=options), bias, options=options)
    np.testing.assert_array_equal(y.float().numpy(), expected.float().numpy())
    compiled = torch.compile(lambda x: method.apply(layer, x, bias), fullgraph=True, backend="eager")
    np.testing.assert_array_equal(compiled(x).float().numpy(), expected.float().numpy())


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vllms_own_layers(config_class: Any, dtype: Any) -> None:
    """Made, loaded and called as a model of vLLM does; q, k and v, and gate and up, as the one weight that they are."""
    linear = importlib.import_module(f"{LAYERS}.linear")
    options = Options(rotation=16, outliers="rows")
    config = config_class.from_config_dict_json(options.text)
    given: dict[str, Any] = {"quant_config": config, "params_dtype": dtype}
    qkv = linear.QKVParallelLinear(64, 16, 4, 2, prefix="model.layers.0.self_attn.qkv_proj", **given)
    gate_up = linear.MergedColumnParallelLinear(64, [96, 96], False, prefix="model.layers.0.mlp.gate_up_proj", **given)
    down = linear.RowParallelLinear(64, 48, prefix="model.layers.0.mlp.down_proj", **given)
    for layer, shards in ((qkv, {"q": 64, "k": 32, "v": 32}), (gate_up, {0: 96, 1: 96}), (down, {None: 48})):
        parts = [torch.randn(rows, 64).to(dtype) for rows in shards.values()]
        for name, part in zip(shards, parts, strict=True):
            layer.weight.weight_loader(layer.weight, part, *(() if name is None else (name,)))
        if layer.bias is not None:
            layer.bias.data.normal_()
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.randn(5, 64).to(dtype)
        with torch.inference_mode():
            y, _ = layer(x)
        expected = octavo.linear(
            x, octavo.quantize_weight(torch.cat(parts), options=options), layer.bias, options=options
        )
        np.testing.assert_array_equal(y.float().numpy(), expected.detach().float().numpy())


def test_other_layers_stay(config_class: Any) -> None:
    assert config_class().options == Options()
    assert config_class().get_quant_method(torch.nn.Embedding(3, 4), "model.embed_tokens") is None


def test_what_is_refused(config_class: Any) -> None:
    with pytest.raises(ValueError, match=r"^octavo in vLLM: model: expected a checkpoint in 16 bit, got one with"):
        config_class.from_config({"quant_method": None, "octavo": "load with: import octavo.transformers"})
    with pytest.raises(ValueError, match=r"^octavo in vLLM: outliers: expected .*, got 'static'$"):
        config_class(Options(outliers="static"))
