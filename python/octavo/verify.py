"""The same outputs on every processor: one hash of a fixed set of layers.

Codes, integer products and the order of every float32 operation are fixed, so the CPU's outputs do not depend on its
instruction set, the number of threads, or the machine. What does not print `EXPECTED` computes something else.
"""

import hashlib
from collections.abc import Iterator
from itertools import product
from typing import get_args

import numpy as np

from octavo._types import Granularity, Outliers, Scheme
from octavo.functional import linear, quantize_weight

EXPECTED = "f4a7f4b809e61a9624f13e1611f68ad511e862130d04dacac9a2b80f5961c452"

# (m, n, k): one row; few rows, short of a tile; more rows than a block of work, and several slices of k; more features.
SHAPES = ((1, 40, 700), (5, 33, 70), (270, 40, 600), (20, 300, 130))


def verify() -> str:
    """Compute the layers on the CPU; returns the SHA-256 of all outputs' bits, in hexadecimal."""
    digest = hashlib.sha256()
    for y in outputs():
        digest.update(y.tobytes())
    return digest.hexdigest()


def outputs() -> Iterator[np.ndarray]:
    """What `verify` hashes: every scheme, granularity, outlier policy and path, in float32 and float16."""
    for shape, dtype in product(SHAPES, ("float32", "float16")):
        m, n, k = shape
        x, w, bias = (_values(*size, seed).astype(dtype) for seed, size in enumerate(((m, k), (n, k), (1, n))))
        x[:, 3::50] *= 12  # outlier columns
        x[0, 5] = -6.0  # at the threshold
        for scheme, granularity in product(get_args(Scheme), get_args(Granularity)):
            weight = quantize_weight(w, scheme=scheme, granularity=granularity, outlier_columns=[3, 5, 53])
            for policy in get_args(Outliers):
                yield linear(x, weight, bias[0], outliers=policy, path="int8")
            yield linear(x, weight, None, path="weight_only")


def _values(rows: int, cols: int, seed: int) -> np.ndarray:
    """Numbers between -2 and 2, made of integers alone so that they are the same everywhere."""
    index = np.arange(1, rows * cols + 1, dtype=np.uint64) + np.uint64(seed << 32)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) ^ (index >> np.uint64(7))
    mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(44)  # 20 bits
    return (mixed.astype(np.float32) / np.float32(2**18) - np.float32(2)).reshape(rows, cols)
