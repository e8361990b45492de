"""octavo: LLM.int8() (arXiv 2208.07339) as a native library.

>>> import numpy as np, octavo
>>> weight = octavo.quantize_weight(np.eye(4, dtype=np.float32))
>>> octavo.linear(np.ones((1, 4), np.float32), weight)
array([[1., 1., 1., 1.]], dtype=float32)

The functions take arrays of any framework (NumPy, PyTorch, CuPy, JAX: whatever has ``__dlpack__``) and return arrays of
the caller's. ``octavo.torch`` converts whole PyTorch models; importing it needs PyTorch, this package does not.
"""

from octavo import _core
from octavo._core import DLPackArray
from octavo.embedding import cmake_prefix
from octavo.functional import (
    Quantized,
    dequantize,
    find_outliers,
    get_num_threads,
    info,
    int8_matmul,
    linear,
    linear_many,
    quantize,
    quantize_weight,
    release_cuda_memory,
    set_num_threads,
)
from octavo.options import Options, recipe
from octavo.weight import Int8Weight

__version__ = _core.version()

__all__ = [
    "DLPackArray",
    "Int8Weight",
    "Options",
    "Quantized",
    "__version__",
    "cmake_prefix",
    "dequantize",
    "find_outliers",
    "get_num_threads",
    "info",
    "int8_matmul",
    "linear",
    "linear_many",
    "quantize",
    "quantize_weight",
    "recipe",
    "release_cuda_memory",
    "set_num_threads",
]
