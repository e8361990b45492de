"""Int8 models as wholes: which of their weights are int8, what they save, and the way back to 16 bit."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from octavo._text import matches
from octavo.options import Options
from octavo.torch import Int8Linear, Int8Tensor
from octavo.torch.choice import ROUTERS, choose_layers, is_linear
from octavo.transformers import experts
from octavo.transformers.config import METHOD, OctavoConfig
from octavo.transformers.loading import UNTIED, keep_names, untie
from octavo.transformers.padding import drop_padding_

logger = logging.get_logger(__name__)


def qualified(patterns: Sequence[str] | None) -> list[str]:
    """`OctavoConfig.modules_to_not_convert` as patterns of qualified names."""
    return [form for each in patterns or () for form in (each, f"{each}.*", f"*.{each}", f"*.{each}.*")]


def weights_to_convert(model: nn.Module, patterns: Sequence[str] | None, head: bool = False) -> set[str]:
    """The weights of `model` that become int8, by qualified name: of linear layers and of stacked experts."""
    left = qualified(ROUTERS if patterns is None else patterns)
    layers = choose_layers(model, skip=None if patterns is None else left, head=head).layers
    return {f"{name}.weight" for name in layers} | stacks_to_convert(model, left)


def stacks_to_convert(model: nn.Module, left: Sequence[str]) -> set[str]:
    """The parameters of `model` that stack experts and become int8, by qualified name. `left`: patterns of others."""
    chosen: set[str] = set()
    special: list[str] = []
    for name, module, _ in experts.stacks(model):
        if not matches(name.rpartition(".")[0], left):
            (chosen.add if experts.is_convertible(module) else special.append)(name)
    if special:
        logger.warning(
            f"octavo: {len(special)} expert weights stay as they are, so that they take their full memory: "
            f"{', '.join(special[:3])}{', ...' if len(special) > 3 else ''}. octavo converts stacked experts whose "
            "module has Transformers' use_experts_implementation."
        )
    return chosen


def adopt(model: nn.Module, quantizer: Any) -> None:
    """Make a model whose weights are int8 known as such: what it saves, Transformers or diffusers loads.

    The linear layers of `model` that are not int8 are named in its config; models that are part of it are adopted too.
    """
    config: OctavoConfig = quantizer.quantization_config
    int8 = [name for name, parameter in model.named_parameters() if isinstance(parameter, Int8Tensor)]
    config.given = {}
    config.modules_to_not_convert = sorted(
        name for name, module in model.named_modules() if is_linear(module) and f"{name}.weight" not in int8
    )
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.hf_quantizer = quantizer
            part.is_quantized = True
            part.quantization_method = METHOD
            keep_names(part, int8)
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = config
        for name in int8:
            untie(model, name)
    drop_padding_(model, config.drop_padding is not False)


def finish_(model: nn.Module, options: Options, skip: Sequence[str] | None) -> None:
    """What `octavo.torch.quantize_` leaves to do for models of Transformers and diffusers: experts, and `adopt`."""
    from octavo.transformers.quantizer import OctavoQuantizer

    chosen = stacks_to_convert(model, qualified(ROUTERS if skip is None else skip))
    for name, module, leaf in list(experts.stacks(model)):
        weight = getattr(module, leaf)
        if name in chosen and not isinstance(weight, experts.Int8Stack):
            experts.put(module, leaf, experts.quantized(module, weight.detach(), options))
    for whole in _topmost(model, PreTrainedModel):
        adopt(whole, OctavoQuantizer(OctavoConfig(**options.to_dict()), pre_quantized=True))
    if "diffusers.models.modeling_utils" in sys.modules:
        from diffusers import ModelMixin

        from octavo.transformers.diffusers import OctavoDiffusersQuantizer

        for whole in _topmost(model, ModelMixin):
            OctavoDiffusersQuantizer(OctavoConfig(**options.to_dict())).adopt(whole)


def _topmost(model: nn.Module, kind: type) -> list[Any]:
    """The modules of a kind that are not part of another one of it."""
    if isinstance(model, kind):
        return [model]
    return [found for child in model.children() for found in _topmost(child, kind)]


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the parts of int8 weights in their place, as a file holds them."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Int8Tensor):
            result |= {f"{name}.{part}": tensor for part, tensor in value.parts().items()}
        else:
            result[name] = value
    return result


def dequantize_(model: Any, dtype: torch.dtype | str | None) -> Any:
    """Give the layers of `model` floating-point weights again, in place."""
    # The config of a model that was saved has a string.
    to: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    drop_padding_(model, False)
    for module in model.modules():
        if is_linear(module) and isinstance(module.weight, Int8Tensor):
            module.weight = nn.Parameter(module.weight.dequantize(to))
            if type(module) is Int8Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment]
    for name, source in model.__dict__.pop(UNTIED, {}).items():
        layer, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(layer), leaf, model.get_parameter(source))
        model.all_tied_weights_keys[name] = source
    for _, module, leaf in list(experts.stacks(model)):
        stack = getattr(module, leaf)
        if isinstance(stack, experts.Int8Stack):
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(stack.dequantize(to)))
    return model
