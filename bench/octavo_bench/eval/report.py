"""What was measured: as tables and for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo_bench.measuring.machine import taken
from octavo_bench.measuring.output import Table, as_text
from octavo_bench.measuring.turns import Spread

from . import order
from .embeddings import Similarity
from .perplexity import Result
from .tasks import Accuracy

_MIB = 1 << 20


@dataclass(frozen=True)
class Timed:
    """Times of the whole model on one window, with the linear layers of a row."""

    key: str
    name: str
    milliseconds: Spread
    ratio: float  # to octavo's, the median over the rounds: both of a round meet the same load of the machine


@dataclass(frozen=True)
class Report:
    """Everything that was measured in one run."""

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    windows: int
    tokens: int  # scored; of an encoder: all
    causal: bool
    results: list[Result]  # of a causal model
    similarities: list[Similarity]  # of an encoder
    accuracies: list[Accuracy]  # with a task
    left_out: dict[str, str]  # name -> reason
    times: list[Timed]  # with peers; octavo's first
    untimed: dict[str, str]  # name -> reason, of peers that have a row but no time
    timed_tokens: int
    seconds: float

    @property
    def rows(self) -> Sequence[Result | Similarity]:
        """Of the first table."""
        return self.results or self.similarities


def tables(report: Report) -> list[Table]:
    """The tables, in the order of the story."""
    found = [_perplexity_table(report) if report.causal else _similarity_table(report)]
    if report.accuracies:
        found.append(_accuracy_table(report))
    if report.times:
        found.append(_timing_table(report))
    checks = order.checks(report.rows)
    if checks:
        found.append(_order_table(checks, report))
    return found


def text(report: Report) -> str:
    """The whole report for a terminal."""
    settings, machine, packages = report.settings, report.machine, report.machine["packages"]
    head = (
        f"{settings['model']}: {settings['architecture']}, {settings['parameters'] / 1e6:.4g} million parameters; "
        f"{settings['text']}\n"
        f"octavo {packages['octavo']} on {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, "
        f"torch {packages['torch']}"
    )
    return "\n\n".join([head, *map(as_text, tables(report)), f"Measured in {report.seconds:.0f} s."])


def content(report: Report, plots: Iterable[str] = ()) -> dict[str, Any]:
    """Everything, tables and the plots' names included, for JSON."""
    return {
        "format": 1,
        "title": f"octavo eval: {Path(report.settings['model']).name}",
        **asdict(report),
        "seed": None,  # nothing is drawn
        "checks": [asdict(check) for check in order.checks(report.rows)],
        "tables": [asdict(table) for table in tables(report)],
        "plots": list(plots),
    }


def _perplexity_table(report: Report) -> Table:
    return Table(
        f"Perplexity of {report.tokens} tokens in {report.windows} windows of up to {report.settings['window']}",
        ["scheme", "name for --schemes", "perplexity", "difference per token", "standard error", "MiB"],
        [
            [
                result.name,
                result.key,
                f"{result.perplexity:.4f}" if result.perplexity < 1e5 else f"{result.perplexity:.3g}",
                f"{result.difference:+.5f}",
                _error(result.standard_error, 5),
                f"{result.linear_bytes / _MIB:.2f}",
            ]
            for result in report.results
        ]
        + [[name, "", "left out", "", "", ""] for name in report.left_out],
        "Difference of the log-likelihood (nats) from float32's, negative is worse; its standard error is paired over "
        "windows. MiB: linear layers." + _reasons(report.left_out),
    )


def _similarity_table(report: Report) -> Table:
    return Table(
        f"Embeddings of {report.windows} passages, {report.tokens} tokens, against float32's",
        ["scheme", "name for --schemes", "mean cosine", "standard error", "lowest", "neighbors kept", "top-1", "MiB"],
        [
            [
                found.name,
                found.key,
                f"{found.mean_cosine:.6f}",
                _error(found.standard_error, 6),
                f"{found.min_cosine:.5f}",
                str(found.neighbors_kept),
                f"{found.top_probability:.4f}",
                f"{found.linear_bytes / _MIB:.2f}",
            ]
            for found in report.similarities
        ]
        + [[name, "", "left out", "", "", "", "", ""] for name in report.left_out],
        "Neighbors: passages whose nearest other one is the same. Top-1: mean of the largest softmax probability of "
        "attention. MiB: linear layers. SmoothQuant divides in front of layers where a residual takes their input, too."
        + _reasons(report.left_out),
    )


def _reasons(left_out: Mapping[str, str]) -> str:
    return "".join(f" Left out: {name}: {reason}." for name, reason in left_out.items())


def _accuracy_table(report: Report) -> Table:
    return Table(
        f"Zero-shot accuracy on {len(report.accuracies[0].answers)} questions of {Path(report.settings['task']).name}",
        ["scheme", "accuracy, %", "standard error", "difference", "standard error", "answers changed"],
        [
            [
                found.name,
                f"{100 * found.accuracy:.1f}",
                _error(100 * found.standard_error, 1),
                f"{100 * found.difference:+.1f}",
                _error(100 * found.difference_error, 1),
                str(found.changed),
            ]
            for found in report.accuracies
        ],
        "In percentage points; the difference from float32 and its error are paired over the questions.",
    )


def _timing_table(report: Report) -> Table:
    rounds = report.times[0].milliseconds.calls
    return Table(
        f"Time of the whole model on a window of {report.timed_tokens} tokens, {rounds} rounds in turns",
        ["linear layers", "median, ms", "quartiles, ms", "times octavo's"],
        [
            [
                timed.name,
                f"{timed.milliseconds.median:.2f}",
                f"{timed.milliseconds.lower:.2f} to {timed.milliseconds.upper:.2f}",
                f"{timed.ratio:.2f}",
            ]
            for timed in report.times
        ]
        + [[name, "left out", "", ""] for name in report.untimed],
        "Times octavo's: the median over rounds. "
        "Everything but the linear layers is float32 in each; bitsandbytes' layers compute in float16. "
        f"Meanwhile {taken(report.machine['cores_taken_by_others'])}." + _reasons(report.untimed),
    )


def _order_table(checks: Sequence[order.Check], report: Report) -> Table:
    loss, unit = ("losses per token", "window") if report.causal else ("losses, 1 - cosine", "passage")
    return Table(
        f"The paper's order of {loss}",
        ["claim", "difference", "standard error", "wanted", ""],
        [
            [
                check.claim,
                f"{check.difference:+.6f}",
                _error(check.standard_error, 6),
                check.wanted,
                check.verdict,
            ]
            for check in checks
        ],
        f"Difference: of the two losses, paired over {unit}s.",
    )


def _error(value: float, places: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}"
