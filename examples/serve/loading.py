"""Language models whose int8 layers compute each token by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from octavo.torch import Int8Linear
from octavo.transformers import OctavoConfig


def load(folder: Path, dtype: str = "auto") -> Any:
    """The model of a folder, its linear layers int8 and independent of what else is in a batch.

    Raises ValueError where none of its layers is int8.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    converted = getattr(config, "quantization_config", None) is not None
    more = {} if converted else {"quantization_config": OctavoConfig(outliers="rows", path="int8")}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError(f"{folder}: expected a model with int8 layers of octavo, got one without")
    changed = independent_(model)
    if changed:
        print(f"{folder.name}: {changed} int8 layers now look for outliers token by token", flush=True)
    return model.eval()


def ends(model: Any) -> set[int]:
    """The tokens that end a text, as the model's generation config says."""
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def independent_(model: torch.nn.Module) -> int:
    """Make each row of each int8 layer independent of the others; returns how many layers had to be changed.

    outliers="columns", the paper's, looks for outlier columns in the whole call: beside another text's outliers a
    feature goes through the 16-bit product, alone it does not. "rows" decides for each token; "static" never looks.
    """
    changed = 0
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            changed += layer.outliers == "columns" or layer.path == "auto"
            layer.outliers = "rows" if layer.outliers == "columns" else layer.outliers
            layer.path = "int8" if layer.path == "auto" else layer.path  # "auto" may come to depend on the rows
    return changed
