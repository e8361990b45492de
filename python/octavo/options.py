"""`Options`: everything that a linear layer with an int8 weight is made and run with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from octavo._types import Granularity, Outliers, Path, Scheme


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of an int8 linear layer. The default is LLM.int8() as in the paper.

    Attributes:
        scheme: "absmax" or "zeropoint": how values map to int8; see `octavo.quantize`.
        granularity: "tensor", "row" or "vector": what shares one scale; see `octavo.quantize_weight`.
        outliers: "columns", "rows", "static" or "none": which elements of X go through the 16-bit product; see
            `octavo.linear`.
        threshold: the magnitude from which an element of X is an outlier, at least 0.
        path: "auto", "int8" or "weight_only": which product is used; see `octavo.linear`.

    `scheme` and `granularity` belong to the weight and are fixed when it is quantized. The others may change from call
    to call.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value that octavo does not have. Both name the option.
    """

    scheme: Scheme = "absmax"
    granularity: Granularity = "vector"
    outliers: Outliers = "columns"
    threshold: float = 6.0
    path: Path = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"Options: {name}: expected a string, got {type(value).__name__}")
            if value not in choices:
                raise ValueError(f"Options: {name}: expected one of {', '.join(choices)}, got {value!r}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"Options: threshold: expected a number, got {type(self.threshold).__name__}")
        if math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError(f"Options: threshold: expected a number >= 0, got {self.threshold}")
        object.__setattr__(self, "threshold", float(self.threshold))

    def to_dict(self) -> dict[str, Any]:
        """The options by name, as JSON can hold them (an infinite threshold as the string "inf")."""
        values = asdict(self)
        if math.isinf(self.threshold):
            values["threshold"] = "inf"
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "Options") -> Options:
        """The options that `to_dict` gave. An option that is missing has its default.

        Raises:
            ValueError: names `where`; a value that octavo does not have, or an option that it does not know, which a
                newer version may have written.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{where}: expected options of octavo, got {', '.join(map(repr, unknown))}: update octavo")
        given = dict(values)
        if given.get("threshold") == "inf":
            given["threshold"] = math.inf
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "scheme": get_args(Scheme),
    "granularity": get_args(Granularity),
    "outliers": get_args(Outliers),
    "path": get_args(Path),
}
