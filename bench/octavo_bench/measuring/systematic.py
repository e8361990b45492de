"""Systematic outlier features: those that a model has, and rescaling some to a wanted size.

The rescaled model computes the same function: z = x*d + s takes the place of x, and the layers that take it get
W' = W/d and bias' = bias - W' s, so that W' z + bias' = W x + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .modules import hooked
from .schemes import THRESHOLD

FEATURES = 6  # as many as the paper counts in its 6.7B model

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Features:
    """The features of one linear input over all tokens, each float32 [k]."""

    largest: Tensor  # magnitude
    share: Tensor  # of tokens at which the feature is outlying
    mean: Tensor
    deviation: Tensor  # the standard deviation

    @property
    def outliers(self) -> list[int]:
        """The outlier columns, ascending."""
        found: list[int] = self.share.nonzero().flatten().tolist()
        return found


def outlying(x: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Bool, as x: as in octavo.find_outliers, NaN and Inf are outlying."""
    return ~(x.abs() < threshold)


def watch(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    watched: Mapping[_Key, nn.Module],
    see: Callable[[_Key, Tensor], None],
) -> None:
    """Runs the batches; calls see(key, x [tokens, k]) with every input of the watched modules, padding left out.

    `batches`: the model's keyword arguments, with an ``attention_mask``.
    """
    real = torch.empty(0)  # of the batch being run: bool [tokens]

    def hook(key: _Key) -> Callable[..., None]:
        return lambda module, args: see(key, args[0].detach().reshape(-1, args[0].shape[-1])[real])

    with hooked((module, hook(key)) for key, module in watched.items()), torch.inference_mode():
        for batch in batches:
            real = batch["attention_mask"].bool().flatten()
            model(**batch)


def observe(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], watched: Mapping[_Key, nn.Module]
) -> dict[_Key, Features]:
    """What the features of the inputs of the watched modules of a float model are like; `batches` as in `watch`."""
    inputs: dict[_Key, list[Tensor]] = {}
    watch(model, batches, watched, lambda key, x: inputs.setdefault(key, []).append(x))
    return {key: features_of(torch.cat(parts)) for key, parts in inputs.items()}


def features_of(x: Tensor) -> Features:
    """The features of x, float32 [tokens, k]."""
    deviation, mean = torch.std_mean(x, 0, correction=0)
    return Features(x.abs().amax(0), outlying(x).float().mean(0), mean, deviation)


def largest_features(seen: Iterable[Features], count: int) -> list[int]:
    """The features of the largest magnitude in any of the inputs, the largest first: where outliers would grow."""
    found: list[int] = torch.stack([own.largest for own in seen]).amax(0).topk(count).indices.tolist()
    return found


@dataclass(frozen=True)
class Size:
    """What the outlier features are to be like: their mean is -magnitude; and their standard deviation."""

    magnitude: float
    deviation: float


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


def rescaling_to(size: Size, features: Sequence[int], mean: Tensor, deviation: Tensor) -> DiagonalShift:
    """The rescaling that gives the features the mean -magnitude and the wanted deviation.

    `mean` and `deviation`: of all the features as they are, float32 [k].
    """
    scale, shift = torch.ones_like(mean), torch.zeros_like(mean)  # float32 [k]
    index = torch.as_tensor(features)
    scale[index] = size.deviation / deviation[index].clamp_min(1e-6)
    shift[index] = -size.magnitude - scale[index] * mean[index]
    return DiagonalShift(scale, shift)


def folded(linear: nn.Linear, rescaling: DiagonalShift) -> nn.Linear:
    """The linear layer that makes of the rescaled input what `linear` makes of the plain one.

    In float64, rounded once. The bias uses the weight as rounded: the rounding errors, which the shift would
    otherwise enlarge, cancel.
    """
    result = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device)
    result.requires_grad_(False)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    result.weight.copy_(linear.weight.double() / rescaling.scale.double())
    result.bias.copy_(bias.double() - result.weight.double() @ rescaling.shift.double())
    return result.eval()
