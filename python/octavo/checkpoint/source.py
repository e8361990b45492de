"""A checkpoint as it lies on disk: its files, tensors, ties and config.

The layout is Hugging Face's: a folder with ``model.safetensors``, or ``model.safetensors.index.json`` and shards, or
``pytorch_model.bin`` likewise, and ``config.json``. A single file of any name works too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo._sizes import shown
from octavo.checkpoint.files import Entry, Shard, explained, identity, open_shard

JOB = ".octavo-job.json"  # of an output that is not finished: what it is the beginning of

_STEMS = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_NAMES = [name for stem in _STEMS for name in (f"{stem}.index.json", stem)]
# Of a model's folder, everything is copied but weights in whatever format.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".tflite")
_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w\d|lokr_w\d|oft_r|vera_\w+)\b"
)


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        shards: in the order of their names.
        config: the content of config.json, empty where there is none.
        companions: the other files that belong to the model, by their path in its folder.
        elsewhere: links in its folder to files that are not the model's, which are not copied.
        identities: of the files that were read, to be compared when a conversion is done.
    """

    shards: list[Shard]
    config: dict[str, Any]
    companions: dict[str, Path] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    identities: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}

    def check_unchanged(self) -> None:
        """Raise RuntimeError, naming the file, where one is no longer what it was when it was opened."""
        for path, before in self.identities.items():
            if not path.exists() or identity(path) != before:
                raise RuntimeError(f"{path}: expected a file at rest, got one that changed meanwhile: run again")


def open_source(model: str | Path) -> Source:
    """Find and check the files of a checkpoint; no tensor of a safetensors file is read.

    Args:
        model: a folder, a weights file, or an index file.

    Raises:
        OSError: a file that is not there or cannot be read.
        ValueError: naming file and tensor: no regular file, truncated, corrupt, unknown format, a tensor twice, an
            index that does not fit; an adapter; a folder of several models.
    """
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    weights = _weights_file(path) if path.is_dir() else path
    if not weights.exists():
        raise FileNotFoundError(f"{weights}: expected a checkpoint (a folder or a file), got nothing of that name")
    is_index = weights.name.endswith(".index.json")
    read = [weights, *([folder / "config.json"] if (folder / "config.json").exists() else [])]
    identities = {each: identity(each) for each in read}
    paths, listed = _indexed(weights) if is_index else ([weights], {})
    identities |= {each: identity(each) for each in paths}
    shards = [open_shard(shard) for shard in paths]

    owners: dict[str, Path] = {}
    for shard in shards:
        for name, entry in shard.entries.items():
            if owners.setdefault(name, shard.path) != shard.path:
                raise ValueError(f"{entry.where}: expected each tensor once, got it in {owners[name].name} too")
            if _ADAPTER.search(name):
                raise ValueError(f"{entry.where}: expected a model, got an adapter: {_MERGE}")
    for name, shard_path in listed.items():
        if owners.get(name) != shard_path:
            raise ValueError(f"{shard_path}: {shown(name)}: expected the tensor that {weights.name} lists, got none")
    companions, elsewhere = _companions(folder) if path.is_dir() else ({}, [])
    return Source(shards, _read_json(folder / "config.json"), companions, elsewhere, identities)


_MERGE = "merge it into its model first (PEFT's merge_and_unload), or load the int8 model and then the adapter"


def _weights_file(folder: Path) -> Path:
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: expected a model, got an adapter (adapter_config.json): {_MERGE}")
    for name in _NAMES:
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    parts = sorted({path.parent.name for stem in _STEMS for path in folder.glob(f"*/{stem}*")})
    if parts:
        raise ValueError(f"{folder}: expected one model, got a folder of several: convert each: {', '.join(parts)}")
    raise FileNotFoundError(f"{folder}: expected one of {', '.join(_NAMES)}, got {len(found)} .safetensors files")


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards that an index names, and the shard of each tensor."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: expected an index with a weight_map, got a file without")
    for tensor, file in weight_map.items():
        if Path(file).name != file:
            raise ValueError(f"{index}: expected names of files beside it, got {shown(repr(file))}")
        if not (index.parent / file).exists():
            raise FileNotFoundError(
                f"{index.parent / file}: {shown(tensor)}: expected the shard that {index.name} names, got none"
            )
    paths = [index.parent / file for file in sorted(set(weight_map.values()))]
    return paths, {tensor: index.parent / file for tensor, file in weight_map.items()}


def _read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no file."""
    if not path.exists():
        return {}
    identity(path)
    try:
        with explained(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _companions(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """See `Source`. Weights in folders below are the model's where a modules.json says so (sentence-transformers)."""
    found: dict[str, Path] = {}
    elsewhere = []
    has_modules = (folder / "modules.json").exists()
    home = [folder.resolve(), *(parent.resolve() for parent in (folder / "../blobs", folder / "../../blobs"))]
    outputs: set[Path] = set()  # folders below that hold an int8 model, begun or finished
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink() and _is_output(path):
            outputs.add(path)
        is_module = has_modules and len(relative.parts) > 1 and path.name in _STEMS
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if (
            not path.is_file()
            or (is_weights and not is_module)
            or any(part.startswith(".") for part in relative.parts)
            or not outputs.isdisjoint(path.parents)
        ):
            continue
        # Hugging Face's cache keeps files in ../../blobs, and links to them here.
        if any(path.resolve().is_relative_to(own) for own in home):
            found[str(relative)] = path
        else:
            elsewhere.append(str(relative))
    return found, elsewhere


def _is_output(folder: Path) -> bool:
    """Whether a conversion made, or is making, this folder: not what belongs to the model that it lies in."""
    if (folder / JOB).exists():
        return True
    try:
        return "quantization_config" in _read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
