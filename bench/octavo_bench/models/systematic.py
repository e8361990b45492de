"""A model that computes the same function with systematic outlier features of a wanted size.

From 6.7B parameters on, a few features are large at nearly every token: around -40 in a 6.7B and around -58 in a 13B
model (the paper's Table 4). Here each chosen feature x of a linear input becomes z = x*d + s, of the wanted mean and
deviation, and the layers that take it get W' = W/d and bias' = bias - W' s. So W' z + bias' = W x + bias. d and s go
into a LayerNorm whose output these linear layers alone take, and else stand in front of them as a module.

Such a model is good for rounding. What zeroing its features does is there by construction: it takes away their mean
too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modules import ATTENTION_INPUT, FEED_FORWARD_INPUT, copy_modules, hooked, projections

FEATURES = 6  # as many as the paper counts in its 6.7B model


@dataclass(frozen=True)
class Size:
    """What the outlier features are to be like: their mean is -magnitude; and their standard deviation."""

    magnitude: float
    deviation: float


# The paper's 6.7B and 13B models have one-sided outliers. What a two-sided one of that size does is to be known, too:
# zeropoint quantization has no advantage there.
SIZES = {"outliers-40": Size(40.0, 6.0), "outliers-58": Size(58.0, 13.0), "outliers-two-sided": Size(0.0, 60.0)}


@dataclass(frozen=True)
class Features:
    """The features of one linear input over all tokens, each float32 [k]."""

    largest: Tensor  # magnitude
    mean: Tensor
    deviation: Tensor  # the standard deviation


class DiagonalShift(nn.Module):
    """z = x*scale + shift, feature by feature. x [..., k]; scale, shift float32 [k]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Z."""
        return x * self.scale + self.shift


Group = tuple[int, str]  # a layer, and the input that some of its linear layers take


def observe(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[Group, Features]:
    """What the inputs of attention and feed-forward are like, on the model's keyword arguments of each batch."""
    inputs: dict[Group, list[Tensor]] = {}

    def hook(group: Group) -> Any:
        return lambda module, args: inputs.setdefault(group, []).append(args[0].detach().flatten(0, -2).float())

    first = {group: found[0] for group, found in _groups(model).items()}
    with hooked((model.get_submodule(path), hook(group)) for group, path in first.items()), torch.inference_mode():
        for batch in batches:
            model(**batch)
    every = {group: torch.cat(parts) for group, parts in inputs.items()}
    moments = {group: torch.std_mean(x, 0, correction=0)[::-1] for group, x in every.items()}
    return {group: Features(x.abs().amax(0), *moments[group]) for group, x in every.items()}


def largest_features(seen: Mapping[Group, Features], count: int = FEATURES) -> list[int]:
    """The features of the largest magnitude in front of any layer's attention, the largest first: where outliers grow.

    In front of the feed-forward others may be large, which come and go.
    """
    magnitudes = torch.stack([own.largest for (_, takes), own in seen.items() if takes == ATTENTION_INPUT]).amax(0)
    return magnitudes.topk(count).indices.tolist()


def with_outliers(model: Any, features: Sequence[int], size: Size, seen: Mapping[Group, Features]) -> Any:
    """A copy of the model that computes the same function, with outliers in these features of `seen`'s inputs."""
    model = copy_modules(model)
    for group, paths in _groups(model).items():
        # What gives the features the mean -magnitude and the wanted deviation.
        index, own = torch.as_tensor(features), seen[group]
        scale, shift = torch.ones_like(own.mean), torch.zeros_like(own.mean)  # float32 [k]
        scale[index] = size.deviation / own.deviation[index].clamp_min(1e-6)
        shift[index] = -size.magnitude - scale[index] * own.mean[index]
        rescaling = DiagonalShift(scale, shift)
        norm = _norm_in_front(model, paths[0])
        if norm is not None:
            rescale_(norm, rescaling)
        for path in paths:
            linear = folded(model.get_submodule(path), rescaling)
            model.set_submodule(path, linear if norm is not None else nn.Sequential(rescaling, linear))
    return model


def _groups(model: Any) -> dict[Group, list[str]]:
    """The linear layers that take one input, by their paths in the model."""
    groups: dict[Group, list[str]] = {}
    for found in projections(model):
        if found.takes in (ATTENTION_INPUT, FEED_FORWARD_INPUT):
            groups.setdefault((found.layer, found.takes), []).append(found.path)
    return groups


def _norm_in_front(model: Any, path: str) -> nn.LayerNorm | None:
    """The LayerNorm whose output goes to this linear layer and others with its input only. Known of OPT."""
    if model.config.model_type != "opt" or not model.config.do_layer_norm_before:
        return None
    layer, attention, _ = path.partition(".self_attn.")
    name = f"{layer}.self_attn_layer_norm" if attention else f"{path.rpartition('.')[0]}.final_layer_norm"
    return model.get_submodule(name)


def folded(linear: nn.Linear, rescaling: DiagonalShift) -> nn.Linear:
    """The linear layer that makes of the rescaled input what `linear` makes of the plain one.

    In float64, rounded once. The bias uses the weight as rounded: the rounding errors, which the shift would
    otherwise enlarge, cancel.
    """
    result = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device).requires_grad_(False)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    result.weight.copy_(linear.weight.double() / rescaling.scale.double())
    result.bias.copy_(bias.double() - result.weight.double() @ rescaling.shift.double())
    return result.eval()


def rescale_(norm: nn.LayerNorm, rescaling: DiagonalShift) -> None:
    """Makes the LayerNorm put out what `rescaling` would make of it. Its parameters are new ones: others may share."""
    scale, shift = rescaling.scale.double(), rescaling.shift.double()
    gain, bias = norm.weight.double() * scale, norm.bias.double() * scale + shift
    norm.weight, norm.bias = (nn.Parameter(each.float(), requires_grad=False) for each in (gain, bias))
