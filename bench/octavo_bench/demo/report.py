"""What the demo found: as tables, as sentences computed from the measured values, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from octavo_bench.measuring.output import Table, as_text, to_json
from octavo_bench.measuring.systematic import Size

from . import timing
from .outliers import ATTENTION_INPUT, INPUTS, Ablation
from .schemes import KEPT_COLUMNS, LLM_INT8, VECTOR_WISE, Row
from .systematic import Measured

MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes of all linear layers."""

    linear_layers: int
    float32: int
    float16: int
    int8: int
    int8_kept: int  # with the 16-bit weights of the calibrated outlier columns

    @property
    def ratio(self) -> float:
        """Bytes in int8 over bytes in float32."""
        return self.int8 / self.float32


@dataclass(frozen=True)
class OutlierColumns:
    """The outlier columns of one linear input of one layer."""

    layer: int
    input: str
    columns: list[int]
    share: list[float]  # of tokens at which each column reaches the threshold
    largest: float  # magnitude, over all columns


@dataclass(frozen=True)
class Ablations:
    """The model untouched, without its largest outlier features, and without as many random ones."""

    untouched: Ablation
    outliers: Ablation
    random: list[Ablation]


@dataclass(frozen=True)
class Systematic:
    """The model with systematic outliers of one size."""

    size: Size
    features: list[int]
    float32_difference: float  # largest difference of any number of any float32 embedding
    measured: Measured
    rows: list[Row]


@dataclass(frozen=True)
class Report:
    """Everything that was measured in one run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    memory: Memory
    natural: list[Row]
    largest_features: list[int]
    outlier_columns: list[OutlierColumns]
    feature_magnitudes: list[list[float]]  # [layer][feature]: the largest magnitude in the attention input
    ablations: Ablations
    systematic: list[Systematic]
    timings: list[timing.Timing]
    seconds: float
    conclusions: list[str] = field(default_factory=list)


# ---- tables ------------------------------------------------------------------------------------------


def tables(report: Report) -> list[Table]:
    """The report's tables, in the order of the story."""
    count = report.settings["sentences"]
    return [
        _memory_table(report.memory),
        _quality_table(
            f"Embeddings of {count} sentences against float32",
            report.natural,
            count,
            "Outlier columns meet dequantized int8 weights, except where the row says kept 16-bit.",
        ),
        _outlier_table(report),
        _ablation_table(report.ablations, count),
        *(_systematic_table(systematic, count) for systematic in report.systematic),
        _timing_table(report.timings),
    ]


def _memory_table(memory: Memory) -> Table:
    rows = [
        ("float32", memory.float32),
        ("float16, bfloat16", memory.float16),
        ("int8", memory.int8),
        ("int8, kept 16-bit outlier weights", memory.int8_kept),
    ]
    return Table(
        f"Memory of the {memory.linear_layers} linear layers",
        ["", "MiB", "of float32"],
        [[name, f"{size / MIB:.2f}", f"{size / memory.float32:.4f}"] for name, size in rows],
    )


def _quality_table(title: str, rows: Sequence[Row], count: int, note: str = "") -> Table:
    return Table(
        title,
        ["scheme", "mean cosine", "min cosine", f"neighbors kept of {count}"],
        [[row.name, *_quality_cells(row.quality)] for row in rows],
        note,
    )


def _quality_cells(quality: Any) -> list[str]:
    return [f"{quality.mean_cosine:.5f}", f"{quality.min_cosine:.5f}", f"{quality.neighbors_kept:g}"]


def _outlier_table(report: Report) -> Table:
    by_place = {(found.layer, found.input): found for found in report.outlier_columns}
    rows = []
    for layer in sorted({found.layer for found in report.outlier_columns}):
        here = [by_place[layer, name] for name in INPUTS]
        listed = ", ".join(map(str, by_place[layer, ATTENTION_INPUT].columns)) or "none"
        rows.append([str(layer), *(f"{len(found.columns)} ({found.largest:.1f})" for found in here), listed])
    return Table(
        f"Outlier columns per layer at threshold {report.settings['threshold']:g} (largest magnitude)",
        ["layer", *INPUTS, "columns of the attention input"],
        rows,
    )


def _ablation_table(ablations: Ablations, count: int) -> Table:
    number = len(ablations.outliers.features)
    named = ", ".join(map(str, ablations.outliers.features))
    draws = ablations.random
    return Table(
        "What the largest outlier features of the attention input carry",
        [
            "set to zero",
            "mean cosine",
            "min cosine",
            f"neighbors kept of {count}",
            "attention top-1 probability",
        ],
        [
            ["nothing", *_ablation_cells([ablations.untouched])],
            [f"the {number} largest outlier features ({named})", *_ablation_cells([ablations.outliers])],
            [f"{number} random features (mean of {len(draws)} draws)", *_ablation_cells(draws)],
        ],
    )


def _ablation_cells(ablations: Sequence[Ablation]) -> list[str]:
    """Means over the draws."""
    return [
        f"{_mean(ablations, lambda a: a.quality.mean_cosine):.5f}",
        f"{_mean(ablations, lambda a: a.quality.min_cosine):.5f}",
        f"{_mean(ablations, lambda a: a.quality.neighbors_kept):.4g}",
        f"{_mean(ablations, lambda a: a.top_probability):.4f}",
    ]


def _systematic_table(systematic: Systematic, count: int) -> Table:
    lower, median, upper = systematic.measured.quartiles
    return _quality_table(
        f"The same function with {len(systematic.features)} systematic outlier features, "
        f"size {systematic.size.magnitude:g}",
        systematic.rows,
        count,
        f"Features {', '.join(map(str, systematic.features))}: "
        f"quartiles {lower:.1f}, {median:.1f}, {upper:.1f}, "
        f"{systematic.measured.share_negative:.1%} of the values negative. "
        f"Largest change of a float32 embedding: {systematic.float32_difference:.1e}.",
    )


def _timing_table(timings: Sequence[timing.Timing]) -> Table:
    names = list(timings[0].times)
    pairs = [(own, other) for own, other in timing.PAIRS.items() if own in names and other in names]
    return Table(
        "Time per batch, ms (median)",
        ["batch", *names, *(f"{own} vs {other}" for own, other in pairs), "rounds"],
        [
            [
                f"{timed.batch} x {timed.tokens} tokens",
                *(f"{timed.times[name].median:.1f}" for name in names),
                *(f"{timed.times[other].median / timed.times[own].median:.2f}x" for own, other in pairs),
                str(timed.times[names[0]].calls),
            ]
            for timed in timings
        ],
    )


# ---- sentences: each says only what this run measured ------------------------------------------------


def conclusions(report: Report) -> list[str]:
    """What the measured values come to."""
    return [
        _about_memory(report.memory),
        _about_decomposition(report.natural, report.settings["sentences"], "On the model as it is"),
        _about_ablation(report.ablations),
        *(line for systematic in report.systematic for line in _about_systematic(systematic, report)),
        *(line for timed in report.timings for line in _about_timing(timed)),
    ]


def _about_memory(memory: Memory) -> str:
    return (
        f"The {memory.linear_layers} linear layers take {memory.int8 / MIB:.2f} MiB in int8, "
        f"{memory.ratio:.3f} of the {memory.float32 / MIB:.2f} MiB in float32."
    )


def _about_decomposition(rows: Sequence[Row], count: int, where: str) -> str:
    without, with_ = _row(rows, VECTOR_WISE.name).quality, _row(rows, LLM_INT8.name).quality
    return (
        f"{where}, decomposition {_moves(without.min_cosine, with_.min_cosine)} the minimum cosine of absmax "
        f"vector-wise quantization from {without.min_cosine:.4f} to {with_.min_cosine:.4f}, and "
        f"{_moves(without.neighbors_kept, with_.neighbors_kept)} the neighbors kept "
        f"from {without.neighbors_kept} to {with_.neighbors_kept} of {count}."
    )


def _about_ablation(ablations: Ablations) -> str:
    untouched, number = ablations.untouched, len(ablations.outliers.features)
    cosine, top = ablations.outliers.quality.mean_cosine, ablations.outliers.top_probability
    random_cosine = _mean(ablations.random, lambda a: a.quality.mean_cosine)
    random_top = _mean(ablations.random, lambda a: a.top_probability)
    text = (
        f"Setting the {number} largest outlier features to zero {_moves(1.0, cosine)} the mean cosine to "
        f"{cosine:.4f} and {_moves(untouched.top_probability, top)} attention's top-1 probability from "
        f"{untouched.top_probability:.4f} to {top:.4f}; with {number} random features they are "
        f"{random_cosine:.4f} and {random_top:.4f}."
    )
    if random_cosine < 1.0:
        ratio = (1 - cosine) / (1 - random_cosine)
        text += f" The outlier features move the embeddings {ratio:.3g} times as far (1 - cosine)."
    return text


def _about_systematic(systematic: Systematic, report: Report) -> list[str]:
    where = f"With systematic outliers of size {systematic.size.magnitude:g}"
    dequantized = _row(systematic.rows, LLM_INT8.name).quality
    kept = _row(systematic.rows, KEPT_COLUMNS.name).quality
    return [
        _about_decomposition(systematic.rows, report.settings["sentences"], where),
        f"{where}, keeping the outlier columns' 16-bit weights "
        f"{_moves(dequantized.mean_cosine, kept.mean_cosine)} the mean cosine of LLM.int8() "
        f"from {dequantized.mean_cosine:.4f} to {kept.mean_cosine:.4f} and "
        f"{_moves(dequantized.min_cosine, kept.min_cosine)} the minimum from {dequantized.min_cosine:.4f} "
        f"to {kept.min_cosine:.4f}.",
    ]


def _about_timing(timed: timing.Timing) -> list[str]:
    found = []
    for name, other in timing.PAIRS.items():
        if name in timed.times and other in timed.times:
            own, ratio = timed.times[name].median, timed.times[other].median / timed.times[name].median
            found.append(
                f"A batch of {timed.batch} takes {name} {own:.1f} ms: {max(ratio, 1 / ratio):.2f} times as "
                f"{'fast' if ratio >= 1 else 'slow'} as {other}."
            )
    return found


def _moves(before: float, after: float) -> str:
    return "raises" if after > before else "lowers" if after < before else "does not change"


def _row(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def _mean(ablations: Sequence[Ablation], value: Callable[[Ablation], float]) -> float:
    return statistics.fmean(value(ablation) for ablation in ablations)


# ---- output ------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """The whole report for a terminal."""
    machine, packages = report.machine, report.machine["packages"]
    head = (
        f"octavo {packages['octavo']} on {machine['cpu']}, {machine['threads']} of {machine['cores']} cores; "
        f"Python {machine['python']}, torch {packages['torch']}, transformers {packages['transformers']}\n"
        f"MiniLM ({report.settings['package']} {report.settings['package_version']}), "
        f"{report.settings['sentences']} sentences of Python's documentation, "
        f"{report.settings['tokens']} tokens"
    )
    parts = [head, *map(as_text, tables(report)), "\n".join(f"- {line}" for line in report.conclusions)]
    return "\n\n".join([*parts, f"Measured in {report.seconds:.0f} s."])


def as_json(report: Report) -> str:
    """The whole report, tables included, as JSON. Numbers that are not finite are null."""
    content = {"format": 1, **asdict(report), "tables": [asdict(table) for table in tables(report)]}
    return to_json(content)
