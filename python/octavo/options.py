"""`Options`: everything that a linear layer with an int8 weight is made and run with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from octavo import _core
from octavo._text import expect
from octavo._types import Granularity, Outliers, ProductPath, Scheme

WEIGHT_OPTIONS = ("scheme", "granularity", "rotation")  # those that a weight is made with
CRITERION_OPTIONS = ("threshold", "relative", "cap")
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
        for name, value in self.criterion.items():
            if isinstance(value, bool):
                raise TypeError(f"Options: {name}: expected a number, got bool")
        _ = self._native  # the core checks the values
        for name, value in self.criterion.items():
            if value is not None:
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

    @property
    def criterion(self) -> dict[str, Any]:
        """Those that say what an outlier is, by name: the arguments of `octavo.find_outliers`."""
        return {name: getattr(self, name) for name in CRITERION_OPTIONS}

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

    def keeping(self, columns: Any) -> Options:
        """These for a weight of which `columns` are kept in 16 bit, or None.

        Where `outliers` is "none", kept columns become the outlier columns: "static".
        """
        return replace(self, outliers="static") if columns is not None and self.outliers == "none" else self

    def changed(self, **given: Any) -> Options:
        """These with others in their place. A `threshold` that is given without `relative` takes the place of that."""
        return replace(self, **({"relative": None, **given} if "threshold" in given else given))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "Options", base: Options | None = None) -> Options:
        """The options that `to_dict` gave. One that is missing is that of `base`, by default its default.

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
            return (base or cls()).changed(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


WHOLE_MODELS = "best"  # the recipe of whatever converts a model, unless one is named
_BEST = Options(rotation=64, outliers="rows", relative=20.0, cap=0.01)
# Before calibration, and after it.
_RECIPES = {"paper": (Options(), Options()), "best": (_BEST, replace(_BEST, outliers="none", relative=3.0))}


def recipe(name: str, *, calibrated: bool = False) -> Options:
    """The options of a recipe.

    Args:
        name: "paper": LLM.int8() as published: vector-wise absmax, the columns from 6 on in 16 bit. "best": the closest
            to 16 bit that was measured on real models in little more time than vector-wise absmax (the guide says how
            much): X and W rotated in blocks of 64, and what is in a row from 63 times its median magnitude on
            (``relative=20``) in 16 bit. No row depends on another.
        calibrated: those for a model that was calibrated, whose `criterion` is that of the calibration. Of "best":
            the columns from 3 times the median on, at most 1 %, go through 16 bit, with their own weights.

    Raises:
        TypeError: `name` is no string.
        ValueError: no recipe has that name.
    """
    expect("recipe: name", name, str, "a string")
    expect("recipe: calibrated", calibrated, bool, "a bool")
    if name not in _RECIPES:
        raise ValueError(f"recipe: name: expected one of {', '.join(map(repr, _RECIPES))}, got {name!r}")
    return _RECIPES[name][calibrated]


@lru_cache(maxsize=256, typed=True)  # a small product takes no longer than to make them; and True is not the number 1
def _single(function: str, default: str, calibrated: bool, **keywords: Any) -> Options:
    given = {name: value for name, value in keywords.items() if value is not DEFAULT}
    try:
        return recipe(given.pop("recipe", default), calibrated=calibrated).changed(**given)
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix("Options: ").replace("recipe: name", "recipe", 1)
        raise type(error)(f"{function}: {message}") from None


def options_of(
    function: str, options: Options | None = None, *, default: str = "paper", calibrated: bool = False, **keywords: Any
) -> Options:
    """The options of a call of `function`: `options`, or else a recipe's with the keywords that are not `DEFAULT`.

    The keyword ``recipe`` names the recipe, `default` the one that is taken without it; `calibrated`: see `recipe`.

    Raises:
        TypeError: both are given, or a value of the wrong kind; ValueError: a value that octavo does not have.
    """
    if options is None:
        try:
            return _single(function, default, calibrated, **keywords)
        except TypeError:  # a wrong value, or one that cannot be remembered
            return _single.__wrapped__(function, default, calibrated, **keywords)
    expect(f"{function}: options", options, Options, "octavo.Options")
    given = [name for name, value in keywords.items() if value is not DEFAULT]
    if given:
        raise TypeError(f"{function}: options: expected these or single ones, got both: also {', '.join(given)}")
    return options
