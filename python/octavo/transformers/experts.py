"""`Int8Experts`: the experts of a mixture, which Transformers keeps stacked in one parameter, as int8 layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.torch import Int8Linear

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds stacked expert weights: one with Transformers' ``use_experts_implementation``."""
    return hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")


def is_convertible(module: nn.Module) -> bool:
    """Whether `Int8Experts` does what `module` does: weights ``[experts, out, in]`` or transposed, no inner norms."""
    if not is_experts(module) or any(getattr(module, name, True) for name in ("has_post_expert_norm", _ELSEWHERE)):
        return False
    projections = {"gate_up_proj" if getattr(module, "has_gate", False) else "up_proj", "down_proj"}
    biases = {f"{projection}_bias" for projection in projections if getattr(module, "has_bias", False)}
    return {name for name, _ in module.named_parameters(recurse=False)} == projections | biases


_ELSEWHERE = "_is_expert_parallel"  # some of the experts are in other processes


class Int8Experts(nn.Module):
    """Stands where a model had a module of stacked experts, with its attributes; each expert's weights are Int8Linear.

    ``y = sum over the experts e of a token of w_e * down_e(gate(up_e(x)))``: Transformers' "eager" implementation, one
    expert after the other, whatever ``experts_implementation`` says.

    Attributes:
        gate_up_proj (or up_proj), down_proj: until their weights arrive the parameters ``[experts, out, in]`` (where
            `is_transposed`, ``[experts, in, out]``) of `experts`, then a ModuleList with an `octavo.torch.Int8Linear`
            ``[out, in]`` for each expert.
        gate_up_proj_bias, down_proj_bias: parameters ``[experts, out]``, in 16 bit, where the model has biases.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Any

    def __init__(self, experts: Any) -> None:
        super().__init__()
        for name, value in vars(experts).items():
            if name not in vars(self):
                setattr(self, name, value)
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        # Models that gate in a way of their own define it in their class.
        self._gate = type(experts)._apply_gate
        self.train(experts.training)

    def hold(self, projection: str, layers: list[Int8Linear]) -> None:
        """Replace the parameter of that name by the int8 layers of the experts."""
        delattr(self, projection)
        self.add_module(projection, nn.ModuleList(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[m, k]``, the experts of each token ``[m, e]`` and their weights ``[m, e]`` -> ``[m, k]``."""
        result = torch.zeros_like(hidden_states)
        with torch.no_grad():
            # An index of num_experts says: an expert of another process.
            mask = functional.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            needed = mask[: self.num_experts].sum(dim=(-1, -2)).nonzero().flatten().tolist()
        for expert in needed:
            position, token = torch.where(mask[expert])
            hidden = self._up(expert, hidden_states[token])
            hidden = self._project("down_proj", expert, hidden) * top_k_weights[token, position, None]
            result.index_add_(0, token, hidden.to(result.dtype))
        return result

    def _up(self, expert: int, hidden: Tensor) -> Tensor:
        if self.has_gate:
            gated: Tensor = self._gate(self, self._project("gate_up_proj", expert, hidden))
            return gated
        activated: Tensor = self.act_fn(self._project("up_proj", expert, hidden))
        return activated

    def _project(self, projection: str, expert: int, hidden: Tensor) -> Tensor:
        weights: Any = getattr(self, projection)
        if isinstance(weights, nn.ModuleList):
            projected: Tensor = weights[expert](hidden)
        else:  # left in 16 bit
            projected = functional.linear(hidden, weights[expert].T if self.is_transposed else weights[expert])
        return projected + getattr(self, f"{projection}_bias")[expert] if self.has_bias else projected
