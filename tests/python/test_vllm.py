"""octavo.vllm: the plugin, called as vLLM calls it.

Where vLLM is not installed, and it has wheels for CUDA only, what the plugin uses of it stands in here: the signatures
are those of vLLM 0.33.
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


@pytest.fixture
def config_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if importlib.util.find_spec("vllm") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="octavo")
    entry.load()()
    yield importlib.import_module(f"{LAYERS}.quantization").get_quantization_config("octavo")
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


def test_other_layers_stay(config_class: Any) -> None:
    assert config_class().options == Options()
    assert config_class().get_quant_method(torch.nn.Embedding(3, 4), "model.embed_tokens") is None


def test_what_is_refused(config_class: Any) -> None:
    with pytest.raises(ValueError, match=r"^octavo in vLLM: model: expected a checkpoint in 16 bit, got one with"):
        config_class.from_config({"quant_method": None, "octavo": "load with: import octavo.transformers"})
    with pytest.raises(ValueError, match=r"^octavo in vLLM: outliers: expected .*, got 'static'$"):
        config_class(Options(outliers="static"))
