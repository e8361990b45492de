"""The files of a checkpoint, as Hugging Face lays them out: weights, config.json, and all else.

A folder has ``model.safetensors``, or ``model.safetensors.index.json`` and shards, or ``pytorch_model.bin`` likewise.
A single file of any name works too.
"""

import json
from pathlib import Path
from typing import Any

from octavo._text import shown, unexpected
from octavo.checkpoint.files import explained, identity

JOB = ".octavo-job.json"  # in an output that is not finished: what it is the beginning of
MERGE = "merge it into its model first (PEFT's merge_and_unload), or load the int8 model and then the adapter"

_STEMS = (
    *("model.safetensors", "pytorch_model.bin"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
)
_NAMES = [name for stem in _STEMS for name in (f"{stem}.index.json", stem)]
# Of a model's folder, everything is copied but weights in whatever format.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".tflite")


def weights_file(path: Path) -> Path:
    """The file or the index that a folder's weights are in; a file itself. Raises for none, an adapter, and several."""
    if not path.exists():
        raise unexpected(path, "a checkpoint (a folder or a file)", "nothing of that name", FileNotFoundError)
    if not path.is_dir():
        return path
    if (path / "adapter_config.json").exists():
        raise unexpected(path, "a model", f"an adapter (adapter_config.json): {MERGE}")
    for name in _NAMES:
        if (path / name).exists():
            return path / name
    with explained(path):
        found = sorted(path.glob("*.safetensors"))
        parts = sorted({file.parent.name for stem in _STEMS for file in path.glob(f"*/{stem}*")})
    if len(found) == 1:
        return found[0]
    if parts:
        raise unexpected(path, "one model", f"a folder of several: convert each: {', '.join(parts)}")
    raise unexpected(path, f"one of {', '.join(_NAMES)}", f"{len(found)} .safetensors files", FileNotFoundError)


def read_index(index: Path) -> dict[str, Path]:
    """The shard of each tensor. Raises ValueError or FileNotFoundError for an index that does not fit the files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise unexpected(index, "an index with a weight_map", "a file without")
    for tensor, file in weight_map.items():
        if Path(file).name != file or len(file) > 255:  # no file's name is longer
            raise unexpected(index, "names of files in the same folder", repr(file))
        if not (index.parent / file).exists():
            where = f"{index.parent / file}: {shown(tensor)}"
            raise unexpected(where, f"the shard that {index.name} names", "none", FileNotFoundError)
    return {tensor: index.parent / file for tensor, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError or ValueError where there is none."""
    identity(path)
    try:
        with explained(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise unexpected(path, "JSON", error) from error
    if not isinstance(value, dict):
        raise unexpected(path, "a JSON object", type(value).__name__)
    return value


def companions(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The other files that belong to a model, by their path in its folder; and links to files that are not its own.

    Weights in folders below are the model's where a modules.json says so (sentence-transformers).
    """
    found: dict[str, Path] = {}
    has_modules = (folder / "modules.json").exists()
    # Hugging Face's cache keeps files in ../../blobs, and links to them here.
    home = [folder.resolve(), *(parent.resolve() for parent in (folder / "../blobs", folder / "../../blobs"))]
    outputs: set[Path] = set()  # folders below that hold an int8 model, begun or finished
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink() and _is_output(path):
            outputs.add(path)
        is_module = has_modules and len(relative.parts) > 1 and path.name in _STEMS
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not is_hidden and (is_module or not is_weights) and outputs.isdisjoint(path.parents):
            found[str(relative)] = path
    own = {name for name, path in found.items() if any(path.resolve().is_relative_to(place) for place in home)}
    return {name: found[name] for name in found if name in own}, [name for name in found if name not in own]


def _is_output(folder: Path) -> bool:
    """Whether a conversion made, or is making, this folder: not what belongs to the model that it lies in."""
    try:
        return (folder / JOB).exists() or "quantization_config" in read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
