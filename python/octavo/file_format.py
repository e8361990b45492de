"""The names and the JSON of int8 checkpoints: the one place that writes and reads them.

Version 2. An int8 weight ``<name>`` ("model.layers.0.mlp.up_proj.weight") is stored as the tensors ``<name>.codes``,
``<name>.scale``, ...: see `PARTS`. There is no tensor ``<name>``, so that a reader without octavo finds no weight to
mistake codes for. Version 1 (``<layer>.weight`` int8 beside ``<layer>.scale``, ...) and bitsandbytes' Linear8bitLt
(``<layer>.weight`` int8 beside ``<layer>.SCB``) are read, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from octavo._sizes import shown
from octavo._types import rotated_size
from octavo.options import Options
from octavo.weight import Int8Weight

VERSION = 2
READABLE_VERSIONS = (1, 2)

CODES, SCALE, ZEROPOINT, OPTIONS = "codes", "scale", "zeropoint", "options"
OUTLIER_COLUMNS, OUTLIER_WEIGHT = "outlier_columns", "outlier_weight"
IN_FEATURES = "in_features"  # in the JSON, where rotation has padded the codes
PARTS = (CODES, SCALE, ZEROPOINT, OUTLIER_COLUMNS, OUTLIER_WEIGHT, OPTIONS)
# The parts of version 1 and of bitsandbytes by the last word of their names, which follows the layer's.
PARTS_OF_VERSION_1 = {
    "weight": CODES, "scale": SCALE, "zeropoint": ZEROPOINT, "outlier_columns": OUTLIER_COLUMNS,
    "outlier_weight": OUTLIER_WEIGHT, "_extra_state": OPTIONS,
}  # fmt: skip
ABSMAX, LAYOUT = "absmax", "layout"
PARTS_OF_BITSANDBYTES = {"weight": CODES, "SCB": ABSMAX, "weight_format": LAYOUT}
ROW_MAJOR = 0  # bitsandbytes' layout

# Keys of a file's metadata: JSON but for the first. CRC-32 by tensor, names that share a tensor, layers that stay and
# why, and what a file was made of.
VERSION_KEY, CRC32_KEY, TIED_KEY = "octavo.format_version", "octavo.crc32", "octavo.tied"
KEPT_KEY, MADE_OF_KEY = "octavo.kept", "octavo.made_of"
METADATA: Mapping[str, str] = {"format": "pt", VERSION_KEY: str(VERSION)}  # "format" is for Transformers

# Transformers refuses a model without a quant_method. One that it does not know, it loads with a warning, and makes new
# weights up: that it must not do where octavo.transformers, which fills this in, is not known.
HEAD: Mapping[str, Any] = {"quant_method": None, "octavo": "load with: import octavo.transformers"}


def quantization_config(options: Options, kept: Iterable[str], *, bitsandbytes: bool) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, so that a reader knows what it has before it.

    Args:
        options: of the layers; a reader may choose others for what they compute with.
        kept: linear layers that stay in 16 bit.
        bitsandbytes: in its format, with the keys that Transformers writes for it.
    """
    left = sorted({*kept, "lm_head"})  # tied heads are in no file
    if bitsandbytes:
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": options.threshold,
            "llm_int8_skip_modules": left,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }
    return {**HEAD, "format_version": VERSION, **options.to_dict(), "modules_to_not_convert": left}


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeight:
    """An int8 weight among the tensors of a checkpoint.

    Attributes:
        name: "<layer>.weight"; what the weight had before it was quantized.
        format: whose it is.
        parts: by part the name of its tensor.
    """

    name: str
    format: Literal["octavo", "bitsandbytes"]
    parts: dict[str, str]


def stored_name(weight: str, part: str, format: Literal["octavo", "bitsandbytes"] = "octavo") -> str:
    """The name of the tensor that holds a part of a weight."""
    if format == "octavo":
        return f"{weight}.{part}"
    word = next(word for word, own in PARTS_OF_BITSANDBYTES.items() if own == part)
    return f"{weight.removesuffix('.weight')}.{word}"


def find_weights(dtypes: Mapping[str, str]) -> dict[str, StoredWeight]:
    """The int8 weights among tensors, by name.

    Args:
        dtypes: of the tensors by name, as safetensors spells them.

    Raises:
        ValueError: int8 codes without the tensors that belong to them.
    """
    found = {}
    for name, dtype in dtypes.items():
        base, _, leaf = name.rpartition(".")
        if dtype != "I8" or leaf not in (CODES, "weight"):
            continue
        version_1: dict[str, str] = {part: word for word, part in PARTS_OF_VERSION_1.items()}
        theirs = {part: word for word, part in PARTS_OF_BITSANDBYTES.items()}
        for format, weight, words, needed in (
            ("octavo", base, {part: part for part in PARTS}, (SCALE, OPTIONS)),
            ("octavo", name, version_1, (SCALE, OPTIONS)),
            ("bitsandbytes", name, theirs, (ABSMAX,)),
        ):
            if words[CODES] == leaf and all(f"{base}.{words[part]}" in dtypes for part in needed):
                parts = {part: f"{base}.{word}" for part, word in words.items() if f"{base}.{word}" in dtypes}
                found[weight] = StoredWeight(weight, format, parts)  # type: ignore[arg-type]
                break
        else:
            theirs_or = "" if leaf == CODES else f" (octavo), or {base}.SCB (bitsandbytes),"
            needs = f"{base}.{SCALE} and {base}.{OPTIONS if leaf == CODES else '_extra_state'}{theirs_or}"
            raise ValueError(f"{shown(name)}: expected {shown(needs, 400)} beside int8 codes, got none")
    return found


# --- parts ------------------------------------------------------------------------------------------------------------


def encode_options(options: Options, dtype: str, in_features: int | None = None) -> bytes:
    """The JSON of ``<name>.options``.

    Args:
        options: of the layer.
        dtype: of the weight before it was quantized: "float32", "float16" or "bfloat16".
        in_features: its columns, k, where they are known: noted where rotation makes more codes of them.
    """
    is_padded = in_features is not None and in_features != rotated_size(in_features, options.rotation)
    more = {IN_FEATURES: in_features} if is_padded else {}
    return json.dumps({"format_version": VERSION, "dtype": dtype, **more, **options.to_dict()}).encode()


def decode_options(data: bytes, where: str) -> tuple[Options, str | None]:
    """What `encode_options` wrote, or version 1, which does not say a dtype (None).

    Raises:
        ValueError: names `where`; no JSON of octavo's, or a newer version.
    """
    try:
        fields = json.loads(data)
        version = fields.pop("format_version")
        dtype = fields.pop("dtype", None)
        fields.pop(IN_FEATURES, None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = shown(repr(error))
        raise ValueError(f"{where}: expected octavo's options as JSON, got {said}: corrupt") from error
    if version not in READABLE_VERSIONS:
        raise ValueError(f"{where}: expected format_version 1 or 2, got {version!r:.50}: update octavo")
    if dtype not in (("float32", "float16", "bfloat16") if version == VERSION else (None,)):
        raise ValueError(f"{where}: expected dtype float32, float16 or bfloat16, got {dtype!r:.50}: corrupt")
    return Options.from_dict(fields, where), dtype


def disassemble(weight: Int8Weight, options: Options, dtype: str) -> dict[str, Any]:
    """The tensors to store for a weight, by part: arrays of its framework (of NumPy's or PyTorch's)."""
    parts = {
        CODES: weight.codes,
        SCALE: weight.scale,
        ZEROPOINT: weight.zeropoint,
        OUTLIER_COLUMNS: weight.outlier_columns,
        OUTLIER_WEIGHT: weight.outlier_weight,
    }
    shape: Any = weight.shape
    encoded = np.frombuffer(bytearray(encode_options(options, dtype, int(shape[1]))), np.uint8)
    return {name: array for name, array in parts.items() if array is not None} | {
        OPTIONS: _beside(weight.scale, encoded)
    }


def assemble(parts: Mapping[str, Any], where: str, **more: Any) -> tuple[Int8Weight, Options, str | None]:
    """The weight that is stored in `parts`, its options, and the dtype that it had (None where no part says it).

    Args:
        parts: by part: those of version 1 or 2, or of bitsandbytes; arrays of one framework.
        where: the file and the weight, for errors.
        more: arguments of `octavo.Int8Weight`.

    Raises:
        ValueError: names `where` and the part; one that is missing or unknown, whose shape or dtype does not fit, or
            whose values cannot be: see `_check_values`.
    """
    given = dict(parts)
    in_features: int | None = None
    try:
        codes = given.pop(CODES)
        if ABSMAX in given:
            options, dtype = Options(), None
            layout = given.pop(LAYOUT, None)
            if layout is not None and int(layout) != ROW_MAJOR:
                raise ValueError(
                    f"{where}: weight_format: expected 0 (row-major codes), got {int(layout)}: load and save the "
                    "model with a recent bitsandbytes"
                )
            given[SCALE] = _beside(codes, _on_host(given.pop(ABSMAX)) / np.float32(127))
        else:
            encoded = bytes(_on_host(given.pop(OPTIONS)))
            options, dtype = decode_options(encoded, f"{where}: {OPTIONS}")
            in_features = json.loads(encoded).get(IN_FEATURES)
        scale = given.pop(SCALE)
    except KeyError as error:
        raise ValueError(f"{where}: expected a tensor {error}, got none") from error
    kept = {name: given.pop(name, None) for name in (ZEROPOINT, OUTLIER_COLUMNS, OUTLIER_WEIGHT)}
    if given:
        raise ValueError(f"{where}: expected the tensors of an int8 weight, got {next(iter(given))!r:.50}")
    if len(codes.shape) != 2:
        raise ValueError(f"{where}: {CODES}: expected rank 2, got shape {list(codes.shape)}")
    if in_features is not None and (type(in_features) is not int or in_features < 0):
        raise ValueError(f"{where}: {OPTIONS}: expected in_features as a number, got {in_features!r:.50}: corrupt")
    shape = (int(codes.shape[0]), int(codes.shape[1]) if in_features is None else in_features)
    _check_values({SCALE: scale, **kept}, shape[1], where)
    try:
        how: Any = {"scheme": options.scheme, "granularity": options.granularity, "rotation": options.rotation, **more}
        how["shape"] = None if in_features is None else shape
        weight = Int8Weight(codes, scale, **kept, **how)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return weight, options, dtype


def _check_values(parts: Mapping[str, Any], k: int, where: str) -> None:
    """Raise ValueError, naming `where` and the part, for values that no quantization of a weight ``[n, k]`` gives.

    Scales are finite and not negative, zeropoints integers, outlier columns ascending without repetitions, in [0, k).
    """
    expectations: dict[str, tuple[str, Callable[[Any], Any]]] = {
        SCALE: ("finite numbers >= 0", lambda values: np.isfinite(values) & (values >= 0)),
        ZEROPOINT: ("integers", lambda values: np.isfinite(values) & (values == np.rint(values))),
        OUTLIER_COLUMNS: (
            f"ascending columns in [0, {k})",
            lambda values: (np.diff(values.astype(np.int64), prepend=-1) > 0) & (values < k),
        ),
    }
    for part, (expected, holds) in expectations.items():
        if parts.get(part) is None:
            continue
        values = _on_host(parts[part])
        wrong = values.ravel()[~holds(values.ravel())]
        if len(wrong):
            raise ValueError(f"{where}: {part}: expected {expected}, got {wrong[0]}: corrupt")


def _on_host(array: Any) -> Any:
    """A small array, as one of NumPy's."""
    return array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)


def _beside(array: Any, values: Any) -> Any:
    """Values of NumPy as an array of the framework and on the device of `array`."""
    if not hasattr(array, "detach"):
        return values
    import torch

    return torch.from_numpy(values).to(array.device)
