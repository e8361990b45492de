"""``octavo plan``: does a model fit on given GPUs, in int8 and in 16 bit? Computed from its config.json alone.

Transformers builds the model without memory, and `octavo.torch.choice.choose_layers` chooses as everywhere. An int8
weight takes one byte an element and a float32 scale per output feature, everything else two bytes, as
`octavo.transformers` makes them: experts that are stacked in one parameter are among the int8 weights
(`octavo.checkpoint.quantize` leaves those that a file stacks). In 16 bit everything takes two. The cache of keys and
values is in 16 bit; other states, as Mamba's, are not counted. A layer is not split between GPUs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo._sizes import format_size, parse_size, positive, table
from octavo.checkpoint.model import meta_model

__all__ = ["Footprint", "Plan", "plan"]

_GIB = 2**30
DEFAULT_RESERVE = _GIB // 2  # per GPU: its context, the libraries' workspace, activations of small batches

DOES_NOT_FIT = 3  # the exit status: 1 is a failure's, 2 that of wrong arguments


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
        title = (
            f"{self.model_type}, {_in_words(self.parameters)} parameters, on {self.gpus} x "
            f"{format_size(self.gpu_memory)} ({format_size(self.reserve)} of each kept free), batch {self.batch}, "
            f"context {self.context}"
        )
        rows = [["", "weights", "cache", "total", "fits", "GPUs needed"]]
        for name, footprint in (("int8", self.int8), ("16 bit", self.bits16)):
            needed = "a layer is too large" if footprint.gpus_needed is None else str(footprint.gpus_needed)
            sizes = [format_size(count) for count in (footprint.weights, footprint.cache, footprint.total)]
            rows.append([name, *sizes, "yes" if footprint.fits else "no", needed])
        lines = [title, *table(rows)]
        lines.append(f"weights in 16 bit take {self.ratio:.2f} times as much")
        if self.stacked_experts:
            lines.append(
                f"{self.stacked_experts} weights of experts count as int8, as from_pretrained makes them; octavo "
                "quantize leaves those that a file stacks"
            )
        return "\n".join(lines)


def _in_words(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


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
    cache = {unit: size * batch * context for unit, size in _cache_per_token(model).items()}
    units: dict[str, tuple[int, int]] = {}  # bytes in int8 and in 16 bit
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        int8, bits16 = units.get(_unit(name), (0, 0))
        own = 2 * parameter.numel()
        units[_unit(name)] = int8 + sizes_in_int8.get(name, own), bits16 + own

    def footprint(precision: int) -> Footprint:
        weights = sum(sizes[precision] for sizes in units.values())
        sizes = [unit[precision] + cache.get(layer, 0) for layer, unit in units.items()]
        needed = _gpus_needed(sizes, gpu_memory - reserve)
        total = sum(sizes)
        return Footprint(weights, total - weights, total, needed is not None and needed <= gpus, needed)

    in_int8, in_16_bit = footprint(0), footprint(1)
    return Plan(
        str(config.get("model_type", type(model).__name__)),
        sum(parameter.numel() for parameter in parameters.values()),
        experts,
        gpus,
        gpu_memory,
        reserve,
        batch,
        context,
        in_int8,
        in_16_bit,
        in_16_bit.weights / in_int8.weights,
    )


def _unit(name: str) -> str:
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
    decoder = [name for name in attention if not name.startswith(("encoder.", "model.encoder."))]
    units = dict.fromkeys(_unit(name) for name in decoder)
    heads = getattr(text, "num_attention_heads", None)
    kv_heads: Any = getattr(text, "num_key_value_heads", None) or heads
    width: Any = getattr(text, "head_dim", None) or (heads and getattr(text, "hidden_size", 0) // heads)
    if units and not (isinstance(kv_heads, int) and isinstance(width, int) and kv_heads > 0 and width > 0):
        raise ValueError(
            "config: expected num_attention_heads and hidden_size, which say how large the cache of model_type "
            f"{model.config.model_type} is, got none"
        )
    attentions = 2 if getattr(model.config, "is_encoder_decoder", False) else 1
    return dict.fromkeys(units, 4 * attentions * kv_heads * width) if units else {}


def _gpus_needed(sizes: Sequence[int], capacity: int) -> int | None:
    """How many GPUs hold the layers in their order: each is filled before the next is begun, which is optimal."""
    if max(sizes) > capacity:
        return None
    needed, used = 1, 0
    for size in sizes:
        if used + size > capacity:
            needed, used = needed + 1, 0
        used += size
    return needed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo plan`."""
    parser.epilog = f"Exit status: 0 where the model fits in int8, {DOES_NOT_FIT} where it does not, 1 for a failure."
    add = parser.add_argument
    add("config", type=Path, help="a config.json, or the folder of a model")
    memory = "of each GPU, such as 24GB (24 * 2^30 bytes)"
    add("--gpu-memory", type=_gpu_memory, required=True, metavar="SIZE", help=memory)
    add("--gpus", type=positive, default=1, metavar="N", help="how many; default: 1")
    add("--batch", type=positive, default=1, metavar="N", help="sequences at a time; default: 1")
    add("--context", type=positive, default=2048, metavar="N", help="tokens of each; default: 2048")
    reserve = "of each GPU, for its context, workspace and activations; default: 0.5GB"
    add("--reserve", type=parse_size, default=DEFAULT_RESERVE, metavar="SIZE", help=reserve)
    add("--json", action="store_true", help="print JSON")


def _gpu_memory(text: str) -> int:
    size = parse_size(text)
    if size < 2**20:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB, got {text!r}, which is {size} bytes")
    return size


def main(args: argparse.Namespace) -> int:
    """`octavo plan`. Returns 0 where the model fits in int8, else `DOES_NOT_FIT`."""
    asked = {name: getattr(args, name) for name in ("gpu_memory", "gpus", "batch", "context", "reserve")}
    found = plan(read_config(args.config), **asked)
    print(found.as_json() if args.json else found.as_text())
    return 0 if found.int8.fits else DOES_NOT_FIT


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, given itself or as its folder. Raises OSError or ValueError for what is none."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a model's config.json, got no such file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(config, dict) or not {"model_type", "_class_name"} & config.keys():
        raise ValueError(f"{file}: expected a JSON object with a model_type, got none")
    return config
