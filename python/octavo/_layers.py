"""Models that somebody else wrote: their linear layers by name, and running batches through them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

MIN_FRACTION = 0.06  # of positions, from which on the paper calls an outlier column systematic (section 4)
# Where `octavo.torch.calibrate_` leaves a layer's columns for `quantize_`.
CALIBRATED = "octavo_outlier_columns"


def linears(
    model: nn.Module, skip: Sequence[str], kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> Iterator[tuple[str, Any]]:
    """The layers of exactly these `kinds` that `skip` does not name; shared ones under each of their names.

    Without those whose weight is also used by another kind of module: a tied embedding.
    """
    if isinstance(skip, str):
        raise TypeError("skip: expected a sequence of patterns, got a string")
    used_elsewhere = {
        id(parameter)
        for module in model.modules()
        if type(module) not in kinds
        for parameter in module.parameters(recurse=False)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in kinds or id(module.weight) in used_elsewhere:
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            yield name, module


def replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put `replacement` where `model` has the layer of that qualified name."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, replacement)
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # its fused path would read the codes as if they were weights


def run_batches(model: nn.Module, batches: Iterable[Any], *, doing: str, progress: bool) -> None:
    """Run each batch in eval mode without autograd; the modules' modes are left as they were.

    A tensor is given as ``model(batch)``, a tuple or list as ``model(*batch)``, a mapping as ``model(**batch)``.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc=doing, unit="batch", disable=not progress):
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
    finally:
        for module, training in was_training.items():
            module.training = training
