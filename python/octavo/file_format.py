"""The names and the JSON of int8 weights in files: the one place that writes and reads them.

Version 2. An int8 weight ``<name>`` ("model.layers.0.mlp.up_proj.weight") is stored as the tensors ``<name>.codes``,
``<name>.scale``, ...: see `PARTS`. There is no tensor ``<name>``, so that a reader without octavo finds no weight to
mistake codes for. Version 3 is of weights whose codes are in the order that CPUs multiply (`octavo.Int8Weight.packed`),
with ``<name>.code_sums``. Version 1 (``<layer>.weight`` int8 with ``<layer>.scale``, ...) and bitsandbytes'
Linear8bitLt (``<layer>.weight`` int8 with ``<layer>.SCB``) are read, too.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from octavo._text import shown, unexpected
from octavo._types import on_host, rotated_size, to_framework_of
from octavo.options import Options
from octavo.weight import ARRAYS, Int8Weight

VERSION, PACKED_VERSION = 2, 3
READABLE_VERSIONS = (1, VERSION, PACKED_VERSION)
Format = Literal["octavo", "packed", "bitsandbytes"]

# Of packed codes the sums are stored, too, so that these need not be read to be used.
CODES, SCALE, CODE_SUMS, ZEROPOINT, OUTLIER_COLUMNS, OUTLIER_WEIGHT = ARRAYS
OPTIONS = "options"
PARTS = (CODES, SCALE, ZEROPOINT, OUTLIER_COLUMNS, OUTLIER_WEIGHT, OPTIONS)
# The parts of version 1 and of bitsandbytes by the last word of their names, which follows the layer's.
PARTS_OF_VERSION_1 = {"weight": CODES, **{part: part for part in PARTS[1:-1]}, "_extra_state": OPTIONS}
ABSMAX, LAYOUT = "absmax", "layout"
PARTS_OF_BITSANDBYTES = {"weight": CODES, "SCB": ABSMAX, "weight_format": LAYOUT}
ROW_MAJOR = 0  # bitsandbytes' layout
# Whose parts they are, by the last word of their names, and those that are in any file.
_KINDS: tuple[tuple[Format, Mapping[str, str], set[str]], ...] = (
    ("octavo", {part: part for part in (*PARTS, CODE_SUMS)}, {SCALE, OPTIONS}),
    ("octavo", PARTS_OF_VERSION_1, {SCALE, OPTIONS}),
    ("bitsandbytes", PARTS_OF_BITSANDBYTES, {ABSMAX}),
)

# Keys of a file's metadata: JSON but for the first. CRC-32 by tensor, names that share a tensor, layers that stay and
# why, what was measured of the model, and what a file was made of.
VERSION_KEY, CRC32_KEY, TIED_KEY = "octavo.format_version", "octavo.crc32", "octavo.tied"
KEPT_KEY, MEASURED_KEY, MADE_OF_KEY = "octavo.kept", "octavo.measured", "octavo.made_of"


def metadata(format: Format) -> dict[str, str]:
    """Those of every file; "format" is for Transformers."""
    return {"format": "pt"} | ({} if format == "bitsandbytes" else {VERSION_KEY: str(_version(format))})


def _version(format: Format) -> int:
    return PACKED_VERSION if format == "packed" else VERSION


# Transformers refuses a model without a quant_method. One that it does not know, it loads with a warning, and makes new
# weights up: that it must not do where octavo.transformers, which fills this in, is not known.
HEAD: Mapping[str, Any] = {"quant_method": None, "octavo": "load with: import octavo.transformers"}


def quantization_config(options: Options, kept: Iterable[str], format: Format) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: the layers' options, and which layers are `kept` in 16 bit.

    For "bitsandbytes" the keys are those that Transformers writes for it.
    """
    left = sorted(kept)
    if format == "bitsandbytes":
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": options.threshold,
            "llm_int8_skip_modules": left,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }
    return {**HEAD, "format_version": _version(format), **options.to_dict(), "modules_to_not_convert": left}


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeight:
    """An int8 weight among the tensors of a checkpoint."""

    name: str  # "<layer>.weight": what the weight had before it was quantized
    format: Format
    parts: dict[str, str]  # by part the name of its tensor


def stored_name(weight: str, part: str, format: Format = "octavo") -> str:
    """The name of the tensor that holds a part of a weight."""
    if format != "bitsandbytes":
        return f"{weight}.{part}"
    word = next(word for word, own in PARTS_OF_BITSANDBYTES.items() if own == part)
    return f"{weight.removesuffix('.weight')}.{word}"


def find_weights(dtypes: Mapping[str, str]) -> dict[str, StoredWeight]:
    """The int8 weights among tensors, by name, from the dtypes of these as safetensors spells them.

    Raises ValueError for int8 codes without the tensors that belong to them.
    """
    found = {}
    for name, dtype in dtypes.items():
        base, _, leaf = name.rpartition(".")
        if dtype != "I8" or leaf not in (CODES, "weight"):
            continue
        for format, words, needed in _KINDS:
            parts = {part: f"{base}.{word}" for word, part in words.items() if f"{base}.{word}" in dtypes}
            if words.get(leaf) == CODES and parts.keys() >= needed:
                weight = base if leaf == CODES else name
                found[weight] = StoredWeight(weight, format, parts)
                break
        else:
            theirs_or = "" if leaf == CODES else f" (octavo), or {base}.SCB (bitsandbytes),"
            needs = f"{base}.{SCALE} and {base}.{OPTIONS if leaf == CODES else '_extra_state'}{theirs_or}"
            raise unexpected(shown(name), f"{shown(needs, 400)} with int8 codes", "none")
    return found


# --- parts ------------------------------------------------------------------------------------------------------------


def encode_options(
    options: Options, dtype: str, in_features: int | None = None, out_features: int | None = None
) -> bytes:
    """The JSON of ``<name>.options``: of a layer, of a weight ``[n, k]`` that had this dtype.

    `out_features`, n, is given where the codes are packed; k is noted where packing or rotation makes more of it.
    """
    about: dict[str, Any] = {"format_version": VERSION if out_features is None else PACKED_VERSION, "dtype": dtype}
    if out_features is not None:
        about["out_features"] = out_features
    if out_features is not None or (in_features or 0) != rotated_size(in_features or 0, options.rotation):
        about["in_features"] = in_features
    return json.dumps({**about, **options.to_dict()}).encode()


def decode_options(data: bytes, where: str) -> tuple[Options, str | None, int | None, int | None]:
    """What `encode_options` was given; in version 1 there is no dtype, and n and k only where they were noted.

    Raises:
        ValueError: names `where`; no JSON of octavo's, or a newer version.
    """
    try:
        fields = json.loads(data)
        version = fields.pop("format_version")
        dtype, *shape = (fields.pop(name, None) for name in ("dtype", "in_features", "out_features"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unexpected(where, "octavo's options as JSON", f"{error!r}: corrupt") from error
    if version not in READABLE_VERSIONS:
        raise unexpected(where, "format_version 1 to 3", f"{version!r}: update octavo")
    if dtype not in ((None,) if version == 1 else ("float32", "float16", "bfloat16")):
        raise unexpected(where, "dtype float32, float16 or bfloat16", f"{dtype!r}: corrupt")
    needed = range(2 if version == PACKED_VERSION else 0)
    for place, extent in enumerate(shape):
        if (extent is not None or place in needed) and (type(extent) is not int or extent < 0):
            raise unexpected(where, f"{('in', 'out')[place]}_features as a number", f"{extent!r}: corrupt")
    return Options.from_dict(fields, where), dtype, *shape


def disassemble(weight: Int8Weight, options: Options, dtype: str) -> dict[str, Any]:
    """The tensors to store for a weight, by part: arrays of its framework (of NumPy's or PyTorch's)."""
    parts = {part: array for part in PARTS[:-1] if (array := getattr(weight, part)) is not None}
    encoded = np.frombuffer(bytearray(encode_options(options, dtype, int(weight.shape[1]))), np.uint8)
    return {**parts, OPTIONS: to_framework_of(weight.scale, encoded)}


def assemble(parts: Mapping[str, Any], where: str, **more: Any) -> tuple[Int8Weight, Options, str | None]:
    """The weight that is stored in `parts`, its options, and the dtype that it had (None where no part says it).

    `parts` are of any version or of bitsandbytes, arrays of one framework; `more` are arguments of `Int8Weight`.

    Raises ValueError, which names `where` and the part, for one that is missing or unknown, does not fit, or holds what
    no quantization gives: scales are finite and not negative, zeropoints integers, outlier columns ascending in [0, k).
    """
    given = dict(parts)
    try:
        if ABSMAX in given:
            options, dtype, k, n = Options(), None, None, None
            given[SCALE] = _scale_of_bitsandbytes(given, where)
        else:
            options, dtype, k, n = decode_options(bytes(on_host(given.pop(OPTIONS))), f"{where}: {OPTIONS}")
        codes, scale = given.pop(CODES), given.pop(SCALE)
    except KeyError as error:
        raise unexpected(where, f"a tensor {error}", "none") from error
    kept = {name: given.pop(name, None) for name in ARRAYS[2:]}
    if given:
        raise unexpected(where, "the tensors of an int8 weight", repr(next(iter(given))))
    rank = 2 if n is None else 4
    if len(codes.shape) != rank:
        raise unexpected(f"{where}: {CODES}", f"rank {rank}", f"shape {list(codes.shape)}")
    shape = None if k is None else (int(codes.shape[0]) if n is None else n, k)
    try:
        _check_values({SCALE: scale, **kept}, int(codes.shape[1]) if k is None else k, options.rotation)
        weight = Int8Weight(codes, scale, **kept, **options.of_weight, shape=shape, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return weight, options, dtype


def _scale_of_bitsandbytes(given: dict[str, Any], where: str) -> Any:
    layout = np.ravel(on_host(given.pop(LAYOUT, np.uint8(ROW_MAJOR))))
    if layout.tolist() != [ROW_MAJOR]:
        other = f"{str(layout)[1:-1]}: load and save the model with a recent bitsandbytes"
        raise unexpected(f"{where}: weight_format", f"{ROW_MAJOR} (row-major codes)", other)
    return to_framework_of(given[CODES], on_host(given.pop(ABSMAX)) / np.float32(127))


def _check_values(parts: Mapping[str, Any], k: int, rotation: int) -> None:
    most = 127 * rotated_size(k, rotation)
    expectations: dict[str, tuple[str, Any]] = {
        SCALE: ("finite numbers >= 0", lambda values: np.isfinite(values) & (values >= 0)),
        ZEROPOINT: ("integers", lambda values: np.isfinite(values) & (values == np.rint(values))),
        OUTLIER_COLUMNS: (
            f"ascending columns in [0, {k})",
            lambda values: (np.diff(values.astype(np.int64), prepend=-1) > 0) & (values < k),
        ),
        CODE_SUMS: (f"sums within +-{most}", lambda values: np.abs(values.astype(np.int64)) <= most),
    }
    for part, (expected, holds) in expectations.items():
        if parts[part] is not None:
            values = np.ravel(on_host(parts[part]))
            wrong = values[~holds(values)]
            if len(wrong):
                raise unexpected(part, expected, f"{wrong[0]}: corrupt")
