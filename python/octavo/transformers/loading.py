"""What happens to a weight between the file and the model: the operations that Transformers' loader calls.

Both kinds put finished int8 layers into the model themselves and return only what the loader is still to set. One
tensor, or the tensors of one layer, are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.checkpoint import format as names
from octavo.checkpoint.format import Options, options_of
from octavo.torch import Int8Linear
from octavo.transformers.experts import Int8Experts
from octavo.weight import Int8Weight

# The tensors of an int8 layer in a checkpoint, the weight first.
PARTS = (
    names.WEIGHT,
    names.SCALE,
    names.ZEROPOINT,
    names.OUTLIER_COLUMNS,
    names.OUTLIER_WEIGHT,
    names.EXTRA_STATE,
)


# What is done to a new layer, given the qualified name of its weight, before it takes its place in the model.
Finish = Callable[[str, Int8Linear], None]


class Quantize(ConversionOps):  # type: ignore[misc]
    """16-bit weights become int8 layers in the model.

    Args:
        options: of the layers.
        chosen: whether a parameter (model, qualified name) is to be converted; others pass through.
        finish: see `Finish`.
    """

    def __init__(self, options: Options, chosen: Callable[[nn.Module, str], bool], finish: Finish) -> None:
        self._options = options
        self._chosen = chosen
        self._finish = finish

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **more: Any
    ) -> dict[str, Any]:
        """Take the tensors of `input_dict`, by qualified parameter name, into `model`."""
        others = {}
        for name, tensors in input_dict.items():
            if not self._chosen(model, name):
                others[name] = tensors
                continue
            tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
            module_name = name.rpartition(".")[0]
            module = model.get_submodule(module_name)
            if isinstance(module, Int8Experts):
                weights = (weight.T if module.is_transposed else weight for weight in tensor)
                hold_experts(module, name, ((self._quantize(each), self._options) for each in weights), self._finish)
            else:
                # Conv1D keeps [in, out].
                weight = self._quantize(tensor.T if isinstance(module, Conv1D) else tensor)
                replace_layer(model, module_name, weight, self._options, self._finish)
            missing_keys.discard(name)
        return others

    def _quantize(self, weight: Tensor) -> Int8Weight:
        return octavo.quantize_weight(weight, scheme=self._options.scheme, granularity=self._options.granularity)


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """What int8 tensors of a checkpoint go through. The loader makes a copy for each layer."""

    def __init__(self, finish: Finish) -> None:
        self._finish = finish
        # The dtype of the layer where it turns out not to be int8: `OctavoQuantizer.get_new_dtype` puts it here.
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Deserialize:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class DeserializeLayer(_Deserialize):
    """The tensors of one layer, `PARTS`, become an Int8Linear in the model; those of other modules pass through."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **more: Any,
    ) -> dict[str, Any]:
        """Take the tensors of `input_dict`, by the pattern of their part, into `model`."""
        layer = full_layer_name.removesuffix(f".{names.WEIGHT}")
        part_of = dict(zip(source_patterns, PARTS, strict=True))
        parts: dict[str, Tensor] = {part_of[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        if not _is_int8(parts):
            return {f"{layer}.{part}": self._cast(tensor) for part, tensor in parts.items()}
        weight, options = _assemble([parts], layer)
        replace_layer(model, layer, weight, options, self._finish)
        missing_keys.discard(full_layer_name)
        return {}


class DeserializeExperts(_Deserialize):
    """The layers of all experts become those of an Int8Experts.

    A model's own file may have an expert's gate and up weights apart: they are put one above the other.

    Args:
        sources: the patterns of the weights that make one, in the order of their rows.
        operations: what the loader would do with 16-bit weights.
        finish: see `Finish`.
    """

    def __init__(self, sources: Sequence[str], operations: Sequence[Any], finish: Finish) -> None:
        super().__init__(finish)
        self._sources = list(sources)
        self._operations = list(operations)

    @staticmethod
    def can_stack(operations: Sequence[Any]) -> bool:
        """Whether `operations` stack experts and put their rows one above the other, and do nothing else."""
        if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
            return False
        return all(type(operation) is Concatenate and operation.dim == 1 for operation in operations[1:])

    @staticmethod
    def patterns(sources: Sequence[str]) -> list[str]:
        """The patterns of all parts of the weights `sources`."""
        return [source.removesuffix(names.WEIGHT) + part for part in PARTS for source in sources]

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **more: Any,
    ) -> dict[str, Any]:
        """Take the tensors of `input_dict`, lists by pattern, into `model`."""
        by_pattern = dict(zip(self.patterns(self._sources), source_patterns, strict=True))
        given = {
            (source, part): input_dict[by_pattern[source.removesuffix(names.WEIGHT) + part]]
            for source in self._sources
            for part in PARTS
            if by_pattern[source.removesuffix(names.WEIGHT) + part] in input_dict
        }
        counts = {len(tensors) for tensors in given.values()}
        if len(counts) != 1:
            raise ValueError(
                f"{full_layer_name}: expected the same tensors of every expert, got {sorted(counts)} of them"
            )
        experts = [
            [
                {part: given[source, part][index] for part in PARTS if (source, part) in given}
                for source in self._sources
            ]
            for index in range(counts.pop())
        ]
        if not any(_is_int8(parts) for expert in experts for parts in expert):
            return self._merge(
                input_dict,
                source_patterns=source_patterns,
                full_layer_name=full_layer_name,
                model=model,
                missing_keys=missing_keys,
                **more,
            )
        experts_module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if not isinstance(experts_module, Int8Experts):
            raise TypeError(f"{full_layer_name}: expected experts that octavo can convert, got {type(experts_module)}")
        input_dict.clear()
        given.clear()

        def assembled() -> Iterator[tuple[Int8Weight, Options]]:
            for index in range(len(experts)):
                yield _assemble(experts[index], f"{full_layer_name}.{index}")
                experts[index] = []  # let go of what is packed now

        hold_experts(experts_module, full_layer_name, assembled(), self._finish)
        missing_keys.discard(full_layer_name)
        return {}

    def _merge(self, input_dict: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Experts that were left in 16 bit."""
        collected: dict[str, Any] = {
            pattern: [self._cast(tensor) for tensor in tensors] for pattern, tensors in input_dict.items()
        }
        for operation in self._operations:
            collected = operation.convert(collected, **more)
        return collected


def replace_layer(model: nn.Module, name: str, weight: Int8Weight, options: Options, finish: Finish) -> None:
    """Put an Int8Linear where `model` has a linear layer, with its bias."""
    module: Any = model.get_submodule(name)
    layer = _layer(f"{name}.{names.WEIGHT}", weight, options, module.bias, module.training, finish)
    model.set_submodule(name, layer)


def hold_experts(
    experts: Int8Experts, parameter: str, weights: Iterable[tuple[Int8Weight, Options]], finish: Finish
) -> None:
    """Give `experts` the int8 weights of a projection, by the qualified name of the parameter that held them."""
    layers = [_layer(parameter, weight, options, None, experts.training, finish) for weight, options in weights]
    experts.hold(parameter.rpartition(".")[2], layers)


def _layer(
    parameter: str, weight: Int8Weight, options: Options, bias: nn.Parameter | None, training: bool, finish: Finish
) -> Int8Linear:
    layer = Int8Linear._from_weight(
        weight,
        bias,
        training=training,
        threshold=options.threshold,
        outliers=options.outliers,
        path=options.path,
    )
    finish(parameter, layer)
    # The loader initializes what does not say that it is.
    for tensor in (layer.weight, *layer.buffers()):
        setattr(tensor, "_is_hf_initialized", True)  # noqa: B010 (tensors have no such attribute)
    return layer


def _is_int8(parts: Mapping[str, Tensor]) -> bool:
    return names.WEIGHT in parts and parts[names.WEIGHT].dtype == torch.int8


def _assemble(pieces: Sequence[Mapping[str, Tensor]], where: str) -> tuple[Int8Weight, Options]:
    """The weight of a layer from its tensors, or from those of several layers whose rows it takes together.

    Raises ValueError naming `where` for tensors that do not belong together.
    """
    for parts in pieces:
        needed = (names.WEIGHT, names.SCALE, names.EXTRA_STATE)
        if not _is_int8(parts) or any(part not in parts for part in needed):
            raise ValueError(f"{where}: expected an int8 {', '.join(needed)}, got {', '.join(sorted(parts))}: corrupt")
    all_options = [options_of(bytes(parts[names.EXTRA_STATE].cpu().numpy()), where) for parts in pieces]
    options, first = all_options[0], pieces[0]
    if any(other != options for other in all_options) or any(parts.keys() != first.keys() for parts in pieces):
        raise ValueError(f"{where}: expected weights that were made with the same options, got different ones")
    if len(pieces) > 1 and options.granularity != "vector":
        raise ValueError(
            f"{where}: expected granularity 'vector' of weights that are to be put together, got "
            f"{options.granularity!r}"
        )
    columns = first.get(names.OUTLIER_COLUMNS)
    if columns is not None and any(not torch.equal(columns, parts[names.OUTLIER_COLUMNS]) for parts in pieces):
        raise ValueError(f"{where}: expected the same outlier_columns of weights that are to be put together")

    def rows(part: str) -> Tensor | None:
        if part not in first:
            return None
        return first[part] if len(pieces) == 1 else torch.cat([parts[part] for parts in pieces])

    codes, scale = rows(names.WEIGHT), rows(names.SCALE)
    weight = Int8Weight(
        codes,
        scale,
        zeropoint=rows(names.ZEROPOINT),
        outlier_columns=columns,
        outlier_weight=rows(names.OUTLIER_WEIGHT),
        scheme=options.scheme,
        granularity=options.granularity,
    )
    return weight, options
