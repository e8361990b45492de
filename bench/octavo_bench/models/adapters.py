"""Trains LoRA over a frozen int8 SmolLM2, next to LoRA over bfloat16.

    python -m octavo_bench adapters --seeds 5 --output build/adapters --json adapters.json

Text: documentation of this machine. Every seed draws the adapter and the batches anew, alike for all bases.
"""

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from octavo.torch import quantize_
from torch import Tensor

from ..machine import Facts
from ..progress import Progress
from ..tables import Report
from . import find, text
from .ways import compare, descend, run_seeds


@dataclass(frozen=True)
class Setting:
    """Sizes of the training."""

    steps: int
    batch: int
    window: int
    rate: float
    rank: int
    evaluated: int  # windows


SETTING = Setting(24, 4, 64, 1e-3, 8, 24)
# By name, what `quantize_` is given; None: nothing is quantized.
BASES: dict[str, Mapping[str, Any] | None] = {
    "bfloat16": None,
    "int8": {},
    "int8, gradients of x in int8, too": {"path": "int8"},
    "the paper's int8": {"recipe": "paper", "path": "int8"},
    "the paper's without decomposition": {"recipe": "paper", "outliers": "none", "path": "int8"},
}


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench adapters``."""
    return run(SETTING, args.seeds, facts, progress, find.smollm2(), args.output / "adapters-runs.json"), None


def run(setting: Setting, seeds: int, facts: Facts, progress: Progress, folder: Path, kept: Path) -> Report:
    """Every base with every seed."""
    from transformers import AutoTokenizer

    texts = text.corpus(600_000)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = {
        part: torch.tensor(ids[: len(ids) // setting.window * setting.window]).unflatten(0, (-1, setting.window))
        for part in ("train", "heldout")
        if (ids := tokenizer("\n\n".join(texts[part]), verbose=False)["input_ids"])
    }
    about = {"setting": asdict(setting), "corpus_version": text.VERSION}
    progress.begin(len(BASES) * seeds)
    values = run_seeds(partial(tune, folder, windows, setting), BASES, seeds, kept, about, progress)
    table = compare(f"LoRA, {seeds} seeds", values, {"held-out loss": ".4f", "before": ".4f"})
    return Report("LoRA over a frozen int8 model", facts.now(seeds=seeds, **about), [table])


def tune(folder: Path, windows: Mapping[str, Tensor], setting: Setting, base: str, seed: int) -> list[float]:
    """Loss on the held-out windows, after training and before."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if (options := BASES[base]) is not None:
        quantize_(model, progress=False, **options)
    torch.manual_seed(seed)
    adapter = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear")
    tuned: Any = get_peft_model(model, adapter)

    def loss_of(ids: Tensor) -> Tensor:
        return tuned(input_ids=ids, labels=ids, use_cache=False).loss

    @torch.no_grad()
    def evaluate() -> float:
        tuned.eval()
        return statistics.mean(float(loss_of(part)) for part in windows["heldout"][: setting.evaluated].split(8))

    before = evaluate()
    optimizer = torch.optim.AdamW(tuned.parameters(), setting.rate)
    tuned.train()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(windows["train"]), (setting.steps, setting.batch), generator=generator)
    descend(optimizer, (loss_of(windows["train"][places]) for places in drawn))
    return [evaluate(), before]
