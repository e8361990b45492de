"""The names and JSON of checkpoints: what is taken apart comes together again, and what cannot be is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import octavo
import pytest
from octavo import file_format as names
from support import TORCH

OPTIONS = octavo.Options(scheme="zeropoint", outliers="static", threshold=math.inf, path="int8")


def parts(framework: str = "numpy") -> dict[str, Any]:
    array: Any = np.random.default_rng(0).standard_normal((5, 6), np.float32)
    if framework == "torch":
        if TORCH.missing:
            pytest.skip(TORCH.missing)
        import torch

        array = torch.from_numpy(array).bfloat16()
    weight = octavo.quantize_weight(array, scheme="zeropoint", outlier_columns=[1, 4])
    return names.disassemble(weight, OPTIONS, "bfloat16")


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_parts_come_together_again(framework: str) -> None:
    taken_apart = parts(framework)
    assert tuple(taken_apart) == names.PARTS
    weight, options, dtype = names.assemble(taken_apart, "w")
    assert (options, dtype) == (OPTIONS, "bfloat16")
    again = names.disassemble(weight, options, dtype)
    for name, array in taken_apart.items():
        assert type(again[name]) is type(array)
        np.testing.assert_array_equal(
            *(each.float() if framework == "torch" else each for each in (again[name], array))
        )


def test_version_1_and_bitsandbytes() -> None:
    codes, scale = np.full((2, 3), 5, np.int8), np.array([0.5, 0], np.float32)
    fields = {"format_version": 1, "scheme": "absmax", "granularity": "vector", "outliers": "rows", "path": "auto"}
    extra_state = np.frombuffer(json.dumps({**fields, "threshold": 2.5}).encode(), np.uint8)
    old = {"weight": codes, "scale": scale, "_extra_state": extra_state}
    weight, options, dtype = names.assemble({names.PARTS_OF_VERSION_1[name]: own for name, own in old.items()}, "w")
    assert (options, dtype) == (octavo.Options(outliers="rows", threshold=2.5), None)
    theirs = {"weight": codes, "SCB": scale * np.float32(127), "weight_format": np.uint8(0)}
    same, options, dtype = names.assemble({names.PARTS_OF_BITSANDBYTES[name]: own for name, own in theirs.items()}, "w")
    assert (options, dtype) == (octavo.Options(), None)
    np.testing.assert_array_equal(same.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="w: weight_format: expected 0 "):
        names.assemble({names.CODES: codes, names.ABSMAX: scale, names.LAYOUT: np.uint8(2)}, "w")


def as_json(**fields: Any) -> Any:
    return np.frombuffer(json.dumps({"format_version": 2, "dtype": "float16", **fields}).encode(), np.uint8)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("codes", None, "expected a tensor 'codes', got none"),
        ("options", None, "expected a tensor 'options', got none"),
        ("codes", np.zeros((5, 6), np.uint8), "codes: expected"),
        ("codes", np.zeros(30, np.int8), "codes: expected"),
        ("scale", np.ones(4, np.float32), "scale: expected"),
        ("scale", np.float32([1, 1, np.nan, 1, 1]), "scale: expected finite numbers >= 0, got nan"),
        ("scale", np.float32([1, 1, -1, 1, 1]), "scale: expected finite numbers >= 0, got -1.0"),
        ("zeropoint", np.float32([1, 1, 0.5, 1, 1]), "zeropoint: expected integers, got 0.5"),
        ("zeropoint", np.float32([1, 1, np.inf, 1, 1]), "zeropoint: expected integers, got inf"),
        ("outlier_columns", np.int32([4, 1]), "outlier_columns: expected ascending columns in \\[0, 6\\), got 1"),
        ("outlier_columns", np.int32([4, 4]), "outlier_columns: expected ascending"),
        ("outlier_columns", np.int32([-1, 4]), "outlier_columns: expected ascending columns in \\[0, 6\\), got -1"),
        ("outlier_columns", np.int32([1, 6]), "outlier_columns: expected ascending columns in \\[0, 6\\), got 6"),
        ("outlier_weight", None, "outlier_weight: expected an array"),
        ("extra", np.zeros(1), "expected the tensors of an int8 weight, got 'extra'"),
        ("options", np.frombuffer(b"[]", np.uint8), "expected octavo's options as JSON"),
        ("options", as_json(format_version=4), "expected format_version 1 to 3, got 4: update octavo"),
        ("options", as_json(dtype="int4"), "expected dtype float32, float16 or bfloat16, got 'int4'"),
        ("options", as_json(rotate=3), "options: expected options of octavo, got 'rotate': update octavo"),
        ("options", as_json(path="slow"), "options: Options: path: expected one of 'auto', 'int8', 'weight_only'"),
    ],
)
def test_what_cannot_be_is_refused(part: str, value: Any, match: str) -> None:
    given = {**parts(), part: value}
    with pytest.raises(ValueError, match=f"^FILE: .*{match}"):
        names.assemble({name: array for name, array in given.items() if array is not None}, "FILE: w")
