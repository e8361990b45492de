"""int8 models of Hugging Face diffusers: ``ModelMixin.from_pretrained``, `OctavoConfig` being the config there, too."""

import copy
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer

from octavo import file_format as names
from octavo.torch import Int8Tensor
from octavo.torch.convert import hold
from octavo.transformers.config import METHOD, OctavoConfig
from octavo.transformers.model import adopt, dequantize_, flat, weights_to_convert


class OctavoDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Converts a model of diffusers while it is loaded, or loads one that is int8. Made by its `from_pretrained`."""

    quantization_config: OctavoConfig
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._weights: set[str] = set()

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        skip = self.quantization_config.modules_to_not_convert
        self._weights = set() if self.pre_quantized else weights_to_convert(model, skip)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names of the weights in the place of those of their parts."""
        weights = {key.removesuffix(f".{names.CODES}") for key in loaded_keys if key.endswith(f".{names.CODES}")}
        parts = {f"{weight}.{part}" for weight in weights for part in names.PARTS}
        return [*(key for key in loaded_keys if key not in parts), *sorted(weights)]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The weights in the place of their parts."""
        state = dict(state_dict)
        for codes in [key for key in state if key.endswith(f".{names.CODES}")]:
            weight = codes.removesuffix(f".{names.CODES}")
            parts = {part: state.pop(f"{weight}.{part}") for part in names.PARTS if f"{weight}.{part}" in state}
            state[weight] = Int8Tensor.from_parts({part: tensor.clone() for part, tensor in parts.items()})
        return state

    def check_if_quantized_param(self, model: Any, param_value: Any, param_name: str, *_: Any, **__: Any) -> bool:
        """Whether a parameter is a weight that is or becomes int8."""
        return param_name in self._weights or isinstance(param_value, Int8Tensor)

    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        """Give a layer its int8 weight."""
        weight = param_value
        if not isinstance(weight, Int8Tensor):
            weight = Int8Tensor.from_float(weight, self.quantization_config.options())
        layer = model.get_submodule(param_name.rpartition(".")[0])
        hold(layer, torch.nn.Parameter(weight.to(target_device), requires_grad=False))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.adopt(model)
        return model

    def adopt(self, model: Any) -> None:
        """Make a model whose layers are int8 known as such: what it saves, diffusers loads."""
        adopt(model, self)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = METHOD
        model.register_to_config(quantization_config=self.quantization_config)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The state dict with the parts of int8 weights in their place."""
        return flat(state_dict), {names.VERSION_KEY: str(names.VERSION)}

    def _dequantize(self, model: Any) -> Any:
        return dequantize_(model, None)


auto.AUTO_QUANTIZER_MAPPING[METHOD] = OctavoDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = OctavoConfig
