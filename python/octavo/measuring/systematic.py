"""Rescaling features so that a few become outliers of a wanted size, and the model computes the same function.

z = x*d + s takes the place of x, and the layers that take it get W' = W/d and bias' = bias - W' s, so that
W' z + bias' = W x + bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FEATURES = 6  # as many as the paper counts in its 6.7B model


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
