"""A language model that computes the same function with systematic outlier features of a wanted size.

In a model that normalizes before each block, what a LayerNorm puts out goes to linear layers only. So a feature can be
rescaled in the LayerNorm's gain and bias, z = x*d + s with gain' = gain*d and bias' = bias*d + s, and the linear layers
take it back: W' = W/d, bias' = bias - W' s. The residual stream does not change.

What such a model is good for: rounding. Setting an outlier feature to zero in it takes away its mean too, which only
the new biases have use for, so it says nothing about what such a feature carries in a model that learned it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo_bench.measuring import systematic
from octavo_bench.measuring.language import Window
from octavo_bench.measuring.modules import copy_modules
from octavo_bench.measuring.systematic import DiagonalShift, Features, Size, folded, rescaling_to
from torch import nn

# The paper's 6.7B and 13B models have one-sided outliers (Table 4). What a two-sided one of that size does is worth
# knowing too: zeropoint quantization has no advantage there.
SIZES = {
    "outliers-40": Size(40.0, 6.0),
    "outliers-58": Size(58.0, 13.0),
    "outliers-two-sided": Size(0.0, 60.0),
}

# Of a layer of OPT: each LayerNorm, and the linear layers that take what it puts out.
BLOCKS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "final_layer_norm": ("fc1",),
}


def observe(model: Any, windows: Sequence[Window]) -> dict[tuple[int, str], Features]:
    """What each LayerNorm puts out, by layer and LayerNorm."""
    consumers = {
        (index, norm): layer.get_submodule(paths[0])
        for index, layer in enumerate(model.model.decoder.layers)
        for norm, paths in BLOCKS.items()
    }
    return systematic.observe(model, [window.inputs for window in windows], consumers)


def largest_features(seen: dict[tuple[int, str], Features], count: int) -> list[int]:
    """The features of the largest magnitude in any layer, the largest first: where outliers would grow."""
    return systematic.largest_features(seen.values(), count)


def with_outliers(model: Any, features: Sequence[int], size: Size, seen: dict[tuple[int, str], Features]) -> Any:
    """A copy of an OPT that computes the same function, with outliers in the given features.

    `seen` says what mean and deviation the features have as they are. Raises ValueError for a model that does not
    normalize before each block.
    """
    if model.config.model_type != "opt" or not model.config.do_layer_norm_before:
        raise ValueError(f"model: expected an OPT that normalizes before each block, got {model.config.model_type}")
    result: Any = copy_modules(model)
    for index, layer in enumerate(result.model.decoder.layers):
        for norm, paths in BLOCKS.items():
            own = seen[index, norm]
            rescaling = rescaling_to(size, features, own.mean, own.deviation)
            rescale_(getattr(layer, norm), rescaling)
            for path in paths:
                parent, _, child = path.rpartition(".")
                setattr(layer.get_submodule(parent), child, folded(layer.get_submodule(path), rescaling))
    return result


def rescale_(norm: nn.LayerNorm, rescaling: DiagonalShift) -> None:
    """Makes the LayerNorm put out what `rescaling` would make of it. Its parameters are new ones: others may share."""
    scale, shift = rescaling.scale.double(), rescaling.shift.double()
    gain, bias = norm.weight.double() * scale, norm.bias.double() * scale + shift
    norm.weight = nn.Parameter(gain.float(), requires_grad=False)
    norm.bias = nn.Parameter(bias.float(), requires_grad=False)
