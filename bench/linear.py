"""Time the int8 linear layer against its peers, in one run, on the CPU.

    .venv/bin/pip install bitsandbytes     # optional: without it that column says why it is empty
    .venv/bin/python bench/linear.py --output bench/results/linear

For each shape the contenders compute Y = X W^T from the same X and W. Each result is compared with the float64 product
before anything is timed; one that is further off than its arithmetic explains is left out, and says so. Then the
contenders take turns, so that a change of the machine's speed meets all of them alike. Reported: median and quartiles
of the time of a call, and the ratio of the medians to octavo's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Threads that spin while they wait take time from those that work. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import matplotlib as mpl
import octavo
import torch
from torch.nn import functional
from tqdm import tqdm

WIDTHS = (768, 1024, 1536, 2048, 2560, 4096, 5120)  # of the GPT-3 family; each with its 4-fold feed-forward
ROWS = (1, 4, 16, 64, 512)
OUTLIERS = (0, 6)
OCTAVO = "octavo int8"


@dataclass
class Timing:
    """Milliseconds of a call: median and quartiles over `calls` calls."""

    median: float
    lower: float
    upper: float
    calls: int


@dataclass
class Case:
    """A shape and what each contender needs for it; `error` is |Y - exact| / |exact| in the Frobenius norm."""

    k: int
    n: int
    m: int
    outliers: int
    times: dict[str, Timing] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Contender:
    """A way to compute the layer: `prepare(weight)` takes W in float32 [n, k] and returns the call."""

    prepare: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
    dtype: torch.dtype
    largest_error: float  # that its arithmetic explains


def octavo_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """LLM.int8() with the options that `octavo.linear` has by default."""
    quantized = octavo.quantize_weight(weight.bfloat16())
    return lambda x: octavo.linear(x, quantized)


def torch_linear(dtype: torch.dtype) -> Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """`torch.nn.functional.linear` in a floating-point type."""

    def prepare(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        converted = weight.to(dtype)
        return lambda x: functional.linear(x, converted)

    return prepare


def bitsandbytes_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The official implementation, `Linear8bitLt`, with the paper's threshold, in the float16 it computes in."""
    import bitsandbytes

    n, k = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


# Rounding to 8 bits is off by about 1 % of the norm for normal values, bfloat16 by 0.3 %.
CONTENDERS = {
    OCTAVO: Contender(octavo_linear, torch.bfloat16, 0.03),
    "torch bfloat16": Contender(torch_linear(torch.bfloat16), torch.bfloat16, 0.01),
    "torch float32": Contender(torch_linear(torch.float32), torch.float32, 0.005),
    "bitsandbytes": Contender(bitsandbytes_linear, torch.float16, 0.03),
}


def main() -> int:
    """Measure, print the table, write JSON and a plot. Returns the exit status."""
    args = arguments()
    torch.set_num_threads(args.threads)
    octavo.set_num_threads(args.threads)
    shapes = [(k, n) for width in args.widths for k, n in ((width, width), (width, 4 * width))]
    cases = [Case(k, n, m, o) for k, n in shapes for m in args.rows for o in OUTLIERS]
    with torch.no_grad(), tqdm(cases, unit="case", file=sys.stderr) as bar:
        for case in bar:
            bar.set_description(f"k={case.k} n={case.n} m={case.m} outliers={case.outliers}")
            measure(case, args.seconds)
    print(table(cases))
    args.output.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(sys.argv),
        "machine": machine(args.threads),
        "cases": [asdict(case) for case in cases],
    }
    write(args.output / "linear.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    write(args.output / "linear.txt", lambda path: path.write_text(table(cases) + "\n"))
    write(args.output / "linear.png", lambda path: plot(cases, report["machine"], path))
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="input features k; n is k and 4k")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each case, all contenders together")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), metavar="DIR")
    return parser.parse_args()


def measure(case: Case, seconds: float) -> None:
    """Check, then time, every contender."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(case.n, case.k, generator=generator) / case.k**0.5).bfloat16().float()
    x = torch.randn(case.m, case.k, generator=generator).clamp_(-5, 5)
    columns = torch.randperm(case.k, generator=generator)[: case.outliers]
    x[:, columns] = 20 + torch.randn(case.m, case.outliers, generator=generator)
    x = x.bfloat16().float()
    exact = x.double() @ weight.double().T

    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for name, contender in CONTENDERS.items():
        given = x.to(contender.dtype)
        try:
            layer = contender.prepare(weight)
            error = float((layer(given).double() - exact).norm() / exact.norm())
        except (ImportError, RuntimeError, NotImplementedError, AttributeError) as problem:
            case.left_out[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            continue
        case.error[name] = error
        if not error <= contender.largest_error:
            case.left_out[name] = f"wrong: error {error:.3g}, at most {contender.largest_error:g} expected"
            continue
        calls[name] = lambda layer=layer, given=given: layer(given)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[OCTAVO]) < 3:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - begin))
    for name, values in samples.items():
        lower, median, upper = statistics.quantiles(values, n=4)
        case.times[name] = Timing(median, lower, upper, len(values))


def ratio(case: Case, name: str) -> float | None:
    """How many times as long as octavo a contender takes."""
    if name not in case.times or OCTAVO not in case.times:
        return None
    return case.times[name].median / case.times[OCTAVO].median


def table(cases: list[Case]) -> str:
    """A line for each case: times in ms, and ratios to octavo."""
    peers = [name for name in CONTENDERS if name != OCTAVO]
    head = f"{'k':>6}{'n':>7}{'m':>5}{'outliers':>9}  {OCTAVO + ', ms':>15}" + "".join(f"{p:>24}" for p in peers)
    lines = [head]
    for case in cases:
        line = f"{case.k:>6}{case.n:>7}{case.m:>5}{case.outliers:>9}  "
        line += f"{case.times[OCTAVO].median:>15.3f}" if OCTAVO in case.times else f"{'left out':>15}"
        for peer in peers:
            factor = ratio(case, peer)
            cell = "left out" if factor is None else f"{case.times[peer].median:.3f} ({factor:.2f}x)"
            line += f"{cell:>24}"
        lines.append(line)
    reasons = {f"{name}: {reason}" for case in cases for name, reason in case.left_out.items()}
    return "\n".join([*lines, *(f"left out: {reason}" for reason in sorted(reasons))])


def plot(cases: list[Case], machine_facts: dict[str, Any], path: Path) -> None:
    """Ratios over the rows of X, a panel for each peer; above 1 octavo is faster."""
    mpl.use("Agg")
    from matplotlib import pyplot

    peers = [name for name in CONTENDERS if any(ratio(case, name) for case in cases) and name != OCTAVO]
    figure, axes = pyplot.subplots(1, len(peers), figsize=(4.6 * len(peers), 4.2), sharey=True, squeeze=False)
    shapes = list(dict.fromkeys((case.k, case.n) for case in cases))
    colors = mpl.colormaps["viridis"].resampled(len(shapes) + 1)
    for axis, peer in zip(axes[0], peers, strict=True):
        for index, (k, n) in enumerate(shapes):
            chosen = [c for c in cases if (c.k, c.n, c.outliers) == (k, n, max(OUTLIERS)) and ratio(c, peer)]
            axis.plot(
                [c.m for c in chosen], [ratio(c, peer) for c in chosen], "o-", color=colors(index), label=f"{k} x {n}"
            )
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="rows of X (tokens)", title=f"against {peer}")
        axis.grid(color="0.9", which="both")
    axes[0][0].set_ylabel("times as fast (above 1: octavo is faster)")
    axes[0][-1].legend(title="k x n", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"Linear layer, {max(OUTLIERS)} outlier columns: {machine_facts['cpu']}, "
                    f"{machine_facts['threads']} thread(s)")  # fmt: skip
    figure.savefig(path, dpi=130, bbox_inches="tight", format="png")
    pyplot.close(figure)


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    packages = {}
    for name in ("octavo", "torch", "bitsandbytes"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg(),
        "instruction_set": octavo.info()["cpu"]["instruction_set"],
        "python": platform.python_version(),
        "packages": packages,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Write beside and rename, so that no half-written file is left under the name."""
    beside = path.with_name(path.name + ".part")
    fill(beside)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
