"""What happens to a weight between the file and the model: the operations that Transformers' loader calls.

They give the loader an `octavo.torch.Int8Tensor` for each weight that is int8, which it puts where the model has the
16-bit one; only stacked experts are put there here. One tensor, or the tensors of one layer, are in memory at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    apply_renamings,
)

from octavo import file_format as names
from octavo.options import Options
from octavo.torch import Int8Tensor
from octavo.torch.choice import is_conv1d
from octavo.transformers import experts
from octavo.transformers.config import OF_THE_WEIGHT

# What is done to a new weight, given its qualified name, before it takes its place in the model.
Finish = Callable[[str, Int8Tensor], Int8Tensor]


class Quantize(ConversionOps):  # type: ignore[misc]
    """16-bit weights become int8.

    Args:
        options: of the weights.
        chosen: whether a parameter, by qualified name, is to be converted; others pass through.
        finish: see `Finish`.
    """

    def __init__(self, options: Options, chosen: Callable[[str], bool], finish: Finish) -> None:
        self._options = options
        self._chosen = chosen
        self._finish = finish

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **more: Any
    ) -> dict[str, Any]:
        """Quantize the tensors of `input_dict`, by qualified parameter name."""
        result = {}
        for name, tensors in input_dict.items():
            tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
            if not self._chosen(name):
                result[name] = tensor
            elif tensor.dim() == 3:
                module = model.get_submodule(name.rpartition(".")[0])
                each = (weight.mT if experts.is_transposed(module) else weight for weight in tensor)
                _stack(model, name, (self._quantize(name, weight) for weight in each), missing_keys)
            else:
                is_transposed = is_conv1d(model.get_submodule(name.rpartition(".")[0]))
                result[name] = parameter(self._quantize(name, tensor.t() if is_transposed else tensor), is_transposed)
        return result

    def _quantize(self, name: str, weight: Tensor) -> Int8Tensor:
        return self._finish(name, Int8Tensor.from_float(weight, self._options))


def parameter(weight: Int8Tensor, is_transposed: bool = False) -> nn.Parameter:
    """The weight ``[n, k]`` as a parameter; of a Conv1D as ``[k, n]``."""
    return nn.Parameter(weight.t() if is_transposed else weight, requires_grad=False)


def _stack(model: nn.Module, name: str, weights: Iterable[Int8Tensor], missing_keys: set[str]) -> dict[str, Any]:
    """Put the weights of experts into the model; there is nothing left for the loader to set."""
    module, _, leaf = name.rpartition(".")
    experts.put(model.get_submodule(module), leaf, weights)
    missing_keys.discard(name)
    return {}


# --- what is int8 already ---------------------------------------------------------------------------------------------


def stored_parts(files: Sequence[str], renamings: Sequence[Any]) -> dict[str, tuple[str, str]]:
    """The tensors of int8 weights in a checkpoint: name -> the weight's name and the part's.

    Args:
        files: of the checkpoint.
        renamings: what the loader does to names beforehand; the result has the new ones.
    """
    keys: set[str] = set()
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                keys |= set(opened.keys())
        else:
            keys |= torch.load(file, map_location="meta", weights_only=True).keys()
    parts: dict[str, tuple[str, str]] = {}
    for key in keys:
        layer, _, last = key.rpartition(".")
        if last == names.CODES:
            parts |= {f"{layer}.{part}": (layer, part) for part in names.PARTS if f"{layer}.{part}" in keys}
        elif names.PARTS_OF_VERSION_1.get(last) == names.OPTIONS and f"{layer}.weight" in keys:
            version_1 = names.PARTS_OF_VERSION_1.items()
            parts |= {
                f"{layer}.{old}": (f"{layer}.weight", part) for old, part in version_1 if f"{layer}.{old}" in keys
            }
    renamings = copy.deepcopy(list(renamings))  # some remember what they have seen
    return {
        apply_renamings(key, renamings): (apply_renamings(weight, renamings), part)
        for key, (weight, part) in sorted(parts.items())
    }


# The weight of a stored name, and which of the sources it is that make this weight; None where it is none of them.
Target = Callable[[str], "tuple[str, int] | None"]


class Deserializer(WeightConverter):  # type: ignore[misc]
    """Collects the parts of int8 weights by their exact names, for `Deserialize`.

    Args:
        label: of this converter, in the patterns by which the loader knows what it has collected.
        parts: see `stored_parts`.
        target: see `Target`.
        sources: how many weights are put together.
        operation: what the parts go through.
    """

    __slots__ = ("_arguments",)

    def __init__(
        self, label: str, parts: Mapping[str, tuple[str, str]], target: Target, sources: int, operation: Deserialize
    ) -> None:
        self._arguments = (label, parts, target, sources)
        patterns = [f"{label}_{source}_{part}" for source in range(sources) for part in names.PARTS]
        super().__init__(patterns, label, [operation])

    def __deepcopy__(self, memo: dict[int, Any]) -> Deserializer:
        return Deserializer(*self._arguments, copy.copy(self.operations[0]))  # the loader makes one for each weight

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name of the weight of a part, and the pattern that stands for the part."""
        _, parts, target, _ = self._arguments
        weight, part = parts.get(source_key, (None, ""))
        found = None if weight is None else target(weight)
        if found is None:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        name, source = found
        return name, self.source_patterns[source * len(names.PARTS) + names.PARTS.index(part)]


class Deserialize(ConversionOps):  # type: ignore[misc]
    """The parts of int8 weights become the weight of a layer, or those of all experts.

    Args:
        given: options that the caller asked for.
        finish: see `Finish`.
        converter: of the model's own, that would take 16-bit weights of these names.

    Attributes:
        dtype: of the weight, which the loader says.
    """

    def __init__(self, given: Mapping[str, Any], finish: Finish, converter: WeightConverter | None = None) -> None:
        self._given = given
        self._finish = finish
        self._operations: list[Any] = [] if converter is None else converter.operations
        self._sources: list[str] = [] if converter is None else converter.source_patterns
        self.dtype: torch.dtype | None = None

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
        """Take the parts of `input_dict`, lists by pattern."""
        if not input_dict.keys() <= set(source_patterns):
            raise ValueError(f"{full_layer_name}: expected all the weights that make it in int8, got some in 16 bit")
        sources = []
        for first in range(0, len(source_patterns), len(names.PARTS)):
            patterns = dict(zip(names.PARTS, source_patterns[first:], strict=False))
            lists = {part: input_dict.pop(pattern) for part, pattern in patterns.items() if pattern in input_dict}
            sources.append(self._weights(lists, full_layer_name))
        if not self._operations:
            module = model.get_submodule(full_layer_name.rpartition(".")[0])
            if experts.is_convertible(module):
                return _stack(model, full_layer_name, sources[0], missing_keys)
            return {full_layer_name: parameter(next(sources[0]), is_conv1d(module))}
        if type(self._operations[0]) is MergeModulelist:
            if not all(type(operation) is Concatenate and operation.dim == 1 for operation in self._operations[1:]):
                raise ValueError(f"{full_layer_name}: expected experts that are stacked, got {self._operations}")
            each: Iterator[Any] = (torch.cat(rows) for rows in zip(*sources, strict=True))
            return _stack(model, full_layer_name, each, missing_keys)
        collected: dict[str, Any] = dict(zip(self._sources, map(list, sources), strict=True))
        more |= {"source_patterns": self._sources, "full_layer_name": full_layer_name}
        for operation in self._operations:
            collected = operation.convert(collected, model=model, missing_keys=missing_keys, **more)
        return {
            name: parameter(weight[0] if isinstance(weight, list) else weight) for name, weight in collected.items()
        }

    def _weights(self, lists: dict[str, list[Tensor]], where: str) -> Iterator[Int8Tensor]:
        counts = {len(tensors) for tensors in lists.values()}
        if len(counts) != 1:
            raise ValueError(f"{where}: expected the same tensors of every weight, got {sorted(counts)} of them")
        for index in range(counts.pop()):
            parts = {part: tensors[index] for part, tensors in lists.items()}
            for part, tensors in lists.items():
                tensors[index] = torch.empty(0)  # let go of what is packed now
                if part != names.CODES:
                    parts[part] = parts[part].clone()  # a tensor of a mapped file would hold the map
            weight, options, dtype = names.assemble(parts, where)
            for name in OF_THE_WEIGHT:
                if self._given.get(name, getattr(options, name)) != getattr(options, name):
                    raise ValueError(
                        f"{where}: {name}: expected {getattr(options, name)!r}, in which the weight is stored, got "
                        f"{self._given[name]!r}: convert the 16-bit model"
                    )
            options = replace(options, **self._given)
            dtype_now = self.dtype or getattr(torch, dtype or "float32")
            yield self._finish(where, Int8Tensor.from_int8_weight(weight, dtype_now, options))


def stack_target(stacked: Iterable[str]) -> Target:
    """Of the weights of experts as `save_pretrained` names them: ``experts.gate_up_proj.0``, once with ``.weight``."""
    known = {tuple(name.split(".")[-2:]) for name in stacked}
    form = re.compile(r"(.+)\.\d+(\.weight)?")

    def target(weight: str) -> tuple[str, int] | None:
        match = form.fullmatch(weight)
        return (match[1], 0) if match and tuple(match[1].split(".")[-2:]) in known else None

    return target


def converter_target(converter: WeightConverter) -> Target:
    """Of the weights that a converter of the model takes."""

    def target(weight: str) -> tuple[str, int] | None:
        name, pattern = converter.rename_source_key(weight)
        return None if pattern is None else (name, converter.source_patterns.index(pattern))

    return target
