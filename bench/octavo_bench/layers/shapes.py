"""Which shapes the linear layers of a model have, from its config alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from ..models.language import use_linear_
from ..models.modules import linear_layers


def model_shapes(path: Path) -> dict[tuple[int, int], int]:
    """(k, n) of every linear layer but the output head -> how many have it; the most frequent first.

    The model is made without its weights. `path`: a config.json, or the folder of a model, int8 or not. Raises OSError
    or ValueError for another one, and ValueError for a model without linear layers.
    """
    import transformers

    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path}: expected a config.json or a folder with one, got none")
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # int8 layers have the shapes of the others
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.device("meta"):
        model = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
    use_linear_(model)
    found = Counter((layer.in_features, layer.out_features) for _, layer in linear_layers(model))
    if not found:
        raise ValueError(f"{path}: expected a model with linear layers, got {type(model).__name__} without")
    return dict(found.most_common())
