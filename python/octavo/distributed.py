"""Int8 layers over several devices and machines: tensor parallelism through ``torch.distributed``.

>>> mesh = init_device_mesh("cuda", (8,))                                                        # doctest: +SKIP
>>> parallelize_module(model, mesh, {"up": ColwiseInt8Parallel(), "down": RowwiseInt8Parallel()})  # doctest: +SKIP

A layer is sharded from the codes it has; nothing is quantized anew. `docs/distributed.md` tells what a rank computes
and how exactly, and has the commands for one and for several machines, FSDP2, and layers on several devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional

from octavo._text import unexpected
from octavo._types import rotated_size
from octavo.torch import Int8Linear, Int8Tensor
from octavo.weight import Int8Weight

__all__ = [
    "ColumnParallelInt8Linear",
    "ColwiseInt8Parallel",
    "OffloadableInt8Linear",
    "RowParallelInt8Linear",
    "RowwiseInt8Parallel",
    "offloadable_",
    "shard_column",
    "shard_row",
    "transformers_plan",
]

# --- styles -----------------------------------------------------------------------------------------------------------


class _Int8Style:
    """What both styles do with a linear layer whose weight is int8; other modules go to torch's style."""

    input_layouts: Any
    output_layouts: Any
    use_local_output: bool
    layer: type[_Sharded]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight, name = getattr(module, "weight", None), type(self).__name__
        if not isinstance(module, nn.Linear) or not isinstance(weight, Int8Tensor):
            return super()._apply(module, device_mesh)  # type: ignore[misc, no-any-return]
        if isinstance(module, _Sharded):
            raise ValueError(f"{name}: module: expected a whole Int8Linear, got one that is sharded already")
        if device_mesh.ndim != 1:
            raise ValueError(f"{name}: device_mesh: expected one dimension, such as mesh['tp'], got {device_mesh.ndim}")
        if weight.device.type == "meta":
            raise ValueError(f"{name}: module: expected a layer with memory, got one on the meta device")
        return self.install(module, self.layer.part(weight, device_mesh), device_mesh, weight.shape)

    def install(self, module: Any, own: Int8Tensor, mesh: DeviceMesh, whole: torch.Size) -> nn.Module:
        """Make a linear layer, whose weight has the shape `whole`, one that holds a rank's part of it."""
        module.weight = nn.Parameter(own, requires_grad=False)
        module.out_features, module.in_features = own.shape
        module.__class__ = self.layer
        module.mesh, module.total_features = mesh, whole[self.layer.sharded]
        module.input_layout, module.output_layout = self.input_layouts[0], self.output_layouts[0]
        module.use_local_output = self.use_local_output
        if module.bias is not None and self.layer.sharded == 0:
            own_bias = module.bias.detach()[chunk(whole[0], mesh)].clone()
            module.bias = nn.Parameter(own_bias, requires_grad=module.bias.requires_grad)
        return module  # type: ignore[no-any-return]


# --- layers -----------------------------------------------------------------------------------------------------------


class _Sharded(Int8Linear):
    """An Int8Linear that holds one rank's part; `weight` is an Int8Tensor of the rank's own."""

    sharded: int  # which dimension of the weight is
    mesh: DeviceMesh  # the ranks, one dimension
    total_features: int  # of the whole layer, along the dimension that is sharded
    input_layout: Placement  # as the styles have it
    output_layout: Placement
    use_local_output: bool

    @classmethod
    def part(cls, weight: Int8Tensor, mesh: DeviceMesh) -> Int8Tensor:
        """This rank's part of a weight, in memory of its own."""
        own = chunk(weight.shape[cls.sharded], mesh)
        return columns(weight, own) if cls.sharded else weight[own].clone()  # type: ignore[return-value]

    def _incoming(self, input: Tensor, wanted: Placement, features: int, gradient: Placement | None = None) -> Tensor:
        """What this rank multiplies: its part of the input in the layout `wanted`.

        `features` are those of the input on all ranks, `gradient` is the layout of this part's gradient, if another.
        DTensor, which costs more than a small product, is left out where it has nothing to do.
        """
        if not isinstance(input, DTensor):
            layout = _counted(self.input_layout, input.dim())
            if layout == wanted and not (gradient and torch.is_grad_enabled() and input.requires_grad):
                return _arrived(input)
            input = self._dtensor(_arrived(input), layout, features)
        local = input.redistribute(placements=(wanted,)).to_local(grad_placements=(gradient,) if gradient else None)
        return _arrived(local)

    def _dtensor(self, local: Tensor, layout: Placement, features: int) -> DTensor:
        """A tensor of all ranks, whose last dimension, `features`, may be spread unevenly."""
        shape = torch.Size((*local.shape[:-1], features))
        is_part = layout == Shard(local.dim() - 1)
        whole: Any = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()} if is_part else {}
        return DTensor.from_local(local, self.mesh, (layout,), run_check=False, **whole)

    def _outgoing(self, output: DTensor) -> Tensor:
        output = output.redistribute(placements=(_counted(self.output_layout, output.dim()),))
        return _arrived(output.to_local()) if self.use_local_output else output

    def extra_repr(self) -> str:
        """As `Int8Linear`'s, and which rank this is."""
        part = f"{self.mesh.get_local_rank()} of {self.mesh.size()}"
        return f"{super().extra_repr()}, rank={part}, total_features={self.total_features}"


class ColumnParallelInt8Linear(_Sharded):
    """An `Int8Linear` of which this rank computes some of the output features: `shard_column`.

    ``out_features`` are this rank's, ``total_features`` all. The gradient of x is summed over the ranks in its dtype.
    """

    sharded = 0

    def forward(self, input: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n/R]`` (a rank's own; gathered with ``output_layouts=Replicate()``)."""
        # Each rank's gradient of x lacks what the other ranks' features contribute.
        y = super().forward(self._incoming(input, Replicate(), self.in_features, Partial()))
        own = Shard(y.dim() - 1)
        if self.use_local_output and _counted(self.output_layout, y.dim()) == own:
            return y
        return self._outgoing(self._dtensor(y, own, self.total_features))


class RowParallelInt8Linear(_Sharded):
    """An `Int8Linear` of which this rank has some of the input features: `shard_row`.

    ``in_features`` are this rank's, ``total_features`` all. Every rank holds the whole bias.
    """

    sharded = 1

    def forward(self, input: Tensor) -> Tensor:
        """``[..., k/R]`` -> ``[..., n]``, the sum over the ranks, in the dtype of input (or autocast's)."""
        x, bias = self._incoming(input, Shard(input.dim() - 1), self.total_features), self.bias
        device = input.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y = functional.linear(x.to(torch.float32), self.weight)  # has the dtype of x; codes are the same
        if not torch.is_grad_enabled() and self.use_local_output and self.output_layout == Replicate():
            dist.all_reduce(y, group=self.mesh.get_group())  # without DTensor
            return (y if bias is None else y + bias).to(x.dtype)
        wanted = (_counted(self.output_layout, y.dim()),)
        total: Any = self._dtensor(y, Partial(), self.out_features).redistribute(placements=wanted)
        if bias is not None:
            total = total + self._dtensor(bias.to(torch.float32), Replicate(), self.out_features)
        return self._outgoing(total.to(x.dtype))


class ColwiseInt8Parallel(_Int8Style, ColwiseParallel):
    """torch's ``ColwiseParallel``, also for int8 weights: output features are spread over the ranks of a mesh.

    The arguments and their defaults are torch's. A linear layer whose weight is int8 becomes, in place, a
    `ColumnParallelInt8Linear`; other modules go to torch's style. Every rank keeps its part of what it has itself
    (``src_data_rank`` is not used), so all ranks must have loaded the same layer. Features are dealt out as by
    ``torch.chunk``: ceil(n/R) to each rank, fewer or none to the last.

    Raises ValueError: the mesh has not one dimension (pass one of it: ``mesh["tp"]``), or the layer is sharded already.
    """

    layer = ColumnParallelInt8Linear


class RowwiseInt8Parallel(_Int8Style, RowwiseParallel):
    """torch's ``RowwiseParallel``, also for int8 weights: input features are spread over the ranks of a mesh.

    A linear layer whose weight is int8 becomes a `RowParallelInt8Linear`; for the rest see `ColwiseInt8Parallel`.
    """

    layer = RowParallelInt8Linear


def shard_column(layer: Int8Linear, mesh: DeviceMesh | dist.ProcessGroup, **layouts: Any) -> ColumnParallelInt8Linear:
    """This rank's part of `layer`, which is left as it is. `mesh` may be a process group.

    `layouts` are the arguments of `ColwiseInt8Parallel`.
    """
    return _shard(ColwiseInt8Parallel(**layouts), layer, mesh, "shard_column")  # type: ignore[return-value]


def shard_row(layer: Int8Linear, mesh: DeviceMesh | dist.ProcessGroup, **layouts: Any) -> RowParallelInt8Linear:
    """As `shard_column`, with the arguments of `RowwiseInt8Parallel`."""
    return _shard(RowwiseInt8Parallel(**layouts), layer, mesh, "shard_row")  # type: ignore[return-value]


def _shard(style: _Int8Style, layer: Int8Linear, mesh: DeviceMesh | dist.ProcessGroup, function: str) -> nn.Module:
    if type(layer) is not Int8Linear:
        raise TypeError(f"{function}: layer: expected an Int8Linear, got {type(layer).__name__}")
    if not isinstance(mesh, DeviceMesh):
        mesh = DeviceMesh.from_group(mesh, layer.weight.device.type)
    sibling = copy.copy(layer)
    sibling._parameters = dict(layer._parameters)
    return style._apply(sibling, mesh)


# What Transformers calls its styles, and ours, which shard nn.Linear and nn.Embedding as well as Int8Linear.
_GATHERED = partial(ColwiseInt8Parallel, output_layouts=Replicate())
_SPLIT = partial(RowwiseInt8Parallel, input_layouts=Replicate())
TRANSFORMERS_STYLES: dict[str, Callable[[], Any]] = {
    "colwise": ColwiseInt8Parallel,
    **dict.fromkeys(("colwise_gather_output", "colwise_rep"), _GATHERED),
    "rowwise": RowwiseInt8Parallel,
    **dict.fromkeys(("rowwise_split_input", "rowwise_rep", "embedding_rowwise"), _SPLIT),
}


def transformers_plan(model: Any) -> dict[str, ParallelStyle]:
    """The tensor-parallel plan that a Transformers model brings along (``tp_plan``), for ``parallelize_module``.

    Attention must be able to split: its heads, keys' and values' too, are to be a multiple of the number of ranks.

    Raises ValueError: the model has no plan, or one with a style for other modules than linear layers and embeddings.
    """
    plan = dict(getattr(model, "tp_plan", None) or {})
    if not plan:
        raise ValueError(f"transformers_plan: model: expected one with a tp_plan, got {type(model).__name__} without")
    unknown = {name: style for name, style in plan.items() if style not in TRANSFORMERS_STYLES}
    if unknown:
        raise unexpected("transformers_plan: model", f"a tp_plan of {', '.join(TRANSFORMERS_STYLES)}", unknown)
    return {name: TRANSFORMERS_STYLES[style]() for name, style in plan.items()}


# --- layers whose weight other tools move -----------------------------------------------------------------------------


class OffloadableInt8Linear(nn.Linear):
    """A linear layer whose int8 weight is made at each call of plain tensors, its parts: `offloadable_`.

    Attributes:
        codes, scale, zeropoint, outlier_columns, outlier_weight, options: parameters, see `Int8Tensor.parts`.
        weight: the Int8Tensor, made anew at each access.
    """

    _dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight."""
        parts = {name: part for name, part in self._parameters.items() if part is not None and name != "bias"}
        return Int8Tensor.from_parts(parts, self._dtype)


def offloadable_(model: nn.Module) -> nn.Module:
    """Make the int8 layers of `model` ready, in place, for tools that take plain tensors away and back.

    accelerate's ``dispatch_model`` and ``cpu_offload`` do not need it, for they move weights as they are. Its
    ``disk_offload``, and ``dispatch_model`` with layers on "disk", do. Calls on the CPU then pack the codes anew.
    Layers that share a weight go on sharing its parts. Returns `model`.
    """
    shared: dict[int, dict[str, nn.Parameter]] = {}
    for layer in model.modules():
        if type(layer) is Int8Linear:
            weight = layer.weight
            assert isinstance(weight, Int8Tensor)
            if id(weight) not in shared:
                parts = weight.parts().items()
                shared[id(weight)] = {name: nn.Parameter(part, requires_grad=False) for name, part in parts}
            del layer.weight
            layer.__class__ = OffloadableInt8Linear  # type: ignore[assignment]
            layer._dtype = weight.dtype  # type: ignore[assignment]
            layer._parameters = {**shared[id(weight)], "bias": layer.bias}
    return model


# --- parts and layouts ------------------------------------------------------------------------------------------------


def columns(weight: Int8Tensor, own: slice) -> Int8Tensor:
    """Input features of a weight ``[n, k]``, in memory of their own.

    Raises ValueError where their bounds are no multiples of the weight's rotation.
    """
    given, (start, stop, _) = weight.int8_weight._arguments(), own.indices(weight.shape[1])
    rotation, kept = given["rotation"], given["outlier_columns"]
    if rotation and (start % rotation or (stop % rotation and stop < weight.shape[1])):
        fits = f"bounds that are multiples of the rotation, {rotation} (recipe 'paper' has none)"
        raise unexpected("columns", fits, f"{start}, {stop}")
    if kept is not None:
        here = (kept >= start) & (kept < stop)
        given |= {"outlier_columns": kept[here] - start, "outlier_weight": given["outlier_weight"][:, here]}
    codes = given["codes"][:, start : rotated_size(stop, rotation)].clone(memory_format=torch.contiguous_format)
    given |= {"codes": codes, "code_sums": None, "shape": (weight.shape[0], stop - start)}
    return Int8Tensor.from_int8_weight(Int8Weight(**given), weight.dtype, weight.options)


def chunk(size: int, mesh: DeviceMesh) -> slice:
    """This rank's part of `size` features, as DTensor and ``torch.chunk`` deal them out."""
    each = -(-size // mesh.size())
    start = min(each * mesh.get_local_rank(), size)
    return slice(start, min(start + each, size))


def _counted(layout: Placement, dim: int) -> Placement:
    """The layout with its dimension counted from the front, as DTensor compares it."""
    return Shard(layout.dim % dim) if isinstance(layout, Shard) else layout


def _arrived(x: Tensor) -> Tensor:
    """The tensor that a collective of torch's styles gives, once it is there: the product reads memory itself."""
    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x
