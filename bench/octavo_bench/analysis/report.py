"""What was found: as tables and for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.torch.convert import MIN_FRACTION

from octavo_bench.measuring.modules import SEED
from octavo_bench.measuring.output import Table, as_text

from .ablation import Ablation
from .observe import Columns, Feature, Spread
from .worth import POLICIES, Worth, root_mean_square

_LISTED = 12  # columns that a cell names; JSON has all


@dataclass(frozen=True)
class Report:
    """Everything that was measured in one run."""

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    causal: bool
    features: list[Feature]  # the most common first
    spread: Spread
    by_layer: list[list[float]]  # [layer][feature]: share of positions at which it is outlying
    magnitudes: list[list[float]]  # [layer][feature]: the largest
    projections: list[Columns]
    ablate: bool  # whether it was asked for
    untouched: Ablation
    without: Ablation | None  # None where there are no outlier features
    random: list[Ablation]
    worths: list[Worth]
    seconds: float


def tables(report: Report) -> list[Table]:
    """The tables, in the order of the story."""
    found = [_model_table(report), _feature_table(report), _projection_table(report), _worth_table(report)]
    return [*found, _ablation_table(report)] if report.ablate else found


def text(report: Report) -> str:
    """The whole report for a terminal."""
    settings = report.settings
    head = (
        f"{settings['model']}: {settings['architecture']}, {settings['parameters'] / 1e6:.4g} million parameters; "
        f"{settings['text']}: {settings['positions']} positions in {settings['windows']} windows"
    )
    return "\n\n".join([head, *map(as_text, tables(report)), f"Measured in {report.seconds:.0f} s."])


def content(report: Report, plots: Iterable[str] = ()) -> dict[str, Any]:
    """Everything, tables and the plots' names included, for JSON."""
    return {
        "format": 1,
        "title": f"octavo analyze: {Path(report.settings['model']).name}",
        **asdict(report),
        "seed": SEED,
        "tables": [asdict(table) for table in tables(report)],
        "plots": list(plots),
    }


def _model_table(report: Report) -> Table:
    """A row of the paper's Table 4."""
    spread = report.spread
    quartiles = ", ".join(f"{value:.1f}" for value in spread.quartiles) if spread.quartiles else "-"
    probability = "of the next token" if report.causal else "of attention"
    settings = report.settings
    return Table(
        f"Features of magnitude {settings['threshold']:g} or more in {settings['min_layers']:.0%} of layers and "
        f"at {settings['min_positions']:.0%} of positions",
        ["", "count", "one-sided", "layers, %", "positions, %", "quartiles", "top-1 with", "top-1 without"],
        [
            [
                "outlier features",
                str(len(report.features)),
                str(sum(feature.one_sided for feature in report.features)),
                f"{100 * spread.layers:.1f}",
                f"{100 * spread.positions:.1f}",
                quartiles,
                f"{report.untouched.top_probability:.4f}",
                f"{report.without.top_probability:.4f}" if report.without else "-",
            ]
        ],
        f"Quartiles: outlying values of the most common one. Top-1: mean of the largest softmax probability "
        f"{probability}, with them and with them zeroed in front of query, key and value.",
    )


def _feature_table(report: Report) -> Table:
    return Table(
        "Outlier features, the most common first",
        ["feature", "layers, %", "positions, %", "largest magnitude", "one-sided"],
        [
            [
                str(feature.number),
                f"{100 * feature.layers:.1f}",
                f"{100 * feature.positions:.1f}",
                f"{feature.largest:.1f}",
                "yes" if feature.one_sided else "no",
            ]
            for feature in report.features
        ],
        "" if report.features else "None.",
    )


def _projection_table(report: Report) -> Table:
    return Table(
        f"Columns that reach magnitude {report.settings['threshold']:g} at any position, by linear layer",
        ["layer, projection", "largest magnitude", "columns", "which, the most common first"],
        [
            [
                f"{found.layer} {found.name}",
                f"{found.largest:.1f}",
                str(len(found.columns)),
                _listed(found),
            ]
            for found in report.projections
        ],
    )


def _listed(found: Columns) -> str:
    ordered = [column for _, column in sorted(zip((-share for share in found.share), found.columns, strict=True))]
    return ", ".join(map(str, ordered[:_LISTED])) + (", ..." if len(ordered) > _LISTED else "")


# The policies of octavo_bench.analysis.worth, as the heads of columns.
POLICY_NAMES = {
    "dequantized-columns": "dequantized",
    "dequantized-rows": "dequantized, by row",
    "kept-columns": "kept",
    "kept-rows": "kept, by row",
    "kept-static": "kept, static",
}


def _worth_table(report: Report) -> Table:
    """Dequantized against kept 16-bit outlier weights, and how the columns are chosen."""

    def row(name: str, kept: int, error: Callable[[str], float]) -> list[str]:
        return [name, str(kept), *(f"{100 * error(policy):.3f}" for policy in POLICIES)]

    return Table(
        "Error of each linear layer's output in int8, % of its norm: what 16-bit outlier weights are worth",
        ["layer, projection", "kept columns", *(POLICY_NAMES[policy] for policy in POLICIES)],
        [
            row(
                "all: sum, root mean square",
                sum(len(worth.kept) for worth in report.worths),
                lambda policy: root_mean_square(report.worths, policy),
            ),
            *(row(f"{worth.layer} {worth.name}", len(worth.kept), worth.errors.__getitem__) for worth in report.worths),
        ],
        "On the inputs that the float32 model gives them. Outlier columns are those of a window; by row: each row's; "
        f"static: the kept ones, found at {100 * MIN_FRACTION:g} % of positions in the first half of the windows and "
        "measured on the others.",
    )


def _ablation_table(report: Report) -> Table:
    measure = "perplexity" if report.causal else "mean cosine"
    rows = [_ablation_row("nothing", [report.untouched], report)]
    if report.without is not None:
        rows.append(_ablation_row(f"the {len(report.features)} outlier features", [report.without], report))
    if report.random:
        name = f"{len(report.random[0].features)} random features (mean of {len(report.random)} draws)"
        rows.append(_ablation_row(name, report.random, report))
    return Table(
        "What zeroing features in front of query, key and value does",
        ["set to zero", measure, "change", "top-1", "change"],
        rows,
        "The feed-forward sees them as before, also those that are outlying there. Random: of those that are outlying "
        "nowhere."
        if report.features
        else "There are no outlier features to be zeroed.",
    )


def _ablation_row(name: str, ablations: Sequence[Ablation], report: Report) -> list[str]:
    def quality(ablation: Ablation) -> float:
        value = ablation.perplexity if report.causal else ablation.mean_cosine
        assert value is not None
        return value

    own, before = _mean(ablations, quality), quality(report.untouched)
    top, top_before = _mean(ablations, lambda ablation: ablation.top_probability), report.untouched.top_probability
    changes = (f"{own / before - 1:+.1%}", f"{top / top_before - 1:+.1%}")
    return [name, f"{own:.5g}", changes[0], f"{top:.4f}", changes[1]]


def _mean(ablations: Sequence[Ablation], value: Callable[[Ablation], float]) -> float:
    return statistics.fmean(value(ablation) for ablation in ablations)
