"""Whatever is passed as an argument: TypeError or ValueError that names it, or MemoryError for a size."""

from __future__ import annotations

import datetime
import decimal
import fractions
import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import octavo
import pytest
from numpy.lib.stride_tricks import as_strided

X, W, CODES = np.ones((3, 4), np.float32), np.ones((2, 4), np.float32), np.ones((2, 4), np.int8)
WEIGHT = octavo.quantize_weight(W, outlier_columns=[1])


class Hostile:
    """Raises where it is looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


def objects() -> dict[str, Any]:
    """Things of 40 kinds."""
    found: dict[str, Any] = {
        "None": None,
        "True": True,
        "int": 3,
        "large int": 2**70,
        "float": 1.5,
        "nan": float("nan"),
        "complex": 1j,
        "str": "absmax ",
        "surrogate": "\ud800",
        "bytes": b"row",
        "bytearray": bytearray(4),
        "memoryview": memoryview(b"abcd"),
        "list": [[1.0, 2.0], [3.0]],
        "tuple": (1, "2"),
        "set": {1},
        "dict": {"a": 1},
        "range": range(3),
        "generator": (i for i in range(3)),
        "object": object(),
        "type": np.ndarray,
        "module": np,
        "function": len,
        "Ellipsis": ...,
        "slice": slice(3),
        "date": datetime.date(2026, 1, 1),
        "Decimal": decimal.Decimal("6"),
        "Fraction": fractions.Fraction(1, 3),
        "file": io.BytesIO(b"a"),
        "exception": ValueError("x"),
        "hostile": Hostile(),
        "Options": octavo.Options(),
        "Int8Weight": WEIGHT,
        "Quantized": octavo.quantize(X),
        "dtype": np.dtype(np.float32),
        "numpy scalar": np.float32(3),
        "rank 0": np.array(3.0, np.float32),
        "rank 1": np.ones(5, np.float32),
        "rank 3": np.ones((2, 3, 5), np.float32),
        "empty": np.ones((0, 7), np.float32),
        "float64": np.ones((3, 4)),
        "objects": np.array([[object()]]),
        "strings": np.array(["a"]),
        "records": np.zeros(3, [("a", "f4")]),
        "big endian": np.ones((3, 4), ">f4"),
        "masked": np.ma.masked_array(X),
        "2^40": as_strided(np.ones(1, np.float32), (2**40, 2**10), (0, 0)),
        "2^62": as_strided(np.ones(1, np.int8), (2**62,), (0,)),
    }
    try:
        import torch
    except ImportError:
        return found
    found |= {
        "meta": torch.empty((3, 4), device="meta"),
        "meta 2^62": torch.empty((2**62,), dtype=torch.int8, device="meta"),
        "sparse": torch.ones((3, 4)).to_sparse(),
        "complex tensor": torch.ones((3, 4), dtype=torch.complex64).conj(),
        "float8": torch.ones((3, 4)).to(torch.float8_e4m3fn),
        "quantized": torch.quantize_per_tensor(torch.ones((3, 4)), 0.1, 0, torch.qint8),
        "torch.Size": torch.Size([2]),
        "torch dtype": torch.float32,
    }
    return found


OBJECTS = objects()
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "quantize": (octavo.quantize, {"x": X, "scheme": "absmax", "granularity": "row", "rotation": 0, "exclude": None}),
    "quantize_weight": (
        octavo.quantize_weight,
        {
            "weight": W,
            "scheme": "absmax",
            "granularity": "row",
            "rotation": 0,
            "outlier_columns": None,
            "out": None,
            "seed": None,
        },
    ),
    "quantize_weight options": (octavo.quantize_weight, {"weight": W, "options": None}),
    "dequantize": (octavo.dequantize, {"q": WEIGHT, "dtype": None}),
    "find_outliers": (octavo.find_outliers, {"x": X, "threshold": 6.0, "relative": None, "cap": None}),
    "int8_matmul": (octavo.int8_matmul, {"a": CODES, "b": CODES, "out": None}),
    "linear": (
        octavo.linear,
        {
            **{"x": X, "weight": WEIGHT, "bias": None, "threshold": 6.0, "relative": None, "cap": None},
            **{"outliers": "columns", "path": "int8", "out": None},
        },
    ),
    "linear_many": (
        octavo.linear_many,
        {
            **{"x": X, "weights": [WEIGHT], "biases": None, "threshold": 6.0, "relative": None, "cap": None},
            **{"outliers": "columns", "path": "int8", "out": None},
        },
    ),
    "linear_many options": (octavo.linear_many, {"x": X, "weights": [WEIGHT], "options": None}),
    "linear options": (octavo.linear, {"x": X, "weight": WEIGHT, "options": None}),
    "Options": (
        octavo.Options,
        {
            **{"scheme": "absmax", "granularity": "row", "rotation": 0, "outliers": "none", "threshold": 6.0},
            **{"relative": None, "cap": None, "path": "auto"},
        },
    ),
    "Int8Weight": (
        octavo.Int8Weight,
        {
            "codes": CODES,
            "scale": np.ones(2, np.float32),
            "zeropoint": None,
            "outlier_columns": WEIGHT.outlier_columns,
            "outlier_weight": WEIGHT.outlier_weight,
            "code_sums": np.full(2, 4, np.int32),
            "scheme": "absmax",
            "granularity": "vector",
            "rotation": 0,
            "shape": None,
            "pack": True,
        },
    ),
    "Int8Weight packed": (
        octavo.Int8Weight,
        {"codes": WEIGHT.packed, "scale": WEIGHT.scale, "code_sums": WEIGHT.code_sums, "shape": (2, 4)},
    ),
    "recipe": (octavo.recipe, {"name": "best", "calibrated": True}),
    "set_num_threads": (octavo.set_num_threads, {"count": octavo.get_num_threads()}),
}


def test_every_argument_is_tried() -> None:
    for name in octavo.__all__:
        function = getattr(octavo, name)
        if not callable(function) or name in ("DLPackArray", "Quantized"):  # made by octavo; a tuple
            continue
        tried = {argument for key, (call, arguments) in FUNCTIONS.items() for argument in arguments if call is function}
        assert tried == set(inspect.signature(function).parameters), name


@pytest.mark.parametrize(
    ("function", "argument"), [(name, argument) for name, (_, arguments) in FUNCTIONS.items() for argument in arguments]
)
def test_any_object_as_any_argument(function: str, argument: str) -> None:
    call, good = FUNCTIONS[function]
    name = function.split()[0]
    call(**good)
    threads = octavo.get_num_threads()
    for kind, value in OBJECTS.items():
        if kind == "2^40" and argument in ("x", "weight", "a"):
            continue  # right, and years of work
        raised: Exception | None = None
        try:
            call(**{**good, argument: value})
        except (TypeError, ValueError, MemoryError) as error:
            raised = error
        finally:
            octavo.set_num_threads(threads)
        if raised is None or name == "set_num_threads":
            continue
        if isinstance(raised, MemoryError):
            assert kind in ("2^40", "2^62"), kind
            continue
        # What names another argument says that the two do not fit each other.
        fits = value is None or isinstance(value, (np.ndarray, octavo.Int8Weight, tuple))
        one = {"weights": "weight", "biases": "bias"}.get(argument, argument)  # of a layer
        named = f"({'|'.join(good)}|weight|bias|scale|codes|code_sums|out)" if fits else f"({argument}|{one})"
        assert re.search(rf"^{name}(\[\d\])?: (\w+\.)*{named}: ", str(raised)), f"{kind}: {raised!r}"


@pytest.mark.parametrize("value", [2**70, -1, 1.5, "16"])
def test_what_a_tuple_of_codes_says(value: Any) -> None:
    codes = octavo.Quantized(CODES, np.ones(2, np.float32), rotation=value, k=4)
    with pytest.raises((TypeError, ValueError), match=r"^dequantize: rotation: expected "):
        octavo.dequantize(codes)
