"""octavo.Options: the one carrier of a layer's options, and how functions take it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import octavo
import pytest

X = np.array([[1.0, -2.0, 7.0, 0.5]], np.float32)
W = np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.25, 2.0]], np.float32)


def test_defaults_are_the_papers() -> None:
    assert octavo.Options().to_dict() == {
        "scheme": "absmax",
        "granularity": "vector",
        "rotation": 0,
        "outliers": "columns",
        "threshold": 6.0,
        "relative": None,
        "cap": None,
        "path": "auto",
    }


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (ValueError, "scheme", "Absmax"),
        (ValueError, "granularity", ""),
        (ValueError, "outliers", "auto"),
        (TypeError, "outliers", None),
        (TypeError, "path", ["int8"]),
        (TypeError, "threshold", "6"),
        (TypeError, "threshold", True),
        (TypeError, "threshold", None),
        (ValueError, "threshold", -1),
        (ValueError, "threshold", math.nan),
    ],
)
def test_wrong_values_name_the_option(error: type[Exception], name: str, value: Any) -> None:
    with pytest.raises(error, match=rf"^Options: {name}: expected .*, got "):
        octavo.Options(**{name: value})
    if name in ("outliers", "path", "threshold"):
        with pytest.raises(error, match=rf"^linear: {name}: expected .*, got "):
            octavo.linear(X, octavo.quantize_weight(W), **{name: value})
    else:
        with pytest.raises(error, match=rf"^quantize_weight: {name}: expected .*, got "):
            octavo.quantize_weight(W, **{name: value})


@pytest.mark.parametrize("threshold", [3, np.float32(3), np.array(3.0), 0, math.inf])
def test_copies_are_equal(threshold: Any) -> None:
    options = octavo.Options(outliers="rows", threshold=threshold)
    through_json = octavo.Options.from_dict(json.loads(json.dumps(options.to_dict())))
    for other in (pickle.loads(pickle.dumps(options)), copy.deepcopy(options), copy.copy(options), through_json):
        assert other == options
        assert hash(other) == hash(options)
    assert dataclasses.replace(options, outliers="none") == octavo.Options(outliers="none", threshold=threshold)
    assert type(options.threshold) is float


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"a\.json: expected options of octavo, got 'later': update octavo"):
        octavo.Options.from_dict({"later": 1}, "a.json")
    with pytest.raises(ValueError, match=r"a\.json: Options: scheme"):
        octavo.Options.from_dict({"scheme": 1}, "a.json")


@pytest.mark.parametrize("outliers", ["columns", "none"])
def test_functions_take_options_or_keywords(outliers: Any) -> None:
    options = octavo.Options(scheme="zeropoint", granularity="row", outliers=outliers, threshold=5, path="int8")
    weight = octavo.quantize_weight(W, options=options)
    assert (weight.scheme, weight.granularity) == ("zeropoint", "row")
    expected = octavo.linear(X, weight, outliers=outliers, threshold=5, path="int8")
    np.testing.assert_array_equal(octavo.linear(X, weight, options=options), expected)

    with pytest.raises(TypeError, match=r"^linear: options: expected these or single ones, .* threshold$"):
        octavo.linear(X, weight, threshold=6.0, options=options)
    with pytest.raises(TypeError, match=r"^quantize_weight: options: expected these or single ones, .* scheme$"):
        octavo.quantize_weight(W, scheme="absmax", options=options)
    for wrong in ({}, "absmax", octavo.Options):
        with pytest.raises(TypeError, match=r"^linear: options: expected octavo.Options, got "):
            octavo.linear(X, weight, options=wrong)


def test_recipes() -> None:
    """Both are valid, and differ from the defaults where they say so."""
    assert octavo.recipe("paper") == octavo.Options()
    best = octavo.recipe("best")
    assert (best.rotation, best.outliers, best.relative) == (64, "rows", 20)
    assert best.keeping([3]) is best
    calibrated = octavo.recipe("best", calibrated=True)
    assert (calibrated.rotation, calibrated.relative, calibrated.keeping([3]).outliers) == (64, 3, "static")
    assert calibrated.keeping(None) is calibrated
    for paper in (octavo.recipe("paper", calibrated=True), octavo.recipe("paper").keeping([3])):
        assert paper == octavo.Options()
    assert best.changed(threshold=5).relative is None
    assert best.changed(threshold=5, relative=2).relative == 2
    y = octavo.linear(X, octavo.quantize_weight(W, options=best), options=best)
    np.testing.assert_allclose(y, X @ W.T, rtol=0, atol=0.2)
    with pytest.raises(ValueError, match=r"^recipe: name: expected one of 'paper', 'best', got 'other'"):
        octavo.recipe("other")
