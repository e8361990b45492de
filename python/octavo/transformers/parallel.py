"""Tensor parallelism while a model is loaded: ``from_pretrained(..., tp_plan="auto")``, in each process of torchrun.

Transformers makes a DTensor placeholder of each parameter that its plan names, and fills it with a rank's part of what
it reads. A scale belongs to a whole row of a weight, and packed codes are no DTensor; so layers that are to be int8 are
taken out of that plan. They are read whole, one after the other, quantized, and sharded at once: a rank holds its parts
and one layer. Embeddings, an output head and whatever else stays in 16 bit is left to Transformers.

Experts: each rank has some of the intermediate features of every expert. Transformers sums their outputs, in the dtype
of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from octavo.distributed import TRANSFORMERS_STYLES, ColumnParallelInt8Linear, chunk, part
from octavo.torch import Int8Linear
from octavo.transformers.experts import Int8Experts

# Of stacked experts: over which features a projection is spread, and of how many matrices, one above the other, it is.
_EXPERTS = {"packed_colwise": ("rows", 2), "colwise": ("rows", 1), "rowwise": ("columns", 1)}


class TensorParallel:
    """The layers of one model that octavo shards.

    Args:
        model: before its weights are loaded, distributed by Transformers (its mesh is known).
        plan: Transformers' own, by concrete name of a module or a parameter. What octavo shards is taken out of it.
        parameters: weights that are to be int8, by qualified name.

    Raises ValueError for a style that int8 layers do not have.
    """

    def __init__(self, model: nn.Module, plan: dict[str, str], parameters: set[str]) -> None:
        manager: Any = getattr(model, "_mesh_manager")  # noqa: B009 (PreTrainedModel's, unknown to nn.Module)
        self._mesh = manager.get_mesh("tp")
        self._layers: dict[str, ParallelStyle] = {}
        self._experts: dict[str, str] = {}  # parameter -> style
        for parameter in sorted(parameters):
            name = parameter.rpartition(".")[0]
            module = model.get_submodule(name)
            if isinstance(module, Int8Experts):
                style = plan.pop(parameter, None)
                if style is not None and style not in _EXPERTS:
                    raise ValueError(_unknown(parameter, style, _EXPERTS))
                if style is not None and module.has_bias:
                    raise ValueError(_unknown(parameter, f"{style} for experts with biases", _EXPERTS))
                if style is not None:
                    self._experts[parameter] = style
                elif name in plan:
                    raise ValueError(f"{_PLAN}: expected a style for {parameter}, got {plan[name]!r} for {name} only")
                continue
            own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
            styles = {plan.pop(key) for key in (name, *own) if key in plan}
            if not styles:
                continue
            if len(styles) > 1 or not styles <= TRANSFORMERS_STYLES.keys():
                raise ValueError(_unknown(name, ", ".join(sorted(styles)), TRANSFORMERS_STYLES))
            make, layouts = TRANSFORMERS_STYLES[styles.pop()]
            self._layers[name] = make(**layouts)

    def shard(self, parameter: str, layer: Int8Linear) -> None:
        """Leave of a new layer, in place, this rank's part. A bias, which may still have to be read, stays whole.

        `parameter` is the qualified name of the weight; of experts, that of the parameter that stacks them.
        """
        if parameter in self._experts:
            self._shard_expert(parameter, layer)
        style = self._layers.get(parameter.rpartition(".")[0])
        if style is not None:
            bias, layer.bias = layer.bias, None
            style._apply(layer, self._mesh)
            layer.bias = bias

    def _shard_expert(self, parameter: str, layer: Int8Linear) -> None:
        features, matrices = _EXPERTS[self._experts[parameter]]
        n, k = layer.out_features, layer.in_features
        rows: slice | torch.Tensor = slice(0, n)
        columns = slice(0, k)
        if features == "rows":
            own = chunk(n // matrices, self._mesh)
            rows = torch.cat([torch.arange(own.start, own.stop) + i * (n // matrices) for i in range(matrices)])
        else:
            columns = chunk(k, self._mesh)
        weight = part(layer.int8_weight, rows, columns)
        layer._hold(weight)
        layer.out_features, layer.in_features = weight.shape

    def finish(self, model: nn.Module) -> None:
        """Shard what could not be before all was read: biases, and layers that turned out not to be int8."""
        for name, style in self._layers.items():
            layer = model.get_submodule(name)
            if isinstance(layer, ColumnParallelInt8Linear):
                layer._take_bias()
            elif not isinstance(layer, Int8Linear):
                style._apply(layer, self._mesh)


_PLAN = "from_pretrained: tp_plan"


def _unknown(name: str, style: str, known: dict[str, Any]) -> str:
    return (
        f"{_PLAN}: expected one of {', '.join(known)} for {name}, which is to be int8, got {style}: leave it in 16 bit "
        "with OctavoConfig(modules_to_not_convert=[...])"
    )
