"""What the 16-bit weights of outlier columns are worth, and what the choice of the columns does, layer by layer.

Each linear layer is given the inputs that it has in the float32 model, and runs as LLM.int8() with dequantized outlier
weights and with kept ones, its outlier columns chosen for the call, row by row, or once. So each error is the layer's
own: nothing that an earlier layer rounded is in it. What all of them together do to a text says `octavo eval`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from octavo.torch.convert import MIN_FRACTION
from octavo._types import Outliers
from octavo.torch import Int8Linear, systematic_columns
from torch import Tensor, nn

from octavo_bench.measuring.language import Language, Window
from octavo_bench.measuring.progress import Progress

from .blocks import Projection, projections
from .observe import watch

# Key -> whether the 16-bit weights are kept, and how outlier columns are chosen. Static columns are the kept ones.
POLICIES: Mapping[str, tuple[bool, Outliers]] = {
    "dequantized-columns": (False, "columns"),
    "dequantized-rows": (False, "rows"),
    "kept-columns": (True, "columns"),
    "kept-rows": (True, "rows"),
    "kept-static": (True, "static"),
}


@dataclass(frozen=True)
class Worth:
    """One linear layer."""

    layer: int
    name: str
    kept: list[int]  # columns whose 16-bit weights are kept, ascending
    errors: dict[str, float]  # by policy: norm of the output's error over the norm of float32's output


def halves(windows: Sequence[Window]) -> tuple[Sequence[Window], Sequence[Window]]:
    """Windows to choose kept columns with, and windows to measure on; a single one is for both."""
    middle = len(windows) // 2
    return windows[:middle] or windows, windows[middle:]


def measure(language: Language, windows: Sequence[Window], threshold: float, progress: Progress) -> list[Worth]:
    """Every linear layer of the transformer layers. One step of progress for each window."""
    found = projections(language.model)
    calibration, measured = halves(windows)

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for window in calibration:
            with progress.step("choosing outlier columns to keep"):
                yield window.inputs

    layers = {str(place): projection.module for place, projection in enumerate(found)}
    columns = systematic_columns(
        language.model, layers, batches(), threshold=threshold, min_fraction=MIN_FRACTION, progress=False
    )
    # A layer that no window reaches (an expert) is not among them.
    kept = {p: columns[str(place)].tolist() if str(place) in columns else [] for place, p in enumerate(found)}
    int8 = {p: {True: _int8(p.module, kept[p], threshold), False: _int8(p.module, [], threshold)} for p in found}
    wrong = {projection: dict.fromkeys(POLICIES, 0.0) for projection in found}  # squares of the output's error
    whole = dict.fromkeys(found, 0.0)  # of the output

    def see(projection: Projection, x: Tensor) -> None:
        exact = nn.functional.linear(x, projection.module.weight, projection.module.bias)
        whole[projection] += float(exact.double().square().sum())
        for policy, (keeps, outliers) in POLICIES.items():
            layer = int8[projection][keeps]
            layer.outliers = outliers
            wrong[projection][policy] += float((layer(x) - exact).double().square().sum())

    watch(language, measured, found, see, lambda: None, progress, "what kept outlier weights are worth")
    return [
        Worth(
            projection.layer,
            projection.name,
            kept[projection],
            {policy: _ratio(square, whole[projection]) for policy, square in wrong[projection].items()},
        )
        for projection in found
    ]


def root_mean_square(worths: Sequence[Worth], policy: str) -> float:
    """Of the errors of all layers."""
    return math.sqrt(math.fsum(worth.errors[policy] ** 2 for worth in worths) / len(worths))


def _int8(linear: nn.Linear, kept: Sequence[int], threshold: float) -> Int8Linear:
    """Of the 16-bit weight, as in octavo_bench.measuring.schemes."""
    rounded = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    rounded.weight = nn.Parameter(linear.weight.detach().half(), requires_grad=False)
    rounded.bias = linear.bias
    return Int8Linear.from_linear(rounded, threshold=threshold, path="int8", outlier_columns=kept)


def _ratio(wrong: float, whole: float) -> float:
    """A layer whose output is zero has no error where it stays zero."""
    return math.sqrt(wrong / whole) if whole else 0.0 if wrong == 0 else math.inf
