"""The names and options of octavo's checkpoint format; `octavo.checkpoint` describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import octavo
from octavo._types import Granularity, Outliers, Path, Scheme

FORMAT_VERSION = 1

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
