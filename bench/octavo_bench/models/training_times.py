"""Times of training in int8: a step of MPNet-base, and the gradient of x through frozen weights.

    python -m octavo_bench step --threads 1 --json step.json
    python -m octavo_bench gradient --threads 1 --json gradient.json

All that is compared takes turns, and has the processor time of its fastest turn. To compare with AVX2, keep PyTorch's
own products to it as well: ``OCTAVO_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2``.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from octavo import quantize_weight
from octavo.torch import Int8Linear
from torch import Tensor, nn

from ..commands import expect_known
from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from ..turns import Call, on_the_cpu, take_turns
from . import find
from .ways import WAYS, arithmetic, prepare_

# --- a step, in int8 next to float32 and bfloat16 ---------------------------------------------------------------------

SEQUENCES, TOKENS = 8, 64
PHASES = ("forward", "backward", "optimizer")
# What a profile counts under a name: operations whose own time it is.
PARTS = {
    "output in int8": ("octavo::train_linear", "GeneratedBackwardFor_octavo_train_linear_default"),
    "gradient of x in int8": ("octavo::train_linear_backward",),
    "products in floats": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "optimizer": ("aten::_fused_adamw_",),
}


def step(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench step``."""
    return time_steps(_mpnet, args.turns, args.ways or list(WAYS), facts, progress), None


def _mpnet() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(find.mpnet(), dtype=torch.float32, add_pooling_layer=False)


def time_steps(
    make: Callable[[], nn.Module], turns: int, ways: Sequence[str], facts: Facts, progress: Progress
) -> Report:
    """Tables of a step's phases, in milliseconds and relative to the first way, and of the operations in it.

    `make` gives an encoder, the same one each time.
    """
    expect_known("--ways", ways, WAYS)
    steps = {way: _phases(way, make()) for way in ways}
    calls = {f"{way}: {phase}": call for way, own in steps.items() for phase, call in own.items()}
    progress.begin(1)
    with progress.step("steps"):
        samples = take_turns(calls, 0, least=turns + 1, clock=on_the_cpu, in_order=True)
    rows: list[list[Any]] = []
    for way, own in steps.items():
        best = [min(samples[f"{way}: {phase}"]) for phase in own]
        rows.append([way, *best, sum(best), sum(best) / (rows[0][-2] if rows else sum(best))])
    columns = {"trained in": "", **{f"{phase} (ms)": ".1f" for phase in PHASES}, "step (ms)": ".1f", "to first": ".2f"}
    title = f"A training step: {SEQUENCES} sequences of {TOKENS} tokens"
    times = Table(title, columns, rows, "Processor time, of each phase's fastest turn.")
    parts = [[way, *_profile(step)] for way, step in steps.items()]
    columns = {"trained in": "", **{f"{part} (%)": ".0f" for part in (*PARTS, "the rest")}}
    note = "Of one more step, by PyTorch's profiler. The weight's codes are made anew with the output in int8."
    tables = [times, Table("Where the time of a step goes", columns, parts, note)]
    return Report("Training in int8: time", facts.now(turns=turns), tables)


def _profile(phases: Mapping[str, Call]) -> list[float]:
    """The per cent of a step's time that each of `PARTS` takes, and the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for call in phases.values():
            call()
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(own.values())
    shares = [100 * sum(own.get(name, 0.0) for name in names) / total for names in PARTS.values()]
    return [*shares, 100 - sum(shares)]


def _phases(way: str, model: Any) -> dict[str, Call]:
    """What makes each phase of a step, one after the other. Embeddings stay as they are."""
    torch.manual_seed(0)
    model.train().embeddings.requires_grad_(False)
    prepare_(model, way)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    x = torch.randn(SEQUENCES, TOKENS, model.config.hidden_size, requires_grad=True)

    losses: list[Tensor] = []

    def forward() -> None:
        with arithmetic(way):
            y = model(inputs_embeds=x).last_hidden_state
        losses.append(y.float().pow(2).mean())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return dict(zip(PHASES, (forward, lambda: losses.pop().backward(), update), strict=True))


# --- the gradient beside nn.Linear's, and codes made anew beside a copy -----------------------------------------------

SHAPES = ((768, 768), (3072, 768), (768, 3072), (1536, 384), (4096, 4096))  # of weights
ROWS = (64, 512)
COLUMNS = {
    "weight": "", "rows": "d", "float32 (ms)": ".2f", "path auto": ".2f", "auto, kept columns": ".2f", "int8": ".2f",
    "int8, kept columns": ".2f", "codes, to a copy": ".2f",
}  # fmt: skip


def gradient(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench gradient``."""
    return time_gradients(args.turns, facts, progress), None


def time_gradients(turns: int, facts: Facts, progress: Progress, shapes: Sequence[tuple[int, int]] = SHAPES) -> Report:
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
