"""Int8 layers over several devices and machines: tensor parallelism through ``torch.distributed``.

>>> mesh = init_device_mesh("cuda", (8,))                                                        # doctest: +SKIP
>>> parallelize_module(model, mesh, {"up": ColwiseInt8Parallel(), "down": RowwiseInt8Parallel()})  # doctest: +SKIP

A layer is sharded from the codes it has; nothing is quantized anew. With R ranks, k input and n output features:

- Column-parallel (of Y = X W^T, hence the name): a rank holds n/R rows of the codes and computes n/R columns of Y from
  the whole X. Each output is made of the same numbers as in one process and is equal to it, bit for bit.
- Row-parallel: a rank holds k/R columns of the codes and multiplies k/R features of X with them. Its product is
  float32; the products are summed in float32, the bias is added once, and the sum is rounded once to the dtype of X.
  Outlier columns are found, and kept ones held, by the rank that has their feature: they are the same columns as in
  one process. Scales of X are taken over the features of a rank, so they are at most those of one process.

`docs/distributed.md` has the commands for one and for several machines, FSDP2, and layers on several devices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional

from octavo import _core
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
    _dim: int  # of the weight, that is sharded

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = _int8_weight(module, device_mesh, type(self).__name__)
        if weight is None:
            return super()._apply(module, device_mesh)  # type: ignore[misc, no-any-return]
        return self._install(module, self._part(weight, device_mesh), device_mesh, weight.shape)

    def _part(self, weight: Int8Tensor, mesh: DeviceMesh) -> Int8Tensor:
        """This rank's part of a weight."""
        own = chunk(weight.shape[self._dim], mesh)
        return part(weight, slice(None), own) if self._dim else part(weight, own, slice(None))

    def _install(self, module: Any, own: Int8Tensor, mesh: DeviceMesh, whole: torch.Size) -> nn.Module:
        """Make a linear layer a sharded one, with a rank's part of its weight."""
        module.weight = nn.Parameter(own, requires_grad=False)
        module.out_features, module.in_features = own.shape
        module.__class__ = RowParallelInt8Linear if self._dim else ColumnParallelInt8Linear
        module.mesh, module.total_features = mesh, whole[self._dim]
        module.input_layouts, module.output_layouts = self.input_layouts, self.output_layouts
        module.use_local_output = self.use_local_output
        module._take_bias()
        return module  # type: ignore[no-any-return]


class ColwiseInt8Parallel(_Int8Style, ColwiseParallel):
    """torch's ``ColwiseParallel``, also for int8 weights: output features are spread over the ranks of a mesh.

    Args (as torch's):
        input_layouts: the layout of a plain tensor that comes in; default ``Replicate()``.
        output_layouts: of the output; default ``Shard(-1)``, a rank's own features. ``Replicate()`` gathers them.
        use_local_output: whether a plain tensor goes out, or a DTensor.

    A linear layer whose weight is int8 becomes, in place, a `ColumnParallelInt8Linear`. Every rank takes its part of
    what it has itself (``src_data_rank`` is not used), so all ranks must have loaded the same layer. Features are dealt
    out as by ``torch.chunk``: ceil(n/R) to each rank, fewer or none to the last. Other modules go to torch's style.

    Raises ValueError: the mesh has not one dimension (take one of it: ``mesh["tp"]``), or the layer is sharded already.
    """

    _dim = 0


class RowwiseInt8Parallel(_Int8Style, RowwiseParallel):
    """torch's ``RowwiseParallel``, also for int8 weights: input features are spread over the ranks of a mesh.

    Args (as torch's):
        input_layouts: the layout of a plain tensor that comes in; default ``Shard(-1)``, a rank's own features.
        output_layouts: of the output; default ``Replicate()``. ``Shard(1)`` scatters the sum along the sequence.
        use_local_output: whether a plain tensor goes out, or a DTensor.

    Such a layer becomes, in place, a `RowParallelInt8Linear`; for the rest see `ColwiseInt8Parallel`.
    """

    _dim = 1


def shard_column(layer: Int8Linear, mesh: DeviceMesh | dist.ProcessGroup, **layouts: Any) -> ColumnParallelInt8Linear:
    """This rank's part of `layer`, which is left as it is. `mesh` may be a process group.

    `layouts` are the arguments of `ColwiseInt8Parallel`.
    """
    return _shard(ColwiseInt8Parallel(**layouts), layer, mesh, "shard_column")  # type: ignore[return-value]


def shard_row(layer: Int8Linear, mesh: DeviceMesh | dist.ProcessGroup, **layouts: Any) -> RowParallelInt8Linear:
    """This rank's part of `layer`, which is left as it is. `mesh` may be a process group.

    `layouts` are the arguments of `RowwiseInt8Parallel`.
    """
    return _shard(RowwiseInt8Parallel(**layouts), layer, mesh, "shard_row")  # type: ignore[return-value]


def _shard(style: _Int8Style, layer: Int8Linear, mesh: DeviceMesh | dist.ProcessGroup, function: str) -> nn.Module:
    if type(layer) is not Int8Linear:
        raise TypeError(f"{function}: layer: expected an Int8Linear, got {type(layer).__name__}")
    if not isinstance(mesh, DeviceMesh):
        mesh = DeviceMesh.from_group(mesh, layer.weight.device.type)
    sibling = copy.copy(layer)
    sibling._parameters = dict(layer._parameters)
    return style._apply(sibling, mesh)


# What Transformers calls its styles, and ours: they take nn.Linear and nn.Embedding as well as Int8Linear.
TRANSFORMERS_STYLES: dict[str, tuple[type[ParallelStyle], dict[str, Placement]]] = {
    "colwise": (ColwiseInt8Parallel, {}),
    "colwise_gather_output": (ColwiseInt8Parallel, {"output_layouts": Replicate()}),
    "colwise_rep": (ColwiseInt8Parallel, {"output_layouts": Replicate()}),
    "rowwise": (RowwiseInt8Parallel, {}),
    "rowwise_split_input": (RowwiseInt8Parallel, {"input_layouts": Replicate()}),
    "rowwise_rep": (RowwiseInt8Parallel, {"input_layouts": Replicate()}),
    "embedding_rowwise": (RowwiseInt8Parallel, {"input_layouts": Replicate()}),
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
        raise ValueError(
            f"transformers_plan: model: expected a tp_plan of {', '.join(TRANSFORMERS_STYLES)}, got {unknown}"
        )
    result = {}
    for name, style in plan.items():
        make, layouts = TRANSFORMERS_STYLES[style]
        result[name] = make(**layouts)
    return result


# --- layers -----------------------------------------------------------------------------------------------------------


class _Sharded(Int8Linear):
    """An Int8Linear that holds one rank's part; `weight` is an Int8Tensor of the rank's own.

    Attributes:
        mesh: the ranks, one dimension.
        total_features: of the whole layer, along the dimension that is sharded.
        input_layouts, output_layouts, use_local_output: see the styles.
    """

    mesh: DeviceMesh
    total_features: int
    input_layouts: tuple[Placement, ...]
    output_layouts: tuple[Placement, ...]
    use_local_output: bool

    def _take_bias(self) -> None:
        """Leave of a whole bias what this rank adds."""

    def _in_one_place(self, input: Tensor, input_layout: type[Placement], output_layout: type[Placement]) -> bool:
        """Whether a plain tensor goes in and out as the product takes and gives it, and nobody asks for gradients.

        Then DTensor, which costs more than a small layer's product, has nothing to do.
        """
        bias = self.bias
        wants_grad = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
        return (
            not wants_grad
            and not isinstance(input, DTensor)
            and self.use_local_output
            and _is_layout(self.input_layouts, input_layout, input.dim())
            and _is_layout(self.output_layouts, output_layout, input.dim())
        )

    def _incoming(self, input: Tensor, wanted: Placement, features: int) -> DTensor:
        """The input in the layout that the product needs."""
        if not isinstance(input, DTensor):
            whole = _whole(input, features) if _is_layout(self.input_layouts, Shard, input.dim()) else {}
            input = DTensor.from_local(input, self.mesh, self.input_layouts, run_check=False, **whole)
        if input.placements != (wanted,):
            input = input.redistribute(placements=(wanted,))
        return input

    def _outgoing(self, output: Tensor) -> Tensor:
        assert isinstance(output, DTensor)
        return _arrived(output.to_local()) if self.use_local_output else output

    def extra_repr(self) -> str:
        """As `Int8Linear`'s, with the sizes of this rank, and which rank that is."""
        part = f"{self.mesh.get_local_rank()} of {self.mesh.size()}"
        return f"{super().extra_repr()}, rank={part}, total_features={self.total_features}"


class ColumnParallelInt8Linear(_Sharded):
    """An `Int8Linear` of which this rank computes some of the output features: `shard_column`.

    ``out_features`` are this rank's, ``total_features`` all. The gradient of x is summed over the ranks in its dtype.
    """

    def _take_bias(self) -> None:
        """Leave of a whole bias this rank's part."""
        bias = self.bias
        if bias is not None:
            own = bias.detach()[chunk(self.total_features, self.mesh)].clone()
            self.bias = nn.Parameter(own, requires_grad=bias.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n/R]`` (a rank's own; gathered with ``output_layouts=Replicate()``)."""
        input = _arrived(input)
        if self._in_one_place(input, Replicate, Shard):
            return super().forward(input)
        x = self._incoming(input, Replicate(), self.in_features)
        # Each rank's gradient of x lacks what the other ranks' features contribute.
        local = super().forward(_arrived(x.to_local(grad_placements=(Partial(),))))
        last = Shard(local.dim() - 1)
        y = DTensor.from_local(local, self.mesh, (last,), run_check=False, **_whole(local, self.total_features))
        wanted = tuple(_counted(layout, local.dim()) for layout in self.output_layouts)
        return self._outgoing(y if wanted == (last,) else y.redistribute(placements=wanted))


class RowParallelInt8Linear(_Sharded):
    """An `Int8Linear` of which this rank has some of the input features: `shard_row`.

    ``in_features`` are this rank's, ``total_features`` all. Every rank holds the whole bias.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[..., k/R]`` -> ``[..., n]``, the sum over the ranks, in the dtype of input (or autocast's)."""
        input = _arrived(input)
        bias = self.bias
        if self._in_one_place(input, Shard, Replicate):
            x = _autocast(input)
            y = self._product(x)
            dist.all_reduce(y, group=self.mesh.get_group())
            if bias is not None:
                y += bias
            return y.to(x.dtype)
        x = _autocast(_arrived(self._incoming(input, Shard(input.dim() - 1), self.total_features).to_local()))
        wanted = tuple(_counted(layout, input.dim()) for layout in self.output_layouts)
        parts = DTensor.from_local(self._product(x), self.mesh, (Partial(),), run_check=False)
        total: Tensor = parts.redistribute(placements=wanted)
        if bias is not None:
            total = total + DTensor.from_local(bias.to(torch.float32), self.mesh, (Replicate(),), run_check=False)
        return self._outgoing(total.to(x.dtype))

    def _product(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, float32 ``[..., n]``, without the bias."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            with torch.autocast(x.device.type, enabled=False):
                return functional.linear(x.to(torch.float32), self.weight)  # has the dtype of x; codes are the same
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=torch.float32, device=x.device)
        _core.linear(x, self.int8_weight._native, None, self.weight.options._native, out)
        return out


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


def part(weight: Int8Tensor, rows: slice | Tensor, columns: slice) -> Int8Tensor:
    """Rows (output features; a range or indices) and columns (input features) of a weight, in memory of their own."""
    whole = weight.int8_weight

    def of_rows(per_output: Tensor | None) -> Tensor | None:
        # Of other granularities there is one for all.
        return per_output[rows].clone() if per_output is not None and whole.granularity == "vector" else per_output

    start, stop, _ = columns.indices(whole.shape[1])
    if start % (whole.rotation or 1) or (stop % (whole.rotation or 1) and stop < whole.shape[1]):
        raise ValueError(
            f"part: columns: expected bounds that are multiples of the rotation, {whole.rotation}, got {start}, {stop}"
        )
    codes = whole.codes[rows, start : rotated_size(stop, whole.rotation)].clone(memory_format=torch.contiguous_format)
    outlier_columns, outlier_weight = whole.outlier_columns, whole.outlier_weight
    if outlier_columns is not None and outlier_weight is not None:
        here = (outlier_columns >= start) & (outlier_columns < stop)
        outlier_columns = outlier_columns[here] - start
        outlier_weight = outlier_weight[rows][:, here]
    own = Int8Weight(
        codes,
        of_rows(whole.scale),
        zeropoint=of_rows(whole.zeropoint),
        outlier_columns=outlier_columns,
        outlier_weight=outlier_weight,
        scheme=whole.scheme,
        granularity=whole.granularity,
        rotation=whole.rotation,
        shape=(codes.shape[0], stop - start),
    )
    return Int8Tensor.from_int8_weight(own, weight.dtype, weight.options)


def chunk(size: int, mesh: DeviceMesh) -> slice:
    """This rank's part of `size` features, as DTensor and ``torch.chunk`` deal them out."""
    each = -(-size // mesh.size())
    start = min(each * mesh.get_local_rank(), size)
    return slice(start, min(start + each, size))


def _int8_weight(module: nn.Module, mesh: DeviceMesh, style: str) -> Int8Tensor | None:
    """The weight of a linear layer that octavo is to shard; None of another module."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Int8Tensor):
        return None
    if isinstance(module, _Sharded):
        raise ValueError(f"{style}: module: expected a whole Int8Linear, got one that is sharded already")
    if mesh.ndim != 1:
        raise ValueError(f"{style}: device_mesh: expected one dimension, such as mesh['tp'], got {mesh.ndim}")
    if weight.device.type == "meta":
        raise ValueError(f"{style}: module: expected a layer with memory, got one on the meta device")
    return weight


def _autocast(input: Tensor) -> Tensor:
    """The input in autocast's dtype where autocast is on."""
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input


def _counted(layout: Placement, dim: int) -> Placement:
    """The layout with its dimension counted from the front, as redistribution compares it."""
    return Shard(layout.dim % dim) if isinstance(layout, Shard) and layout.dim < 0 else layout


def _is_layout(layouts: Sequence[Placement], kind: type[Placement], dim: int) -> bool:
    """Whether the layout is Replicate, or Shard of the last of `dim` dimensions."""
    return layouts == ((Shard(dim - 1) if kind is Shard else kind()),) or (kind is Shard and layouts == (Shard(-1),))


def _whole(local: Tensor, features: int) -> dict[str, Any]:
    """Shape and strides of a tensor whose last dimension is sharded, perhaps unevenly, as ``from_local`` takes them."""
    shape = torch.Size((*local.shape[:-1], features))
    return {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}


def _arrived(x: Tensor) -> Tensor:
    """The tensor that a collective of torch's styles gives, once it is there: the product reads memory itself."""
    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x
