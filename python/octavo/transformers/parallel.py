"""Tensor parallelism while a model is loaded: ``from_pretrained(..., tp_plan="auto")``, in each process of torchrun.

Transformers makes a DTensor placeholder of each parameter that its plan names, and fills it with a rank's part of what
it reads. A scale belongs to a whole row of a weight, and packed codes are no DTensor; so layers that are to be int8 are
taken out of that plan, read whole, quantized, and sharded at once: `docs/distributed.md` tells who holds what.
"""

from typing import Any

import torch
from torch import nn

from octavo._text import unexpected
from octavo.distributed import TRANSFORMERS_STYLES, chunk, columns
from octavo.torch import Int8Tensor
from octavo.transformers.experts import is_convertible

# Of stacked experts: over which features a projection is spread, and of how many matrices, one above the other, it is.
_EXPERTS = {"packed_colwise": ("rows", 2), "colwise": ("rows", 1), "rowwise": ("columns", 1)}


class TensorParallel:
    """The layers of one model that octavo shards, which is made before its weights are loaded, its mesh being known.

    `plan` is Transformers' own, by name of a module or a parameter: what octavo shards is taken out of it. `parameters`
    are the weights that are to be int8, by qualified name.
    """

    def __init__(self, model: nn.Module, plan: dict[str, str], parameters: set[str]) -> None:
        manager: Any = getattr(model, "_mesh_manager")  # noqa: B009 (PreTrainedModel's, unknown to nn.Module)
        self._mesh = manager.get_mesh("tp")
        self._styles: dict[str, Any] = {}  # of layers
        self._shapes: dict[str, torch.Size] = {}  # of their whole weights
        self._experts: dict[str, str] = {}  # parameter -> style
        for parameter in sorted(parameters):
            name = parameter.rpartition(".")[0]
            module = model.get_submodule(name)
            if is_convertible(module):
                style = plan.pop(parameter, None)
                if style is None and name in plan:
                    raise ValueError(f"{_PLAN}: expected a style for {parameter}, got {plan[name]!r} for {name} only")
                if style is not None:
                    given = f"{style} for experts with biases" if getattr(module, "has_bias", False) else style
                    if given not in _EXPERTS:
                        raise _unknown(parameter, given, _EXPERTS)
                    self._experts[parameter] = style
                continue
            own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
            styles = {plan.pop(key) for key in (name, *own) if key in plan}
            if not styles:
                continue
            if len(styles) > 1 or not styles <= TRANSFORMERS_STYLES.keys():
                raise _unknown(name, ", ".join(sorted(styles)), TRANSFORMERS_STYLES)
            self._styles[name] = TRANSFORMERS_STYLES[styles.pop()]()

    def shard(self, parameter: str, weight: Int8Tensor) -> Int8Tensor:
        """This rank's part of a new weight.

        `parameter` is its qualified name; of experts, that of the parameter that stacks them.
        """
        name, (n, k) = parameter.rpartition(".")[0], weight.shape
        if parameter in self._experts:
            features, matrices = _EXPERTS[self._experts[parameter]]
            if features == "columns":
                return columns(weight, chunk(k, self._mesh))
            own = chunk(n // matrices, self._mesh)
            return torch.cat([weight[i * (n // matrices) :][own] for i in range(matrices)])  # type: ignore[return-value]
        if name not in self._styles:
            return weight
        self._shapes[name] = weight.shape
        return self._styles[name].layer.part(weight, self._mesh)  # type: ignore[no-any-return]

    def finish(self, model: nn.Module) -> None:
        """Shard what could not be before all was read: the layers around the weights, and those that stay in 16 bit."""
        for name, style in self._styles.items():
            layer: Any = model.get_submodule(name)
            if name in self._shapes:
                style.install(layer, layer.weight, self._mesh, self._shapes[name])
            else:
                style._apply(layer, self._mesh)


_PLAN = "from_pretrained: tp_plan"


def _unknown(name: str, style: str, known: dict[str, Any]) -> Exception:
    leave = "leave it in 16 bit with OctavoConfig(modules_to_not_convert=[...])"
    return unexpected(_PLAN, f"one of {', '.join(known)} for {name}, which is to be int8", f"{style}: {leave}")
