"""The paper's tables on real models, all in one run.

    .venv/bin/python bench/train_lm.py --output build/lm
    .venv/bin/python bench/evidence.py --lm build/lm --output bench/results/evidence

Two models: the language model of bench/train_lm.py, as it is and with outlier features put in (exact rescalings), and
MiniLM, a sentence encoder whose outlier features are its own. Of each: every scheme of the paper's Table 1, what kept
16-bit outlier weights are worth, SmoothQuant, bitsandbytes and torchao (`octavo eval --peers`, with a task made by
bench/lm_task.py); where the outlier features are and what zeroing them does (`octavo analyze --ablate`). What zeroing
does to the rescaled models is there by construction: claims about it rest on MiniLM.

Written for each model into a folder of its own: eval.json and analyze.json, their tables as Markdown, and plots; beside
them evidence.json and evidence.md: one row for each scheme, one column for each model; and whether the paper's order of
schemes is met, model by model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from octavo_bench.measuring.options import wait_passively

wait_passively()

import lm_outliers
import lm_task
from measure import machine, set_threads, write
from octavo_bench import analysis
from octavo_bench import eval as evaluation
from octavo_bench.analysis import plots as analysis_plots
from octavo_bench.analysis import report as analysis_report
from octavo_bench.demo import data
from octavo_bench.demo import model as minilm
from octavo_bench.eval import order, variants
from octavo_bench.eval import plots as eval_plots
from octavo_bench.eval import report as eval_report
from octavo_bench.measuring import modules
from octavo_bench.measuring.drawing import save_all
from octavo_bench.measuring.output import Table, as_text, to_json
from tqdm import tqdm

LANGUAGE_MODELS = ("model", *lm_outliers.SIZES)
# The schemes that are claimed to be as good as float32, and float32.
CLOSE = ("float32", *(left for _, left, _, wanted in order.CLAIMS if wanted == "near"))
MINILM = "minilm"


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    windows: int = 100  # of held-out text
    close_windows: int = 2000  # for what is as good as float32, or nearly: differences of 1e-4 need this many
    questions: int = 200
    analyzed: int = 40  # windows of `octavo analyze`
    sentences: int = data.EVALUATION_SENTENCES
    calibration_windows: int = 16  # of text; of MiniLM: all its calibration sentences
    calibration_sentences: int = data.CALIBRATION_SENTENCES
    seconds: float = 8.0  # of timing peers, for each model
    draws: int = 3  # of random features


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", type=Path, required=True, metavar="DIR", help="what bench/train_lm.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="made where it is not there")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    for name, default in asdict(defaults).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, metavar="N", help="default: %(default)s")
    args = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(args, name) for name in asdict(defaults)})
    words = sys.argv[1:] if arguments is None else arguments
    run(args.lm, args.output, settings, args.threads, shlex.join(["bench/evidence.py", *words]))


def run(lm: Path, output: Path, settings: Settings, threads: int, command: str, *, show_progress: bool = True) -> None:
    """Measure everything and write it. Raises ValueError where `lm` is not what bench/train_lm.py writes."""
    for name in (*LANGUAGE_MODELS, "heldout.txt", "calibration.txt", "training.json"):
        if not (lm / name).exists():
            raise ValueError(f"{lm}: expected what bench/train_lm.py writes, {name} among it, got none")
    training = json.loads((lm / "training.json").read_text())
    started = time.perf_counter()
    set_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    evaluated: dict[str, eval_report.Report] = {}
    inputs = lm / "evidence"  # kept: the reports name them
    task = lm_task.build(lm / "heldout.txt", inputs, settings.questions)
    models = {name: _language_model(lm, name, task, settings) for name in LANGUAGE_MODELS}
    models[MINILM] = _minilm(inputs, settings)
    close: dict[str, eval_report.Report] = {}
    with tqdm(
        total=2 * len(models) + len(LANGUAGE_MODELS), desc="evidence", unit="report", disable=not show_progress
    ) as bar:
        for name, (evaluate, analyze) in models.items():
            bar.set_postfix_str(f"{name}: eval")
            evaluated[name] = evaluate(threads=threads, show_progress=show_progress, command=command)
            _write_eval(evaluated[name], output / name)
            bar.update()
            bar.set_postfix_str(f"{name}: analyze")
            analyzed = analyze(threads=threads, show_progress=show_progress, command=command)
            _write_analysis(analyzed, output / name)
            bar.update()
        for name in LANGUAGE_MODELS:
            bar.set_postfix_str(f"{name}: as good as float32?")
            chosen = evaluation.Settings(
                CLOSE,
                limit=settings.close_windows,
                calibration=lm / "calibration.txt",
                calibration_windows=settings.calibration_windows,
            )
            text = lm / "heldout.txt"
            close[name] = evaluation.run(lm / name, text, chosen, threads=threads, show_progress=show_progress)
            bar.update()
    checks = {name: _checks(found, close.get(name)) for name, found in evaluated.items()}
    tables = [loss_table(evaluated), close_table(close), order_table(checks), peers_table(evaluated)]
    content = {
        "title": "Evidence: the paper's tables",
        "command": command,
        "seed": {"training": training["seed"], "task": lm_task.SEED, "random features": modules.SEED},
        "machine": machine(threads),
        "settings": asdict(settings),
        "training": training["setting"],
        "seconds": time.perf_counter() - started,
        "checks": {name: [asdict(check) for check in found] for name, found in checks.items()},
        "tables": [asdict(table) for table in tables],
        "plots": [],
    }
    _write_text(output / "evidence.json", to_json(content) + "\n")
    _write_markdown(output / "evidence.md", "Evidence", tables, content)
    print("\n\n".join(map(as_text, tables)))
    print(f"\n{output}: measured in {content['seconds']:.0f} s")


# --- the models -------------------------------------------------------------------------------------------------------

Evaluate = Callable[..., eval_report.Report]
Analyze = Callable[..., analysis_report.Report]


def _language_model(lm: Path, name: str, task: Path, settings: Settings) -> tuple[Evaluate, Analyze]:
    """How to evaluate and to analyze a model of `lm`."""
    text = lm / "heldout.txt"
    chosen = evaluation.Settings(
        limit=settings.windows,
        calibration=lm / "calibration.txt",
        calibration_windows=settings.calibration_windows,
        task=task,
        peers=True,
        seconds=settings.seconds,
    )
    zeroed = analysis.Settings(limit=settings.analyzed, ablate=True, draws=settings.draws)
    return partial(evaluation.run, lm / name, text, chosen), partial(analysis.run, lm / name, text, zeroed)


def _minilm(folder: Path, settings: Settings) -> tuple[Evaluate, Analyze]:
    """The same for MiniLM, on the demo's sentences."""
    sentences = data.load(settings.sentences, settings.calibration_sentences)
    text, calibration = folder / "sentences.txt", folder / "calibration.txt"
    _write_text(text, "\n".join(sentences.evaluation) + "\n")
    _write_text(calibration, "\n".join(sentences.calibration) + "\n")
    chosen = evaluation.Settings(
        calibration=calibration,
        calibration_windows=settings.calibration_sentences,
        peers=True,
        seconds=settings.seconds,
    )
    zeroed = analysis.Settings(window=minilm.MAX_TOKENS, ablate=True, draws=settings.draws)
    model = minilm.model_directory()
    return partial(evaluation.run, model, text, chosen), partial(analysis.run, model, text, zeroed)


# --- all models together ----------------------------------------------------------------------------------------------


def loss_table(evaluated: dict[str, eval_report.Report]) -> Table:
    """What each scheme costs each model."""
    cells: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}
    for model, report in evaluated.items():
        for result in report.results:
            names[result.key] = result.name
            error = f"{result.standard_error:.5f}"
            loss = 0 - result.difference  # not -difference, whose zero is -0
            cells.setdefault(result.key, {})[model] = f"{loss:+.5f} ± {error}"
        for found in report.similarities:
            names[found.key] = found.name
            error = f"{found.standard_error:.6f}"
            cells.setdefault(found.key, {})[model] = f"{1 - found.mean_cosine:.6f} ± {error}"
    known = [scheme.key for scheme in variants.SCHEMES]
    ordered = sorted(cells, key=lambda key: known.index(key) if key in known else len(known))
    return Table(
        "Loss against float32, by scheme and model",
        ["scheme", *evaluated],
        [[names[key], *(cells[key].get(model, "left out") for model in evaluated)] for key in ordered],
        "Language models: nats per token, positive is worse, with the standard error paired over windows. "
        "minilm: 1 - mean cosine of the embeddings with float32's, with its standard error.",
    )


def close_table(close: dict[str, eval_report.Report]) -> Table:
    """What the schemes cost that are as good as float32, or nearly."""
    rows = {result.key: [result.name] for result in next(iter(close.values())).results}
    for report in close.values():
        for result in report.results:
            rows[result.key].append(f"{0 - result.difference:+.6f} ± {result.standard_error:.6f}")
    windows = sorted({report.windows for report in close.values()})
    return Table(
        f"Decomposition against float32, on {' to '.join(map(str, windows))} windows",
        ["scheme", *close],
        [row for key, row in rows.items() if key != "float32"],
        "Nats per token, positive is worse, with the standard error paired over windows.",
    )


def _checks(report: eval_report.Report, close: eval_report.Report | None) -> list[order.Check]:
    """The claims about a model, of which those that more text was read for by that."""
    read = order.checks(close.results) if close is not None else []
    known = {check.claim: check for check in read if check.right == "float32"}
    return [known.get(check.claim, check) for check in order.checks(report.rows)]


def order_table(found: dict[str, list[order.Check]]) -> Table:
    """Which claims are met by which language model."""
    return Table(
        "The paper's order",
        ["claim", *found],
        [
            [
                claim,
                *(
                    next((_verdict(check) for check in checks if check.claim == claim), "-")
                    for checks in found.values()
                ),
            ]
            for claim, *_ in order.CLAIMS
        ],
        "In brackets: the difference of the two losses and its paired standard error, in nats per token (minilm: of "
        "1 - cosine, to which closeness is not applied). Met: more than two standard errors; no less: not below minus "
        f"two; as good: within {order.TOLERANCE:g} with two standard errors added, not met with them taken away, and "
        "undecided in between.",
    )


def _verdict(check: order.Check) -> str:
    return f"{check.verdict} ({check.difference:+.5f} ± {check.standard_error:.5f})"


def peers_table(evaluated: dict[str, eval_report.Report]) -> Table:
    """Octavo and its peers on each model: loss, memory, time."""
    rows = []
    for model, report in evaluated.items():
        known: dict[str, Any] = {row.key: row for row in report.rows}
        for timed in report.times:
            row = known[timed.key]
            loss = 0 - row.difference if report.causal else 1 - row.mean_cosine
            rows.append(
                [
                    f"{model}: {timed.name}",
                    f"{loss:+.6f}",
                    f"{row.standard_error:.6f}",
                    f"{row.linear_bytes / (1 << 20):.2f}",
                    f"{timed.milliseconds.median:.2f}",
                    f"{timed.ratio:.2f}",
                ]
            )
        rows += [[f"{model}: {name}", "left out", "", "", "", ""] for name in (*report.left_out, *report.untimed)]
    return Table(
        "octavo and its peers on the same model and text",
        ["model: linear layers", "loss", "standard error", "MiB", "ms", "times octavo's"],
        rows,
        "Loss as above. MiB: linear layers. Time of the whole model on one window (minilm: sentence), taken in turns; "
        "its ratio to octavo's is the median over the rounds.",
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _write_eval(report: eval_report.Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures = eval_plots.figures(report)
    content = eval_report.content(report, figures)
    _write_text(folder / "eval.json", to_json(content) + "\n")
    _write_markdown(folder / "eval.md", content["title"], eval_report.tables(report), content)
    save_all(figures, folder)


def _write_analysis(report: analysis_report.Report, folder: Path) -> None:
    (folder / "analyze").mkdir(parents=True, exist_ok=True)
    figures = analysis_plots.figures(report)
    content = analysis_report.content(report, figures)
    _write_text(folder / "analyze.json", to_json(content) + "\n")
    _write_markdown(folder / "analyze.md", content["title"], analysis_report.tables(report), content)
    save_all(figures, folder / "analyze")


def _write_markdown(path: Path, title: str, tables: Sequence[Table], content: dict[str, Any]) -> None:
    facts, packages = content["machine"], content["machine"]["packages"]
    head = [
        f"# {title}",
        f"`{content['command']}`; {facts['cpu']}, {facts['threads']} of {facts['cores']} cores; octavo "
        f"{packages['octavo']}, torch {packages['torch']}; {facts['date']}; {content['seconds']:.0f} s",
    ]
    parts = []
    for table in tables:
        lines = [
            f"## {table.title}",
            "",
            "| " + " | ".join(column or " " for column in table.columns) + " |",
            "|" + "---|" * len(table.columns),
            *("| " + " | ".join(cells) + " |" for cells in table.rows),
        ]
        parts.append("\n".join([*lines, "", table.note] if table.note else lines))
    _write_text(path, "\n\n".join([*head, *parts]) + "\n")


def _write_text(path: Path, text: str) -> None:
    write(path, partial(Path.write_text, data=text, encoding="utf-8"))


if __name__ == "__main__":
    main()
