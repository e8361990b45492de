"""The paper's tables on real models, all in one run.

    python -m octavo_bench train --output build/lm
    python -m octavo_bench evidence --lm build/lm --output bench/results/evidence

Two models: the language model of ``train``, as it is and with outlier features put in (exact rescalings), and MiniLM, a
sentence encoder whose outlier features are its own. Of each what `octavo eval --peers` and `octavo analyze --ablate`
tell. What zeroing does to the rescaled models is there by construction: claims about it rest on MiniLM.

Written: of each model <model>-eval.json and <model>-analyze.json; and evidence.json: a row for each scheme, a column
for each model; and whether the paper's order of schemes is met, model by model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from .. import accuracy, outliers
from ..accuracy import measurement, order
from ..machine import Facts
from ..models import language, minilm, systematic, text
from ..models.language import Language
from ..outliers import analysis
from ..progress import Progress
from ..tables import Cell, Report, Table, write_text
from .settings import Evidence

LANGUAGE_MODELS = ("model", *systematic.SIZES)
MINILM = "minilm"


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench evidence``."""
    settings = Evidence(**{each.name: getattr(args, each.name) for each in fields(Evidence)})
    return run(args.lm, args.output, settings, facts, progress), None


def run(lm: Path, output: Path, settings: Evidence, facts: Facts, progress: Progress) -> Report:
    """Measure everything and write it. Raises ValueError where `lm` is not what octavo_bench.models.train writes."""
    for name in (*LANGUAGE_MODELS, "heldout.txt", "calibration.txt", "training.json"):
        if not (lm / name).exists():
            raise ValueError(f"{lm}: expected what octavo_bench.models.train writes, {name} among it, got none")
    output.mkdir(parents=True, exist_ok=True)
    inputs = lm / "evidence"  # kept: the reports name them
    inputs.mkdir(exist_ok=True)
    sentences, calibration = text.sentences(settings.sentences, settings.calibration_sentences)
    write_text(inputs / "sentences.txt", "\n".join(sentences) + "\n")
    write_text(inputs / "calibration.txt", "\n".join(calibration) + "\n")
    of_text = accuracy.Settings(
        limit=settings.windows, calibration=lm / "calibration.txt", calibration_windows=settings.calibration_windows,
        peers=True, seconds=settings.seconds,
    )  # fmt: skip
    of_sentences = accuracy.Settings(
        calibration=inputs / "calibration.txt", calibration_windows=settings.calibration_sentences, peers=True,
        seconds=settings.seconds,
    )  # fmt: skip
    of_close = accuracy.Settings(
        order.CLOSE, limit=settings.close_windows, calibration=lm / "calibration.txt",
        calibration_windows=settings.calibration_windows,
    )  # fmt: skip
    zeroed = outliers.Settings(limit=settings.analyzed, ablate=True, draws=settings.draws)
    evaluated: dict[str, Report] = {}
    close: dict[str, Report] = {}
    progress.begin(3 * len(LANGUAGE_MODELS) + 2)
    for name in (*LANGUAGE_MODELS, MINILM):
        loaded, read, chosen = _model(name, lm, inputs, of_text, of_sentences)
        evaluated[name] = measurement.run(loaded, read, chosen, facts, progress.part(1))
        analyzed, _ = analysis.run(loaded, read, zeroed, facts, progress.part(1))
        if name != MINILM:
            close[name] = measurement.run(loaded, read, of_close, facts, progress.part(1))
        write_text(output / f"{name}-eval.json", evaluated[name].json())
        write_text(output / f"{name}-analyze.json", analyzed.json())
    tables = [
        loss_table(evaluated, "Loss against float32, by scheme and model"),
        loss_table(close, "Decomposition against float32, on more windows"),
        order_table(evaluated, close),
    ]
    report = Report("Evidence: the paper's tables", facts.now(settings=asdict(settings)), tables)
    write_text(output / "evidence.json", report.json())
    return report


def _model(
    name: str, lm: Path, inputs: Path, of_text: accuracy.Settings, of_sentences: accuracy.Settings
) -> tuple[Language, Path, accuracy.Settings]:
    """A model, the text it is measured on, and how."""
    if name == MINILM:
        return minilm.minilm(), inputs / "sentences.txt", of_sentences
    return language.load(lm / name), lm / "heldout.txt", of_text


def loss_table(reports: Mapping[str, Report], title: str) -> Table:
    """What each scheme costs each model: a row for each scheme, the loss and its error for each model."""
    found: dict[str, dict[str, list[Cell]]] = {}
    for model, report in reports.items():
        table = report.table(measurement.AGAINST)
        for name, *cells in zip(*map(table.column, ("scheme", "loss", "loss ±")), strict=True):
            found.setdefault(name, {})[model] = cells
    columns = {f"{model}{end}": form for model in reports for end, form in (("", "+.6f"), (" ±", ".6f"))}
    rows = [
        [name, *(cell for model in reports for cell in own.get(model, [None, None]))] for name, own in found.items()
    ]
    return Table(
        title,
        {"scheme": "", **columns},
        rows,
        "Language models: nats per token, positive is worse, with the standard error paired over windows. minilm: 1 - "
        "mean cosine of the embeddings with float32's, with its standard error.",
    )


def order_table(evaluated: Mapping[str, Report], close: Mapping[str, Report]) -> Table:
    """Which claims are met by which model: those of closeness by the run on more windows."""
    claims: dict[str, dict[str, str]] = {}
    for model, report in evaluated.items():
        for source in (report, close.get(model)):
            if source is None:
                continue
            table = source.table("The paper's order")
            for claim, difference, error, wanted, verdict in table.rows:
                if source is report or str(wanted) == order.WANTED["near"]:
                    claims.setdefault(str(claim), {})[model] = f"{verdict} ({difference:+.6f} ± {error:.6f})"
    rows = [[claim, *(own.get(model, "-") for model in evaluated)] for claim, own in claims.items()]
    return Table(
        "The paper's order",
        {"claim": "", **dict.fromkeys(evaluated, "")},
        rows,
        "In brackets: the difference of the two losses and its paired standard error. Met: more than two standard "
        f"errors; no less: not below minus two; as good: within {order.TOLERANCE:g} nats with two standard errors "
        "added, not met with them taken away, and undecided in between.",
    )
