"""Time per batch: octavo's int8 model side by side with torch in float32 and in bfloat16.

The models take turns, so that whatever else the machine does falls on all of them alike; each model's answer
is checked against float32's before anything is timed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from octavo.measuring.turns import Spread, spreads, take_turns

from .errors import WrongResultError
from .model import Batch, embed_batch

MIN_COSINE = 0.99  # a model that is wrong has no speed


@dataclass(frozen=True)
class Timing:
    """One batch size. `times`: by the model's name."""

    batch: int
    tokens: int  # the longest sentence's, to which the others are padded
    times: dict[str, Spread]


def variants(float32: nn.Module, int8: nn.Module) -> dict[str, nn.Module]:
    """The models to be timed, by name. In octavo's, activations and all but the linear layers are float32."""
    return {
        "octavo int8": int8,
        "torch float32": float32,
        "torch bfloat16": copy.deepcopy(float32).bfloat16(),
    }


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
