"""The paper's tables on real models, and on one that its rounding is hard on, all in one run.

    python -m octavo_bench train --output build/lm
    python -m octavo_bench evidence --lm build/lm --output bench/results/evidence

With the setting "full" MiniLM, SmolLM2 and MPNet, of which the last two are downloaded; as a stress test the language
model of ``train``, as it is and with outlier features put in. Of each what `octavo eval --peers` and `octavo analyze
--ablate` tell, <model>-eval.json and <model>-analyze.json; and evidence.json: a row for each scheme, a column for each
model.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .. import commands
from ..accuracy import measurement
from ..machine import Facts
from ..models import language, systematic, text
from ..models.find import find
from ..outliers import analysis
from ..progress import Progress
from ..tables import Cell, Report, Table, write_text

LANGUAGE_MODELS = ("model", *systematic.SIZES)


@dataclass(frozen=True)
class Setting:
    """How much to measure."""

    windows: int  # of held-out text
    analyzed: int  # windows of `octavo analyze`
    sentences: int
    seconds: float  # of timing peers, for each model
    real: tuple[str, ...]  # models by the names of `find`
    calibration_windows: int = 16  # of text
    calibration_sentences: int = 64
    draws: int = 3  # of random features


SETTINGS = {
    "full": Setting(100, 40, 200, 8.0, ("smollm2", "mpnet", "minilm")),
    "small": Setting(12, 5, 20, 0.5, (), calibration_windows=8, draws=1),  # `octavo demo` is of MiniLM
}


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
    text.write_sentences(inputs, settings.sentences, settings.calibration_sentences)
    chosen = partial(commands.settings, commands.evaluate, peers=True, seconds=settings.seconds)
    of_text = chosen(limit=settings.windows, calibration_windows=settings.calibration_windows)
    of_sentences = chosen(calibration_windows=settings.calibration_sentences)
    zeroed = commands.settings(commands.analyze, limit=settings.analyzed, ablate=True, draws=settings.draws)
    reports: dict[str, Report] = {}
    models = (*settings.real, *LANGUAGE_MODELS)
    progress.begin(2 * len(models))
    for name in models:
        loaded = find(Path(name)) if name in settings.real else language.load(lm / name)
        how, read = (of_text, lm / "heldout.txt") if loaded.causal else (of_sentences, inputs / "sentences.txt")
        how.calibration = read.with_name("calibration.txt")
        reports[name] = measurement.run(loaded, read, how, facts, progress.part(1))
        analyzed, _ = analysis.run(loaded, read, zeroed, facts, progress.part(1))
        write_text(output / f"{name}-eval.json", reports[name].json())
        write_text(output / f"{name}-analyze.json", analyzed.json())
    report = Report("Evidence: the paper's tables", facts.now(settings=asdict(settings)), [cost_table(reports)])
    write_text(output / "evidence.json", report.json())
    return report


def cost_table(reports: Mapping[str, Report]) -> Table:
    """What each scheme costs each model: a row for each scheme, the cost and its error for each model."""
    found: dict[str, dict[str, Cell]] = {}  # by scheme, by head
    for model, report in reports.items():
        table = report.table(measurement.AGAINST)
        measure = "KL" if "KL" in table.columns else "loss"
        for name, cost, error in zip(*map(table.column, ("scheme", measure, f"{measure} ±")), strict=True):
            found[name] = {**found.get(name, {}), model: cost, f"{model} ±": error}
    columns = {f"{model}{end}": ".6f" for model in reports for end in ("", " ±")}
    rows = [[name, *map(own.get, columns)] for name, own in found.items()]
    note = "Language models: Kullback-Leibler divergence from float32, nats per token. Encoders: 1 - cosine of the "
    note += "embeddings with float32's. ±: standard errors over windows or passages."
    return Table("What each scheme costs, by model", {"scheme": "", **columns}, rows, note)
