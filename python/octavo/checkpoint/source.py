"""A checkpoint as it lies on disk: its files, tensors, ties and config.

The layout is Hugging Face's: a folder with ``model.safetensors``, or ``model.safetensors.index.json`` and shards, or
``pytorch_model.bin`` likewise, and ``config.json``. A single file of any name works too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.checkpoint.format import JOURNAL
from octavo.checkpoint.tensors import Entry, read_header
from octavo.checkpoint.torch_file import read_torch_file

_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# Of a model's folder, everything is copied but weights in whatever format.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".tflite")


@dataclass(frozen=True)
class Shard:
    """One file: its tensors by name, ties (name -> another name of the same data) among them, and its metadata."""

    path: Path
    entries: dict[str, Entry]
    ties: dict[str, str]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A checkpoint. `shards` in the order of their names; `companions`: its folder's other files, by path in it."""

    shards: list[Shard]
    config: dict[str, Any]
    companions: dict[str, Path] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}


def open_source(model: str | Path) -> Source:
    """Find and check the files of a checkpoint; no tensor of a safetensors file is read.

    Args:
        model: a folder, a weights file, or an index file.

    Raises:
        OSError: a file that is not there or cannot be read.
        ValueError: naming file and tensor: truncated, corrupt, unknown format, a tensor twice, an index that does not
            fit.
    """
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    weights = _weights_file(path) if path.is_dir() else path
    if not weights.exists():
        raise FileNotFoundError(f"{weights}: expected a checkpoint (a folder or a file), got nothing of that name")
    paths, listed = _indexed(weights) if weights.name.endswith(".index.json") else ([weights], {})
    shards = [_open_shard(shard) for shard in paths]

    owners: dict[str, Path] = {}
    for shard in shards:
        for name in shard.entries:
            if owners.setdefault(name, shard.path) != shard.path:
                raise ValueError(f"{shard.path}: {name}: expected each tensor once, got it in {owners[name].name} too")
    for name, shard_path in listed.items():
        if owners.get(name) != shard_path:
            raise ValueError(f"{shard_path}: {name}: expected the tensor that {weights.name} lists here, got none")
    return Source(shards, _config(folder), _companions(folder) if path.is_dir() else {})


def _weights_file(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: expected one of {', '.join(_NAMES)}, got {len(found)} .safetensors files")
    return found[0]


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards that an index names, and the shard of each tensor."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected an index with a weight_map, got a file without: {error!r}") from error
    for name in names.values():
        if Path(name).name != name:
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
        if not (index.parent / name).exists():
            tensor = next(tensor for tensor, file in names.items() if file == name)
            raise FileNotFoundError(
                f"{index.parent / name}: {tensor}: expected the shard that {index.name} names, got none"
            )
    return [index.parent / name for name in sorted(set(names.values()))], {
        tensor: index.parent / name for tensor, name in names.items()
    }


def _open_shard(path: Path) -> Shard:
    if path.suffix == ".safetensors":
        entries, metadata = read_header(path)
        # As safetensors.torch.save_model notes a tensor that it stored under another name.
        ties = {name: first for name, first in metadata.items() if first in entries and name not in entries}
        return Shard(
            path, entries | {name: replace(entries[first], name=name) for name, first in ties.items()}, ties, metadata
        )
    if path.suffix in _TORCH_SUFFIXES:
        return Shard(path, *read_torch_file(path), {})
    raise ValueError(f"{path}: expected .safetensors, {', '.join(_TORCH_SUFFIXES)} or .index.json, got {path.suffix!r}")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _companions(folder: Path) -> dict[str, Path]:
    found = {}
    outputs: dict[Path, bool] = {}  # by folder inside of this one, whether it holds an int8 model, begun or finished
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        above = [folder / parent for parent in relative.parents if parent.parts]
        for parent in above:
            if parent not in outputs:
                outputs[parent] = _is_output(parent)
        if any(outputs[parent] for parent in above):
            continue
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not hidden and not weights:
            found[str(relative)] = path
    return found


def _is_output(folder: Path) -> bool:
    """Whether a conversion made, or is making, this folder: not what belongs to the model that it lies in."""
    if (folder / JOURNAL).exists():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "quantization_config" in config
