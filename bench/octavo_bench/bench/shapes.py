"""Which shapes the linear layers of a model have, from headers or its config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from octavo.architectures import tensors_of
from octavo.checkpoint import format as names
from octavo.checkpoint.layers import LayerChoice
from octavo.checkpoint.reader import Checkpoint
from octavo.plan import read_config


def model_shapes(path: Path) -> dict[tuple[int, int], int]:
    """(k, n) of every linear layer that is, or would be, int8 -> how many have it; the most frequent first.

    Args:
        path: a config.json or the folder of a model (its layers as `octavo plan` counts them), or an int8 checkpoint,
            folder or file, whose headers say which layers are int8.

    Raises OSError or ValueError as `octavo.plan.read_config` and `octavo.checkpoint.Checkpoint` do, and ValueError for
    a model without linear layers.
    """
    is_config = path.suffix == ".json" and not path.name.endswith(".index.json")
    if path.is_file() and not is_config:
        found = Counter(_of_checkpoint(path))
    else:
        config = read_config(path)
        int8 = path.is_dir() and "quantization_config" in config
        found = Counter(_of_checkpoint(path) if int8 else _of_config(config))
    if not found:
        raise ValueError(f"{path}: expected a model with linear layers in int8, or to be converted, got none")
    return dict(found.most_common())


def _of_checkpoint(path: Path) -> Iterator[tuple[int, int]]:
    for layer in Checkpoint(path, framework="numpy").layers.values():
        n, k = layer.parts[names.WEIGHT].shape
        yield k, n


def _of_config(config: dict[str, object]) -> Iterator[tuple[int, int]]:
    choice = LayerChoice(config)
    for name, shape in tensors_of(config):
        layer = choice.layer(name, shape)
        if layer is not None:
            k, n = shape if choice.transposed(layer) else shape[::-1]
            yield k, n
