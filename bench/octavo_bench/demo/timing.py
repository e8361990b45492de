"""Time per batch: int8 linear layers in a float32 and in a bfloat16 model, side by side with torch in both.

The models take turns, so that whatever else the machine does falls on all of them alike; each model's answer
is checked against float32's before anything is timed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from octavo_bench.measuring.turns import Spread, spreads, take_turns

from .errors import WrongResultError
from .model import Batch, embed_batch
from .schemes import LLM_INT8, convert

# Each of octavo's models with torch's of the same dtype: what is not a linear layer is the same in both.
PAIRS = {"octavo int8": "torch float32", "octavo int8, rest bfloat16": "torch bfloat16"}
MIN_COSINE = 0.99  # a model that is wrong has no speed


@dataclass(frozen=True)
class Timing:
    """One batch size. `times`: by the model's name."""

    batch: int
    tokens: int  # the longest sentence's, to which the others are padded
    times: dict[str, Spread]


def variants(float32: nn.Module, int8: nn.Module) -> dict[str, nn.Module]:
    """The models to be timed, by name; `int8`: the float32 model with int8 linear layers."""
    bfloat16 = copy.deepcopy(float32).bfloat16()
    models = (int8, float32, convert(bfloat16, LLM_INT8, path="auto"), bfloat16)
    names = [name for pair in PAIRS.items() for name in pair]
    return dict(zip(names, models, strict=True))


def check(models: dict[str, nn.Module], batch: Batch) -> None:
    """Raises WrongResultError where a model's embeddings of the batch are not near float32's."""
    reference = embed_batch(models["torch float32"], batch)
    for name, model in models.items():
        cosine = float(nn.functional.cosine_similarity(embed_batch(model, batch), reference, dim=1).min())
        if not cosine >= MIN_COSINE:
            raise WrongResultError(f"{name}: expected a cosine of at least {MIN_COSINE} with float32, got {cosine:.4f}")


def measure(models: dict[str, nn.Module], batch: Batch, *, seconds: float, least: int = 4) -> Timing:
    """Times the models in turns, for about `seconds` and for at least `least` rounds."""
    check(models, batch)  # and every model is warm
    calls = {name: partial(_forward, model, batch) for name, model in models.items()}
    samples = take_turns(calls, seconds, least=least)
    return Timing(len(batch.indices), int(batch.real.shape[1]), spreads(samples))


@torch.inference_mode()
def _forward(model: nn.Module, batch: Batch) -> None:
    model(**batch.inputs)
