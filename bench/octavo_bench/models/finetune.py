"""Fine-tunes a sentence encoder in int8 next to float32 and bfloat16: appendix E of the paper, its Table 10, in small.

    python -m octavo_bench finetune --model minilm --seeds 5 --json results.json

Three tasks, made of the text of this machine: which package a sentence of documentation is from; whether one sentence
follows another; how much of a sentence's words a changed copy of it has kept. Every seed draws the head, the order and
the batches anew, alike for all ways to train, so that the difference of two ways has a standard error of its own.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..commands import expect_known
from ..machine import Facts
from ..progress import Progress
from ..tables import Report
from . import find, text
from .ways import DEFAULT, WAYS, arithmetic, compare, descend, prepare_, run_seeds

PACKAGES = ("torch", "numpy", "transformers", "jax", "sympy", "onnx")
LENGTH = 32  # tokens of an example, at most
SCALE, UNRELATED = 20, 0.3  # of the logit of sentences' cosine, and from which cosine on it is positive

Example = tuple[str, str, float]  # a text, another one or "", what to tell of them


@dataclass(frozen=True)
class Setting:
    """Sizes of the training of one model."""

    examples: int  # trained on, once
    evaluated: int
    batch: int
    rate: float


SETTINGS = {"minilm": Setting(384, 200, 16, 3e-4), "mpnet": Setting(192, 100, 16, 1e-4)}


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench finetune``."""
    ways, tasks = args.ways or DEFAULT, args.tasks or list(TASKS)
    kept = args.output / f"{args.model}.json"
    return run(args.model, SETTINGS[args.model], args.seeds, ways, facts, progress, kept, tasks), None


def run(
    model: str, setting: Setting, seeds: int, ways: Sequence[str], facts: Facts, progress: Progress, kept: Path,
    tasks: Sequence[str],
) -> Report:  # fmt: skip
    """Every task in every way with every seed; a table of each task. `kept`: a file of the single runs."""
    expect_known("--ways", ways, WAYS)
    expect_known("--tasks", tasks, TASKS)
    folder = find.NAMED[model]()
    about = {"model": model, "setting": asdict(setting), "corpus_version": text.VERSION}
    examples = {name: make(setting.examples + setting.evaluated) for name, make in TASKS.items() if name in tasks}
    progress.begin(len(examples) * len(ways) * seeds)
    tables = []
    for task, own in examples.items():
        make = partial(fine_tune, folder, task, own, setting)
        values = run_seeds(make, ways, seeds, kept, about, progress, f"{task}, ")
        score = "accuracy" if task in CLASSES else "correlation"
        tables.append(compare(f"{task}, {seeds} seeds", values, {"held-out loss": ".4f", score: ".4f"}))
    return Report(f"{model} fine-tuned in int8", facts.now(seeds=seeds, **about), tables)


def fine_tune(
    folder: Path, task: str, examples: Sequence[Example], setting: Setting, way: str, seed: int
) -> tuple[float, float]:
    """Loss on held-out examples, and accuracy or correlation."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.embeddings.requires_grad_(False)
    head = nn.Linear(model.config.hidden_size, CLASSES.get(task, 1))
    prepare_(model, way)
    trained, held_out = list(examples[: setting.examples]), examples[setting.examples :]

    def embed(*given: list[str]) -> Tensor:
        x = tokenizer(*given, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        with arithmetic(way):
            hidden = model(**x).last_hidden_state.float()
        mask = x["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def outputs(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
        first, second = [first for first, _, _ in batch], [second for _, second, _ in batch]
        labels = torch.tensor([label for _, _, label in batch])
        if task == "next sentence":  # each embedded by itself, as these models compare sentences
            a, b = embed(first + second).chunk(2)
            near = SCALE * (functional.cosine_similarity(a, b) - UNRELATED)
            return torch.stack((torch.zeros_like(near), near), 1), labels
        return head(embed(first, second) if any(second) else embed(first)), labels

    def loss_of(given: Tensor, labels: Tensor) -> Tensor:
        if task in CLASSES:
            return functional.cross_entropy(given, labels.long())
        return functional.mse_loss(given[:, 0], labels)

    rate = setting.rate / (3 if task == "next sentence" else 1)  # no head begins from nothing there
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], rate, fused=True)
    random.Random(seed).shuffle(trained)
    model.train()
    batches = (trained[begin : begin + setting.batch] for begin in range(0, len(trained), setting.batch))
    descend(optimizer, (loss_of(*outputs(batch)) for batch in batches))
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
    examples: list[Example] = []
    for i, ((first, second), (_, other)) in enumerate(zip(pairs, pairs[1:] + pairs[:1], strict=True)):
        examples.append((first, second if i % 2 else other, i % 2))
    return examples


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


TASKS = {"topic": topics, "next sentence": neighbors, "similarity": similarities}
CLASSES = {"topic": len(PACKAGES), "next sentence": 2}
