"""Times a training step of MPNet-base, in int8 next to float32 and bfloat16.

    python -m octavo_bench step --threads 1 --json step.json

The ways take turns, and each has the processor time of its fastest step. To compare with AVX2, keep PyTorch's own
products to it as well: ``OCTAVO_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from . import find
from .ways import WAYS, Way, arithmetic, check, prepare_

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
    check(ways)
    steps = {way: _step(WAYS[way], make()) for way in ways}
    best = {way: [float("inf")] * len(PHASES) for way in ways}
    progress.begin(turns)
    for turn in range(turns + 1):
        for way, step in steps.items():
            taken = step()
            if turn:  # the first warms up
                best[way] = [min(pair) for pair in zip(best[way], taken, strict=True)]
        with progress.step(f"turn {turn}", 1 if turn else 0):
            pass
    first = sum(best[ways[0]])
    rows = [[way, *(1e3 * each for each in own), 1e3 * sum(own), sum(own) / first] for way, own in best.items()]
    columns = {"trained in": "", **{f"{phase} (ms)": ".1f" for phase in PHASES}, "step (ms)": ".1f", "to first": ".2f"}
    title = f"A training step: {SEQUENCES} sequences of {TOKENS} tokens"
    times = Table(title, columns, rows, "Processor time, of the fastest turn.")
    parts = [[way, *_profile(step)] for way, step in steps.items()]
    columns = {"trained in": "", **{f"{part} (%)": ".0f" for part in (*PARTS, "the rest")}}
    note = "Of one more step, by PyTorch's profiler. The weight's codes are made anew with the output in int8."
    tables = [times, Table("Where the time of a step goes", columns, parts, note)]
    return Report("Training in int8: time", facts.now(turns=turns), tables)


def _profile(step: Callable[[], object]) -> list[float]:
    """The per cent of a step's time that each of `PARTS` takes, and the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(own.values())
    shares = [100 * sum(own.get(name, 0.0) for name in names) / total for names in PARTS.values()]
    return [*shares, 100 - sum(shares)]


def _step(way: Way, model: Any) -> Callable[[], list[float]]:
    """What makes a step and gives the seconds of its phases. Embeddings stay as they are."""
    torch.manual_seed(0)
    model.train().embeddings.requires_grad_(False)
    prepare_(model, way)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-5, fused=True)
    x = torch.randn(SEQUENCES, TOKENS, model.config.hidden_size, requires_grad=True)

    def step() -> list[float]:
        marks = [time.process_time()]
        with arithmetic(way):
            y = model(inputs_embeds=x).last_hidden_state
        loss = y.float().pow(2).mean()
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.process_time())
        return [end - begin for begin, end in itertools.pairwise(marks)]

    return step
