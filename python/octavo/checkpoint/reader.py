"""Int8 checkpoints, octavo's and bitsandbytes', tensor by tensor."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from octavo._types import Array
from octavo.checkpoint import format as names
from octavo.checkpoint.format import Options, options_of
from octavo.checkpoint.source import Shard, Source, open_source
from octavo.checkpoint.tensors import NUMPY_DTYPES, Entry, read_all
from octavo.weight import Int8Weight

Framework = Literal["torch", "numpy"]


@dataclass(frozen=True)
class Int8Layer:
    """Where the tensors of an int8 layer are, by their names after the layer's, and whose format they have."""

    name: str
    parts: dict[str, Entry]
    format: Literal["octavo", "bitsandbytes"]


def int8_layers(entries: dict[str, Entry]) -> dict[str, Int8Layer]:
    """The int8 layers among tensors, by name: an int8 weight beside octavo's scale or bitsandbytes' SCB.

    Raises ValueError for an int8 weight beside neither, and for parts whose shapes or dtypes do not fit.
    """
    layers = {}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != names.WEIGHT or entry.dtype != "I8":
            continue
        known = (names.SCALE, names.ZEROPOINT, names.OUTLIER_COLUMNS, names.OUTLIER_WEIGHT, names.EXTRA_STATE)
        for format, needed, optional in (
            ("octavo", (names.SCALE, names.EXTRA_STATE), known),
            ("bitsandbytes", (names.BNB_ABSMAX,), (names.BNB_ABSMAX, names.BNB_LAYOUT)),
        ):
            if all(f"{layer}.{part}" in entries for part in needed):
                parts = {part: entries[f"{layer}.{part}"] for part in optional if f"{layer}.{part}" in entries}
                layers[layer] = Int8Layer(layer, {names.WEIGHT: entry, **parts}, format)  # type: ignore[arg-type]
                _check_parts(layers[layer])
                break
        else:
            raise ValueError(
                f"{entry.path}: {name}: expected {layer}.{names.SCALE} and {layer}.{names.EXTRA_STATE} (octavo) or "
                f"{layer}.{names.BNB_ABSMAX} (bitsandbytes) beside an int8 weight, got neither"
            )
    return layers


def _check_parts(layer: Int8Layer) -> None:
    weight = layer.parts[names.WEIGHT]
    if len(weight.shape) != 2:
        raise ValueError(f"{weight.path}: {weight.name}: expected rank 2, got shape {list(weight.shape)}")
    n = weight.shape[0]
    columns = layer.parts.get(names.OUTLIER_COLUMNS)
    r = columns.shape[0] if columns and len(columns.shape) == 1 else -1
    expected: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
        names.SCALE: (("F32",), ((n,), (1,))),
        names.ZEROPOINT: (("F32",), ((n,), (1,))),
        names.OUTLIER_COLUMNS: (("I32",), ((r,),)),
        names.OUTLIER_WEIGHT: (("F32", "F16", "BF16"), ((n, r),)),
        names.BNB_ABSMAX: (("F32",), ((n,),)),
    }
    for part, (dtypes, shapes) in expected.items():
        entry = layer.parts.get(part)
        if entry and (entry.dtype not in dtypes or entry.shape not in shapes):
            wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
            raise ValueError(f"{entry.path}: {entry.name}: expected {wanted}, got {entry.dtype} {list(entry.shape)}")


class Checkpoint:
    """A checkpoint, opened: names and shapes at once, data when asked for.

    Args:
        path: a folder or a file, as `quantize` takes and makes them.
        framework: of the arrays: "torch" or "numpy" (which has no bfloat16).
        verify: compare each tensor that is read with its CRC-32, where the file has one. `Checkpoint.verify` does so
            in any case.

    Raises OSError or ValueError, naming the file and where possible the tensor, for one that is missing, truncated or
    corrupt.
    """

    def __init__(self, path: str | Path, *, framework: Framework = "torch", verify: bool = True) -> None:
        if framework not in ("torch", "numpy"):
            raise ValueError(f"Checkpoint: framework: expected 'torch' or 'numpy', got {framework!r}")
        self.source: Source = open_source(path)
        self.entries = self.source.entries
        self.layers = int8_layers(self.entries)
        self.framework = framework
        self._compare = verify
        self.ties: dict[str, str] = {}
        self._crc32: dict[str, int] = {}
        for shard in self.source.shards:
            self.ties.update(_ties(shard))
            self._crc32.update(_checksums(shard))

    def tensor(self, name: str) -> Array:
        """One tensor as it is stored. Raises KeyError for an unknown name, ValueError where its checksum differs."""
        entry = self.entries[self.ties.get(name, name)]
        array = self._read(entry)
        return self._native(array, entry)

    def weight(self, layer: str) -> Int8Weight:
        """The weight of an int8 layer. Raises KeyError for a layer that is not one."""
        parts = self.layers[layer].parts
        if self.layers[layer].format == "bitsandbytes":
            return self._bitsandbytes_weight(parts)
        options = self.options(layer)
        arrays = {part: self._native(self._read(entry), entry) for part, entry in parts.items()}
        return Int8Weight(
            arrays[names.WEIGHT],
            arrays[names.SCALE],
            zeropoint=arrays.get(names.ZEROPOINT),
            outlier_columns=arrays.get(names.OUTLIER_COLUMNS),
            outlier_weight=arrays.get(names.OUTLIER_WEIGHT),
            scheme=options.scheme,
            granularity=options.granularity,
        )

    def options(self, layer: str) -> Options:
        """How an int8 layer was made and is to be run; the defaults for one of bitsandbytes."""
        entry = self.layers[layer].parts.get(names.EXTRA_STATE)
        if entry is None:
            return Options()
        return options_of(self._read(entry).tobytes(), f"{entry.path}: {entry.name}")

    def items(self) -> Iterator[tuple[str, Int8Weight | Array]]:
        """Every parameter: ``<layer>.weight`` of int8 layers as an `Int8Weight`, all else as an array.

        One is read at a time. Tied names come after the one they share, and with the same object.
        """
        sharers: dict[str, list[str]] = {}
        for name, first in self.ties.items():
            sharers.setdefault(first, []).append(name)
        inside = {
            entry.name for layer in self.layers.values() for part, entry in layer.parts.items() if part != names.WEIGHT
        }
        for name in self.entries:
            if name in inside or name in self.ties:
                continue
            layer = name.rpartition(".")[0]
            is_int8 = layer in self.layers and self.layers[layer].parts[names.WEIGHT].name == name
            value = self.weight(layer) if is_int8 else self.tensor(name)
            yield name, value
            for other in sharers.get(name, ()):
                yield other, value

    def state_dict(self) -> dict[str, Array]:
        """All tensors as they are stored, tied names included: what ``load_state_dict`` takes."""
        state = {name: self.tensor(name) for name in self.entries if name not in self.ties}
        return {**state, **{name: state[first] for name, first in self.ties.items()}}

    @property
    def checksums(self) -> int:
        """How many tensors have a checksum."""
        return len(self._crc32)

    def verify(self) -> int:
        """Read all tensors that have a checksum; returns how many. Raises ValueError naming the first that differs."""
        for name in self._crc32:
            self._read(self.entries[name], compare=True)
        return len(self._crc32)

    def _bitsandbytes_weight(self, parts: dict[str, Entry]) -> Int8Weight:
        layout = parts.get(names.BNB_LAYOUT)
        if layout is not None and int(self._read(layout)) != names.BNB_ROW_MAJOR:
            raise ValueError(
                f"{layout.path}: {layout.name}: expected 0 (row-major codes), got {int(self._read(layout))}: load and "
                "save the model with a recent bitsandbytes"
            )
        weight, absmax = parts[names.WEIGHT], parts[names.BNB_ABSMAX]
        codes = self._native(self._read(weight), weight)
        return Int8Weight(codes, self._native(self._read(absmax) / np.float32(127), absmax))

    def _read(self, entry: Entry, *, compare: bool | None = None) -> Any:
        """A tensor's data, compared with its checksum where there is one and `compare`, or else `verify`, says so."""
        array: Any
        file = os.open(entry.path, os.O_RDONLY)
        try:
            array = read_all(file, entry)
        finally:
            os.close(file)
        expected = self._crc32.get(entry.name)
        if expected is not None and (self._compare if compare is None else compare):
            found = zlib.crc32(memoryview(array))
            if found != expected:
                raise ValueError(
                    f"{entry.path}: {entry.name}: expected data with CRC-32 {expected:08x}, got {found:08x}: corrupt"
                )
        return array

    def _native(self, array: Any, entry: Entry) -> Array:
        if self.framework == "numpy":
            if entry.dtype not in NUMPY_DTYPES or entry.dtype == "BF16":
                raise TypeError(f"{entry.name}: expected a dtype of NumPy, got {entry.dtype}: use framework='torch'")
            return array
        torch = _torch()
        tensor = torch.from_numpy(array)
        return tensor.view(getattr(torch, _TORCH_DTYPES[entry.dtype])) if entry.dtype in _TORCH_DTYPES else tensor


_TORCH_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def load(path: str | Path, *, framework: Framework = "torch", verify: bool = True) -> dict[str, Int8Weight | Array]:
    """A whole checkpoint: `Checkpoint.items` as a dict.

    >>> octavo.checkpoint.load("opt-125m-int8")["model.decoder.layers.0.fc1.weight"]     # doctest: +SKIP
    Int8Weight(shape=(3072, 768), scheme='absmax', granularity='vector')
    """
    return dict(Checkpoint(path, framework=framework, verify=verify).items())


def _ties(shard: Shard) -> dict[str, str]:
    try:
        ties = json.loads(shard.metadata.get(names.TIED_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"{shard.path}: expected {names.TIED_KEY} as JSON, got {error}: corrupt") from error
    if not isinstance(ties, dict) or not all(isinstance(first, str) for first in ties.values()):
        raise ValueError(f"{shard.path}: expected {names.TIED_KEY} as a JSON object of names, got {ties!r}: corrupt")
    for first in ties.values():
        if first not in shard.entries:
            raise ValueError(f"{shard.path}: {names.TIED_KEY}: expected tensors of this file, got {first!r}")
    return {**shard.ties, **ties}


def _checksums(shard: Shard) -> dict[str, int]:
    text = shard.metadata.get(names.CRC32_KEY)
    if text is None:
        return {}
    try:
        checksums = {name: int(crc, 16) for name, crc in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{shard.path}: expected {names.CRC32_KEY} as JSON, got {error}: corrupt") from error
    if set(checksums) != set(shard.entries):
        raise ValueError(f"{shard.path}: expected a checksum of every tensor, got others: corrupt")
    return checksums


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(
            "framework='torch' needs PyTorch: pip install \"octavo[torch]\", or use framework='numpy'"
        ) from error
    return torch
