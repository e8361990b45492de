from typing import final

from octavo._types import Array, Granularity, Outliers, Path, Scheme

@final
class Weight:
    def __init__(
        self,
        codes: Array,
        scale: Array,
        zeropoint: Array | None,
        code_sums: Array | None,
        outlier_columns: Array | None,
        outlier_weight: Array | None,
        scheme: Scheme,
        granularity: Granularity,
    ) -> None: ...
    @property
    def code_sums(self) -> Array: ...

def quantize(
    x: Array, scheme: Scheme, granularity: Granularity, exclude: Array | None, /
) -> tuple[Array, Array, Array | None]: ...
def quantize_weight(
    weight: Array, scheme: Scheme, granularity: Granularity, /
) -> tuple[Array, Array, Array | None, Array]: ...
def find_outliers(x: Array, threshold: float, /) -> Array: ...
def int8_matmul(a: Array, b: Array, out: Array | None, /) -> Array: ...
def dequantize(codes: Array, scale: Array, zeropoint: Array | None, dtype: str, /) -> Array: ...
def linear(
    x: Array,
    weight: Weight,
    bias: Array | None,
    threshold: float,
    outliers: Outliers,
    path: Path,
    out: Array | None,
    /,
) -> Array: ...
def version() -> str: ...
def cpu_isa() -> str: ...
def cpu_isas_available() -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
