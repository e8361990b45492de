"""`Checkpoint`: tensors and int8 weights of octavo's, bitsandbytes' and 16/32-bit checkpoints, one by one."""

import json
import re
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from octavo import file_format as names
from octavo._text import expect, expect_choice, shown, unexpected
from octavo._types import Array
from octavo.checkpoint.files import DTYPES, Entry, Shard, check_unchanged, identity, open_shard, opened
from octavo.checkpoint.folder import MERGE, read_index, read_json, weights_file
from octavo.file_format import StoredWeight
from octavo.options import Options
from octavo.weight import Int8Weight

Framework = Literal["torch", "numpy"]

_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w\d|lokr_w\d|oft_r|vera_\w+)\b"
)


class Checkpoint:
    """A checkpoint, opened: names, shapes and scales at once, other data when asked for.

    Args:
        path: a folder, a weights file, or an index file: as `quantize` takes and makes them.
        framework: of the arrays: "torch" or "numpy" (which has no bfloat16).
        verify: compare each tensor that is read with its CRC-32, where the file has one. `Checkpoint.verify` does so
            in any case.

    Attributes:
        shards: the files, in the order of their names.
        config: the content of config.json, empty where there is none.
        entries: every tensor that is stored, by name: its dtype, its shape and where it lies.
        layers: the int8 weights by the name of their layer.
        ties: by name of a tensor that shares the data of another, that one's name.
        kept: by name of a linear layer that stayed in 16 bit, why; where the file says so.
        measured: what was measured of the model when it was quantized, by name (`octavo.checkpoint.choose_options`).
        checksums: how many tensors have one.

    Raises OSError or ValueError, naming the file and where possible the tensor, for one that is missing, no regular
    file, truncated or corrupt; an index that does not fit; an adapter; a folder of several models; parts of an int8
    weight that are missing or do not fit each other, and values in them that no quantization gives.
    """

    def __init__(self, path: str | Path, *, framework: Framework = "torch", verify: bool = True) -> None:
        expect("Checkpoint: path", path, (str, PathLike), "a path")
        expect_choice("Checkpoint: framework", framework, get_args(Framework))
        self.framework = framework
        self._compare = verify
        weights = weights_file(Path(path))
        config = weights.parent / "config.json"
        self._identities = {each: identity(each) for each in (weights, config) if each == weights or each.exists()}
        listed = read_index(weights) if weights.name.endswith(".index.json") else {}
        files = sorted(set(listed.values())) or [weights]
        self._identities |= {file: identity(file) for file in files}
        self.config = read_json(config) if config in self._identities else {}
        self.shards = [open_shard(file) for file in files]
        self.entries: dict[str, Entry] = {}
        for name, entry in (pair for shard in self.shards for pair in shard.entries.items()):
            if self.entries.setdefault(name, entry) is not entry:
                raise unexpected(entry.where, "each tensor once", f"it in {self.entries[name].path.name} too")
            if _ADAPTER.search(name):
                raise unexpected(entry.where, "a model", f"an adapter: {MERGE}")

        def noted(key: str) -> dict[str, str]:
            return {name: value for shard in self.shards for name, value in _names(shard, key).items()}

        self.kept, self.measured, self._crc32 = map(noted, (names.KEPT_KEY, names.MEASURED_KEY, names.CRC32_KEY))
        self.ties = {name: first for shard in self.shards for name, first in shard.ties.items()} | noted(names.TIED_KEY)
        self.checksums = len(self._crc32)
        for name, file in listed.items():
            if name not in self.entries or self.entries[name].path != file:
                raise unexpected(f"{file}: {shown(name)}", f"the tensor that {weights.name} lists", "none")
        for first in self.ties.values():
            if first not in self.entries:
                raise unexpected(f"{path}: {names.TIED_KEY}", "tensors of this file", repr(first))
        try:
            stored = names.find_weights({n: entry.dtype for n, entry in self.entries.items() if n not in self.ties})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.layers = {name.removesuffix(".weight"): weight for name, weight in stored.items()}
        self._checked = {layer: self._check_parts(weight) for layer, weight in self.layers.items()}

    def tensor(self, name: str) -> Array:
        """One tensor as it is stored. Raises KeyError for an unknown name, ValueError where its checksum differs."""
        entry = self.entries[self.ties.get(name, name)]
        return self._native(self._read(entry), entry)

    def weight(self, layer: str) -> Int8Weight:
        """The weight of an int8 layer. Raises KeyError for a layer that is not one."""
        stored = self.layers[layer]
        return names.assemble({part: self.tensor(name) for part, name in stored.parts.items()}, self._where(stored))[0]

    def shape(self, layer: str) -> tuple[int, int]:
        """Output and input features ``(n, k)`` of an int8 layer."""
        return self._checked[layer][0]

    def options(self, layer: str) -> Options:
        """How an int8 layer was made and is to be run; the defaults for one of bitsandbytes."""
        return self._checked[layer][1]

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

    def verify(self) -> int:
        """Read all tensors that have a checksum; returns how many. Raises ValueError naming the first that differs."""
        for shard in self.shards:
            with opened(shard.path) as file:
                for name in _names(shard, names.CRC32_KEY):
                    crc32 = 0
                    for chunk in shard.entries[name].chunks(file):
                        crc32 = zlib.crc32(chunk, crc32)
                    self._check(shard.entries[name], crc32)
        return self.checksums

    def check_unchanged(self, *files: Path) -> None:
        """Raise RuntimeError, naming it, where one of the files, or of all, is no longer what it was when opened."""
        check_unchanged({path: self._identities[path] for path in files or self._identities})

    def _check_parts(self, stored: StoredWeight) -> tuple[tuple[int, int], Options]:
        """Shape and options of a weight, whose parts are checked as far as can be told without reading large ones."""
        entries = {part: self.entries[name] for part, name in stored.parts.items()}
        parts: dict[str, Any] = {}
        for part, entry in entries.items():
            # In place of large ones zeros that nobody touches, of a dtype that is refused where its own is.
            dtype = "<f2" if entry.dtype == "BF16" else DTYPES[entry.dtype][0]
            is_large = part in (names.CODES, names.OUTLIER_WEIGHT)
            parts[part] = np.zeros(entry.shape, dtype) if is_large else self._read(entry)
        parts.setdefault(names.CODE_SUMS, np.zeros(parts[names.CODES].shape[:1], np.int32))
        weight, options, _ = names.assemble(parts, self._where(stored), pack=False)
        return weight.shape, options

    def _where(self, stored: StoredWeight) -> str:
        return f"{self.entries[stored.parts[names.CODES]].path}: {shown(stored.name)}"

    def _read(self, entry: Entry) -> Any:
        """A tensor's data, compared with its checksum where there is one and that is asked for."""
        with opened(entry.path) as file:
            array, flat = entry.read(file)
        if self._compare and entry.name in self._crc32:
            self._check(entry, zlib.crc32(flat))
        return array

    def _check(self, entry: Entry, crc32: int) -> None:
        expected, found = self._crc32[entry.name], f"{crc32:08x}"
        if expected != found:
            raise unexpected(entry.where, f"data with CRC-32 {shown(expected)}", f"{found}: corrupt")

    def _native(self, array: Any, entry: Entry) -> Array:
        if self.framework == "numpy":
            if entry.dtype == "BF16" or entry.dtype.startswith("F8"):
                raise unexpected(entry.where, "a dtype of NumPy", f"{entry.dtype}: use framework='torch'", TypeError)
            return array
        try:
            import torch
        except ImportError as error:
            install = 'pip install "octavo[torch]"'
            raise RuntimeError(f"framework='torch' needs PyTorch: {install}, or use framework='numpy'") from error
        return torch.from_numpy(array).view(getattr(torch, DTYPES[entry.dtype][1]))


def load(path: str | Path, *, framework: Framework = "torch", verify: bool = True) -> dict[str, Int8Weight | Array]:
    """A whole checkpoint: `Checkpoint.items` as a dict.

    >>> octavo.checkpoint.load("opt-125m-int8")["model.decoder.layers.0.fc1.weight"]     # doctest: +SKIP
    Int8Weight(shape=(3072, 768), scheme='absmax', granularity='vector')
    """
    return dict(Checkpoint(path, framework=framework, verify=verify).items())


def _names(shard: Shard, key: str) -> dict[str, str]:
    """The strings by name that a file's metadata have under a key."""
    try:
        found = json.loads(shard.metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise unexpected(shard.path, f"{key} as JSON", f"{error}: corrupt") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise unexpected(shard.path, f"{key} as a JSON object of names", f"{found!r}: corrupt")
    if key == names.CRC32_KEY and found and set(found) != set(shard.entries):
        raise unexpected(shard.path, "a checksum of every tensor", "others: corrupt")
    return found
