"""What the 16-bit weights of outlier columns are worth, and what the choice of the columns does, layer by layer.

Each linear layer is given the inputs that it has in the float32 model, and runs as LLM.int8() with dequantized outlier
weights and with kept ones, its outlier columns chosen for the call, row by row, or once. So each error is the layer's
own: nothing that an earlier layer rounded is in it. What all of them together do to a text says `octavo eval`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..models.language import Language, Window
from ..models.modules import Projection, projections
from ..models.variants import KEPT_COLUMNS, KEPT_ROWS, KEPT_STATIC, LLM_INT8, ROWS, Maker
from ..progress import Progress
from ..tables import Table
from .observe import watch

# By the heads of the table.
POLICIES = {
    "dequantized": LLM_INT8, "dequantized, by row": ROWS, "kept": KEPT_COLUMNS, "kept, by row": KEPT_ROWS,
    "kept, static": KEPT_STATIC,
}  # fmt: skip


def table(language: Language, windows: Sequence[Window], progress: Progress) -> Table:
    """Every linear layer of the transformer layers: the norm of its output's error over the norm of the output, in %.

    Kept columns are chosen with the first half of the windows, and errors measured on the others; a single window is
    for both. Of progress two steps for each window.
    """
    middle = len(windows) // 2
    calibration, measured = windows[:middle] or windows, windows[middle:]
    with progress.step("choosing outlier columns to keep", 2 * len(windows) - len(measured)):
        maker = Maker(language.model, [window.inputs for window in calibration])
        models = {policy: maker.make(variant) for policy, variant in POLICIES.items()}
    found = projections(language.model)
    layers = {each: {policy: model.get_submodule(each.path) for policy, model in models.items()} for each in found}
    wrong = {each: dict.fromkeys(POLICIES, 0.0) for each in found}  # squares of the output's error
    whole = dict.fromkeys(found, 0.0)  # of the output

    def see(projection: Projection, x: Tensor) -> None:
        exact = nn.functional.linear(x, projection.module.weight, projection.module.bias)
        whole[projection] += float(exact.double().square().sum())
        for policy, layer in layers[projection].items():
            wrong[projection][policy] += float((layer(x) - exact).double().square().sum())

    for window in measured:
        with progress.step("what kept outlier weights are worth"):
            watch(language, window, found, see)
    # A layer whose output is zero has no error where it stays zero.
    errors = {
        each: [100 * math.sqrt(square / whole[each]) if whole[each] else 0.0 for square in wrong[each].values()]
        for each in found
    }
    kept = {each: _kept(layers[each]["kept"]) for each in found}
    means = [math.sqrt(math.fsum(e**2 for e in column) / len(found)) for column in zip(*errors.values(), strict=True)]
    rows = [[f"{each.layer} {each.name}", kept[each], *errors[each]] for each in found]
    return Table(
        "Error of each linear layer's output in int8, % of its norm: what 16-bit outlier weights are worth",
        {"layer, projection": "", "kept columns": "d", **dict.fromkeys(POLICIES, ".3f")},
        [["all: sum, root mean square", sum(kept.values()), *means], *rows],
        "On the inputs that the float32 model gives them. Outlier columns are those of a window; by row: each row's; "
        "static: the kept ones, found with the first half of the windows; errors are those on the others.",
    )


def _kept(layer: Any) -> int:
    """How many columns' 16-bit weights an int8 layer keeps."""
    columns = layer.weight.int8_weight.outlier_columns
    return 0 if columns is None else len(columns)
