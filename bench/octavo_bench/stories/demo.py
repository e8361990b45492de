"""`octavo demo`: LLM.int8() on real models and real sentences, with what it costs and why it is needed.

First SmolLM2 answers three questions in bfloat16 and in int8, where it is there or can be downloaded. Then MiniLM, a
sentence transformer, embeds 200 sentences of Python's own documentation. All its 36 linear layers are converted to
int8, by every scheme of the paper's Table 1, and the embeddings compared with float32's. `run` tells the story from top
to bottom.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import commands
from ..accuracy import measurement
from ..accuracy.measurement import AGAINST
from ..machine import Facts
from ..models import systematic, text, variants
from ..models.find import MINILM, MINILM_SHA256, MINILM_VERSION, find
from ..models.language import Language, read_windows
from ..models.variants import FLOAT32, KEPT_COLUMNS, LLM_INT8, VECTOR_WISE, Variant
from ..outliers import analysis
from ..pictures import Figures
from ..progress import Progress
from ..tables import Report, Table, write_text
from . import answers


@dataclass(frozen=True)
class Demo:
    """How much to measure. The defaults are the demo's; tests measure less."""

    sentences: int = 200
    calibration: int = 64
    draws: int = 3  # of random features, for the ablation
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    seconds: float = 2.5  # of timing, for each batch size and dtype
    tokens: int = 24  # of an answer; 0: no questions are asked


SETTINGS = {"full": Demo(), "small": Demo(24, 8, 1, (4,), 0.5, 8)}


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """`octavo demo`."""
    return run(SETTINGS[args.setting], args.output, facts, progress)


def run(settings: Demo, output: Path, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """Measure everything; write report.json into `output`."""
    progress.begin(100)
    with progress.step("reading Python's documentation, loading MiniLM", 4):
        evaluated = text.write_sentences(output, settings.sentences, settings.calibration)
        loaded = find(Path("minilm"))
    every = (*variants.TABLE_1, KEPT_COLUMNS, variants.BEST, variants.BEST_KEPT)
    few = (variants.ABSMAX, VECTOR_WISE, variants.ZEROPOINT_VECTOR, LLM_INT8, KEPT_COLUMNS, variants.BEST)

    def evaluate(model: Language, shown: Sequence[Variant], part: Progress) -> Report:
        how: dict[str, Any] = {"schemes": [each.key for each in shown], "calibration": output / "calibration.txt"}
        chosen = commands.settings(commands.evaluate, **how, calibration_windows=settings.calibration)
        return measurement.run(model, output / "sentences.txt", chosen, facts, part)

    # 1. What a user sees: answers of a language model.
    tables: list[Table] = []
    told: list[str] = []
    left_out: dict[str, str] = {}
    if settings.tokens:
        with variants.attempt("SmolLM2, whose weights are downloaded once, was left out", left_out):
            tables, told = answers.run(find(Path("smollm2")), settings.tokens, progress.part(25))
        told += [f"{name}: {why}" for name, why in left_out.items()]

    # 2. An encoder as it is: memory, and every scheme of Table 1.
    natural = evaluate(loaded, every, progress.part(20))
    tables += natural.tables
    told += _about("as it is", natural)

    # 3. Why decomposition is needed: the model's own outlier features, and what they carry.
    analyzed = commands.settings(commands.analyze, ablate=True, draws=settings.draws)
    analyzed_report, figures = analysis.run(loaded, output / "sentences.txt", analyzed, facts, progress.part(15))
    tables += analyzed_report.tables

    # 4. The same function with the outliers of large models.
    with progress.step("looking at the spread of features", 1):
        windows = read_windows(loaded, output / "calibration.txt")
        seen = systematic.observe(loaded.model, [window.inputs for window in windows])
        features = systematic.largest_features(seen)
    where = "with systematic outliers of size 58"
    model = systematic.with_outliers(loaded.model, features, systematic.SIZES["outliers-58"], seen)
    found = evaluate(replace(loaded, model=model), few, progress.part(12))
    tables += [replace(table, title=f"{table.title}, {where}") for table in found.tables]
    told += _about(where, found)

    # 5. Speed, with all but the linear layers in float32 and in bfloat16.
    for size in settings.batch_sizes:
        batch = dict(loaded.tokenizer(evaluated[:size], padding="longest", return_tensors="pt"))
        for model in (loaded.model, copy.deepcopy(loaded.model).bfloat16()):
            with progress.step(f"timing batches of {size}", 9 / len(settings.batch_sizes)):
                times = measurement.times(variants.Maker(model, []), (), batch, settings.seconds)
                tables.append(times)
                told.append(f"{times.title}: int8 is {times.rows[1][-1]:.2f} times as fast.")
    figures = {**figures, **measurement.figures(natural)}
    about = {**analyzed_report.facts, **facts.now(package=f"{MINILM}=={MINILM_VERSION}", sha256=MINILM_SHA256)}
    report = Report("octavo demo: SmolLM2 and MiniLM in int8", about, tables, told, list(figures))
    with progress.step("writing report.json", 4):
        write_text(output / "report.json", report.json())
    return report, figures


def _about(where: str, report: Report) -> list[str]:
    """What the losses come to: each sentence says only what this run measured."""
    table = report.table(AGAINST)
    loss, size = (dict(zip(table.column("scheme"), table.column(head), strict=True)) for head in ("loss", "MiB"))
    vector, decomposed, kept = (loss[each.name] for each in (VECTOR_WISE, LLM_INT8, KEPT_COLUMNS))
    found = [
        f"MiniLM {where}: 1 - cosine is {vector:.5f} vector-wise, {decomposed:.5f} with decomposition, {kept:.5f} with "
        "the outlier columns' 16-bit weights kept."
    ]
    own, before = size[LLM_INT8.name], size[FLOAT32.name]
    memory = f"Its linear layers take {own:.2f} MiB in int8, {own / before:.3f} of the {before:.2f} in float32."
    return [*found, memory] if where == "as it is" else found
