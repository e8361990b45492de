"""`Options`: everything that a linear layer with an int8 weight is made and run with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from octavo import _core
from octavo._text import expect
from octavo._types import Granularity, Outliers, ProductPath, Scheme

WEIGHT_OPTIONS = ("scheme", "granularity", "rotation")  # those that a weight is made with
# The default of a keyword, so that one that is not given differs from one that is.
DEFAULT: Any = type("Default", (), {"__repr__": lambda _: "<default>"})()


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of an int8 linear layer. The default is LLM.int8() as in the paper.

    Attributes:
        scheme: "absmax" or "zeropoint": how values map to int8; see `octavo.quantize`.
        granularity: "tensor", "row" or "vector": what shares one scale; see `octavo.quantize_weight`.
        rotation: 0, or the input features of a block, 16, 64 or 256, that X and W are rotated in; see
            `octavo.quantize`.
        outliers: "columns", "rows", "static" or "none": which elements of X go through the 16-bit product; see
            `octavo.linear`.
        threshold: the magnitude from which an element of X is an outlier, at least 0.
        relative: a number above 0 takes the place of `threshold`: outliers are from that many times the median on; see
            `octavo.find_outliers`.
        cap: the most outlier columns (with "rows": elements of a row), as a part of k from 0 to 1; None: no limit.
        path: "auto", "int8" or "weight_only": which product is used; see `octavo.linear`. "int8" also multiplies the
            gradients that flow to x in int8 (absmax only); with the others they are float32 sums.

    `scheme`, `granularity` and `rotation` belong to the weight (`of_weight`) and are fixed when it is quantized. The
    others may change from call to call.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value that octavo does not have. Both name the option.
    """

    scheme: Scheme = "absmax"
    granularity: Granularity = "vector"
    rotation: int = 0
    outliers: Outliers = "columns"
    threshold: float = 6.0
    relative: float | None = None
    cap: float | None = None
    path: ProductPath = "auto"

    def __post_init__(self) -> None:
        numbers = ("threshold", "relative", "cap")
        for name in numbers:
            if isinstance(getattr(self, name), bool):
                raise TypeError(f"Options: {name}: expected a number, got bool")
        _ = self._native  # the core checks the values
        for name in numbers:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        if self.relative == 0:  # which to the core is None
            raise ValueError("Options: relative: expected a number above 0 or None, got 0")

    @cached_property
    def _native(self) -> _core.Options:
        """The options as the core takes them, made once."""
        return _core.Options(**self._values())

    @property
    def of_weight(self) -> dict[str, Any]:
        """Those that belong to the weight, by name."""
        return {name: getattr(self, name) for name in WEIGHT_OPTIONS}

    def _values(self) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        return Options.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, as JSON can hold them (an infinite threshold as the string "inf")."""
        values = self._values()
        if math.isinf(self.threshold):
            values["threshold"] = "inf"
        return values

    @cached_property
    def text(self) -> str:
        """`to_dict` as JSON, made once: the options as one argument of an operation."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_text(cls, text: str) -> Options:
        """The options of `text`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "Options") -> Options:
        """The options that `to_dict` gave. An option that is missing has its default.

        Raises:
            ValueError: names `where`; a value that octavo does not have, or an option that it does not know, which a
                newer version may have written.
        """
        known = {option.name for option in fields(cls)}
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


_RECIPES = {
    "paper": Options(),
    "best": Options(rotation=64, outliers="rows", relative=6.3, cap=0.02),
}


def recipe(name: str) -> Options:
    """The options of a recipe.

    Args:
        name: "paper": LLM.int8() as published: vector-wise absmax, the columns from 6 on in 16 bit. "best": the closest
            to 16 bit that was measured on real models without calibration: X and W rotated in blocks of 64, and of each
            row the few elements from 20 times its median magnitude on (6.3 times f(1), see `octavo.find_outliers`), at
            most 2 %, in 16 bit. No row depends on another.

    Raises:
        TypeError: `name` is no string.
        ValueError: no recipe has that name.
    """
    expect("recipe: name", name, str, "a string")
    if name not in _RECIPES:
        raise ValueError(f"recipe: name: expected one of {', '.join(map(repr, _RECIPES))}, got {name!r}")
    return _RECIPES[name]


@lru_cache(maxsize=256, typed=True)  # a small product takes no longer than to make them; and True is not the number 1
def _single(function: str, **keywords: Any) -> Options:
    try:
        return Options(**{name: value for name, value in keywords.items() if value is not DEFAULT})
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("Options", function, 1)) from None


def options_of(function: str, options: Options | None = None, **keywords: Any) -> Options:
    """The options of a call of `function`: `options`, or else the defaults with the keywords that are not `DEFAULT`.

    Raises:
        TypeError: both are given, or a value of the wrong kind; ValueError: a value that octavo does not have.
    """
    if options is None:
        try:
            return _single(function, **keywords)
        except TypeError:  # a wrong value, or one that cannot be remembered
            return _single.__wrapped__(function, **keywords)
    expect(f"{function}: options", options, Options, "octavo.Options")
    given = [name for name, value in keywords.items() if value is not DEFAULT]
    if given:
        raise TypeError(f"{function}: options: expected these or single ones, got both: also {', '.join(given)}")
    return options
