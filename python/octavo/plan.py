"""``octavo plan``: does a model fit on given GPUs, in int8 and in 16 bit? Computed from its config.json alone.

Transformers builds the model without memory, and the weights that `octavo.transformers` makes int8 are counted as such:
one byte an element and a float32 scale per output feature, also of experts that are stacked in one parameter
(`octavo.checkpoint.quantize` leaves those that a file stacks). Everything else takes two bytes, as in 16 bit everything
does. The cache of keys and values is in 16 bit; other states, as Mamba's, are not counted. A layer is not split between
GPUs.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from octavo._text import format_size, table, unexpected
from octavo.checkpoint.meta_model import meta_model

__all__ = ["Footprint", "Plan", "plan"]

DEFAULT_RESERVE = 2**29  # per GPU: its context, the libraries' workspace, activations of small batches


@dataclass(frozen=True)
class Footprint:
    """A model in one precision.

    Attributes:
        weights, cache, total: bytes.
        fits: on the GPUs asked about.
        gpus_needed: how many of such GPUs it takes; None where a single layer is too large for one.
    """

    weights: int
    cache: int
    total: int
    fits: bool
    gpus_needed: int | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        model_type: of the config.
        parameters: how many.
        stacked_experts: weights of single experts among them, counted in int8, that a parameter of the model stacks.
        gpus, gpu_memory, reserve, batch, context: what was asked; bytes.
        int8, bits16: the model in int8 and in 16 bit.
        ratio: of the weights in 16 bit to those in int8.
    """

    model_type: str
    parameters: int
    stacked_experts: int
    gpus: int
    gpu_memory: int
    reserve: int
    batch: int
    context: int
    int8: Footprint
    bits16: Footprint
    ratio: float

    def as_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """For people."""
        many = self.parameters >= 1e8
        parameters = f"{self.parameters / (1e9 if many else 1e6):.2f} {'billion' if many else 'million'} parameters"
        rows = [["", "weights", "cache", "total", "fits", "GPUs needed"]]
        for name, footprint in (("int8", self.int8), ("16 bit", self.bits16)):
            needed = "a layer is too large" if footprint.gpus_needed is None else str(footprint.gpus_needed)
            sizes = [format_size(count) for count in (footprint.weights, footprint.cache, footprint.total)]
            rows.append([name, *sizes, "yes" if footprint.fits else "no", needed])
        lines = [
            f"{self.model_type}, {parameters}, on {self.gpus} x {format_size(self.gpu_memory)} "
            f"({format_size(self.reserve)} of each kept free), batch {self.batch}, context {self.context}",
            *table(rows),
            f"weights in 16 bit take {self.ratio:.2f} times as much",
        ]
        if self.stacked_experts:
            made = "count as int8, as from_pretrained makes them; octavo quantize leaves those that a file stacks"
            lines.append(f"{self.stacked_experts} weights of experts {made}")
        return "\n".join(lines)


def plan(
    config: Mapping[str, Any],
    *,
    gpu_memory: int,
    gpus: int = 1,
    batch: int = 1,
    context: int = 2048,
    reserve: int = DEFAULT_RESERVE,
) -> Plan:
    """Compute whether a model fits.

    Args:
        config: the content of a Hugging Face config.json.
        gpu_memory: bytes of each GPU.
        gpus: how many.
        batch, context: sequences at a time, and the tokens of each, whose keys and values are cached.
        reserve: bytes of each GPU that are not for weights and cache.

    Raises:
        RuntimeError: PyTorch or Transformers is missing.
        ValueError: a model that Transformers has not, or a config that it refuses.
    """
    model = meta_model(config, "bfloat16")
    sizes_in_int8, experts = _sizes_in_int8(model)
    sizes_in_16_bit = {name: 2 * parameter.numel() for name, parameter in model.named_parameters()}
    cache = {layer: size * batch * context for layer, size in _cache_per_token(model).items()}

    def footprint(sizes: Mapping[str, int]) -> Footprint:
        layers: dict[str, int] = {}
        for name, size in sizes.items():
            layer = _layer(name)
            layers[layer] = layers.get(layer, cache.get(layer, 0)) + size
        needed = _gpus_needed(layers.values(), gpu_memory - reserve)
        weights, total = sum(sizes.values()), sum(layers.values())
        return Footprint(weights, total - weights, total, needed is not None and needed <= gpus, needed)

    int8, bits16 = footprint(sizes_in_16_bit | sizes_in_int8), footprint(sizes_in_16_bit)
    model_type, parameters = str(config.get("model_type", type(model).__name__)), sum(sizes_in_16_bit.values()) // 2
    asked = (gpus, gpu_memory, reserve, batch, context)
    return Plan(model_type, parameters, experts, *asked, int8, bits16, ratio=bits16.weights / int8.weights)


def _layer(name: str) -> str:
    """What a parameter has to share a GPU with: its layer ("model.layers.3"); outside of layers, only itself."""
    match = re.match(r"^(.*?\.\d+)\.", name)
    return match[1] if match else name


def _sizes_in_int8(model: Any) -> tuple[dict[str, int], int]:
    """Bytes of the parameters that become int8, and how many weights of single experts are among them."""
    from octavo.torch.choice import is_conv1d
    from octavo.transformers.experts import is_transposed
    from octavo.transformers.model import weights_to_convert

    sizes, experts = {}, 0
    for name in weights_to_convert(model, None):
        module, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        k = weight.shape[-2 if is_conv1d(module) or (weight.dim() == 3 and is_transposed(module)) else -1]
        sizes[name] = weight.numel() + 4 * weight.numel() // k
        experts += weight.shape[0] if weight.dim() == 3 else 0
    return sizes, experts


def _cache_per_token(model: Any) -> dict[str, int]:
    """Bytes of keys and values for a token, by the layer that holds them; of a model that generates."""
    if not getattr(model, "can_generate", lambda: False)():
        return {}
    text = model.config.get_text_config(decoder=True)
    attention = [name.lower() for name, _ in model.named_parameters() if "attn" in name or "attention" in name.lower()]
    # An encoder keeps none. Its decoder keeps, of each token, those of its own attention and of that to the encoder.
    layers = {_layer(name) for name in attention if not name.startswith(("encoder.", "model.encoder."))}
    if not layers:
        return {}
    heads = getattr(text, "num_attention_heads", None)
    kv_heads: Any = getattr(text, "num_key_value_heads", None) or heads
    width: Any = getattr(text, "head_dim", None) or (heads and getattr(text, "hidden_size", 0) // heads)
    if not (isinstance(kv_heads, int) and isinstance(width, int) and kv_heads > 0 and width > 0):
        sizes = f"num_attention_heads and hidden_size, which say how large the cache of {model.config.model_type} is"
        raise unexpected("config", sizes, "none")
    attentions = 2 if getattr(model.config, "is_encoder_decoder", False) else 1
    return dict.fromkeys(layers, 4 * attentions * kv_heads * width)


def _gpus_needed(sizes: Iterable[int], capacity: int) -> int | None:
    """How many GPUs hold the layers in their order: each is filled before the next is begun, which is optimal."""
    needed, used = 1, 0
    for size in sizes:
        if size > capacity:
            return None
        if used + size > capacity:
            needed, used = needed + 1, 0
        used += size
    return needed
