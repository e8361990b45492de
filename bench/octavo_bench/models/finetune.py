"""Fine-tunes MiniLM in int8 next to float32 and bfloat16: the paper's appendix E, with its Table 10, in small.

    python -m octavo_bench finetune --seeds 5 --json results.json

Three tasks, made of the text of this machine: which package a sentence of documentation is from; whether one sentence
follows another; how much of a sentence's words a changed copy of it has kept. Every seed draws the head, the order and
the batches anew, alike for all ways to train, so that the difference of two ways has a standard error of its own.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from octavo.torch import train_
from torch import Tensor, nn
from torch.nn import functional

from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from . import find, text

PACKAGES = ("torch", "numpy", "transformers", "jax", "sympy", "onnx")
LENGTH = 32  # tokens of an example, at most

Example = tuple[str, str, float]  # a text, another one or "", what to tell of them


@dataclass(frozen=True)
class Setting:
    """Sizes of the training of one model."""

    examples: int  # trained on, once
    evaluated: int
    batch: int
    rate: float


SETTINGS = {"full": Setting(960, 600, 16, 1e-4), "small": Setting(256, 200, 16, 2e-4)}

# By name: what `train_` is given; or the dtype of autocast, of layers as they are.
WAYS: dict[str, Any] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "int8, feed-forward": {},
    "without decomposition": {"decomposition": False},
    "gradient of x in 32 bit": {"grad_input": "16bit"},
    "int8, attention too": {"modules": "ffn+attention"},
    "attention too, without decomposition": {"modules": "ffn+attention", "decomposition": False},
}


def check(ways: Sequence[str]) -> None:
    """Raises ValueError for a way that there is not."""
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"--ways: expected some of {', '.join(map(repr, WAYS))}, got {unknown}")


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench finetune``."""
    return run(SETTINGS[args.setting], args.seeds, args.ways or list(WAYS), facts, progress), None


def run(
    setting: Setting, seeds: int, ways: Sequence[str], facts: Facts, progress: Progress, folder: Path | None = None
) -> Report:
    """Every task in every way with every seed; a table of each task."""
    check(ways)
    folder = folder or find.minilm()
    tasks = {name: make(setting.examples + setting.evaluated) for name, make in TASKS.items()}
    progress.begin(len(tasks) * len(ways) * seeds)
    tables = []
    for name, examples in tasks.items():
        scores: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for seed in range(seeds):
            for way in ways:
                with progress.step(f"{name}, {way}, seed {seed}"):
                    scores[way].append(fine_tune(folder, name, examples, setting, WAYS[way], seed))
        tables.append(_table(name, scores))
    about = {"seeds": seeds, "setting": setting.__dict__, "corpus_version": text.VERSION}
    return Report("MiniLM fine-tuned in int8", facts.now(**about), tables)


def _table(name: str, scores: dict[str, list[tuple[float, float]]]) -> Table:
    """Means over seeds, and the difference to the first way with its standard error."""
    first = next(iter(scores))
    columns = {"trained in": "", "loss": ".4f", "minus first": "+.4f", "its error": ".4f"}
    columns |= {"accuracy" if name in CLASSES else "correlation": ".4f", "minus first ": "+.4f", "its error ": ".4f"}
    rows = []
    for way, own in scores.items():
        row: list[Any] = [way]
        for kind in (0, 1):
            gaps = [mine[kind] - other[kind] for mine, other in zip(own, scores[first], strict=True)]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 and way != first else None
            row += [statistics.mean(pair[kind] for pair in own), statistics.mean(gaps) if way != first else None, error]
        rows.append(row)
    note = "Held-out examples. Differences are paired by seed; their error is the standard error of the mean."
    return Table(f"{name}, {len(scores[first])} seeds", columns, rows, note)


def fine_tune(
    folder: Path, task: str, examples: list[Example], setting: Setting, way: Any, seed: int
) -> tuple[float, float]:
    """Loss on held-out examples, and accuracy or correlation."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    order = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.embeddings.requires_grad_(False)
    head = nn.Linear(model.config.hidden_size, CLASSES.get(task, 1))
    if isinstance(way, dict):
        train_(model, **way)
    dtype = way if isinstance(way, torch.dtype) else None
    trained, held_out = examples[: setting.examples], examples[setting.examples :]

    def outputs(batch: list[Example]) -> tuple[Tensor, Tensor]:
        pairs = [first for first, _, _ in batch], [second for _, second, _ in batch]
        given = pairs if any(pairs[1]) else pairs[:1]
        x = tokenizer(*given, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            hidden = model(**x).last_hidden_state.float()
        mask = x["attention_mask"][..., None]
        return head((hidden * mask).sum(1) / mask.sum(1)), torch.tensor([label for _, _, label in batch])

    def loss_of(given: Tensor, labels: Tensor) -> Tensor:
        if task in CLASSES:
            return functional.cross_entropy(given, labels.long())
        return functional.mse_loss(given[:, 0], labels)

    parameters = [parameter for parameter in (*model.parameters(), *head.parameters()) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, setting.rate)
    order.shuffle(trained)
    model.train()
    for begin in range(0, len(trained), setting.batch):
        loss = loss_of(*outputs(trained[begin : begin + setting.batch]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        parts = [outputs(held_out[begin : begin + 50]) for begin in range(0, len(held_out), 50)]
    given, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    if task in CLASSES:
        score = float((given.argmax(1) == labels).float().mean())
    else:
        score = float(torch.corrcoef(torch.stack((given[:, 0], labels)))[0, 1])
    return float(loss_of(given, labels)), score


# --- the tasks --------------------------------------------------------------------------------------------------------


def topics(count: int) -> list[Example]:
    """Which package a paragraph of documentation is from; its name is left out."""
    import importlib.util

    examples: list[Example] = []
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)  # of a top-level package: imports nothing
        if spec is None or spec.origin is None:
            raise RuntimeError(f"expected the package {package}, whose documentation is a topic, got none")
        found: list[str] = []
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            paragraphs = text.read(path).split("\n\n")
            found += [each for paragraph in paragraphs for each in text.split_sentences(paragraph)]
            if len(found) > 4 * count:
                break
        distinct = sorted(
            {each.replace(package, "it") for each in found}, key=lambda each: random.Random(each).random()
        )
        examples += [(each, "", label) for each in distinct[: count // len(PACKAGES) + 1]]
    random.Random(0).shuffle(examples)
    return examples[:count]


def neighbors(count: int) -> list[Example]:
    """Whether the second sentence is the one that follows."""
    texts = text.corpus(3_000_000)["train"]
    runs = [list(text.split_sentences(paragraph)) for each in texts for paragraph in each.split("\n\n")]
    pairs = sorted({pair for run in runs for pair in itertools.pairwise(run)})
    random.Random(0).shuffle(pairs)
    pairs = pairs[:count]
    others = [second for _, second in pairs[1:] + pairs[:1]]
    return [
        (first, second if i % 2 else other, float(i % 2))
        for i, ((first, second), other) in enumerate(zip(pairs, others, strict=True))
    ]


def similarities(count: int) -> list[Example]:
    """How much of a sentence another has kept: words are left out, and others' put in."""
    sentences, _ = text.sentences(count)
    draw = random.Random(0)
    examples: list[Example] = []
    for first, other in zip(sentences, sentences[1:] + sentences[:1], strict=True):
        words, strange = first.split(), other.split()
        kept = draw.random()
        changed = [word if draw.random() < kept else draw.choice(strange) for word in words]
        same = sum(a == b for a, b in zip(words, changed, strict=True)) / len(words)
        examples.append((first, " ".join(changed), same))
    return examples


TASKS: dict[str, Callable[[int], list[Example]]] = {
    "topic": topics,
    "next sentence": neighbors,
    "similarity": similarities,
}
CLASSES = {"topic": len(PACKAGES), "next sentence": 2}
