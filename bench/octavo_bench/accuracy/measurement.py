"""The measurement itself, from top to bottom: what to run, every variant of the model on it, times; the report."""

import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import truediv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..machine import Facts
from ..models import variants
from ..models.find import find
from ..models.language import Language, Window, read_windows, set_aside
from ..models.modules import linear_bytes, rows_at_a_time
from ..models.variants import BEST, BROKEN, FLOAT32, LLM_INT8, PEERS, Maker, Variant, attempt, chosen, reason, told
from ..pictures import BLUE, GRAY, Figures, draw_losses, quiet
from ..progress import Progress
from ..tables import Cell, Report, Table
from ..turns import on_the_cpu, on_the_wall, spread, take_turns
from .scores import AGREED, DIVERGENCE, LOSS, TOP, Judge, Scores, neighbors_kept, perplexity

MIB = 1 << 20
# Of timing the peers. A time's ratio to octavo's is that of one round, and few rounds say little of their median.
_ROUNDS = 15
AGAINST = "Against the model as it is"
TIMES = "Time of the whole model"
RATIO = "times the first"
MIN_COSINE = 0.98


def command(args: Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """`octavo eval`."""
    report = run(find(args.model, trust_remote_code=args.trust_remote_code), args.text, args, facts, progress)
    return report, figures(report) if args.plots else {}


def run(loaded: Language, text: Path, settings: Namespace, facts: Facts, progress: Progress) -> Report:
    """Measure every variant; `settings` are the options of `octavo eval`.

    Raises ValueError and OSError for a text that cannot be used.
    """
    wanted = chosen(settings.schemes, peers=settings.peers)
    calibrated = any(each.kept is not None or each.smooth for each in wanted)
    windows, calibration = _windows(loaded, text, settings, calibrated)
    maker = Maker(loaded.model, [window.inputs for window in calibration], insert=not loaded.causal)
    judge = Judge(loaded, windows)
    measured: dict[Variant, tuple[Scores, list[Cell]]] = {}  # the cells: the share in 16 bit, and MiB
    left_out: dict[str, str] = {}
    listed = [FLOAT32, *(variant for variant in wanted if variant is not FLOAT32)]
    timing = len(windows) if settings.peers else 0
    progress.begin(len(windows) * len(listed) + timing)
    for variant in listed:
        try:
            model = maker.make(variant)
            with rows_at_a_time(model, None if model is loaded.model else settings.rows):
                found = judge.score(model, progress, variant.name)
        except (*BROKEN, ValueError) as error:
            if variant not in PEERS and not (variant.smooth and settings.schemes is None):
                raise
            left_out[variant.key] = reason(error)
            continue
        share = variants.share_in_16_bit(model, windows[0].inputs, settings.rows)
        measured[variant] = found, [share and 100 * share, linear_bytes(model) / MIB]
    tables = [_table(measured, len(windows), told(left_out.items()), causal=loaded.causal)]
    if settings.peers:
        with progress.step("timing", timing):
            others = (variants.BEST_KEPT, LLM_INT8, variants.VECTOR_WISE, *PEERS)
            peers = [variant for variant in others if variant in measured]
            tables.append(times(maker, peers, windows[0].inputs, settings.seconds))
    about = {"model": loaded.path.name, "parameters": loaded.model.num_parameters(), "text": str(text)}
    about |= {"calibration": str(settings.calibration or text), "calibration_windows": len(calibration)}
    return Report(f"octavo eval: {loaded.path.name}", facts.now(**about, rows=settings.rows), tables)


def _windows(loaded: Language, text: Path, settings: Namespace, calibrated: bool) -> tuple[list[Window], list[Window]]:
    """What is scored, and what is calibrated with."""
    count = settings.calibration_windows
    windows = read_windows(loaded, text, settings.window, settings.stride)
    calibration: list[Window] = []
    if calibrated and settings.calibration is not None:
        calibration = read_windows(loaded, settings.calibration, settings.window, limit=count)
    elif calibrated:
        calibration, windows = set_aside(windows, count)
    windows = windows[: settings.limit]
    if len(windows) < (1 if loaded.causal else 2):
        wanted = (
            f"{text}: expected more windows than the {len(calibration)} of the calibration, got {len(windows)} more"
        )
        raise ValueError(f"{wanted} (give --calibration FILE, or fewer --calibration-windows)")
    return windows, calibration


@torch.inference_mode()
def times(maker: Maker, others: Sequence[Variant], inputs: Mapping[str, Tensor], seconds: float) -> Table:
    """Of the whole model on some inputs, in turns: octavo's default as it runs by default, the model as it is, others.

    A model is timed only where its output is near that of the model as it is: what is wrong has no speed.
    """
    calls: dict[str, Callable[[], object]] = {}
    untimed: dict[str, str] = {}
    tokens = inputs["attention_mask"].bool()  # what stands in padded rows is nobody's concern
    exact = maker.model(**inputs)[0][tokens].double().flatten()
    for variant in (BEST, FLOAT32, *others):
        with attempt(variant.name, untimed):
            call = partial(maker.make(variant, **({"path": "auto"} if variant.options else {})), **inputs)
            cosine = float(torch.nn.functional.cosine_similarity(call()[0][tokens].double().flatten(), exact, dim=0))
            if not cosine >= MIN_COSINE:
                raise RuntimeError(f"wrong: cosine {cosine:.3f} with the output of the model as it is")
            calls[variant.name] = call
    alone = torch.get_num_threads() == 1
    samples = take_turns(calls, seconds, least=_ROUNDS, clock=on_the_cpu if alone else on_the_wall)
    first, rows = next(iter(samples.values())), []
    for name, values in samples.items():
        ratio = statistics.median(map(truediv, values, first))  # a round's load meets both
        rows.append([name, *spread(values), ratio])
    numbers = ("CPU ms" if alone else "ms", "lower quartile", "upper quartile", RATIO)
    sequences, length = inputs["input_ids"].shape
    title = f"{TIMES} in {maker.dtype}: {sequences} x {length} tokens, {len(first)} rounds in turns"
    note = "Ratios: the median over the rounds. All but the linear layers is the same in each; bitsandbytes computes "
    note += "in float16." + told(untimed.items())
    return Table(title, {"linear layers": "", **dict.fromkeys(numbers, ".2f")}, rows, note)


# The heads of the first table, and the formats below them.
_FORMATS = {
    "KL": ".5f", "KL ±": ".5f", "same argmax, %": ".2f", "argmax ±": ".2f", "perplexity": ".4f", "loss": "+.6f",
    "loss ±": ".6f", "largest": ".5f", "neighbors kept": "d", "top-1": ".4f", "16 bit, %": ".2f", "MiB": ".2f",
}  # fmt: skip
_OF_TOKENS = (
    "KL: of the variant's next-token probabilities from the model's, nats per token. Loss: of the log-likelihood, "
    "nats per token, positive is worse. ±: standard errors over windows. Top-1: the mean of the largest probability. "
    "16 bit: of the inputs of octavo's layers, in the first window. MiB: linear layers, and an int8 head."
)
_OF_PASSAGES = (
    "Loss: 1 - cosine with the model's embedding, the mean over passages; ±: its standard error. Neighbors: of how "
    "many passages the nearest other one is the same. Top-1: mean of the largest softmax probability of attention. "
    "16 bit: of the inputs of octavo's layers, in the first passage. MiB: linear layers, and an int8 head. SmoothQuant "
    "divides in front of layers where a residual takes their input, too."
)


def _table(
    measured: Mapping[Variant, tuple[Scores, Sequence[Cell]]], windows: int, left_out: str, *, causal: bool
) -> Table:
    """A row for each variant."""
    rows, (reference, _) = [], measured[FLOAT32]
    for variant, (found, held) in measured.items():
        cells: dict[str, Cell] = {}
        if causal:
            cells |= {"KL": found.mean(DIVERGENCE), "KL ±": found.error(DIVERGENCE)}
            cells |= {"same argmax, %": 100 * found.mean(AGREED), "argmax ±": 100 * found.error(AGREED)}
            cells["perplexity"] = perplexity(found.mean(LOSS))
        cells |= zip(("loss", "loss ±"), found.paired(reference), strict=True)
        if not causal:
            cells |= {"largest": max(found.sums[LOSS]), "neighbors kept": neighbors_kept(found, reference)}
        cells |= {"top-1": found.mean(TOP), **dict(zip(("16 bit, %", "MiB"), held, strict=True))}
        rows.append([variant.name, variant.key, *cells.values()])
    columns = {"scheme": "", "name for --schemes": "", **{name: _FORMATS[name] for name in cells}}
    title = f"{sum(reference.counts)} tokens in {windows} windows" if causal else f"embeddings of {windows} passages"
    return Table(f"{AGAINST}: {title}", columns, rows, (_OF_TOKENS if causal else _OF_PASSAGES) + left_out)


def figures(report: Report) -> Figures:
    """What draws each picture, by the name of its file."""
    table = report.table(AGAINST)
    labels = {"loss": "1 - cosine of the embedding"}
    if "KL" in table.columns:
        labels = {"KL": "KL divergence from float32, nats per token", "loss": "log-likelihood lost, nats per token"}
    found: dict[str, Callable[[], Figure]] = {}
    for name, label in labels.items():
        names, values, errors = map(table.column, ("scheme", name, f"{name} ±"))
        found[f"{name.lower()}.png"] = partial(draw_losses, names, values, errors, label, table.title)
    if any(each.title.startswith(TIMES) for each in report.tables):
        found["peers.png"] = partial(peers, report, next(iter(labels)), next(iter(labels.values())))
    return found


def peers(report: Report, measure: str, label: str) -> Figure:
    """Time, memory and loss of the same model with each implementation's linear layers: less is better in all."""
    times, table = report.table(TIMES), report.table(AGAINST)
    ratios = dict(zip(times.column("linear layers"), times.column(RATIO), strict=True))
    held, lost = (dict(zip(table.column("scheme"), table.column(name), strict=True)) for name in ("MiB", measure))
    own = {each.name for each in variants.ALL if each.options is not None}
    both = [name for name in ratios if name in held and name != variants.VECTOR_WISE.name]
    names = sorted(both, key=lambda name: name not in own)
    relative = {name: ratios[name] / ratios[FLOAT32.name] for name in names}
    panels = {"time, torch float32 is 1": relative, "memory of the linear layers, MiB": held, label: lost}
    shown = {LLM_INT8.name: "octavo LLM.int8()", FLOAT32.name: "torch float32"}
    shown |= {name: f"octavo {name.removeprefix('absmax ')}" for name in own if name not in shown}
    figure: Figure = plt.figure(figsize=(12, 1.3 + 0.45 * len(names)))
    for axis, (head, values) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for place, name in enumerate(names):
            axis.barh(place, values[name], color=BLUE if name in own else GRAY)
            axis.annotate(f" {values[name]:.3g}", (values[name], place), va="center")
        axis.set_yticks(range(len(names)), [shown.get(name, name) for name in names])
        axis.set_title(head, fontsize=11)
        axis.margins(x=0.15)
        quiet(axis, "x")
    figure.axes[0].invert_yaxis()
    about = "{model} by its linear layers: less is better (threads: {threads}, {cpu})"
    figure.suptitle(about.format(**report.facts))
    figure.tight_layout()
    return figure
