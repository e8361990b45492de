"""Muon (Jordan 2024): momentum whose update is made orthogonal, for the weights of a network's hidden linear layers.

    M' = beta * M + G,   W' = W * (1 - rate * decay) - 0.2 * sqrt(max(rows, columns)) * rate * U V^T,
    where G + beta * M' = U S V^T

The factor gives the update the root mean square that AdamW's has (Liu 2025, arXiv 2502.16982), so both take one
learning rate. torch.optim.Muon iterates in bfloat16, which a processor without instructions for it emulates; this one
does in float32, for all weights of one shape at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of the quintic that moves singular values towards 1, fast rather than exactly: five steps take 0.002 to 1 to between
# 0.68 and 1.21. A step makes 3.4 times as much of one near 0, so that what is below 0.001 stays behind.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """The optimizer. `params`: matrices. lr: learning rate; momentum: beta."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = orthogonal(torch.stack([self._direction(own, group["momentum"]) for own in parameters]))
                size = 0.2 * max(shape) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)
        return loss

    def _direction(self, parameter: Tensor, beta: float) -> Tensor:
        """G + beta * M', before it is made orthogonal (Nesterov's momentum)."""
        gradient = parameter.grad
        assert gradient is not None, "step takes those that have one"
        kept: Tensor = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        kept.mul_(beta).add_(gradient)
        return gradient.add(kept, alpha=beta)


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, nearly. float32 [count, rows, columns].

    Singular values of at least 0.002 of the matrix's norm become 0.68 to 1.21; smaller ones stay below.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
