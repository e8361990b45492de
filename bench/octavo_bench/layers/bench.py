"""`octavo bench`: int8 linear layers against 16 and 32 bit and other int8 layers, in one run and one process.

For each shape and number of outlier columns the contenders compute Y = X W^T from the same X and W. Results are
compared with float64 before anything is timed; one that is further off than its arithmetic explains is left out, and
says so. Only octavo and bitsandbytes with its threshold keep outlier columns in 16 bits.

On a CPU and one thread, times are processor time, which other programs lengthen least.

As the contenders take turns, each finds in the caches what the weights of the others have left of its own. `--cold`
also reads a buffer before every call, which empties the level-2 cache, or, with a size beyond it, the level-3 cache, as
the other layers of a large model do. On a GPU its level-2 cache is always emptied. `--graph` times replays of CUDA
graphs, in which the host launches nothing.

Without shapes, a GPU measures the GPT-3 family of the paper's Table 5 and Llama's layers, octavo also by each of its
paths; and first three cases in which octavo does something else: one scale for all of X, rows that are not aligned, and
zeropoint. Beside them, the shares of the memory bandwidth, by a copy of a gigabyte, and of the int8 peak, by a product
of 8192 in each direction.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import octavo
import torch
from octavo.checkpoint.folder import read_json
from octavo.checkpoint.meta_model import meta_model

from .. import commands, machine, turns
from ..models.language import use_linear_
from ..models.modules import linear_layers
from ..models.variants import reason, told
from ..progress import Progress
from ..tables import Cell, Report, Table, write_text
from ..turns import Before, Call, evicting, take_turns
from . import contenders as known
from . import overhead
from .contest import LATE, OCTAVO, Case, Contender, measure

GPT3_WIDTHS = (768, 1024, 2048, 2560, 4096, 5120, 12288)  # Table 5: k = w, n = 4 w and back
LLAMA = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192))
ON_CPU = {"rows": (1, 16, 512), "outliers": (6,), "dtypes": ("bfloat16", "float32")}
ON_GPU = {"rows": (1, 8, 16, 32, 64, 128, 256, 1024, 4096), "outliers": (0, 6, 64), "dtypes": ("float16",)}
# Other options of octavo, by what is written behind the shape.
VARIANTS: tuple[tuple[str, dict[str, Any], Case], ...] = (
    ("tensor", {"granularity": "tensor"}, Case(4096, 16384, 256, 6)),
    ("unaligned", {}, Case(4098, 16384, 256, 6)),
    ("zeropoint", {"scheme": "zeropoint"}, Case(4096, 16384, 256, 6)),
)
CALLS = 15  # of each contender in each case on a GPU, at most


@dataclass
class Group:
    """Cases that share a weight, and who computes them."""

    name: str
    contenders: dict[str, Contender]
    cases: list[Case]
    layers: int = 1  # of a model that have this shape


def command(args: argparse.Namespace, facts: machine.Facts, progress: Progress) -> tuple[Report, None]:
    """`octavo bench`. Raises RuntimeError for a device that is not there, ValueError for graphs of another one."""
    if args.overhead:
        return overhead.run(args.seconds, facts, progress), None
    on_gpu, backends = args.device == "cuda", octavo.info()["backends"]
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"--device cuda: torch {torch.__version__} sees no GPU")
    if args.device not in backends:
        raise RuntimeError(f"--device {args.device}: octavo has no such backend here, only {backends}")
    if args.graph and not on_gpu:
        raise ValueError(f"--graph: expected --device cuda, got {args.device}")
    evict: Before = evicting(args.cold * torch.get_num_threads() << 20) if args.cold else lambda name: None
    peak = {}
    if on_gpu:
        evict = evicting(4 * torch.cuda.get_device_properties(0).L2_cache_size, "cuda")
        peak = {"bytes_per_second": bandwidth(evict), "int8_operations_per_second": int8_peak(evict)}
        facts.add(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda, octavo_info=octavo.info(), **peak)
    return run(args, plan(args), evict, peak, facts, progress), None


def plan(args: argparse.Namespace) -> list[Group]:
    """What is to be measured."""
    on_gpu = args.device == "cuda"
    rows, outliers, dtypes = (
        dict.fromkeys(getattr(args, name) or usual) for name, usual in (ON_GPU if on_gpu else ON_CPU).items()
    )
    paths = list(known.PATHS) if on_gpu else ["auto"]

    def contenders(**options: Any) -> dict[str, Contender]:
        if args.recipes:
            return known.of_recipes(next(iter(dtypes))) | known.of_torch(list(dtypes))
        found = known.of_octavo(next(iter(dtypes)), paths, **options) | known.of_torch(list(dtypes))
        if args.peers or machine.installed("bitsandbytes"):
            found |= known.of_bitsandbytes(known.THRESHOLD, *([0.0] if args.peers else []))
        return found | (known.of_torchao(compiled=args.compile) | known.of_int_mm() if args.peers else {})

    groups = []
    if args.model is not None:
        shapes = model_shapes(args.model)
    elif args.shapes or args.hidden or not on_gpu:
        widths = args.hidden or commands.HIDDEN
        shapes = dict.fromkeys(args.shapes or [(k, n) for w in widths for k, n in ((w, w), (w, 4 * w), (4 * w, w))], 1)
    else:
        shapes = dict.fromkeys([*((k, n) for w in GPT3_WIDTHS for k, n in ((w, 4 * w), (4 * w, w))), *LLAMA], 1)
        groups = [Group(f"{c.k} x {c.n} {name}", contenders(**options), [c]) for name, options, c in VARIANTS]
    for (k, n), layers in shapes.items():
        cases = [Case(k, n, m, o) for m in rows for o in dict.fromkeys(min(each, k) for each in outliers)]
        groups.append(Group(f"{k} x {n}", contenders(), cases, layers))
    return groups


def run(
    args: argparse.Namespace, groups: Sequence[Group], evict: Before, peak: Mapping[str, float],
    facts: machine.Facts, progress: Progress,
) -> Report:  # fmt: skip
    """Measure. A file that is asked for is written after every group anew."""
    on_gpu = args.device == "cuda"
    clock = turns.on_the_cpu if torch.get_num_threads() == 1 else turns.on_the_wall
    how: dict[str, Any] = {"clock": turns.on_the_gpu, "most": CALLS} if on_gpu else {"clock": clock}
    time_calls = partial(take_turns, seconds=args.seconds, before=evict, **how)
    more: dict[str, Any] = {"device": args.device, "deadline": time.perf_counter() + (args.limit or math.inf)}
    if args.graph:
        more["prepare"] = turns.captured
    progress.begin(sum(len(group.cases) for group in groups))
    for group in groups:
        with progress.step(group.name, len(group.cases)):
            try:
                with torch.inference_mode():
                    measure(group.cases, group.contenders, time_calls, **more)
            except Exception as error:  # want of memory above all, or of the device, costs these cases alone
                for case in group.cases:
                    if not case.times:
                        case.left_out.setdefault("all", reason(error))
            if on_gpu:
                torch.cuda.empty_cache()
                octavo.release_cuda_memory()
        tables = [cases_table(groups, peak), *([totals(groups)] if args.model else [])]
        broken = [
            f"k={case.k} n={case.n} m={case.m}: {name}: {why}"
            for case in (case for each in groups for case in each.cases)
            for name, why in case.left_out.items()
            if name in ("all", *known.PATHS.values()) and why != LATE
        ]
        title = f"octavo bench: {args.model or 'the linear layer against its peers'}"
        report = Report(title, facts.now(clock=how["clock"].__name__), tables, failure=next(iter(broken), ""))
        if args.json and args.json != "-":
            write_text(Path(args.json), report.json())
    return report


def cases_table(groups: Sequence[Group], peak: Mapping[str, float]) -> Table:
    """A row for each case. `peak`: what the device can do at best."""
    names = list(dict.fromkeys(name for group in groups for name in group.contenders))[1:]
    every = [case for group in groups for case in group.cases]
    rows: list[list[Cell]] = []
    for group, case in [(each, case) for each in groups for case in each.cases]:
        times: list[Cell] = [None] * (3 + len(peak))
        if own := case.times.get(OCTAVO):
            work = case.n * case.k + 2 * case.m * (case.k + case.n), 2 * case.m * case.n * case.k  # bytes, operations
            shares = [1e5 * done / own.median / most for done, most in zip(work, peak.values(), strict=False)]
            times = [*own, *shares]
        rows.append([group.name, group.layers, case.m, case.outliers, *times[:3], *map(case.ratio, names), *times[3:]])
    lowest = [min((r for case in every if (r := case.ratio(name)) is not None), default=None) for name in names]
    rows.append(["lowest ratio", *[None] * 6, *lowest, *[None] * len(peak)])
    columns = {"k x n": "", **dict.fromkeys(("layers", "m", "outlier columns"), "d")}
    columns |= dict.fromkeys((f"{OCTAVO}, ms", "lower quartile", "upper quartile"), ".4f" if peak else ".3f")
    columns |= dict.fromkeys(names, ".2f") | dict.fromkeys(("bandwidth, %", "int8 peak, %")[: len(peak)], ".0f")
    note = "Medians of calls that were measured in turns; above 1 octavo is faster. Results were checked against "
    note += "float64 first." + told(sorted({each for case in every for each in case.left_out.items()}))
    return Table("Milliseconds of a call, and how many times as long the others take", columns, rows, note)


def totals(groups: Sequence[Group]) -> Table:
    """For a model: by number of tokens, the medians of all its linear layers together."""
    names = list(groups[0].contenders)
    rows = []
    for own in zip(*(group.cases for group in groups), strict=True):  # the same m and outliers of each shape
        sums = [
            sum(group.layers * case.times[name].median for group, case in zip(groups, own, strict=True))
            if all(name in case.times for case in own)
            else None
            for name in names
        ]
        rows.append([f"{own[0].m}", own[0].outliers, sum(group.layers for group in groups), *sums])
    columns = {"m": "", "outlier columns": "d", "layers": "d", **dict.fromkeys(names, ".2f")}
    return Table("The medians of all linear layers of the model together, milliseconds", columns, rows)


def best(call: Call, evict: Before, calls: int = 12) -> float:
    """Seconds of the fastest of some calls on a GPU."""
    return 1e-3 * min(take_turns({"": call}, 0, evict, calls, clock=turns.on_the_gpu)[""])


def bandwidth(evict: Before) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / best(lambda: target.copy_(source), evict)


def int8_peak(evict: Before) -> float:
    """Operations per second of a large int8 product, of torch's or octavo's whichever is faster."""
    size = 8192
    a, b = torch.randint(-127, 128, (2, size, size), dtype=torch.int8, device="cuda")
    seconds = min(best(lambda: torch._int_mm(a, b.t()), evict), best(lambda: octavo.int8_matmul(a, b), evict))
    return 2 * size**3 / seconds


def model_shapes(path: Path) -> dict[tuple[int, int], int]:
    """(k, n) of every linear layer but the output head -> how many have it; the most frequent first.

    The model is made without its weights. `path`: a config.json, or the folder of a model, int8 or not. Raises OSError
    or ValueError for another one, and ValueError for a model without linear layers.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: expected a config.json or a folder with one, got none")
    model = meta_model(read_json(file), "float32")
    use_linear_(model)
    found = Counter((layer.in_features, layer.out_features) for _, layer in linear_layers(model))
    if not found:
        raise ValueError(f"{path}: expected a model with linear layers, got {type(model).__name__} without")
    return dict(found.most_common())
