"""The names and options of octavo's checkpoint format; `octavo.checkpoint` describes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import octavo
from octavo._types import Granularity, Outliers, Path, Scheme, rotated_size

FORMAT_VERSION = 1  # that is written; VERSION as soon as octavo.transformers reads it

# A layer's tensors, after its name and a dot: those of `octavo.torch.Int8Linear.state_dict()`.
WEIGHT, SCALE, ZEROPOINT = "weight", "scale", "zeropoint"
OUTLIER_COLUMNS, OUTLIER_WEIGHT, EXTRA_STATE = "outlier_columns", "outlier_weight", "_extra_state"
# bitsandbytes' Linear8bitLt: absmax of each row, and a number that says "row-major".
BNB_ABSMAX, BNB_LAYOUT = "SCB", "weight_format"
BNB_ROW_MAJOR = 0

JOURNAL = ".octavo-journal"  # of an output that is not finished

# Keys of a file's metadata.
VERSION_KEY, CRC32_KEY, TIED_KEY = "octavo.format_version", "octavo.crc32", "octavo.tied"


@dataclass(frozen=True)
class Options:
    """What an int8 layer is made and run with: see `octavo.quantize_weight` and `octavo.linear`.

    Raises ValueError or TypeError for values that octavo does not have.
    """

    scheme: Scheme = "absmax"
    granularity: Granularity = "vector"
    threshold: float = 6.0
    outliers: Outliers = "columns"
    path: Path = "auto"

    def __post_init__(self) -> None:
        weight = octavo.quantize_weight(
            np.zeros((0, 1), np.float32), scheme=self.scheme, granularity=self.granularity, outlier_columns=[]
        )
        # A product with no rows costs nothing and refuses what does not exist.
        octavo.linear(
            np.zeros((0, 1), np.float32), weight, threshold=self.threshold, outliers=self.outliers, path=self.path
        )

    def extra_state(self) -> bytes:
        """What `octavo.torch.Int8Linear.get_extra_state` holds, byte for byte."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "scheme": self.scheme,
                "granularity": self.granularity,
                "threshold": float(self.threshold),
                "outliers": self.outliers,
                "path": self.path,
            }
        ).encode()

    def metadata(self) -> dict[str, str]:
        """For a file's metadata; ``format`` is what transformers looks for."""
        options = {f"octavo.{name}": str(value) for name, value in asdict(self).items()}
        return {"format": "pt", VERSION_KEY: str(FORMAT_VERSION), **options}


def options_of(extra_state: bytes, where: str) -> Options:
    """The options in a layer's ``_extra_state``. Raises ValueError naming `where` for another format version."""
    try:
        fields: dict[str, Any] = json.loads(extra_state)
        version = fields.pop("format_version")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: expected octavo's options as JSON, got {error!r}: corrupt") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{where}: expected format_version {FORMAT_VERSION}, got {version}: update octavo")
    try:
        return Options(**fields)
    except TypeError as error:
        raise ValueError(f"{where}: expected octavo's options, got {error}") from error


# Transformers refuses a model without a quant_method. One that it does not know, it loads with a warning, and takes
# codes for weights: that it must not do where octavo.transformers, which fills this in, has not been imported.
HEAD: Mapping[str, Any] = {"quant_method": None, "octavo": "load with: import octavo.transformers"}


def quantization_config(options: Options, left: list[str], *, bitsandbytes: bool) -> Mapping[str, Any]:
    """The ``quantization_config`` of config.json, so that a reader knows what it has before it.

    Args:
        options: of the layers.
        left: linear layers that stay in 16 bit.
        bitsandbytes: in its format, with the keys that transformers writes for it.
    """
    left = sorted({*left, "lm_head"})  # tied heads are in no file
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
    return {
        **HEAD,
        "format_version": FORMAT_VERSION,
        **asdict(options),
        "modules_to_not_convert": left,
    }


# --- version 2 --------------------------------------------------------------------------------------------------------
# An int8 weight ``<name>`` ("model.layers.0.mlp.up_proj.weight") is stored as the tensors ``<name>.codes``,
# ``<name>.scale``, ... There is no tensor ``<name>``, so a reader without octavo finds no weight to mistake codes for.

VERSION = 2
READABLE_VERSIONS = (1, 2)

CODES, OPTIONS = "codes", "options"
IN_FEATURES = "in_features"  # in the JSON, where rotation has padded the codes
PARTS = (CODES, SCALE, ZEROPOINT, OUTLIER_COLUMNS, OUTLIER_WEIGHT, OPTIONS)
# The parts of version 1 and of bitsandbytes by the last word of their names, which follows the layer's.
PARTS_OF_VERSION_1 = {
    "weight": CODES, "scale": SCALE, "zeropoint": ZEROPOINT, "outlier_columns": OUTLIER_COLUMNS,
    "outlier_weight": OUTLIER_WEIGHT, "_extra_state": OPTIONS,
}  # fmt: skip
ABSMAX, LAYOUT = "absmax", "layout"
PARTS_OF_BITSANDBYTES = {"weight": CODES, "SCB": ABSMAX, "weight_format": LAYOUT}


def encode_options(options: octavo.Options, dtype: str, in_features: int | None = None) -> bytes:
    """The JSON of ``<name>.options``.

    Args:
        options: of the layer.
        dtype: of the weight before it was quantized: "float32", "float16" or "bfloat16".
        in_features: its columns, where rotation has made more codes than that.
    """
    more = {} if in_features is None else {IN_FEATURES: in_features}
    return json.dumps({"format_version": VERSION, "dtype": dtype, **more, **options.to_dict()}).encode()


def decode_options(data: bytes, where: str) -> tuple[octavo.Options, str | None]:
    """What `encode_options` wrote, or version 1, which does not say a dtype (None).

    Raises:
        ValueError: names `where`; no JSON of octavo's, or a newer version.
    """
    try:
        fields = json.loads(data)
        version = fields.pop("format_version")
        dtype = fields.pop("dtype", None)
        fields.pop(IN_FEATURES, None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected octavo's options as JSON, got {error!r}: corrupt") from error
    if version not in READABLE_VERSIONS:
        raise ValueError(f"{where}: expected format_version 1 or 2, got {version!r:.50}: update octavo")
    if dtype not in (("float32", "float16", "bfloat16") if version == VERSION else (None,)):
        raise ValueError(f"{where}: expected dtype float32, float16 or bfloat16, got {dtype!r:.50}: corrupt")
    return octavo.Options.from_dict(fields, where), dtype


def disassemble(weight: octavo.Int8Weight, options: octavo.Options, dtype: str) -> dict[str, Any]:
    """The tensors to store for a weight, by part: arrays of its framework (of NumPy's or PyTorch's)."""
    parts = {
        CODES: weight.codes,
        SCALE: weight.scale,
        ZEROPOINT: weight.zeropoint,
        OUTLIER_COLUMNS: weight.outlier_columns,
        OUTLIER_WEIGHT: weight.outlier_weight,
    }
    k = int(weight.shape[1])
    in_features = None if k == rotated_size(k, weight.rotation) else k
    encoded = np.frombuffer(bytearray(encode_options(options, dtype, in_features)), np.uint8)
    return {name: array for name, array in parts.items() if array is not None} | {
        OPTIONS: _beside(weight.scale, encoded)
    }


def assemble(parts: Mapping[str, Any], where: str) -> tuple[octavo.Int8Weight, octavo.Options, str | None]:
    """The weight that is stored in `parts`, its options, and the dtype that it had (None where no part says it).

    Args:
        parts: by part: those of version 1 or 2, or of bitsandbytes; arrays of one framework.
        where: the file and the weight, for errors.

    Raises:
        ValueError: names `where` and the part; one that is missing or unknown, whose shape or dtype does not fit, or
            whose values cannot be: see `check_values`.
    """
    given = dict(parts)
    in_features: int | None = None
    try:
        codes = given.pop(CODES)
        if ABSMAX in given:
            options, dtype = octavo.Options(), None
            layout = given.pop(LAYOUT, None)
            if layout is not None and int(layout) != BNB_ROW_MAJOR:
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
    check_values({SCALE: scale, **kept}, int(codes.shape[-1]), where)
    try:
        weight = octavo.Int8Weight(
            codes,
            scale,
            **kept,
            scheme=options.scheme,
            granularity=options.granularity,
            rotation=options.rotation,
            shape=None if in_features is None else (int(codes.shape[0]), in_features),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return weight, options, dtype


def check_values(parts: Mapping[str, Any], k: int, where: str) -> None:
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
