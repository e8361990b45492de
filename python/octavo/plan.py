"""``octavo plan``: does a model fit on given GPUs, in int8 and in 16 bit? Computed from its config.json alone.

The tensors of a model follow from its config; `architectures.tensors_of` lists them. Linear weights take one byte an
element in int8 and a float32 scale per output feature, everything else two bytes, as `octavo.transformers` makes them:
experts that are stacked in one parameter are among the linear weights (`octavo.checkpoint.quantize` leaves those that a
file stacks). In 16 bit everything takes two. The cache of keys and values is in 16 bit; other states, as Mamba's, are
not counted. A layer is not split between GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo._sizes import format_size, parse_size, positive
from octavo.architectures import cache_per_token, is_stacked_expert, layer_of, tensors_of
from octavo.checkpoint.layers import LayerChoice

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
        lines = [
            f"{self.model_type}, {_in_words(self.parameters)} parameters, on {self.gpus} x "
            f"{format_size(self.gpu_memory)} ({format_size(self.reserve)} of each kept free), batch {self.batch}, "
            f"context {self.context}",
            f"{'':8}{'weights':>14}{'cache':>14}{'total':>14}  fits  GPUs needed",
        ]
        for name, footprint in (("int8", self.int8), ("16 bit", self.bits16)):
            sizes = "".join(f"{format_size(n):>14}" for n in (footprint.weights, footprint.cache, footprint.total))
            needed = "a layer is too large" if footprint.gpus_needed is None else footprint.gpus_needed
            lines.append(f"{name:8}{sizes}  {'yes' if footprint.fits else 'no':4}  {needed}")
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
        ValueError: a model type that is not known, or a config without what it needs.
    """
    choice = LayerChoice(config)
    tensors = dict(tensors_of(config))
    cache = {layer: bytes_each * batch * context for layer, bytes_each in cache_per_token(config).items()}
    units: dict[str, tuple[int, int]] = {}  # by layer, bytes in int8 and in 16 bit
    for name, shape in tensors.items():
        elements = math.prod(shape)
        layer = choice.layer(name, shape)
        scales = 0 if layer is None else 4 * (shape[1] if choice.transposed(layer) else shape[0])
        int8, bits16 = units.get(layer_of(name), (0, 0))
        units[layer_of(name)] = int8 + (2 * elements if layer is None else elements + scales), bits16 + 2 * elements

    def footprint(precision: int) -> Footprint:
        weights = sum(sizes[precision] for sizes in units.values())
        sizes = [unit[precision] + cache.get(layer, 0) for layer, unit in units.items()]
        needed = _gpus_needed(sizes, gpu_memory - reserve)
        total = sum(sizes)
        return Footprint(weights, total - weights, total, needed is not None and needed <= gpus, needed)

    in_int8, in_16_bit = footprint(0), footprint(1)
    return Plan(
        str(config["model_type"]),
        sum(math.prod(shape) for shape in tensors.values()),
        sum(is_stacked_expert(name) for name in tensors),
        gpus,
        gpu_memory,
        reserve,
        batch,
        context,
        in_int8,
        in_16_bit,
        in_16_bit.weights / in_int8.weights,
    )


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
    parser.add_argument("config", type=Path, help="a config.json, or the folder of a model")
    parser.add_argument(
        "--gpu-memory",
        type=_gpu_memory,
        required=True,
        metavar="SIZE",
        help="of each GPU, such as 24GB (24 * 2^30 bytes)",
    )
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="how many; default: 1")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at a time; default: 1")
    parser.add_argument("--context", type=positive, default=2048, metavar="N", help="tokens of each; default: 2048")
    parser.add_argument(
        "--reserve",
        type=parse_size,
        default=DEFAULT_RESERVE,
        metavar="SIZE",
        help="of each GPU, for its context, workspace and activations; default: 0.5GB",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _gpu_memory(text: str) -> int:
    size = parse_size(text)
    if size < 2**20:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB, got {text!r}, which is {size} bytes")
    return size


def main(args: argparse.Namespace) -> int:
    """`octavo plan`. Returns 0 where the model fits in int8, else `DOES_NOT_FIT`."""
    found = plan(
        read_config(args.config),
        gpu_memory=args.gpu_memory,
        gpus=args.gpus,
        batch=args.batch,
        context=args.context,
        reserve=args.reserve,
    )
    print(found.as_json() if args.json else found.as_text())
    return 0 if found.int8.fits else DOES_NOT_FIT


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, given itself or as its folder. Raises OSError or ValueError for what is none."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a model's config.json, got no such file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{file}: expected a JSON object with a model_type, got none")
    return config
