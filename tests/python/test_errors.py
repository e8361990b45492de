"""What does not fit is refused before any work, by name: "<function>: <argument>: expected ..., got ...".

dtype and kind: TypeError. Shape, value, device: ValueError. Inputs stay untouched, and nothing is silently wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
from support import HAS_TORCH, NUMPY, TORCH, Backend, equal, make, names, unchanged

F = np.float32
NAN, INF = np.nan, np.inf
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
Errors = type[Exception] | tuple[type[Exception], ...]


def fails(error: Errors, function: str, argument: str, call: Callable[[], Any], *words: str) -> None:
    """Assert that `call` raises `error` with a message of the house's form that holds `words`."""
    with pytest.raises(error) as info:
        call()
    message = str(info.value)
    names(info.value, f"{function}: {argument}")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


class Inputs:
    """Good arguments on one backend: x [4, 6], w [5, 6], codes, a weight, a bias [5]."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.x = self.floats((4, 6))
        self.w = self.floats((5, 6))
        self.bias = self.floats((5,))
        self.a = self.array(np.ones((4, 6), np.int8))
        self.b = self.array(np.ones((5, 6), np.int8))
        self.weight = octavo.quantize_weight(self.w)

    def array(self, values: Any) -> Any:
        return self.backend.array(np.asarray(values))

    def floats(self, shape: tuple[int, ...]) -> Any:
        return self.array(make("normal", shape, "float32"))

    def zeros(self, *shape: int, dtype: str = "float32") -> Any:
        return self.array(np.zeros(shape, dtype))


@pytest.fixture(scope="module")
def inputs(backend: Backend) -> Inputs:
    return Inputs(backend)


# ---------------------------------------------------------------------------------------------------------------
# x of every function that takes one: wrong kinds, dtypes, ranks

TAKES_X: dict[str, tuple[str, Callable[[Inputs, Any], Any]]] = {
    "quantize": ("x", lambda i, x: octavo.quantize(x)),
    "quantize_weight": ("weight", lambda i, x: octavo.quantize_weight(x)),
    "find_outliers": ("x", lambda i, x: octavo.find_outliers(x)),
    "linear": ("x", lambda i, x: octavo.linear(x, i.weight)),
}


@pytest.mark.parametrize("function", TAKES_X)
def test_x_of_a_wrong_dtype(inputs: Inputs, function: str) -> None:
    argument, call = TAKES_X[function]
    for dtype in ("float64", "int8", "int32", "int64", "uint8", "bool", "complex64"):
        x = inputs.zeros(4, 6, dtype=dtype)
        fails(TypeError, function, argument, lambda x=x: call(inputs, x), dtype)


@pytest.mark.parametrize("function", TAKES_X)
def test_x_of_a_wrong_kind(inputs: Inputs, function: str) -> None:
    argument, call = TAKES_X[function]
    for x in ([[1.0] * 6], ((1.0,) * 6,), None, 1.0, "x", object(), {}, np.float32(1)):
        if isinstance(x, np.generic):  # a 0-d array in disguise: either word is right
            fails((TypeError, ValueError), function, argument, lambda x=x: call(inputs, x))
        else:
            fails(TypeError, function, argument, lambda x=x: call(inputs, x))


@pytest.mark.parametrize("function", TAKES_X)
def test_x_of_rank_0(inputs: Inputs, function: str) -> None:
    argument, call = TAKES_X[function]
    fails(ValueError, function, argument, lambda: call(inputs, inputs.zeros()))


def test_weight_of_a_wrong_rank(inputs: Inputs) -> None:
    for shape in ((6,), (2, 5, 6)):
        w = inputs.zeros(*shape)
        fails(ValueError, "quantize_weight", "weight", lambda w=w: octavo.quantize_weight(w))


def test_nonfinite_weight(inputs: Inputs) -> None:
    for bad, granularity, scheme in itertools.product((NAN, INF, -INF), ref.GRANULARITIES, ref.SCHEMES):
        for dtype in inputs.backend.dtypes:
            for at in ((0, 0), (4, 32), (2, 17)):
                values = make("normal", (5, 33), dtype)
                values[at] = bad
                w = inputs.backend.array(values, dtype)
                for columns in (None, [at[1]]):  # a kept column has codes too
                    options = {"scheme": scheme, "granularity": granularity, "outlier_columns": columns}
                    fails(ValueError, "quantize_weight", "weight", partial(octavo.quantize_weight, w, **options))


# ---------------------------------------------------------------------------------------------------------------
# Everything else, one line each

linear, int8_matmul, quantize, dequantize = octavo.linear, octavo.int8_matmul, octavo.quantize, octavo.dequantize
quantize_weight = octavo.quantize_weight
EITHER = (TypeError, ValueError)
KEPT = "outlier_columns"
Case = tuple[Errors, str, Callable[[Inputs], Any]]

CASES: dict[str, dict[str, Case]] = {
    "linear": {
        "x of another k": (ValueError, "x", lambda i: linear(i.zeros(4, 7), i.weight)),
        "x of k = 1": (ValueError, "x", lambda i: linear(i.zeros(4, 1), i.weight)),
        "x of k = 0": (ValueError, "x", lambda i: linear(i.zeros(4, 0), i.weight)),
        "bias length": (ValueError, "bias", lambda i: linear(i.x, i.weight, i.zeros(6))),
        "bias of 1": (ValueError, "bias", lambda i: linear(i.x, i.weight, i.zeros(1))),
        "bias rank 2": (ValueError, "bias", lambda i: linear(i.x, i.weight, i.zeros(1, 5))),
        "bias rank 0": (ValueError, "bias", lambda i: linear(i.x, i.weight, i.zeros())),
        "bias float64": (TypeError, "bias", lambda i: linear(i.x, i.weight, i.zeros(5, dtype="float64"))),
        "bias int32": (TypeError, "bias", lambda i: linear(i.x, i.weight, i.zeros(5, dtype="int32"))),
        "bias list": (TypeError, "bias", lambda i: linear(i.x, i.weight, [0.0] * 5)),
        "weight array": (TypeError, "weight", lambda i: linear(i.x, i.w)),
        "weight None": (TypeError, "weight", lambda i: linear(i.x, None)),
        "weight Weight": (TypeError, "weight", lambda i: linear(i.x, i.weight._native)),
        "weight Quantized": (TypeError, "weight", lambda i: linear(i.x, quantize(i.w))),
        "static": (ValueError, "(outliers|weight)", lambda i: linear(i.x, i.weight, outliers="static")),
        "out shape": (ValueError, "out", lambda i: linear(i.x, i.weight, out=i.zeros(5, 4))),
        "out rank": (ValueError, "out", lambda i: linear(i.x, i.weight, out=i.zeros(20))),
        "out lead": (ValueError, "out", lambda i: linear(i.x, i.weight, out=i.zeros(2, 2, 5))),
        "out float64": (TypeError, "out", lambda i: linear(i.x, i.weight, out=i.zeros(4, 5, dtype="float64"))),
        "out int8": (TypeError, "out", lambda i: linear(i.x, i.weight, out=i.zeros(4, 5, dtype="int8"))),
        "out list": (TypeError, "out", lambda i: linear(i.x, i.weight, out=[[0.0] * 5] * 4)),
    },
    "int8_matmul": {
        "another k": (ValueError, "b", lambda i: int8_matmul(i.a, i.zeros(5, 7, dtype="int8"))),
        "b rank 1": (ValueError, "b", lambda i: int8_matmul(i.a, i.zeros(6, dtype="int8"))),
        "b rank 3": (ValueError, "b", lambda i: int8_matmul(i.a, i.zeros(1, 5, 6, dtype="int8"))),
        "a rank 0": (ValueError, "a", lambda i: int8_matmul(i.zeros(dtype="int8"), i.b)),
        "a float": (TypeError, "a", lambda i: int8_matmul(i.x, i.b)),
        "a bool": (TypeError, "a", lambda i: int8_matmul(i.zeros(4, 6, dtype="bool"), i.b)),
        "a list": (TypeError, "a", lambda i: int8_matmul([[1] * 6], i.b)),
        "b uint8": (TypeError, "b", lambda i: int8_matmul(i.a, i.zeros(5, 6, dtype="uint8"))),
        "b int32": (TypeError, "b", lambda i: int8_matmul(i.a, i.zeros(5, 6, dtype="int32"))),
        "b None": (TypeError, "b", lambda i: int8_matmul(i.a, None)),
        "out shape": (ValueError, "out", lambda i: int8_matmul(i.a, i.b, out=i.zeros(5, 4, dtype="int32"))),
        "out float32": (TypeError, "out", lambda i: int8_matmul(i.a, i.b, out=i.zeros(4, 5))),
        "out int64": (TypeError, "out", lambda i: int8_matmul(i.a, i.b, out=i.zeros(4, 5, dtype="int64"))),
    },
    "quantize": {
        "exclude range": (ValueError, "exclude", lambda i: quantize(i.x, exclude=[6])),
        "exclude negative": (ValueError, "exclude", lambda i: quantize(i.x, exclude=[-1])),
        "exclude rank": (ValueError, "exclude", lambda i: quantize(i.x, exclude=[[0]])),
        "exclude floats": (TypeError, "exclude", lambda i: quantize(i.x, exclude=[0.5])),
        "exclude mask": (EITHER, "exclude", lambda i: quantize(i.x, exclude=np.ones(6, bool))),
    },
    "quantize_weight": {
        "columns range": (ValueError, KEPT, lambda i: quantize_weight(i.w, outlier_columns=[6])),
        "columns negative": (ValueError, KEPT, lambda i: quantize_weight(i.w, outlier_columns=[-1])),
        "columns huge": (ValueError, KEPT, lambda i: quantize_weight(i.w, outlier_columns=[2**32])),
        "columns rank": (ValueError, KEPT, lambda i: quantize_weight(i.w, outlier_columns=[[0]])),
        "columns floats": (TypeError, KEPT, lambda i: quantize_weight(i.w, outlier_columns=[0.0])),
        "columns of none": (ValueError, KEPT, lambda i: quantize_weight(i.zeros(5, 0), outlier_columns=[0])),
    },
    "dequantize": {
        "array": (TypeError, "q", lambda i: dequantize(i.a)),
        "None": (TypeError, "q", lambda i: dequantize(None)),
        "dtype float64": (EITHER, "dtype", lambda i: dequantize(i.weight, dtype="float64")),
        "dtype int8": (EITHER, "dtype", lambda i: dequantize(i.weight, dtype="int8")),
        "dtype number": (EITHER, "dtype", lambda i: dequantize(i.weight, dtype=3)),
        "scale length": (ValueError, "(q.)?scale", lambda i: dequantize(octavo.Quantized(i.a, i.zeros(3), None))),
        "codes dtype": (TypeError, "(q.)?codes", lambda i: dequantize(octavo.Quantized(i.x, i.zeros(4), None))),
    },
}

THRESHOLDS: dict[Any, type[Exception]] = {
    -1.0: ValueError,
    -1e-30: ValueError,
    NAN: ValueError,
    -INF: ValueError,
    "6": TypeError,
    None: TypeError,
    (6.0,): TypeError,
}


def test_thresholds(inputs: Inputs) -> None:
    for threshold, function in itertools.product(THRESHOLDS, ("find_outliers", "linear")):
        arguments = (inputs.x,) if function == "find_outliers" else (inputs.x, inputs.weight)
        call = partial(getattr(octavo, function), *arguments, threshold=threshold)
        fails(THRESHOLDS[threshold], function, "threshold", call)


@pytest.mark.parametrize(("function", "case"), [(f, c) for f, cases in CASES.items() for c in cases])
def test_refused(inputs: Inputs, function: str, case: str) -> None:
    error, argument, call = CASES[function][case]
    with unchanged(inputs.backend, inputs.x, inputs.w, inputs.bias, inputs.a, inputs.b):
        fails(error, function, argument, lambda: call(inputs))


# Every enumeration: what is allowed is in the message.
ENUMS: dict[str, tuple[str, tuple[str, ...], Callable[[Inputs, Any], Any]]] = {
    "quantize scheme": ("scheme", ref.SCHEMES, lambda i, v: octavo.quantize(i.x, scheme=v)),
    "quantize granularity": ("granularity", ("tensor", "row"), lambda i, v: octavo.quantize(i.x, granularity=v)),
    "quantize_weight scheme": ("scheme", ref.SCHEMES, lambda i, v: octavo.quantize_weight(i.w, scheme=v)),
    "quantize_weight granularity": (
        "granularity",
        ref.GRANULARITIES,
        lambda i, v: octavo.quantize_weight(i.w, granularity=v),
    ),
    "linear outliers": ("outliers", ref.OUTLIERS, lambda i, v: octavo.linear(i.x, i.weight, outliers=v)),
    "linear path": ("path", ("auto", "int8", "weight_only"), lambda i, v: octavo.linear(i.x, i.weight, path=v)),
}


def test_enumerations_name_what_is_allowed(inputs: Inputs) -> None:
    for case, value in itertools.product(ENUMS, ("", "foo", "Absmax", "ROW", "none ", "auto\0", 3, None, True, b"row")):
        argument, allowed, call = ENUMS[case]
        error = ValueError if isinstance(value, str) else (TypeError, ValueError)
        words = allowed if isinstance(value, str) else ()
        fails(error, case.split()[0], argument, partial(call, inputs, value), *words)


def test_vector_is_a_granularity_of_products_only(inputs: Inputs) -> None:
    fails(ValueError, "quantize", "granularity", lambda: octavo.quantize(inputs.x, granularity="vector"), "vector")


def test_everything_after_the_star_is_keyword_only(inputs: Inputs) -> None:
    for call in (
        lambda: octavo.quantize(inputs.x, "absmax"),
        lambda: octavo.quantize_weight(inputs.w, "absmax"),
        lambda: octavo.find_outliers(inputs.x, 6.0),
        lambda: octavo.int8_matmul(inputs.a, inputs.b, None),
        lambda: octavo.linear(inputs.x, inputs.weight, None, 6.0),
        lambda: octavo.linear(inputs.x, inputs.weight, treshold=6.0),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, 2**40])
def test_set_num_threads_refuses(count: Any) -> None:
    before = octavo.get_num_threads()
    with pytest.raises((TypeError, ValueError)):
        octavo.set_num_threads(count)
    assert octavo.get_num_threads() == before


def test_the_core_refuses_what_its_wrapper_would(inputs: Inputs) -> None:
    """The functions of octavo._core read their arguments themselves: wrong kinds and counts must not get through."""
    from octavo import _core

    empty = _core.Weight.__new__(_core.Weight)
    options = octavo.Options()._native
    for weight in (None, 3, inputs.w, inputs.weight, empty):
        call = lambda w=weight: _core.linear(inputs.x, w, None, options, None)  # noqa: E731
        fails(TypeError, "linear", "weight", call)
    for wrong in (None, {}, octavo.Options(), inputs.weight._native):
        call = lambda o=wrong: _core.linear(inputs.x, inputs.weight._native, None, o, None)  # noqa: E731
        fails(TypeError, "linear", "options", call)
    for arguments in ((), (inputs.x,), (inputs.x,) * 8):
        with pytest.raises(TypeError, match=f"expected 5 positional arguments, got {len(arguments)}"):
            _core.linear(*arguments)
    with pytest.raises(TypeError):
        _core.find_outliers(inputs.x, threshold=6.0)
    fails(ValueError, "linear", "outliers", lambda: octavo.linear(inputs.x, inputs.weight, outliers="\ud800"))


# ---------------------------------------------------------------------------------------------------------------
# out: overlaps


def overlapping(i: Inputs, function: str) -> list[tuple[str, Any, Callable[[Any], Any]]]:
    """(what, out, call) with an out [4, 6] that shares memory with an input, or with itself."""
    square = octavo.quantize_weight(i.floats((6, 6)))
    b = i.array(np.ones((6, 6), np.int8))
    if function == "linear":
        buffer = i.zeros(8, 6)
        x, bias = buffer[:4], buffer[5]
        return [
            ("x itself", x, lambda out: octavo.linear(x, square, out=out)),
            ("a part of x", buffer[3:7], lambda out: octavo.linear(x, square, out=out)),
            ("bias", buffer[2:6], lambda out: octavo.linear(i.x, square, bias, out=out)),
        ]
    codes = i.zeros(4, 6, dtype="int32")
    view = codes.view(np.int8) if i.backend.framework == "numpy" else codes.view(i.backend.dtype("int8"))
    return [("a", codes, lambda out: octavo.int8_matmul(view[:, :6], b, out=out))]


@pytest.mark.parametrize("function", ["linear", "int8_matmul"])
def test_out_must_not_overlap_an_input(inputs: Inputs, function: str) -> None:
    for what, out, call in overlapping(inputs, function):
        with unchanged(inputs.backend, out):
            fails(ValueError, function, "out", lambda out=out, call=call: call(out))
        assert what


@pytest.mark.parametrize("where", ["codes", "scale", "outlier_weight"])
def test_out_must_not_overlap_the_weight(where: str) -> None:
    """Arrays of a weight given to the constructor may be the caller's own."""
    buffer = np.zeros((4, 6), F)
    arrays: dict[str, Any] = {
        "codes": np.ones((6, 6), np.int8),
        "scale": np.ones(6, F),
        "outlier_weight": np.ones((6, 1), F),
    }
    arrays[where] = {
        "codes": buffer.view(np.int8).reshape(-1)[:36].reshape(6, 6),
        "scale": buffer[1],
        "outlier_weight": buffer[2].reshape(6, 1),
    }[where]
    weight = octavo.Int8Weight(
        arrays["codes"],
        arrays["scale"],
        outlier_columns=np.array([1], np.int32),
        outlier_weight=arrays["outlier_weight"],
        scheme="absmax",
        granularity="vector",
    )
    x = make("outliers", (4, 6), "float32")
    expected = octavo.linear(x, weight)
    try:
        got = octavo.linear(x, weight, out=buffer)
    except ValueError as error:
        names(error, "linear: out")
    else:  # the weight holds its own copy
        equal(got, expected)


def test_out_must_not_overlap_itself(inputs: Inputs) -> None:
    """Strides of zero, and rows that share elements."""
    strided = inputs.backend.as_strided
    expanded = strided(inputs.zeros(1, 5), (4, 5), (0, 1))
    expanded_codes = strided(inputs.zeros(1, 5, dtype="int32"), (4, 5), (0, 1))
    shared = strided(inputs.zeros(9), (4, 5), (1, 1))
    for out in (expanded, shared):
        fails(ValueError, "linear", "out", lambda out=out: octavo.linear(inputs.x, inputs.weight, out=out))
    fails(ValueError, "int8_matmul", "out", lambda: octavo.int8_matmul(inputs.a, inputs.b, out=expanded_codes))


def test_out_beside_its_input_is_fine(inputs: Inputs) -> None:
    """Interleaved, not overlapping: x and out are the left and the right half of one buffer."""
    buffer = inputs.zeros(4, 11)
    x, out = buffer[:, :6], buffer[:, 6:]
    x[...] = inputs.x
    octavo.linear(x, inputs.weight, out=out)
    equal(inputs.backend.host(out), inputs.backend.host(octavo.linear(inputs.x, inputs.weight)))
    equal(inputs.backend.host(x), inputs.backend.host(inputs.x))


# ---------------------------------------------------------------------------------------------------------------
# NumPy's own


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


def test_read_only_inputs_are_fine() -> None:
    x, w = make("outliers", (4, 6), "float32"), make("normal", (5, 6), "float32")
    weight = octavo.quantize_weight(read_only(w), outlier_columns=read_only(np.array([1])))
    expected = octavo.linear(x, octavo.quantize_weight(w, outlier_columns=[1]), w[:, 0].copy())
    equal(octavo.linear(read_only(x), weight, read_only(w[:, 0])), expected)
    equal(octavo.quantize(read_only(x)).codes, ref.quantize(x).codes)
    equal(octavo.find_outliers(read_only(x)), ref.find_outliers(x))
    a = read_only(np.ones((2, 3), np.int8))
    equal(octavo.int8_matmul(a, a), np.full((2, 2), 3, np.int32))
    parts = read_only(weight.codes), read_only(weight.scale)
    frozen = octavo.Int8Weight(*parts, scheme="absmax", granularity="vector")
    equal(octavo.linear(x, frozen, outliers="none"), octavo.linear(x, weight, outliers="none"))
    equal(octavo.dequantize(frozen), octavo.dequantize(weight))


def test_read_only_out_is_refused() -> None:
    i = Inputs(NUMPY)
    out = read_only(np.zeros((4, 5), F))
    fails(ValueError, "linear", "out", lambda: octavo.linear(i.x, i.weight, out=out))
    codes = read_only(np.zeros((4, 5), np.int32))
    fails(ValueError, "int8_matmul", "out", lambda: octavo.int8_matmul(i.a, i.b, out=codes))
    assert not out.any()
    assert not codes.any()


@pytest.mark.parametrize("function", TAKES_X)
def test_byte_swapped_arrays_are_refused(function: str) -> None:
    argument, call = TAKES_X[function]
    i = Inputs(NUMPY)
    swapped = i.x.astype(i.x.dtype.newbyteorder())
    fails((TypeError, ValueError), function, argument, lambda: call(i, swapped))


@pytest.mark.parametrize("function", TAKES_X)
def test_masked_arrays_are_refused(function: str) -> None:
    """Their mask would be ignored."""
    argument, call = TAKES_X[function]
    masked = np.ma.masked_array(np.ones((4, 6), F), mask=np.eye(4, 6))
    fails((TypeError, ValueError), function, argument, lambda: call(Inputs(NUMPY), masked))


@pytest.mark.parametrize("function", TAKES_X)
def test_object_string_and_structured_arrays_are_refused(function: str) -> None:
    argument, call = TAKES_X[function]
    i = Inputs(NUMPY)
    for x in (
        np.ones((4, 6), object),
        np.full((4, 6), "1"),
        np.zeros((4, 6), [("a", F)]),
        np.zeros((4, 6), "datetime64[s]"),
    ):
        fails((TypeError, ValueError), function, argument, lambda x=x: call(i, x))


def test_misaligned_and_subclassed_arrays() -> None:
    """Elements at odd addresses, np.matrix and memory maps' kind: right, or refused by name."""
    x = make("normal", (4, 6), "float32")
    raw = np.zeros(x.nbytes + 1, np.uint8)
    odd = raw[1:].view(F).reshape(4, 6)
    odd[...] = x
    assert not odd.flags.aligned
    for given in (odd, x.view(np.matrix), x.view(type("Own", (np.ndarray,), {}))):
        try:
            codes = octavo.quantize(given).codes
        except (TypeError, ValueError) as error:
            names(error, "quantize: x")
        else:
            equal(np.asarray(codes), ref.quantize(x).codes)


# ---------------------------------------------------------------------------------------------------------------
# PyTorch's own


@needs_torch
@pytest.mark.parametrize("function", TAKES_X)
def test_meta_tensors_are_refused(function: str) -> None:
    argument, call = TAKES_X[function]
    x = TORCH.array(np.zeros((4, 6), F)).to("meta")
    # a device (ValueError), or one without a backend (RuntimeError)
    fails((ValueError, RuntimeError), function, argument, lambda: call(Inputs(TORCH), x), "meta")


@needs_torch
@pytest.mark.filterwarnings("ignore:Sparse .* in beta")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("function", TAKES_X)
def test_other_layouts_are_refused(function: str, layout: str) -> None:
    argument, call = TAKES_X[function]
    x = getattr(TORCH.array(np.eye(4, 6, dtype=F)), layout)()
    fails((TypeError, ValueError), function, argument, lambda: call(Inputs(TORCH), x))


@needs_torch
@pytest.mark.parametrize("function", TAKES_X)
def test_negative_bit_tensors_are_right_or_refused(function: str) -> None:
    """What `x.conj().imag` gives is a view whose sign is kept in a bit that DLPack loses."""
    import torch

    argument, call = TAKES_X[function]
    imag = torch.from_numpy(make("normal", (4, 6), "float32"))
    imag[0, 0] = 50
    i = Inputs(TORCH)

    def values(result: Any) -> Any:
        return result.codes if function.startswith("quantize") else result

    for lazy in (
        torch.complex(torch.zeros(4, 6), imag).conj().imag,
        torch._neg_view(imag),  # contiguous
        torch.complex(torch.zeros(4, 6), imag).conj().imag.as_strided((4, 6), (6, 1)),
    ):
        assert lazy.is_neg()
        try:
            got = values(call(i, lazy))
        except ValueError as error:
            names(error, f"{function}: {argument}")
        else:
            assert torch.equal(got, values(call(i, lazy.resolve_neg())))


@needs_torch
def test_out_with_the_negative_bit_is_refused() -> None:
    import torch

    i = Inputs(TORCH)
    out = torch._neg_view(torch.zeros(4, 5))
    fails(ValueError, "linear", "out", lambda: octavo.linear(i.x, i.weight, out=out), "negative bit")


@needs_torch
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of jvp itself
def test_wrapped_tensors_of_transforms_are_refused() -> None:
    """Inside vmap and jvp a tensor has no memory of its own, and its type does not tell."""
    import torch

    i = Inputs(TORCH)
    for transformed in (
        lambda: torch.vmap(lambda row: octavo.linear(row, i.weight))(i.x),
        lambda: torch.func.jvp(lambda x: octavo.linear(x, i.weight), (i.x,), (i.x,)),
        lambda: torch.func.functionalize(lambda x: octavo.linear(x, i.weight))(i.x),
    ):
        fails((TypeError, ValueError), "linear", "x", transformed)


@needs_torch
def test_a_tensor_of_another_rank_than_usual() -> None:
    """More dimensions than the bindings have room for without the heap, in and out, permuted."""
    i = Inputs(TORCH)
    flat = octavo.linear(i.x, i.weight)
    many = i.x.reshape(1, 2, 1, 1, 2, 1, 1, 1, 6)
    assert octavo.linear(many, i.weight).shape == (1, 2, 1, 1, 2, 1, 1, 1, 5)
    out = i.zeros(1, 2, 1, 1, 2, 1, 1, 1, 5)
    octavo.linear(many.transpose(1, 4), i.weight, out=out.transpose(1, 4))
    assert out.reshape(4, 5).equal(flat)


@needs_torch
@pytest.mark.parametrize("function", TAKES_X)
def test_conjugate_tensors_are_refused(function: str) -> None:
    import torch

    argument, call = TAKES_X[function]
    x = torch.ones(4, 6, dtype=torch.complex64).conj()
    fails(TypeError, function, argument, lambda: call(Inputs(TORCH), x))


@needs_torch
def test_requires_grad() -> None:
    """The gradient of x would be lost : refused with what to do instead. Weights and biases are detached."""
    import torch

    i = Inputs(TORCH)
    x = i.x.clone().requires_grad_()
    words = ("detach()", "no_grad", "Int8Linear")
    for function, call in (
        ("linear", lambda: octavo.linear(x, i.weight)),
        ("quantize", lambda: octavo.quantize(x)),
    ):
        with pytest.raises(ValueError, match=rf"^{function}: x: expected") as info:
            call()
        assert all(word in str(info.value) for word in words), str(info.value)
    try:  # columns have no gradient: this may as well work
        assert torch.equal(octavo.find_outliers(x, threshold=0.5), octavo.find_outliers(i.x, threshold=0.5))
    except ValueError as error:
        names(error, "find_outliers: x")
    expected = octavo.linear(i.x, i.weight, i.bias)
    with torch.no_grad():
        got = octavo.linear(x, i.weight, i.bias)
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert torch.equal(octavo.linear(x.detach(), i.weight, i.bias), expected)
    with torch.inference_mode():
        assert torch.equal(octavo.linear(x, i.weight, i.bias), expected)
    weight = octavo.quantize_weight(torch.nn.Parameter(i.w.clone()), outlier_columns=[1])
    assert not weight.outlier_weight.requires_grad
    assert not weight.scale.requires_grad
    got = octavo.linear(i.x, i.weight, torch.nn.Parameter(i.bias.clone()))
    assert torch.equal(got, expected)
    assert not got.requires_grad


@needs_torch
def test_out_that_requires_grad_is_refused() -> None:
    i = Inputs(TORCH)
    out = i.zeros(4, 5).requires_grad_()
    fails(ValueError, "linear", "out", lambda: octavo.linear(i.x, i.weight, out=out))


@needs_torch
def test_mixed_devices_are_refused() -> None:
    """With x on one device, bias or out on another that has no memory."""
    i = Inputs(TORCH)
    for argument, call in (
        ("bias", lambda: octavo.linear(i.x, i.weight, i.bias.to("meta"))),
        ("out", lambda: octavo.linear(i.x, i.weight, out=i.zeros(4, 5).to("meta"))),
    ):
        fails((ValueError, RuntimeError), "linear", argument, call, "meta")


@needs_torch
def test_fake_and_functional_tensors_do_not_crash() -> None:
    """FakeTensor inherits DLPack's fast path and has no memory behind it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    i = Inputs(TORCH)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(4, 6))
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            octavo.linear(fake, i.weight)
    parameter = torch.nn.Parameter(i.x.clone(), requires_grad=False)
    assert torch.equal(octavo.linear(parameter, i.weight), octavo.linear(i.x, i.weight))


@needs_torch
def test_inputs_are_untouched_after_a_failure() -> None:
    i = Inputs(TORCH)
    with unchanged(TORCH, i.x, i.bias, i.weight.codes):
        for call in (
            lambda: octavo.linear(i.x, i.weight, i.bias, outliers="foo"),
            lambda: octavo.linear(i.x, i.weight, i.zeros(4)),
            lambda: octavo.linear(i.x, i.weight, out=i.x),
        ):
            with pytest.raises(ValueError, match="linear"):
                call()


# ---------------------------------------------------------------------------------------------------------------
# What looks bad and is fine


def test_unusual_but_good(inputs: Inputs) -> None:
    """Rank 5, m or n or k of 0, one element, k of 200000, an infinite threshold, numpy scalars as numbers."""
    b = inputs.backend
    assert tuple(octavo.linear(inputs.zeros(1, 2, 1, 3, 6), inputs.weight).shape) == (1, 2, 1, 3, 5)
    assert tuple(octavo.linear(inputs.zeros(0, 6), inputs.weight).shape) == (0, 5)
    assert tuple(octavo.linear(inputs.zeros(4, 6), octavo.quantize_weight(inputs.zeros(0, 6))).shape) == (4, 0)
    bias_only = octavo.linear(inputs.zeros(4, 0), octavo.quantize_weight(inputs.zeros(5, 0)), inputs.bias)
    equal(b.host(bias_only), np.tile(b.host(inputs.bias), (4, 1)))
    one = octavo.linear(inputs.array(np.ones((1, 1), F)), octavo.quantize_weight(inputs.array(np.ones((1, 1), F))))
    assert abs(b.host(one)[0, 0] - 1) < 1e-6
    wide = octavo.quantize_weight(inputs.zeros(1, 200_000))
    equal(b.host(octavo.linear(inputs.zeros(1, 200_000), wide)), np.zeros((1, 1), F))
    plain = b.host(octavo.linear(inputs.x, inputs.weight))
    for threshold in (INF, 6, np.float32(6), np.float64(6), np.int64(6)):
        equal(b.host(octavo.linear(inputs.x, inputs.weight, threshold=threshold)), plain)
    static = octavo.quantize_weight(inputs.w, outlier_columns=[])  # an empty calibrated set is a set
    equal(b.host(octavo.linear(inputs.x, static, outliers="static")), plain)
