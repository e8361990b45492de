"""Int8 checkpoints, octavo's and bitsandbytes', tensor by tensor."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from octavo import file_format as names
from octavo._sizes import shown
from octavo._types import Array
from octavo.checkpoint.files import NUMPY_DTYPES, TORCH_DTYPES, Entry, Shard, opened
from octavo.checkpoint.source import Source, open_source
from octavo.file_format import StoredWeight
from octavo.options import Options
from octavo.weight import Int8Weight

Framework = Literal["torch", "numpy"]


class Checkpoint:
    """A checkpoint, opened: names, shapes and scales at once, other data when asked for.

    Args:
        path: a folder or a file, as `quantize` takes and makes them.
        framework: of the arrays: "torch" or "numpy" (which has no bfloat16).
        verify: compare each tensor that is read with its CRC-32, where the file has one. `Checkpoint.verify` does so
            in any case.

    Attributes:
        entries: every tensor that is stored, by name: its dtype, its shape and where it lies.
        layers: the int8 weights by the name of their layer.
        ties: by name of a tensor that shares the data of another, that one's name.
        kept: by name of a linear layer that stayed in 16 bit, why; where the file says so.

    Raises OSError or ValueError, naming the file and where possible the tensor, for one that is missing, truncated or
    corrupt: parts of an int8 weight that are missing or do not fit each other, scales that are negative or not finite,
    zeropoints that are no integers, outlier columns that are not ascending or not in the weight.
    """

    def __init__(self, path: str | Path, *, framework: Framework = "torch", verify: bool = True) -> None:
        if framework not in ("torch", "numpy"):
            raise ValueError(f"Checkpoint: framework: expected 'torch' or 'numpy', got {framework!r}")
        self.source: Source = open_source(path)
        self.entries = self.source.entries
        self.framework = framework
        self._compare = verify
        self.ties: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self._crc32: dict[str, str] = {}
        for shard in self.source.shards:
            self.ties |= {**shard.ties, **_names(shard, names.TIED_KEY)}
            self.kept |= _names(shard, names.KEPT_KEY)
            self._crc32 |= _names(shard, names.CRC32_KEY)
        for first in self.ties.values():
            if first not in self.entries:
                raise ValueError(f"{path}: {names.TIED_KEY}: expected tensors of this file, got {shown(repr(first))}")
        try:
            stored = names.find_weights({n: entry.dtype for n, entry in self.entries.items() if n not in self.ties})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.layers = {name.removesuffix(".weight"): weight for name, weight in stored.items()}
        self._options = {layer: self._checked(weight) for layer, weight in self.layers.items()}

    def tensor(self, name: str) -> Array:
        """One tensor as it is stored. Raises KeyError for an unknown name, ValueError where its checksum differs."""
        entry = self.entries[self.ties.get(name, name)]
        return self._native(self._read(entry), entry)

    def weight(self, layer: str) -> Int8Weight:
        """The weight of an int8 layer. Raises KeyError for a layer that is not one."""
        stored = self.layers[layer]
        return names.assemble({part: self.tensor(name) for part, name in stored.parts.items()}, self._where(stored))[0]

    def options(self, layer: str) -> Options:
        """How an int8 layer was made and is to be run; the defaults for one of bitsandbytes."""
        return self._options[layer]

    def items(self) -> Iterator[tuple[str, Int8Weight | Array]]:
        """Every parameter: int8 weights as an `Int8Weight`, all else as an array.

        One is read at a time. Tied names come after the one they share, and with the same object.
        """
        sharers: dict[str, list[str]] = {}
        for name, first in self.ties.items():
            sharers.setdefault(first, []).append(name)
        parts = {name: weight for weight in self.layers.values() for name in weight.parts.values()}
        for name in self.entries:
            stored = parts.get(name)
            if name in self.ties or (stored and stored.parts[names.CODES] != name):
                continue
            value = self.weight(stored.name.removesuffix(".weight")) if stored else self.tensor(name)
            yield stored.name if stored else name, value
            for other in sharers.get(name, ()):
                yield other.removesuffix(f".{names.CODES}") if stored else other, value

    def state_dict(self) -> dict[str, Array]:
        """All tensors under the names they are stored with, tied ones included."""
        state = {name: self.tensor(name) for name in self.entries if name not in self.ties}
        return {**state, **{name: state[first] for name, first in self.ties.items()}}

    @property
    def checksums(self) -> int:
        """How many tensors have a checksum."""
        return len(self._crc32)

    def verify(self) -> int:
        """Read all tensors that have a checksum; returns how many. Raises ValueError naming the first that differs."""
        for shard in self.source.shards:
            with opened(shard.path) as file:
                for name, expected in _names(shard, names.CRC32_KEY).items():
                    _compare(shard.entries[name], expected, shard.entries[name].crc32(file))
        return len(self._crc32)

    def _checked(self, stored: StoredWeight) -> Options:
        """The options of an int8 weight, whose parts are what `weight` wants as far as can be told without codes."""
        entries = {part: self.entries[name] for part, name in stored.parts.items()}
        parts = {part: _blank(entry) if part in _LARGE else self._read(entry) for part, entry in entries.items()}
        parts[names.CODES] = codes = _blank(entries[names.CODES])
        sums = np.zeros(codes.shape[:1], np.int32)
        return names.assemble(parts, self._where(stored), code_sums=sums, pack=False)[1]

    def _where(self, stored: StoredWeight) -> str:
        return f"{self.entries[stored.parts[names.CODES]].path}: {shown(stored.name)}"

    def _read(self, entry: Entry) -> Any:
        """A tensor's data, compared with its checksum where there is one and that is asked for."""
        with opened(entry.path) as file:
            array, flat = entry.read(file)
        if self._compare and entry.name in self._crc32:
            _compare(entry, self._crc32[entry.name], f"{zlib.crc32(flat):08x}")
        return array

    def _native(self, array: Any, entry: Entry) -> Array:
        if self.framework == "numpy":
            if entry.dtype == "BF16" or entry.dtype.startswith("F8"):
                raise TypeError(f"{entry.where}: expected a dtype of NumPy, got {entry.dtype}: use framework='torch'")
            return array
        try:
            import torch
        except ImportError as error:
            raise RuntimeError(
                "framework='torch' needs PyTorch: pip install \"octavo[torch]\", or use framework='numpy'"
            ) from error
        return torch.from_numpy(array).view(getattr(torch, TORCH_DTYPES[entry.dtype]))


def load(path: str | Path, *, framework: Framework = "torch", verify: bool = True) -> dict[str, Int8Weight | Array]:
    """A whole checkpoint: `Checkpoint.items` as a dict.

    >>> octavo.checkpoint.load("opt-125m-int8")["model.decoder.layers.0.fc1.weight"]     # doctest: +SKIP
    Int8Weight(shape=(3072, 768), scheme='absmax', granularity='vector')
    """
    return dict(Checkpoint(path, framework=framework, verify=verify).items())


_LARGE = (names.CODES, names.OUTLIER_WEIGHT)


def _blank(entry: Entry) -> Any:
    """An array of a tensor's shape, and of a dtype that is refused where its own is, that takes no memory."""
    return np.broadcast_to(np.zeros((), "<f2" if entry.dtype == "BF16" else NUMPY_DTYPES[entry.dtype]), entry.shape)


def _compare(entry: Entry, expected: str, found: str) -> None:
    if found != expected:
        raise ValueError(f"{entry.where}: expected data with CRC-32 {shown(expected)}, got {found}: corrupt")


def _names(shard: Shard, key: str) -> dict[str, str]:
    """The strings by name that a file's metadata have under a key."""
    try:
        found = json.loads(shard.metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shard.path}: expected {key} as JSON, got {shown(str(error))}: corrupt") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{shard.path}: expected {key} as a JSON object of names, got {shown(repr(found))}: corrupt")
    if key == names.CRC32_KEY and found and set(found) != set(shard.entries):
        raise ValueError(f"{shard.path}: expected a checksum of every tensor, got others: corrupt")
    return found
