"""The ways to train that are compared, the runs that were made of them, and what these say together."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from octavo.torch import train_
from torch import Tensor, nn

from ..progress import Progress
from ..tables import Table, write_text


@dataclass(frozen=True)
class Way:
    """How a model's linear layers are multiplied while it is trained."""

    int8: Mapping[str, Any] | None = None  # what `train_` is given; None: layers as they are
    dtype: torch.dtype | None = torch.bfloat16  # of autocast, for all that is not in int8; None: float32
    bitsandbytes: bool = False  # multiplies those layers in octavo's place


ATTENTION = {"modules": "ffn+attention"}
PLAIN = {"decomposition": False}
WAYS = {
    "float32": Way(dtype=None),
    "bfloat16": Way(),
    "int8, feed-forward": Way({}),
    "without decomposition": Way(PLAIN),
    "int8, attention too": Way(ATTENTION),
    "attention too, without decomposition": Way({**ATTENTION, **PLAIN}),
    "int8, feed-forward, the rest in float32": Way({}, None),
    "int8, attention too, the rest in float32": Way(ATTENTION, None),
    "gradient of x in 16 bit": Way({"grad_input": "16bit"}),
    "bitsandbytes, feed-forward": Way({}, bitsandbytes=True),
}
DEFAULT = (
    "float32", "bfloat16", "int8, feed-forward", "without decomposition", "int8, attention too",
    "attention too, without decomposition", "bitsandbytes, feed-forward",
)  # fmt: skip


def prepare_(model: nn.Module, way: str) -> None:
    """Lets the layers of `model` multiply so."""
    how = WAYS[way]
    if how.int8 is None:
        return
    train_(model, **how.int8)
    if how.bitsandbytes:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and "forward" in vars(layer):
                layer.forward = _bitsandbytes(layer)  # type: ignore[method-assign, assignment]


def _bitsandbytes(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """`Linear8bitLt` with ``has_fp16_weights=True`` as it computes on a CPU: its backward pass takes matrices only.

    There its training multiplies floats by the dequantized weight; LLM.int8() is what it evaluates with.
    """
    import bitsandbytes

    state = bitsandbytes.MatmulLtState()
    state.threshold, state.has_fp16_weights = 6.0, True

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        state.is_training = layer.training
        weight = layer.weight if layer.training else layer.weight.detach()  # else it quantizes for a backward pass
        y: Tensor = bitsandbytes.matmul(x.flatten(0, -2), weight, bias=layer.bias.to(x.dtype), state=state)
        return y.reshape(*x.shape[:-1], -1)

    return forward


@contextmanager
def arithmetic(way: str) -> Iterator[None]:
    """What is not in int8 computes so."""
    dtype = WAYS[way].dtype
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def descend(optimizer: torch.optim.Optimizer, losses: Iterable[Tensor]) -> None:
    """A step of the optimizer along the gradients of each loss, before the next is computed."""
    for loss in losses:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run_seeds(
    make: Callable[[str, int], Sequence[float]], ways: Iterable[str], seeds: int, kept: Path, about: Mapping[str, Any],
    progress: Progress, task: str = "",
) -> dict[str, list[list[float]]]:  # fmt: skip
    """By way the values with each seed, which `make(way, seed)` gives.

    The file `kept` has those of single runs, by `task`, way and seed, and what they are about: what was ended goes on.
    """
    content: dict[str, Any] = {"about": json.loads(json.dumps(about)), "runs": {}}
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["about"] != content["about"]:
            raise ValueError(f"{kept}: expected runs of {about}, got those of {found['about']}; remove it")
        content = found
    values: dict[str, list[list[float]]] = {way: [] for way in ways}
    for seed in range(seeds):
        for way, own in values.items():
            name = f"{task}{way}, seed {seed}"
            with progress.step(name):
                if name not in content["runs"]:
                    content["runs"][name] = [float(f"{value:.6g}") for value in make(way, seed)]
                    write_text(kept, json.dumps(content, indent=0))
                own.append(content["runs"][name])
    return values


def compare(title: str, values: Mapping[str, Sequence[Sequence[float]]], forms: Mapping[str, str]) -> Table:
    """Means over seeds of each way's values, and their differences to the 16-bit way (the first where there is none).

    Args:
        values: by way, for each seed, of each value of `forms` in turn.
        forms: by name of the value, its format.
    """
    first = "bfloat16" if "bfloat16" in values else next(iter(values))
    columns = {"trained in": ""}
    for place, (name, form) in enumerate(forms.items()):
        more = " " * place  # heads differ
        columns |= {name: form, f"- {first}{more}": f"+{form}", f"its error{more}": form}
    rows = []
    for way, own in values.items():
        row: list[Any] = [way]
        for kind in range(len(forms)):
            gaps = [mine[kind] - other[kind] for mine, other in zip(own, values[first], strict=True)]
            row.append(statistics.mean(each[kind] for each in own))
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
            row += [None, None] if way == first else [statistics.mean(gaps), error]
        rows.append(row)
    note = "Means over seeds. Differences are paired by seed; their error is the standard error of the mean."
    return Table(title, columns, rows, note)
