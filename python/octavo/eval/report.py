"""What was measured: as a table and for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from octavo.measuring.output import Table, as_text

from .perplexity import Result


@dataclass(frozen=True)
class Report:
    """Everything that was measured in one run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    windows: int
    tokens: int  # scored
    results: list[Result]
    seconds: float


def table(report: Report) -> Table:
    """A row for each scheme."""
    return Table(
        f"Perplexity of {report.tokens} tokens in {report.windows} windows of up to {report.settings['window']}",
        ["scheme", "name for --schemes", "perplexity", "difference per token", "standard error", "MiB"],
        [
            [
                result.name,
                result.key,
                f"{result.perplexity:.4f}" if result.perplexity < 1e5 else f"{result.perplexity:.3g}",
                f"{result.difference:+.5f}",
                "-" if math.isnan(result.standard_error) else f"{result.standard_error:.5f}",
                f"{result.linear_bytes / (1 << 20):.2f}",
            ]
            for result in report.results
        ],
        "Difference of the log-likelihood (nats) from float32's, negative is worse; its standard error is paired over "
        "windows. MiB: linear layers.",
    )


def text(report: Report) -> str:
    """The whole report for a terminal."""
    settings, machine = report.settings, report.machine
    head = (
        f"{settings['model']}: {settings['architecture']}, {settings['parameters'] / 1e6:.4g} million parameters; "
        f"{settings['text']}\n"
        f"octavo {machine['octavo']} on {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, "
        f"torch {machine['torch']}"
    )
    return "\n\n".join([head, as_text(table(report)), f"Measured in {report.seconds:.0f} s."])


def content(report: Report) -> dict[str, Any]:
    """Everything, the table included, for JSON."""
    return {"format": 1, **asdict(report), "tables": [asdict(table(report))]}
