"""Times a training step of MPNet-base, in int8 next to float32 and bfloat16.

    python -m octavo_bench step --threads 1 --json step.json

The ways take turns, and each phase has the processor time of its fastest turn. To compare with AVX2, keep PyTorch's own
products to it as well: ``OCTAVO_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2``.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..commands import expect_known
from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from ..turns import Call, on_the_cpu, take_turns
from . import find
from .ways import WAYS, arithmetic, prepare_

SEQUENCES, TOKENS = 8, 64
PHASES = ("forward", "backward", "optimizer")
# What a profile counts under a name: operations whose own time it is.
PARTS = {
    "output in int8": ("octavo::train_linear", "GeneratedBackwardFor_octavo_train_linear_default"),
    "gradient of x in int8": ("octavo::train_linear_backward",),
    "products in floats": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "optimizer": ("aten::_fused_adamw_",),
}


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench step``."""
    return run(_mpnet, args.turns, args.ways or list(WAYS), facts, progress), None


def _mpnet() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(find.mpnet(), dtype=torch.float32, add_pooling_layer=False)


def run(make: Callable[[], nn.Module], turns: int, ways: Sequence[str], facts: Facts, progress: Progress) -> Report:
    """Tables of a step's phases, in milliseconds and relative to the first way, and of the operations in it.

    `make` gives an encoder, the same one each time.
    """
    expect_known("--ways", ways, WAYS)
    steps = {way: _phases(way, make()) for way in ways}
    calls = {f"{way}: {phase}": call for way, own in steps.items() for phase, call in own.items()}
    progress.begin(1)
    with progress.step("steps"):
        samples = take_turns(calls, 0, least=turns + 1, clock=on_the_cpu)
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
