"""`octavo bench`: int8 linear layers against 16 and 32 bit and other int8 layers, in one run and one process.

For each shape and number of outlier columns the contenders compute Y = X W^T from the same X and W. Results are
compared with float64 before anything is timed; one that is further off than its arithmetic explains is left out, and
says so. Only octavo and bitsandbytes with its threshold keep outlier columns in 16 bits.

As the contenders take turns, each finds in the caches what the weights of the others have left of its own. `--cold`
also reads a buffer before every call, which empties the level-2 cache, or, with a size beyond it, the level-3 cache, as
the other layers of a large model do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import octavo
import torch

from .. import commands, machine, turns
from ..models.language import use_linear_
from ..models.modules import linear_layers
from ..progress import Progress
from ..tables import Cell, Report, Table
from . import contenders as known
from . import overhead
from .contest import OCTAVO, Case, Contender, measure


def command(args: argparse.Namespace, facts: machine.Facts, progress: Progress) -> tuple[Report, None]:
    """`octavo bench`. Raises RuntimeError for a device that is not there."""
    if args.overhead:
        return overhead.run(args.seconds, facts, progress), None
    _check_device(args.device)
    if args.model is not None:
        shapes = model_shapes(args.model)
    else:
        widths = args.hidden or commands.HIDDEN
        shapes = dict.fromkeys(args.shapes or [(k, n) for w in widths for k, n in ((w, w), (w, 4 * w), (4 * w, w))], 1)
    chosen = contenders(args)
    on_gpu = args.device == "cuda"
    evict = turns.Evict(args.cold * torch.get_num_threads() << 20, args.device) if args.cold else lambda name: None
    cases = [
        Case(k, n, m, outliers)
        for k, n in shapes
        for m in dict.fromkeys(args.rows)
        for outliers in dict.fromkeys(min(each, k) for each in args.outliers)
    ]
    progress.begin(len(cases))
    with torch.no_grad():
        for k, n in shapes:
            own = [case for case in cases if (case.k, case.n) == (k, n)]
            with progress.step(f"k={k} n={n}", len(own)):
                clock = turns.on_the_gpu if on_gpu else turns.on_the_wall
                measure(own, chosen, args.seconds, before=evict, device=args.device, clock=clock)
    tables = [cases_table(cases, list(chosen), shapes), *([totals(cases, list(chosen), shapes)] if args.model else [])]
    gpu = {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    about = facts.now(device=args.device, cold_mebibytes=args.cold, seconds_of_a_case=args.seconds, **gpu)
    broken = [f"k={c.k} n={c.n} m={c.m}: {OCTAVO}: {c.left_out[OCTAVO]}" for c in cases if OCTAVO in c.left_out]
    title = f"octavo bench: {args.model or 'the linear layer against its peers'}"
    return Report(title, about, tables, failure=broken[0] if broken else ""), None


def contenders(args: argparse.Namespace) -> dict[str, Contender]:
    """What is measured, by name, octavo first."""
    found = {**known.of_octavo(args.dtypes[0]), **known.of_torch(args.dtypes)}
    if args.peers or machine.installed("bitsandbytes"):
        found |= known.of_bitsandbytes(known.THRESHOLD, *([0.0] if args.peers else []))
    return {**found, **({**known.of_torchao(compiled=args.compile), **known.of_int_mm()} if args.peers else {})}


def cases_table(cases: list[Case], names: list[str], shapes: Mapping[tuple[int, int], int]) -> Table:
    """A row for each case."""
    others = names[1:]
    rows = []
    for case in cases:
        own = case.times.get(OCTAVO)
        spread: list[Cell] = [own.median, own.lower, own.upper] if own else [None] * 3
        ratios = [case.ratio(name) for name in others]
        rows.append([f"{case.k} x {case.n}", shapes[case.k, case.n], case.m, case.outliers, *spread, *ratios])
    reasons = {f"{name}: {reason}" for case in cases for name, reason in case.left_out.items()}
    lowest = [min((r for case in cases if (r := case.ratio(name)) is not None), default=None) for name in others]
    head = {"k x n": "", "layers": "d", "m": "d", "outlier columns": "d", f"{OCTAVO}, ms": ".3f"}
    quartiles = {"lower quartile": ".3f", "upper quartile": ".3f"}
    return Table(
        "Milliseconds of a call, and how many times as long the others take",
        {**head, **quartiles, **dict.fromkeys(others, ".2f")},
        [*rows, ["lowest ratio", *[None] * 6, *lowest]],
        "Medians of calls that were measured in turns; above 1 octavo is faster. Results were checked against float64 "
        "first." + "".join(f" Left out: {reason}." for reason in sorted(reasons)),
    )


def totals(cases: list[Case], names: list[str], shapes: Mapping[tuple[int, int], int]) -> Table:
    """For a model: by number of tokens, the medians of all its linear layers together."""
    rows = []
    for m, outliers in dict.fromkeys((case.m, case.outliers) for case in cases):
        own = [case for case in cases if (case.m, case.outliers) == (m, outliers)]
        sums = [
            sum(shapes[case.k, case.n] * case.times[name].median for case in own)
            if all(name in case.times for case in own)
            else None
            for name in names
        ]
        rows.append([f"{m}", outliers, sum(shapes.values()), *sums])
    columns = {"m": "", "outlier columns": "d", "layers": "d", **dict.fromkeys(names, ".2f")}
    return Table("The medians of all linear layers of the model together, milliseconds", columns, rows)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device cuda: torch {torch.__version__} sees no GPU")
    if device not in octavo.info()["backends"]:
        raise RuntimeError(f"--device {device}: octavo has no such backend here, only {octavo.info()['backends']}")


def model_shapes(path: Path) -> dict[tuple[int, int], int]:
    """(k, n) of every linear layer but the output head -> how many have it; the most frequent first.

    The model is made without its weights. `path`: a config.json, or the folder of a model, int8 or not. Raises OSError
    or ValueError for another one, and ValueError for a model without linear layers.
    """
    import transformers

    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path}: expected a config.json or a folder with one, got none")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)  # no question, either
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # int8 layers have the shapes of the others
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.device("meta"):
        model = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
    use_linear_(model)
    found = Counter((layer.in_features, layer.out_features) for _, layer in linear_layers(model))
    if not found:
        raise ValueError(f"{path}: expected a model with linear layers, got {type(model).__name__} without")
    return dict(found.most_common())
