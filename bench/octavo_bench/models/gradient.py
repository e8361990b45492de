"""Times the gradient of x through frozen int8 weights beside nn.Linear's, and codes made anew beside a copy.

    python -m octavo_bench gradient --threads 1 --json gradient.json

To compare with AVX2, keep PyTorch's own products to it as well: ``OCTAVO_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ATEN_CPU_CAPABILITY=avx2``.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from octavo import quantize_weight
from octavo.torch import Int8Linear
from torch import nn

from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from ..turns import Call, on_the_cpu, take_turns

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1536, 384), (4096, 4096))  # of weights
ROWS = (64, 512)
COLUMNS = {
    "weight": "", "rows": "d", "float32 (ms)": ".2f", "path auto": ".2f", "auto, kept columns": ".2f", "int8": ".2f",
    "int8, kept columns": ".2f", "codes, to a copy": ".2f",
}  # fmt: skip


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench gradient``."""
    return run(args.turns, facts, progress), None


def run(turns: int, facts: Facts, progress: Progress, shapes: Sequence[tuple[int, int]] = SHAPES) -> Report:
    """One table: the times of each shape and number of rows."""
    rows = []
    progress.begin(len(shapes))
    for n, k in shapes:
        with progress.step(f"{n} x {k}"):
            for tokens in ROWS:
                samples = take_turns(_calls(n, k, tokens), 0, least=turns + 1, clock=on_the_cpu)
                first, *others, made, copied = map(min, samples.values())
                rows.append([f"{n} x {k}", tokens, first, *(each / first for each in others), made / copied])
    note = (
        "Processor time of the fastest turn, to float32's, which is in milliseconds; of codes made anew, to a copy of"
    )
    note += " the weight."
    table = Table("The gradient of x through frozen int8 weights", COLUMNS, rows, note)
    return Report("Frozen int8 weights: time of the gradient", facts.now(turns=turns), [table])


def _calls(n: int, k: int, tokens: int) -> dict[str, Call]:
    layer = nn.Linear(k, n, bias=False).requires_grad_(False)
    kept = range(0, k, k // 7)
    layers = {
        "float32": layer,
        "auto": Int8Linear.from_linear(layer),
        "auto, kept": Int8Linear.from_linear(layer, outlier_columns=kept),
        "int8": Int8Linear.from_linear(layer, path="int8"),
        "int8, kept": Int8Linear.from_linear(layer, path="int8", outlier_columns=kept),
    }
    codes = quantize_weight(layer.weight)
    x, gradient = torch.randn(tokens, k, requires_grad=True), torch.randn(tokens, n) * torch.randn(tokens, n)
    calls: dict[str, Call] = {
        name: partial(torch.autograd.grad, each(x), x, gradient, retain_graph=True) for name, each in layers.items()
    }
    calls["codes"] = partial(quantize_weight, layer.weight, out=codes)
    calls["copy"] = partial(torch.empty_like(layer.weight).copy_, layer.weight)
    return calls
