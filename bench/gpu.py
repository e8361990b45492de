"""Time the int8 linear layer against its peers on a GPU, in one run and one process.

    python bench/gpu.py --output bench/results --seconds 240
    python bench/gpu.py --plan            what would be measured, without a GPU

For each shape (the GPT-3 family of the paper's Table 5, Llama's layers) and number of outlier columns the contenders
compute Y = X W^T from the same X and W in float16: octavo with its defaults; its int8 path and its weight-only path
alone; its int8 product alone (the codes of X given); torch's linear in float16; bitsandbytes' `Linear8bitLt` with the
paper's threshold where it is installed.

Each result is compared with the float64 product of some of its rows before anything is timed (the int8 product must be
equal to that of the codes); one that is further off than its arithmetic explains is left out, says so, and, where it is
octavo's, the status is 1. Then the contenders take turns, so that a change of the clocks meets all alike, each call on
a cold level-2 cache: a buffer of more than its size is written before. Times are those of CUDA events around one call.
First come three cases in which octavo does something else: one scale for all of X, rows that are not aligned, and
zeropoint.

Written to OUTPUT as <gpu>-<date>.json and .txt, after every shape anew: median and quartiles, ratios of the medians to
torch float16, the share of the memory bandwidth that reading W once and X, and writing Y, is in that time, and of the
int8 peak; both ceilings are measured first, by a copy of a gigabyte and by an int8 product of 8192 in each direction.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import octavo
import torch
from measure import commit, write
from tqdm import tqdm

GPT3_WIDTHS = (768, 1024, 2048, 2560, 4096, 5120, 12288)  # Table 5: k = w, n = 4 w and back
LLAMA = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192))
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
OUTLIERS = (0, 6, 64)

OCTAVO = "octavo"
INT8 = "octavo int8 path"
WEIGHT_ONLY = "octavo weight-only"
PRODUCT = "octavo int8 product"
FLOAT16 = "torch float16"
BITSANDBYTES = "bitsandbytes"
WEIGHT_ONLY_ROWS = 256  # beyond, the weight-only path is no contender
LATE = "the time given was over"

Call = Callable[[], object]


@dataclass
class Case:
    """A shape, and for each contender: milliseconds (lower quartile, median, upper quartile), error, why left out."""

    k: int
    n: int
    m: int
    outliers: int
    scheme: Literal["absmax", "zeropoint"] = "absmax"
    granularity: Literal["tensor", "row", "vector"] = "vector"
    times: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[int, int, str, str]:
        """What cases must have in common to share a weight."""
        return self.k, self.n, self.scheme, self.granularity

    @property
    def variant(self) -> str:
        """How octavo's weight is not the usual one."""
        return ", ".join(word for word in (self.scheme, self.granularity) if word not in ("absmax", "vector"))


def variants() -> list[Case]:
    """The cases of another granularity, alignment and scheme."""
    n, m, outliers = 16384, 256, 6
    return [
        Case(4096, n, m, outliers, granularity="tensor"),
        Case(4098, n, m, outliers),
        Case(4096, n, m, outliers, scheme="zeropoint"),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON and text. Returns the exit status."""
    args = arguments(words)
    cases = plan(args)
    if args.plan:
        for case in cases:
            print(f"k={case.k} n={case.n} m={case.m} outliers={case.outliers} {case.variant}".rstrip())
        return 0
    if not torch.cuda.is_available():
        print("bench/gpu.py: no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    if "cuda" not in octavo.info()["backends"]:
        print(f"bench/gpu.py: {octavo.info()['cuda']['missing']}", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + args.seconds
    facts = machine()
    clock = Clock()
    ceilings = {"bytes_per_second": bandwidth(clock), "int8_operations_per_second": int8_peak(clock)}
    command = " ".join(["bench/gpu.py", *(sys.argv[1:] if words is None else words)])
    stem = name_of_results(facts["gpu"], time.strftime("%Y-%m-%d"))
    args.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        measured = [asdict(case) for case in cases]
        report = {"command": command, "machine": facts, "ceilings": ceilings, "cases": measured}
        write(args.output / f"{stem}.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
        write(args.output / f"{stem}.txt", lambda path: path.write_text(table(cases, ceilings) + "\n"))

    measure_all(cases, args.calls, clock, deadline, save)
    print(table(cases, ceilings))
    return status(cases)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=GPT3_WIDTHS, help="w: k x n is w x 4w and 4w x w")
    parser.add_argument("--no-llama", action="store_true", help="without Llama's shapes")
    parser.add_argument("--no-variants", action="store_true", help="without the three cases of other kinds")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens m")
    parser.add_argument("--outliers", type=int, nargs="+", default=OUTLIERS, help="outlier columns of X")
    parser.add_argument("--calls", type=int, default=15, help="of each contender in each case, at least 2")
    parser.add_argument("--seconds", type=float, default=240.0, help="what is not reached until then is left out")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), metavar="DIR")
    parser.add_argument("--plan", action="store_true", help="print the cases and measure nothing")
    args = parser.parse_args(words)
    for name in ("widths", "rows", "outliers"):
        least = 0 if name == "outliers" else 1
        if any(value < least for value in getattr(args, name)):
            parser.error(f"--{name}: expected numbers of at least {least}, got {getattr(args, name)}")
    if args.calls < 2:
        parser.error(f"--calls: expected at least 2, got {args.calls}")
    narrowest = min((k for k, _ in shapes(args)), default=None)
    if narrowest is None:
        parser.error("--widths: expected some, or Llama's shapes, got neither")
    if max(args.outliers) > narrowest:
        parser.error(f"--outliers: expected at most {narrowest}, the least k, got {max(args.outliers)}")
    return args


def plan(args: argparse.Namespace) -> list[Case]:
    """The cases asked for, those of a shape together."""
    regular = [Case(k, n, m, outliers) for k, n in shapes(args) for m in args.rows for outliers in args.outliers]
    return [*([] if args.no_variants else variants()), *regular]


def name_of_results(gpu: str, date: str) -> str:
    """The name of the files, without what they end in."""
    return f"{'-'.join(re.findall('[a-z0-9]+', gpu.lower()))}-{date}"


def status(cases: Sequence[Case]) -> int:
    """1 where a result of octavo's was wrong or missing for another reason than time, else 0."""
    late = {"all": LATE}
    own = (OCTAVO, INT8, WEIGHT_ONLY, PRODUCT, "all")
    return int(any(reason != late.get(name) for case in cases for name, reason in case.left_out.items() if name in own))


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The (k, n) asked for."""
    pairs = [pair for w in args.widths for pair in ((w, 4 * w), (4 * w, w))]
    return list(dict.fromkeys([*pairs, *(() if args.no_llama else LLAMA)]))


def machine() -> dict[str, Any]:
    """GPU, driver, clocks, versions, commit."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        smi = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        smi = f"nvidia-smi: {error}"
    return {
        "gpu": torch.cuda.get_device_name(),
        query: smi,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "octavo": octavo.info(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


class Clock:
    """Times calls on the GPU, each on a cold level-2 cache: before each, four times its size is written."""

    device = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def milliseconds(self, call: Call) -> float:
        """Of one call."""
        self.buffer.zero_()
        self.begin.record()
        call()
        self.end.record()
        self.end.synchronize()
        elapsed: float = self.begin.elapsed_time(self.end)
        return elapsed

    def best(self, call: Call, calls: int = 10) -> float:
        """The shortest of some calls, after two to warm up."""
        return min([self.milliseconds(call) for _ in range(calls + 2)][2:])


def bandwidth(clock: Clock) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * clock.best(lambda: target.copy_(source)))


def int8_peak(clock: Clock) -> float:
    """Operations per second of a large int8 product, of torch's or octavo's whichever is faster."""
    size = 8192
    a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    best = min(clock.best(lambda: torch._int_mm(a, b.t())), clock.best(lambda: octavo.int8_matmul(a, b)))
    return 2 * size**3 / (1e-3 * best)


def problem(k: int, m: int, outliers: int, like: torch.Tensor) -> torch.Tensor:
    """Random X [m, k], of the dtype and device of `like`; `outliers` columns lie around 20, all else below 5."""
    generator = torch.Generator(like.device).manual_seed(outliers)
    x = torch.randn(m, k, generator=generator, device=like.device).clamp_(-5, 5)
    columns = torch.randperm(k, generator=generator, device=like.device)[:outliers]
    x[:, columns] = 20 + torch.randn(m, outliers, generator=generator, device=like.device)
    return x.to(like.dtype)


def measure_all(
    cases: Sequence[Case], calls: int, clock: Clock, deadline: float, save: Callable[[], None] = lambda: None
) -> None:
    """Measure every case. What goes wrong in a shape, want of memory above all, costs that shape alone.

    `save` is called after each.
    """
    with torch.inference_mode(), tqdm(total=len(cases), unit="case", file=sys.stderr, disable=None) as bar:
        for shared in dict.fromkeys(case.shared for case in cases):
            own = [case for case in cases if case.shared == shared]
            bar.set_description(f"k={own[0].k} n={own[0].n} {own[0].variant}".rstrip())
            try:
                measure(own, calls, clock, deadline)
            except Exception as error:  # an error of the device: the results so far are written all the same
                for case in own:
                    if not case.times:
                        case.left_out.setdefault("all", reason_of(error))
            bar.update(len(own))
            save()
            if clock.device == "cuda":
                torch.cuda.empty_cache()
                octavo.release_cuda_memory()


def reason_of(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def measure(cases: list[Case], calls: int, clock: Clock, deadline: float) -> None:
    """Check, then time, every contender in cases that share a weight."""
    if time.perf_counter() > deadline:
        for case in cases:
            case.left_out["all"] = LATE
        return
    k, n = cases[0].k, cases[0].n
    generator = torch.Generator(clock.device).manual_seed(0)
    weight = (torch.randn(n, k, generator=generator, device=clock.device) / k**0.5).half()
    exact_weight = weight.double()
    layers, left_out = prepare(weight, cases[0])
    most = max(case.m for case in cases)
    given = {o: problem(k, most, o, weight) for o in {case.outliers for case in cases}}
    for case in cases:
        if time.perf_counter() > deadline:
            case.left_out["all"] = LATE
            continue
        case.left_out |= left_out
        x = given[case.outliers][: case.m]
        rows = torch.linspace(0, case.m - 1, min(case.m, 32), device=clock.device).long()
        exact = x[rows].double() @ exact_weight.T
        chosen: dict[str, Call] = {}
        for name, layer in layers.items():
            if name == WEIGHT_ONLY and case.m > WEIGHT_ONLY_ROWS:
                continue
            try:
                call = layer(x)
                result = call()
                assert isinstance(result, torch.Tensor)
                if name == PRODUCT:
                    assert isinstance(call, partial)
                    a, b = call.args
                    wrong = int((result[rows].double() != a[rows].double() @ b.double().T).sum())
                    if wrong:
                        case.left_out[name] = f"wrong: {wrong} integers of {len(rows)} rows"
                        continue
                else:
                    case.error[name] = float((result[rows].double() - exact).norm() / exact.norm())
                    limit = 2 * rounding(x, weight, name, case.granularity)
                    if not case.error[name] <= limit:
                        case.left_out[name] = f"wrong: error {case.error[name]:.2e}, at most {limit:.2e} expected"
                        continue
            except Exception as error:  # a contender that cannot run is left out with its reason
                case.left_out[name] = reason_of(error)
                continue
            chosen[name] = call
        samples: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(calls + 2):
            for name, call in chosen.items():
                time_of_call = clock.milliseconds(call)
                if turn >= 2:
                    samples[name].append(time_of_call)
        for name, values in samples.items():
            lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
            case.times[name] = (lower, median, upper)


def rounding(x: torch.Tensor, weight: torch.Tensor, name: str, granularity: str) -> float:
    """The relative error that rounding to 8 bits (X and W, or W alone) explains; a floor for 16-bit arithmetic."""
    floor = 1e-3
    if name == FLOAT16:
        return floor
    regular = x.float().masked_fill((x.abs() >= 6).any(0), 0)
    steps_x = regular.abs().amax(1) / 127 if name not in (WEIGHT_ONLY,) else torch.zeros(1, device=x.device)
    steps_w = weight.float().abs().amax(1) / 127
    if granularity == "tensor":
        steps_x, steps_w = steps_x.amax(), steps_w.amax()
    variance = steps_x.square().mean() * weight.float().square().sum(1).mean()
    variance += steps_w.square().mean() * x.float().square().sum(1).mean()
    power = x.float().square().sum(1).mean() * weight.float().square().mean()
    return floor + float((variance / 12 / power).sqrt())


def prepare(weight: torch.Tensor, case: Case) -> tuple[dict[str, Callable[[torch.Tensor], Call]], dict[str, str]]:
    """For each contender what makes a call of an X; and why some are left out."""
    int8 = octavo.quantize_weight(weight, scheme=case.scheme, granularity=case.granularity)
    layers: dict[str, Callable[[torch.Tensor], Call]] = {
        OCTAVO: lambda x: partial(octavo.linear, x, int8),
        INT8: lambda x: partial(octavo.linear, x, int8, path="int8"),
        WEIGHT_ONLY: lambda x: partial(octavo.linear, x, int8, path="weight_only"),
        PRODUCT: lambda x: partial(octavo.int8_matmul, octavo.quantize(x).codes, int8.codes),
        FLOAT16: lambda x: partial(torch.nn.functional.linear, x, weight),
    }
    left_out = {}
    if weight.device.type != "cuda":
        return layers, {BITSANDBYTES: "its int8 layer is for a GPU"}
    try:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0
        )
        layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), has_fp16_weights=False, requires_grad=False)
        layer = layer.cuda()
        layers[BITSANDBYTES] = lambda x: partial(layer, x)
    except Exception as error:  # absent, or without a build for this CUDA
        left_out[BITSANDBYTES] = reason_of(error)
    return layers, left_out


def table(cases: list[Case], ceilings: dict[str, float]) -> str:
    """A line for each case; then in how many cases octavo is faster than each peer, and where it is slowest."""
    names = [OCTAVO, INT8, WEIGHT_ONLY, PRODUCT, FLOAT16, BITSANDBYTES]
    lines = [
        f"copy: {ceilings['bytes_per_second'] / 1e12:.2f} TB/s; "
        f"int8 product of 8192: {ceilings['int8_operations_per_second'] / 1e12:.0f} TOPS",
        f"{'k':>6}{'n':>7}{'m':>6}{'outliers':>9}" + "".join(f"{name + ', us':>25}" for name in names)
        + f"{'x of float16':>14}{'bandwidth':>11}{'int8 peak':>11}",
    ]  # fmt: skip
    for case in cases:
        line = f"{case.k:>6}{case.n:>7}{case.m:>6}{case.outliers:>9}"
        for name in names:
            found = case.times.get(name)
            line += f"{'-':>25}" if found is None else f"{1e3 * found[1]:>15.1f} ({1e3 * (found[2] - found[0]):>6.1f})"
        if OCTAVO in case.times and FLOAT16 in case.times:
            seconds = 1e-3 * case.times[OCTAVO][1]
            moved = case.n * case.k + 2 * case.m * (case.k + case.n)
            line += f"{case.times[FLOAT16][1] / case.times[OCTAVO][1]:>13.2f}x"
            line += f"{moved / seconds / ceilings['bytes_per_second']:>11.0%}"
            line += f"{2 * case.m * case.n * case.k / seconds / ceilings['int8_operations_per_second']:>11.0%}"
        lines.append(f"{line}  {case.variant}".rstrip())
    for peer in (FLOAT16, BITSANDBYTES):
        ratios = [(c.times[peer][1] / c.times[OCTAVO][1], c) for c in cases if {peer, OCTAVO} <= set(c.times)]
        if ratios:
            lowest, case = min(ratios, key=lambda pair: pair[0])
            faster = sum(ratio > 1 for ratio, _ in ratios)
            lines.append(
                f"octavo is faster than {peer} in {faster} of {len(ratios)} cases; lowest ratio {lowest:.2f}x "
                f"(k={case.k} n={case.n} m={case.m}, {case.outliers} outlier columns)"
            )
    reasons = {f"{name}: {reason}" for case in cases for name, reason in case.left_out.items()}
    return "\n".join([*lines, *(f"left out: {reason}" for reason in sorted(reasons))])


if __name__ == "__main__":
    sys.exit(main())
