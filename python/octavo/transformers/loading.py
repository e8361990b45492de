"""What happens to a weight between the file and the model: the operations that Transformers' loader calls.

They give the loader an `octavo.torch.Int8Tensor` for each weight that is int8, which it puts where the model has the
16-bit one; only stacked experts are put there here. One tensor, or the tensors of one layer, are in memory at a time.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)
from transformers.modeling_utils import load_state_dict

from octavo import _core
from octavo import file_format as names
from octavo._text import unexpected
from octavo.torch import Int8Tensor
from octavo.torch.choice import is_linear, oriented
from octavo.transformers import experts

if TYPE_CHECKING:
    from octavo.transformers.quantizer import OctavoQuantizer

UNTIED = "_octavo_untied"  # of a model: what was tied, and to what
PARTS = (*names.PARTS, names.CODE_SUMS, names.ABSMAX, names.LAYOUT)


class _Operation(ConversionOps):  # type: ignore[misc]
    """An operation of a quantizer. The loader makes a copy for each weight."""

    supports_many_to_many = True

    def __init__(self, quantizer: OctavoQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return copy.copy(self)

    def place(self, model: nn.Module, name: str, weight: Any, missing_keys: set[str]) -> dict[str, Any]:
        """What the loader is to set: this process's part of a weight ``[n, k]``; nothing for experts, put here."""
        module, _, leaf = name.rpartition(".")
        layer = model.get_submodule(module)
        if isinstance(weight, Int8Tensor):
            own = self.quantizer.part(name, weight)
            untie(model, name)
            return {name: nn.Parameter(oriented(layer, own), requires_grad=False)}
        if isinstance(weight, Tensor):  # an operation of the model's own has dequantized it
            return {name: weight}
        experts.put(layer, leaf, (self.quantizer.part(name, one) for one in weight))
        missing_keys.discard(name)
        return {}


class Quantize(_Operation):
    """16-bit weights become int8."""

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Any]:
        """Quantize the tensors of `input_dict`, by qualified parameter name."""
        options = self.quantizer.quantization_config.options()
        result: dict[str, Any] = {}
        for name, tensors in input_dict.items():
            tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
            if not self.quantizer.param_needs_quantization(model, name):
                result[name] = tensor
                continue
            made = experts.quantized(model.get_submodule(name.rpartition(".")[0]), tensor, options)
            result |= self.place(model, name, made if tensor.dim() == 3 else next(made), missing_keys)
            give_back(self.quantizer.files, tensor)
        return result


# --- what is int8 already ---------------------------------------------------------------------------------------------


class Renaming(WeightRenaming):  # type: ignore[misc]
    """The tensors of int8 weights by the names of the format's second version, whichever they have in the files.

    `stacks`: the last two words of the names of parameters that stack experts.
    """

    __slots__ = ("_new",)

    def __init__(self, files: Sequence[str], stacks: Collection[str]) -> None:
        super().__init__("octavo", "octavo")
        keys = {key for file in files for key in load_state_dict(file, map_location="meta")}
        self._new: dict[str, str] = {}
        for key in keys:
            layer, _, last = key.rpartition(".")
            for marker, parts in (("_extra_state", names.PARTS_OF_VERSION_1), ("SCB", names.PARTS_OF_BITSANDBYTES)):
                if last == marker and f"{layer}.weight" in keys:
                    above, _, number = layer.rpartition(".")
                    # In the first version an expert of a stack was a layer.
                    weight = layer if number.isdigit() and _last_two(above) in stacks else f"{layer}.weight"
                    self._new |= {f"{layer}.{old}": f"{weight}.{part}" for old, part in parts.items()}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name; no pattern of this one has matched."""
        return self._new.get(source_key, source_key), None


def conversions_of_int8(quantizer: OctavoQuantizer, model: nn.Module, conversions: Sequence[Any]) -> list[Any]:
    """The conversions of a model with int8 weights, from those of the model with 16-bit ones.

    Before each of the model's there is one that collects the parts of int8 weights in their place, makes weights of
    them and does the same with these; and one for weights that need nothing else.
    """
    stacks = {_last_two(name): None for name, _, _ in experts.stacks(model)}

    def collecting(sources: Sequence[str], operations: Sequence[Any]) -> tuple[list[str], list[Any]]:
        parts = [f"{source}.{part}" for source in sources for part in PARTS]
        return parts, [Assemble(quantizer), *operations, Place(quantizer)]

    made: list[Any] = []
    for target in stacks:
        parts, operations = collecting([rf"{target}.\d+"], [Stack()])
        made.append(WeightConverter(parts, target, operations))
    for converter in conversions:
        if isinstance(converter, WeightConverter):
            own = [Stack() if type(one) is MergeModulelist else one for one in converter.operations]
            sources = [source.removesuffix("$") for source in converter._original_source_patterns]
            parts, operations = collecting(sources, own)
            made.append(converter.copy(parts, converter._original_target_patterns.copy(), operations=operations))
    parts, operations = collecting(["weight"], [])
    return [Renaming(quantizer.files, stacks), *made, WeightConverter(parts, "weight", operations), *conversions]


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


class Stack(MergeModulelist):  # type: ignore[misc]
    """The int8 weights of experts become one `Int8Stack`."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        """Take lists by pattern."""
        names = {pattern: self.get_target_pattern(len(input_dict), pattern, target_patterns) for pattern in input_dict}
        return {names[pattern]: experts.Int8Stack(weights) for pattern, weights in input_dict.items()}


class Assemble(_Operation):
    """The parts of int8 weights become `Int8Tensor`."""

    dtype: torch.dtype | None = None  # of the weights, which the loader says

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any) -> dict[str, Any]:
        """Take lists by the patterns of parts; the result has the pattern of the codes."""
        weights: dict[str, Any] = {}
        for pattern in [pattern for pattern in input_dict if pattern.endswith(f".{names.CODES}")]:
            base = pattern.removesuffix(names.CODES)
            lists = {part: input_dict.pop(base + part) for part in PARTS if base + part in input_dict}
            counts = {len(tensors) for tensors in lists.values()}
            if len(counts) != 1:
                raise unexpected(full_layer_name, "the same tensors of every weight", sorted(counts))
            weights[pattern] = [
                self._weight({part: tensors.pop(0) for part, tensors in lists.items()}, full_layer_name)
                for _ in range(counts.pop())
            ]
        if input_dict:
            raise unexpected(full_layer_name, "all the weights that make it in int8", "some in 16 bit")
        return weights

    def _weight(self, parts: dict[str, Tensor], where: str) -> Int8Tensor:
        device = parts[names.CODES].device
        for part in parts.keys() - {names.CODES}:
            parts[part] = parts[part].clone()  # a tensor of a mapped file would hold the map
        if names.CODE_SUMS in parts:  # packed codes are the CPU's, which uses them as they lie in the file
            parts = {part: tensor.cpu() for part, tensor in parts.items()}
            self.quantizer.keeps_files |= device.type == "cpu"
        weight, options, dtype = names.assemble(parts, where)
        options = replace(options, **self.quantizer.quantization_config.given)
        made: Any = Int8Tensor.from_int8_weight(weight, self.dtype or getattr(torch, dtype or "float32"), options)
        return made.to(device)  # type: ignore[no-any-return]


class Place(_Operation):
    """Weights take their place in the model."""

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, target_patterns: list[str], **about: Any
    ) -> dict[str, Any]:
        """Take a weight for each target."""
        result: dict[str, Any] = {}
        for target, weights in input_dict.items():
            name = full_layer_name.replace(target_patterns[0], target) if len(target_patterns) > 1 else full_layer_name
            weight = weights[0] if isinstance(weights, list) else weights
            result |= self.place(about["model"], name, weight, about["missing_keys"])
        return result


# --- memory -----------------------------------------------------------------------------------------------------------


def give_back(files: Sequence[str], tensor: Tensor | None = None) -> None:
    """Give freed memory back to the system, and the pages of mapped files (Linux): a tensor's that lies there, or all.

    They are read again where they are needed; nobody may have written to them.
    """
    maps, paths = Path("/proc/self/maps"), {os.path.realpath(file) for file in files}
    first, end = (0, sys.maxsize) if tensor is None else (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    lines = maps.read_text().splitlines() if maps.exists() and (tensor is None or tensor.is_cpu) else []
    for area, *_, path in (line.split(maxsplit=5) for line in lines):
        begin, last = (int(place, 16) for place in area.split("-"))
        if path in paths and first < last and begin < end:
            _core.give_back(max(begin, first), min(last, end))
    _core.give_back(0, 0)


# --- what follows from it --------------------------------------------------------------------------------------------


def untie(model: Any, name: str) -> None:
    """Let an int8 weight, by qualified name, have a place of its own, apart from the embedding that it was tied to."""
    source = model.all_tied_weights_keys.get(name)
    if source is not None and not is_linear(model.get_submodule(source.rpartition(".")[0])):
        model.__dict__.setdefault(UNTIED, {})[name] = model.all_tied_weights_keys.pop(name)


def keep_names(model: Any, int8: Sequence[str]) -> None:
    """Int8 weights are saved under the names that they have in the model, not taken apart again."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not made by from_pretrained
        known = get_model_conversion_mapping(model, add_legacy=False) or []
        conversions = [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
    lines = "\n".join(int8)

    def takes_apart(own: Any) -> bool:
        return isinstance(own.operations[0], Assemble) or any(target in lines for target in own.target_patterns)

    model._weight_conversions = [
        each for each in conversions if not isinstance(each, WeightConverter) or not takes_apart(each)
    ]
