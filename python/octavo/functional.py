"""The operations of LLM.int8() on arrays of any supported framework (NumPy, PyTorch).

Letters: ``m`` tokens, ``k`` input features, ``n`` output features; X is ``[..., k]``, W is ``[n, k]`` (the layout of a
framework's ``Linear.weight``), Y is ``[..., n]``. Inputs may have any strides and are never modified. Results belong to
the framework and device of the first argument. On the CPU a call returns when its work is done; the interpreter lock is
released meanwhile. Arguments that do not fit raise TypeError (dtype, kind) or ValueError (shape, value, device), worded
"<function>: <argument>: expected ..., got ...", before any work starts.

Equations are those of arXiv 2208.07339.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from octavo import _core, _types
from octavo._text import expect, unexpected
from octavo._types import Array, Columns, Granularity, Outliers, ProductPath, Scheme
from octavo.options import DEFAULT, Options, options_of
from octavo.weight import Int8Weight

_DEFAULTS = Options()


class _QuantizedArrays(NamedTuple):
    codes: Array
    scale: Array
    zeropoint: Array | None


class Quantized(_QuantizedArrays):
    """What `quantize` returns: ``x ~ (codes + zeropoint) * scale``, a tuple of the three.

    Attributes:
        codes: int8, the shape of x; with rotation, the last dimension up to whole blocks.
        scale: float32, ``[1]`` for granularity "tensor", else one per row: ``x.shape[:-1]`` (``[1]`` for a rank-1 x).
        zeropoint: float32 with integral values, shaped as `scale`; None for scheme "absmax".
        rotation: 0, or what x was rotated with: then the codes are those of the rotated x.
        k: the columns of x.
    """

    rotation: int
    k: int

    def __new__(  # noqa: D102
        cls, codes: Array, scale: Array, zeropoint: Array | None = None, rotation: int = 0, k: int | None = None
    ) -> Quantized:
        self = super().__new__(cls, codes, scale, zeropoint)
        self.rotation = rotation
        self.k = _types.columns_of(codes) if k is None else k
        return self


def quantize(
    x: Array,
    *,
    scheme: Scheme = "absmax",
    granularity: Literal["tensor", "row"] = "row",
    rotation: int = 0,
    exclude: Columns | None = None,
) -> Quantized:
    """Quantize activations to int8, one scale per tensor or per row; in float32, rounding half to even.

    absmax (Eq. 1): ``codes = clip(rint(x * 127 / absmax), -127, 127)``, ``scale = absmax / 127``.

    zeropoint (Eq. 2-3): ``nd = 254 / (max - min)``, ``zeropoint = rint(nd * min) + 127``,
    ``codes = clip(rint(nd * x) - zeropoint, -127, 127)``, ``scale = 1 / nd``.

    With `rotation` b, each block of b consecutive features (k padded with zeros to whole blocks) is first multiplied by
    the Sylvester-Hadamard matrix over sqrt(b), which spreads what is large in one feature over its block and is its own
    inverse. absmax is then ``codes = clip(rint(x * (127 / absmax)), -127, 127)``.

    Args:
        x: float32, float16 or bfloat16 ``[..., k]``, rank >= 1. A rank-1 x is one row.
        scheme: "absmax" or "zeropoint".
        granularity: "tensor" (one scale) or "row" (one for each row of k elements).
        rotation: 0 (none), 16, 64 or 256.
        exclude: columns left out of the scale, whose codes are 0 (rank 1, integers): outlier columns. With `rotation`
            they are 0 before it.

    Returns:
        Quantized(codes, scale, zeropoint).

    A group (row, tensor) of zeros, or without elements, has scale 0 and codes 0 (zeropoint: scale 1); a constant group
    m under zeropoint has scale ``|m|`` and reproduces m. A group that holds NaN or Inf has scale NaN and codes 0.
    """
    if exclude is not None:
        exclude = _types.to_framework_of(x, _types.column_indices("quantize", "exclude", exclude, _types.columns_of(x)))
    options = options_of("quantize", scheme=scheme, granularity=granularity, rotation=rotation)
    return Quantized(*_core.quantize(x, options._native, exclude), rotation, _types.columns_of(x))


def quantize_weight(
    weight: Array,
    *,
    scheme: Scheme = DEFAULT,
    granularity: Granularity = DEFAULT,
    rotation: int = DEFAULT,
    outlier_columns: Columns | None = None,
    options: Options | None = None,
    out: Int8Weight | None = None,
    seed: int | None = None,
) -> Int8Weight:
    """Quantize the weight of a linear layer for `linear`.

    The equations are those of `quantize`. Codes and scales are made over all k columns, kept or not.

    Args:
        weight: float32, float16 or bfloat16 ``[n, k]``, finite. A tensor that requires grad is read as if detached.
        scheme: "absmax" (default) or "zeropoint"; `linear` quantizes X the same way.
        granularity: names the product. "tensor": one scale for W and one for X; "row": one for W and one per row of X;
            "vector" (default): one per output feature of W and one per row of X.
        rotation: 0 (default), 16, 64 or 256; `linear` rotates X the same way. What is kept is not rotated.
        outlier_columns: input features whose original weights are kept with the codes (integers, any order), so that
            the 16-bit product of these columns uses them instead of dequantized codes.
        options: whose `scheme`, `granularity` and `rotation` to use, instead of single ones.
        out: a weight of the same shape, made with the same options and without kept columns, whose arrays to write to,
            without an allocation; it is returned. For a weight that is trained. On CUDA devices the work is enqueued,
            and a group of the weight that holds NaN or Inf has scale NaN, so that whatever it produces is NaN.
        seed: 0 to 2**64 - 1: codes are rounded stochastically, so that ``codes * scale`` is the weight on average over
            seeds: of ``r = weight / scale`` the greater neighbor as likely as ``r`` is near to it. The random numbers
            are those of Philox-4x32-10 for this key and the places of the elements (stochastic.hpp), the same on every
            machine. Absmax without rotation, and with `out` only. None (default): to the nearest.

    Raises:
        ValueError: the weight holds NaN or Inf (`out` is then unspecified), is not of rank 2, or a column is out of
            range; `out` does not fit, or its arrays cannot be written to; a seed without `out`, out of range, with
            "zeropoint" or with rotation.
    """
    if seed is not None:
        expect("quantize_weight: seed", seed, int, "an int")
        if out is None or not 0 <= seed < 2**64:
            raise ValueError(f"quantize_weight: seed: expected `out`, and 0 to 2**64 - 1, got {seed}")
    indices = None
    if outlier_columns is not None:
        indices = _types.column_indices(
            "quantize_weight", "outlier_columns", outlier_columns, _types.columns_of(weight)
        )
    options = options_of("quantize_weight", options, scheme=scheme, granularity=granularity, rotation=rotation)
    if out is not None:
        return _requantize(weight, options, indices, out, seed)
    codes, scale, zeropoint, code_sums = _core.quantize_weight(weight, options._native)
    more: dict[str, Any] = {"zeropoint": zeropoint, "code_sums": code_sums, **options.of_weight}
    if indices is not None:
        more["outlier_columns"], more["outlier_weight"] = _types.take_columns(weight, indices)
    shape = (len(codes), _types.columns_of(weight)) if options.rotation else None
    return Int8Weight(codes, scale, shape=shape, **more)


def _requantize(weight: Array, options: Options, kept: Any, out: Int8Weight, seed: int | None) -> Int8Weight:
    """Quantize into the arrays of `out`."""
    expect("quantize_weight: out", out, Int8Weight, "an Int8Weight")
    expected = (_types.shape_of(weight), options.scheme, options.granularity, options.rotation)
    if (out.shape, out.scheme, out.granularity, out.rotation) != expected:
        raise ValueError("quantize_weight: out: expected {}, {}, {}, rotation {}, got {!r}".format(*expected, out))
    if kept is not None or out.outlier_columns is not None:
        raise ValueError("quantize_weight: out: expected no kept columns, got some")
    _core.requantize(weight, options._native, out._codes, out.scale, out.zeropoint, out.code_sums, seed, True)
    return out


def dequantize(q: Quantized | Int8Weight, *, dtype: Any = None) -> Array:
    """``(codes + zeropoint) * scale`` in float32, rounded once to `dtype`; what was rotated is rotated back.

    Args:
        q: what `quantize` or `quantize_weight` returned. Of an Int8Weight the kept outlier columns are not put in.
        dtype: float32 (default), float16 or bfloat16, as a name or as the framework's dtype.

    Returns:
        An array of the shape of what was quantized. Where a scale is NaN, NaN.
    """
    expect("dequantize: q", q, (Quantized, Int8Weight), "Quantized or Int8Weight")
    k = q.k if isinstance(q, Quantized) else q.shape[1]
    return _core.dequantize(q.codes, q.scale, q.zeropoint, q.rotation, k, _types.dtype_name(dtype))


def find_outliers(
    x: Array, *, threshold: float = DEFAULT, relative: float | None = DEFAULT, cap: float | None = DEFAULT
) -> Array:
    """The outlier columns of x: ``O = {j : exists i with not (|x[i, j]| < threshold)}`` (section 3.2).

    With `relative`, of the largest magnitudes ``a[j]`` of the columns, ``O = {j : a[j] > 0 and not (a[j] < t)}``,
    ``t = relative * f(m) * median(a)``: the lower median of those above 0, each cut to its upper 16 bits, and
    ``f(m) = sqrt(ln 1024 / ln 2m)`` for fewer than 512 rows, else 1, which is what the maximum of few normal values
    lacks. So the criterion means the same for small and large activations, for one row and for many.

    Args:
        x: float32, float16 or bfloat16 ``[..., k]``, rank >= 1; all leading dimensions are rows.
        threshold: >= 0, by default 6; a magnitude equal to it, NaN and Inf make an outlier. Infinity: NaN and Inf only.
        relative: a number above 0 instead of `threshold`, or None (default).
        cap: of more than ``floor(cap * k)`` columns the largest stay (of equal ones the first), but all with NaN or Inf
            do; from 0 to 1, or None (default).

    Returns:
        int32 ``[r]``, ascending.
    """
    options = options_of("find_outliers", threshold=threshold, relative=relative, cap=cap)
    return _core.find_outliers(x, options._native)


def int8_matmul(a: Array, b: Array, *, out: Array | None = None) -> Array:
    """``out[..., j] = sum_k a[..., k] * b[j, k]``, exact.

    Args:
        a: int8 ``[..., k]``, rank >= 1.
        b: int8 ``[n, k]``.
        out: int32 ``[..., n]`` to write to (any strides, apart from a and b); default: a new array.

    Raises:
        ValueError: a sum does not fit int32 (possible for k > 131071 only); `out` is then unspecified.
    """
    return _core.int8_matmul(a, b, out)


def linear(
    x: Array,
    weight: Int8Weight,
    bias: Array | None = None,
    *,
    threshold: float = DEFAULT,
    relative: float | None = DEFAULT,
    cap: float | None = DEFAULT,
    outliers: Outliers = DEFAULT,
    path: ProductPath = DEFAULT,
    options: Options | None = None,
    out: Array | None = None,
) -> Array:
    """LLM.int8(): a linear layer with int8 weights (Figure 2, Eq. 8).

    ``y[i, j] = acc[i, j] * (scale_x[i] * scale_w[j]) + sum_{o in O} x[i, o] * w[j, o] + bias[j]``

    ``acc`` is the exact int8 product over the features not in O (zeropoint: unrolled, Eq. 4-5). ``w[j, o]`` is the kept
    original weight where column o is kept, else the dequantized one. Scales are taken over what is not in O. All after
    ``acc`` is float32, rounded once to the output dtype. For a rotated weight X is rotated too, with zeros in O; the
    sum over O is as it was.

    Args:
        x: float32, float16 or bfloat16 ``[..., k]``, rank >= 1.
        weight: from `quantize_weight`, ``[n, k]``.
        bias: float32, float16 or bfloat16 ``[n]``.
        threshold: magnitude from which an element is an outlier, >= 0, by default 6. Unused by "static" and "none".
        relative: instead of `threshold`, as in `find_outliers`; with "rows" of each row as if it were alone.
        cap: the most outlier columns, or with "rows" elements of a row, as in `find_outliers`.
        outliers: what goes through the 16-bit product. "columns" (default): the columns of `find_outliers`, as in the
            paper. "rows": each row's own outliers, so that with path "int8" a row's result depends on no other row.
            "static": ``weight.outlier_columns``, whatever the data; nor does it here. "none": nothing.
        path: "int8" is all of the above. "weight_only" leaves X as it is, ``y = scale_w * sum_k x * (codes + zeropoint)
            + bias`` in float32, and ignores `threshold`, `outliers` and kept columns. "auto" is "int8" on the CPU; on
            CUDA devices it is "weight_only" for few rows, as fast there and more accurate, else "int8". How many
            depends on the GPU and the weight's shape: 8 to 4096, of float32 X 0 to 96. So there a row's result depends
            on the number of rows, as it does (in how sums are rounded) with "weight_only".
            Default: "auto".
        options: whose `threshold`, `relative`, `cap`, `outliers` and `path` to use, instead of single ones. What the
            weight was quantized with stays the weight's.
        out: float32, float16 or bfloat16 ``[..., n]`` to write to (any strides, apart from the inputs); default: a new
            array of x's dtype.

    NaN and Inf in x: under "columns" and "rows" their products propagate as IEEE says, in their own row; under "static"
    and "none" they make the rows of their scaling group NaN. m, n or k of 0 give an empty or bias-only result.

    Raises:
        ValueError: also where x requires grad and autograd is on (use `octavo.torch.Int8Linear`), and for "static" with
            a weight that has no outlier_columns.
    """
    try:
        native = weight._native
    except Exception:
        raise TypeError(f"linear: weight: expected an Int8Weight, got {type(weight).__name__}") from None
    policy: Any = outliers
    product: Any = path
    is_alone = threshold is relative is cap is policy is product is DEFAULT
    if is_alone and (options is None or type(options) is Options):
        options = options or _DEFAULTS  # at once: a small product takes no longer than to ask what was given
    else:
        options = options_of(
            "linear", options, threshold=threshold, relative=relative, cap=cap, outliers=outliers, path=path
        )
    return _core.linear(x, native, bias, options._native, out)


def linear_many(
    x: Array,
    weights: Sequence[Int8Weight],
    biases: Sequence[Array | None] | None = None,
    *,
    threshold: float = DEFAULT,
    relative: float | None = DEFAULT,
    cap: float | None = DEFAULT,
    outliers: Outliers = DEFAULT,
    path: ProductPath = DEFAULT,
    options: Options | None = None,
    out: Sequence[Array | None] | None = None,
) -> list[Array]:
    """`linear` of one x for several weights: the outputs are those of one call for each, bit for bit.

    X is quantized once for weights that follow each other and have the scheme, rotation and product ("tensor" or not)
    in common, and with "static" the kept columns: on CUDA devices their memory, and at most four weights at a time.

    Args:
        x: as for `linear`.
        weights: from `quantize_weight`, ``[n_i, k]``.
        biases: for each weight ``[n_i]`` or None; default: none.
        threshold, relative, cap, outliers, path, options: as for `linear`.
        out: for each weight an array ``[..., n_i]`` to write to, or None for a new one; default: new ones.

    Returns:
        For each weight ``[..., n_i]``.

    Raises:
        TypeError, ValueError: as `linear`; of a layer "linear_many[1]: ...". An `out` shares memory with another.
    """
    expect("linear_many: weights", weights, (list, tuple), "a list or tuple")
    each: dict[str, list[Any]] = {}
    for name, given in (("biases", biases), ("out", out)):
        expect(f"linear_many: {name}", given, (list, tuple, type(None)), "a list or tuple")
        each[name] = [None] * len(weights) if given is None else list(given)
        if len(each[name]) != len(weights):
            raise unexpected(f"linear_many: {name}", f"{len(weights)} of them, as of weights", len(each[name]))
    for index, weight in enumerate(weights):
        expect(f"linear_many[{index}]: weight", weight, Int8Weight, "an Int8Weight")
    options = options_of(
        "linear_many", options, threshold=threshold, relative=relative, cap=cap, outliers=outliers, path=path
    )
    return _core.linear_many(x, [weight._native for weight in weights], each["biases"], options._native, each["out"])


def get_num_threads() -> int:
    """Threads that octavo's CPU backend may use, the caller's included.

    What `set_num_threads` was given. Before that ``OMP_NUM_THREADS``, or else the processors this process may run on;
    but a call with PyTorch tensors uses ``torch.get_num_threads()`` threads.
    """
    return _core.num_threads()


def set_num_threads(count: int) -> None:
    """Let octavo's CPU backend use up to `count` threads (1 to 1024) in every call from now on.

    Also for PyTorch tensors, whose calls otherwise follow ``torch.set_num_threads``. Of calls that several Python
    threads make at once, one has the ``count - 1`` helper threads and the others work alone. Results do not depend on
    any of this.
    """
    _core.set_num_threads(count)


def info() -> dict[str, Any]:
    """What this installation and this machine offer.

    Returns:
        version: str; python: str; platform: str; backends: the names of the usable backends; cpu: a dict of
        ``instruction_set`` (in use), ``instruction_sets`` (that this processor can run, best first), ``threads``;
        cuda: a dict of ``devices`` (each with ``name``, ``compute_capability``, ``multiprocessors``, ``memory`` in
        bytes), ``cublaslt`` (its version, or why it is not used; and the devices that calls could not use it on) and
        ``wgmma`` (on which of the devices used so far Hopper's matrix instructions multiply, or why not), or of
        ``missing``: what CUDA arrays lack here.
    """
    here = {"version": _core.version(), "python": platform.python_version(), "platform": platform.platform()}
    sets = {"instruction_set": _core.cpu_isa(), "instruction_sets": _core.cpu_isas_available()}
    cpu, cuda = {**sets, "threads": _core.num_threads()}, _core.cuda_info()
    return {**here, "backends": ["cpu"] if "missing" in cuda else ["cpu", "cuda"], "cpu": cpu, "cuda": cuda}


def release_cuda_memory() -> None:
    """Give back to the driver the scratch memory that products on CUDA devices keep for further calls."""
    _core.release_cuda_memory()
