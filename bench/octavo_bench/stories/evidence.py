"""The paper's tables on real models, all in one run.

    python -m octavo_bench train --output build/lm
    python -m octavo_bench evidence --lm build/lm --output bench/results/evidence

The language model of ``train``, as it is and with outlier features put in, and MiniLM, whose outlier features are its
own: of each what `octavo eval --peers` and `octavo analyze --ablate` tell, <model>-eval.json and <model>-analyze.json;
and evidence.json: a row for each scheme, a column for each model, and whether the paper's order of schemes is met.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..accuracy import measurement, order
from ..machine import Facts
from ..models import language, systematic, text
from ..models.find import find
from ..outliers import analysis, observe
from ..progress import Progress
from ..tables import Cell, Report, Table, write_text

LANGUAGE_MODELS = ("model", *systematic.SIZES)
MINILM = "minilm"


@dataclass(frozen=True)
class Setting:
    """How much to measure."""

    windows: int  # of held-out text
    close_windows: int  # for what is as good as float32, or nearly: differences of 1e-4 need two thousand
    analyzed: int  # windows of `octavo analyze`
    sentences: int
    seconds: float  # of timing peers, for each model
    calibration_windows: int = 16  # of text
    calibration_sentences: int = 64
    draws: int = 3  # of random features


SETTINGS = {"full": Setting(100, 2000, 40, 200, 8.0), "small": Setting(30, 200, 10, 50, 2.0, draws=2)}


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench evidence``."""
    return run(args.lm, args.output, SETTINGS[args.setting], facts, progress), None


def run(lm: Path, output: Path, settings: Setting, facts: Facts, progress: Progress) -> Report:
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
    held, calibrated, some = lm / "heldout.txt", lm / "calibration.txt", settings.calibration_windows
    of_text = measurement.Settings(None, limit=settings.windows, calibration=calibrated, calibration_windows=some)
    of_close = replace(of_text, schemes=order.CLOSE, limit=settings.close_windows)
    of_text = replace(of_text, peers=True, seconds=settings.seconds)
    some = settings.calibration_sentences
    of_sentences = replace(of_text, limit=None, calibration=inputs / "calibration.txt", calibration_windows=some)
    zeroed = observe.Settings(limit=settings.analyzed, ablate=True, draws=settings.draws)
    evaluated: dict[str, Report] = {}
    close: dict[str, Report] = {}
    progress.begin(3 * len(LANGUAGE_MODELS) + 2)
    for name in (*LANGUAGE_MODELS, MINILM):
        loaded, read, chosen = find(Path("minilm")), inputs / "sentences.txt", of_sentences
        if name != MINILM:
            loaded, read, chosen = language.load(lm / name), held, of_text
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
