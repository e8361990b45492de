"""Trains a small language model from nothing in int8, next to float32 and bfloat16: the paper's appendix E, in small.

    python -m octavo_bench pretrain --seeds 5 --output build/pretrain --json pretrain.json

The model, text and optimizers of `train`, smaller. Every seed draws weights and batches anew, alike for all ways.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import pictures
from ..commands import expect_known
from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from . import text, train
from .ways import DEFAULT, WAYS, arithmetic, compare, prepare_, run_seeds

SETTING = train.Setting(3_000_000, 1024, 3, 128, 4, 128, 8, 180, 4e-3, 48)
POINTS = 30  # of a curve, each the mean of as many steps

Curves = Mapping[str, Sequence[Sequence[float]]]  # by way, for each seed: losses while training, and held-out


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, pictures.Figures]:
    """``python -m octavo_bench pretrain``."""
    report, curves = run(SETTING, args.seeds, args.ways or DEFAULT, args.output, facts, progress)
    return report, {"pretrain.png": partial(_draw, SETTING, curves)}


def run(
    setting: train.Setting, seeds: int, ways: Sequence[str], output: Path, facts: Facts, progress: Progress
) -> tuple[Report, Curves]:
    """Every way with every seed; single runs are kept in `output`."""
    from transformers import AutoTokenizer

    expect_known("--ways", ways, WAYS)
    about = {"setting": asdict(setting), "corpus_version": text.VERSION}
    tokens = train.prepare_text(setting, output)
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    ids = tokenizer((output / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    held_out = torch.tensor(ids[: setting.evaluated * setting.window]).unflatten(0, (-1, setting.window))
    progress.begin(len(ways) * seeds)
    make = partial(pretrain, setting, tokens, held_out)
    curves = run_seeds(make, ways, seeds, output / "pretrain-runs.json", about, progress)
    ends = {way: [(own[-1], own[-2]) for own in found] for way, found in curves.items()}
    last = setting.steps // POINTS
    losses = compare(
        f"A language model from nothing, {seeds} seeds", ends,
        {"held-out loss": ".4f", f"loss of the last {last} steps": ".4f"},
    )  # fmt: skip
    facts_of = facts.now(seeds=seeds, train_tokens=len(tokens), **about)
    report = Report("Training from nothing in int8", facts_of, [losses, _curves(setting, curves)])
    return report, curves


def pretrain(setting: train.Setting, tokens: train.Tokens, held_out: Tensor, way: str, seed: int) -> list[float]:
    """`POINTS` losses while training, and that of the held-out windows."""
    model = train.new_model(setting, seed)
    prepare_(model, way)
    optimizers = train.new_optimizers(model, setting)
    model.train()

    def loss_of(ids: Tensor) -> Tensor:
        with arithmetic(way):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    losses = []
    for step in range(setting.steps):
        loss = loss_of(train.batch(setting, tokens, step, seed))
        losses.append(train.learn(model, optimizers, train.rate(setting, step), loss))
    model.eval()
    with torch.no_grad():
        evaluated = statistics.mean(float(loss_of(part)) for part in held_out.split(16))
    each = setting.steps // POINTS
    return [*(statistics.mean(losses[i * each : (i + 1) * each]) for i in range(POINTS)), evaluated]


def _curves(setting: train.Setting, curves: Curves) -> Table:
    """The mean loss while training, and its standard deviation over seeds."""
    columns = {"steps": ""}
    for way in curves:
        columns |= {way: ".3f", f"{way}, deviation": ".3f"}
    rows: list[list[Any]] = []
    for point in range(0, POINTS, 3):
        row: list[Any] = [str((point + 1) * setting.steps // POINTS)]
        for found in curves.values():
            values = [own[point] for own in found]
            row += [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        rows.append(row)
    return Table("Loss while training", columns, rows, f"Means of {setting.steps // POINTS} steps, over seeds.")


def _draw(setting: train.Setting, curves: Curves) -> Figure:
    """The losses, and their differences to 16 bit with twice their standard error."""
    figure = plt.figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    steps = [(point + 1) * setting.steps / POINTS for point in range(POINTS)]
    losses = {way: torch.tensor(found, dtype=torch.float64)[:, :POINTS] for way, found in curves.items()}
    first = "bfloat16" if "bfloat16" in losses else next(iter(losses))
    colors = (pictures.GRAY, "black", pictures.BLUE, pictures.ORANGE, pictures.GREEN, pictures.VERMILION,
              pictures.PURPLE)  # fmt: skip
    for (way, own), color in zip(losses.items(), colors, strict=False):
        left.plot(steps, own.mean(0), color=color, label=way, linewidth=1)
        left.fill_between(steps, own.amin(0), own.amax(0), color=color, alpha=0.1)
        if way != first:
            gaps = own - losses[first]
            errors = 2 * gaps.std(0, correction=min(1, len(gaps) - 1)) / len(gaps) ** 0.5  # of one seed: 0
            right.errorbar(steps, gaps.mean(0), errors, color=color, linewidth=1, capsize=2)
    right.axhline(0, color="black", linewidth=1)
    left.set(xlabel="steps", ylabel="loss", title="mean, smallest and largest over seeds")
    right.set(xlabel="steps", title=f"difference to {first}, twice its standard error")
    left.legend(fontsize=7)
    for axis in (left, right):
        pictures.quiet(axis, "both")
    figure.tight_layout()
    return figure
