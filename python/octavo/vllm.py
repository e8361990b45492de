r"""octavo in vLLM: ``vllm serve MODEL --quantization octavo``, which vLLM's plugins make known (octavo[vllm]).

The linear layers of a 16-bit checkpoint are quantized as they are loaded, each process its own part; vLLM holds q, k
and v, and gate and up, as one weight, so that X is quantized once for them. Embeddings, the output head and experts
stay. Options, if not the default: ``--hf-overrides '{"quantization_config_dict_json": "{\"rotation\": 64}"}'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from octavo._text import unexpected
from octavo.options import Options
from octavo.torch import Int8Tensor

__all__ = ["register"]


def register() -> None:
    """What vLLM calls in each of its processes: importing this module has made the method known."""


class _Int8LinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]  # vLLM may not be there
    """Loads a weight as it is in the checkpoint, and then quantizes it."""

    supports_pre_processed_weights = False

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = Int8Tensor.from_float(layer.weight.data, self.options)  # type: ignore[arg-type]
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]


@register_quantization_config("octavo")
class _Config(QuantizationConfig):  # type: ignore[misc]
    """The options of the layers, as vLLM wants them."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or Options()
        if self.options.outliers == "static":
            calibrated = "'columns', 'rows' or 'none', as no columns are calibrated here"
            raise unexpected("octavo in vLLM: outliers", calibrated, "'static'")

    @classmethod
    def get_name(cls) -> str:
        return "octavo"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> _Config:
        """Of a checkpoint that names a method: its weights would not be what they are taken for."""
        raise unexpected("octavo in vLLM: model", "a checkpoint in 16 bit", f"one with quantization_config {config}")

    @classmethod
    def from_config_dict_json(cls, text: str) -> _Config:
        return cls(Options.from_text(text))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How a layer computes; None: as without this config."""
        return _Int8LinearMethod(self.options) if isinstance(layer, LinearBase) else None
