"""Time the int8 linear layer against its peers, in one run and one process, on the CPU.

    .venv/bin/pip install ".[peers]"               # optional: without them their columns say why they are empty
    .venv/bin/python bench/linear.py --output bench/results/linear

For each shape the contenders compute Y = X W^T from the same X and W: octavo with its defaults; torch's linear in
bfloat16 and float32; `torch._int_mm` with a quantization of X and a scaling around it in torch operations;
bitsandbytes' `Linear8bitLt` with the paper's threshold and with 0 (no decomposition); torchao's int8 weights with
dynamic activations, eager (`--compile-torchao` adds it compiled). X and Y are bfloat16, but float32 for torch float32
and float16 for bitsandbytes, which computes in it and would convert anything else.

Each result is compared with the float64 product before anything is timed; one that is further off than its arithmetic
explains is left out, and says so, as does one that cannot run. Only octavo and bitsandbytes with its threshold keep
outlier columns in 16 bits. Then the contenders take turns call by call, so that a change of the machine's speed meets
all of them alike. Reported: median and quartiles of the time of a call, and the ratio of the medians to octavo's.

As the contenders take turns, each finds in the caches what the weights of the others have left of its own: of all but
small weights nothing in the level-2 cache, perhaps all in a large level-3 cache. `--cold` also reads a buffer before
every call, which empties the level-2 cache for small weights too, or, with a size beyond it, the level-3 cache, as
the other layers of a large model do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from octavo_bench.measuring.options import wait_passively

wait_passively()

import matplotlib as mpl
import torch
from contenders import OCTAVO, contenders
from measure import Evict, Others, machine, set_threads, write
from octavo_bench.measuring.contest import Case, measure, ratio
from tqdm import tqdm

WIDTHS = (768, 1024, 1536, 2048, 2560, 4096, 5120)  # of the GPT-3 family
ROWS = (1, 4, 16, 64, 512)
OUTLIERS = (0, 6)
COLD = 64  # MiB


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON, text and a plot. Returns the exit status."""
    args = arguments(words)
    set_threads(args.threads)
    evict = Evict(args.cold, args.threads) if args.cold else None
    chosen = contenders(compile_torchao=args.compile_torchao)
    cases = [Case(*shape, outliers, args.threads) for shape in shapes(args) for outliers in args.outliers]
    facts = machine(args.threads) | {"cold_mebibytes": args.cold, "seconds": args.seconds}
    others = Others()
    with torch.no_grad(), tqdm(total=len(cases), unit="case", file=sys.stderr, disable=None) as bar:
        for k, n in dict.fromkeys((case.k, case.n) for case in cases):
            bar.set_description(f"k={k} n={n}")
            of_pair = [case for case in cases if (case.k, case.n) == (k, n)]
            measure(of_pair, chosen, args.seconds, before=evict, done=bar.update)
    facts["cores_taken_by_others"] = others.cores()
    text = table(cases, list(chosen))
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["bench/linear.py", *(sys.argv[1:] if words is None else words)])
    report = {"command": command, "machine": facts, "cases": [asdict(case) for case in cases]}
    write(args.output / "linear.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    write(args.output / "linear.txt", lambda path: path.write_text(text + "\n"))
    write(args.output / "linear.png", partial(plot, cases, list(chosen), facts))
    return 0


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="k x n is w x w, w x 4w and 4w x w")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens m")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="K,N,M", help="these instead of --widths and --rows")
    parser.add_argument("--outliers", type=int, nargs="+", default=OUTLIERS, help="outlier columns of X")
    parser.add_argument("--threads", type=int, default=1, help="run it with 1 and with 2 to see how it scales")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each case, all contenders together")
    parser.add_argument("--cold", type=int, nargs="?", const=COLD, metavar="MIB", help="read a buffer before each "
                        f"call, for each thread of this size (without one: {COLD} MiB)")  # fmt: skip
    parser.add_argument("--compile-torchao", action="store_true", help="also through torch.compile (needs a compiler)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), metavar="DIR")
    return parser.parse_args(words)


def shape(word: str) -> tuple[int, int, int]:
    """(k, n, m) of "k,n,m"."""
    numbers = [int(number) for number in word.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected K,N,M, three positive numbers, got {word!r}")
    k, n, m = numbers
    return k, n, m


def shapes(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """The (k, n, m) asked for."""
    if args.shapes:
        return list(args.shapes)
    pairs = [(k, n) for w in args.widths for k, n in ((w, w), (w, 4 * w), (4 * w, w))]
    return [(k, n, m) for k, n in dict.fromkeys(pairs) for m in args.rows]


def table(cases: list[Case], names: list[str]) -> str:
    """A line for each case: times in ms, and ratios to octavo; the lowest ratios; what was left out and why."""
    peers = [name for name in names if name != OCTAVO]
    head = f"{'k':>6}{'n':>7}{'m':>5}{'outliers':>9}  {OCTAVO + ', ms':>15}" + "".join(f"{p:>27}" for p in peers)
    lines = [head]
    for case in cases:
        line = f"{case.k:>6}{case.n:>7}{case.m:>5}{case.outliers:>9}  "
        line += f"{case.times[OCTAVO].median:>15.3f}" if OCTAVO in case.times else f"{'left out':>15}"
        for peer in peers:
            factor = ratio(case, peer)
            cell = "left out" if factor is None else f"{case.times[peer].median:.3f} ({factor:.2f}x)"
            line += f"{cell:>27}"
        lines.append(line)
    for peer in peers:
        found = [(factor, case) for case in cases if (factor := ratio(case, peer)) is not None]
        if found:
            factor, case = min(found, key=lambda item: item[0])
            where = f"k={case.k} n={case.n} m={case.m}, {case.outliers} outlier columns"
            lines.append(f"lowest ratio to {peer}: {factor:.2f}x ({where})")
    reasons = {f"{name}: {reason}" for case in cases for name, reason in case.left_out.items()}
    return "\n".join([*lines, *(f"left out: {reason}" for reason in sorted(reasons))])


def plot(cases: list[Case], names: list[str], facts: dict[str, Any], path: Path) -> None:
    """Ratios over the rows of X, a panel for each peer; above 1 octavo is faster."""
    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    outliers = max(case.outliers for case in cases)
    shown = [case for case in cases if case.outliers == outliers]
    peers = [name for name in names if name != OCTAVO and any(ratio(case, name) is not None for case in shown)]
    wide = min(3, max(1, len(peers)))
    tall = max(1, -(-len(peers) // wide))
    figure, grid = pyplot.subplots(
        tall, wide, figsize=(4.6 * wide, 4.2 * tall), sharex=True, sharey=True, squeeze=False
    )
    axes = list(grid.flat)
    pairs = list(dict.fromkeys((case.k, case.n) for case in shown))
    colors = mpl.colormaps["viridis"].resampled(len(pairs) + 1)
    for axis, peer in zip(axes, peers, strict=False):
        for index, (k, n) in enumerate(pairs):
            of_pair = sorted((c for c in shown if (c.k, c.n) == (k, n)), key=lambda c: c.m)
            points = [(c.m, ratio(c, peer)) for c in of_pair if ratio(c, peer) is not None]
            rows, ratios = [m for m, _ in points], [factor for _, factor in points]
            axis.plot(rows, ratios, "o-", color=colors(index), label=f"{k} x {n}")
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="rows of X (tokens)", title=f"against {peer}")
        axis.set_xticks(sorted({case.m for case in shown}))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(color="0.9", which="both")
    for axis in axes[len(peers) :]:
        axis.axis("off")
    for row in grid:
        row[0].set_ylabel("times as fast (above 1: octavo is faster)")
    if peers:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, title="k x n", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    caches = f", {facts['cold_mebibytes']} MiB read before each call" if facts["cold_mebibytes"] else ""
    figure.suptitle(f"Linear layer, {outliers} outlier columns: {facts['cpu']}, {facts['instruction_set']}, "
                    f"{facts['threads']} thread(s){caches}")  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
