"""Times a training step of an encoder as wide as MPNet-base, in int8 next to float32 and bfloat16.

    python -m octavo_bench step --threads 1 --json step.json

Random weights, since none are needed for the time; the ways take turns, and each has the processor time of its fastest
step.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from octavo.torch import train_

from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from .finetune import WAYS, check

LAYERS, WIDTH, SEQUENCES, TOKENS = 2, 768, 8, 64
PHASES = ("forward", "backward", "optimizer")


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench step``."""
    return run(args.turns, args.ways or list(WAYS), facts, progress), None


def run(turns: int, ways: Sequence[str], facts: Facts, progress: Progress, width: int = WIDTH) -> Report:
    """The table of a step's parts, in milliseconds and relative to the first way."""
    check(ways)
    steps = {way: _step(WAYS[way], width) for way in ways}
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
    title = f"A training step: {LAYERS} encoder layers of width {width}, {SEQUENCES} sequences of {TOKENS} tokens"
    return Report("Training in int8: time", facts.now(turns=turns), [Table(title, columns, rows, "Processor time.")])


def _step(way: Any, width: int) -> Callable[[], list[float]]:
    """What makes a step and gives the seconds of its phases."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=width // 64,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layers = BertModel(config, add_pooling_layer=False).train()
    layers.embeddings.requires_grad_(False)
    if isinstance(way, dict):
        train_(layers, **way)
    optimizer = torch.optim.AdamW([each for each in layers.parameters() if each.requires_grad], 1e-5)
    x = torch.randn(SEQUENCES, TOKENS, width, requires_grad=True)
    dtype = way if isinstance(way, torch.dtype) else None

    def step() -> list[float]:
        marks = [time.process_time()]
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = layers(inputs_embeds=x).last_hidden_state
        loss = y.float().pow(2).mean()
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.process_time())
        return [end - begin for begin, end in itertools.pairwise(marks)]

    return step
