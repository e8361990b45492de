"""Time what a call costs apart from its product: octavo's Python face on a tiny layer, on the CPU.

    python bench/call_overhead.py
    python bench/call_overhead.py --library build/release/liboctavo.a --json bench/results/call_overhead.json

On a product of one row, 64 features in and 16 out, all in float32, almost everything is overhead. Contenders take
turns, each for a short loop, in many rounds, so that a change of the machine's speed meets all of them alike; reported
are the fastest round, which other processes disturb least, and the median. Everything runs under
torch.inference_mode() in one thread. The loop itself (first line of the table) is in every figure of Python's.

The core call alone is the same product through the C++ API, in a loop of a program (bench/cpp/core_call.cpp), which is
compiled here against the static library that building the wheel leaves in build/, and takes its turns as a process of
its own. What the column "over core" shows (of the fastest rounds) is thus the whole of Python's share: reading
arguments, allocating the result, the wrapper, the interpreter's loop, and that the core's code and data are not as
undisturbed in the processor's caches as in a loop of nothing else. Without a compiler or the library that column is
empty, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import octavo
import octavo.torch
import torch
from octavo._types import Outliers
from octavo_bench.measuring.output import write_atomically
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
M, K, N = 1, 64, 16
SEED = 0
POLICIES: tuple[Outliers, ...] = ("none", "columns")


def main() -> int:
    """Measure, print the table, write the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="turns of each contender (default 60)")
    parser.add_argument("--calls", type=int, default=2000, help="calls in a turn (default 2000)")
    parser.add_argument("--library", type=Path, help="liboctavo.a (default: the newest under build/)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()

    torch.set_num_threads(1)
    with torch.inference_mode(), core_program(options.library) as core:
        timers = contenders(core)
        samples: dict[str, list[float]] = {name: [] for name in timers}
        for timer in timers.values():
            timer(options.calls)  # warm
        for _ in range(options.rounds):
            for name, timer in timers.items():
                samples[name].append(timer(options.calls))

    rows = [summary(name, values) for name, values in samples.items()]
    cores = {row["policy"]: row["min_ns"] for row in rows if row["name"].startswith("core")}
    for row in rows:
        over = row["policy"] in cores and not row["name"].startswith("core")
        row["over_core_ns"] = round(row["min_ns"] - cores[row["policy"]], 1) if over else None
    print(table(rows))
    if options.json is not None:
        command = shlex.join(["bench/call_overhead.py", *sys.argv[1:]])
        report = {
            "command": command,
            "seed": SEED,
            "machine": machine(),
            "shape": {"m": M, "k": K, "n": N},
            "options": vars(options),
            "rows": rows,
        }
        write_atomically(options.json, lambda path: path.write_text(json.dumps(report, indent=1, default=str) + "\n"))
    return 0


def contenders(core: Path | None) -> dict[str, Callable[[int], float]]:
    """For each contender a function of a number of calls that returns the ns that one took."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(M, K, generator=generator)
    dense = nn.Linear(K, N)
    weight, bias, out = dense.weight.detach(), dense.bias.detach(), torch.empty(M, N)
    names: dict[str, Any] = {
        "linear": octavo.linear,
        "x": x,
        "bias": bias,
        "out": out,
        "weight": octavo.quantize_weight(weight),
        "x_np": x.numpy(),
        "bias_np": bias.numpy(),
        "out_np": out.numpy(),
        "weight_np": octavo.quantize_weight(weight.numpy()),
        "functional": nn.functional.linear,
        "empty": torch.empty,
        "dense": dense,
        "dense_weight": weight,
    }
    expected = dense(x)
    timers: dict[str, Callable[[int], float]] = {"empty loop": python_timer("pass", {})}
    for policy in POLICIES:
        layer = octavo.torch.Int8Linear.from_linear(dense, outliers=policy)
        for result in (
            octavo.linear(x, names["weight"], bias, outliers=policy),
            octavo.linear(names["x_np"], names["weight_np"], names["bias_np"], outliers=policy),
            layer(x),
        ):
            error = float((torch.as_tensor(result) - expected).norm() / expected.norm())
            if not error < 0.02:
                raise SystemExit(f"call_overhead: wrong result with outliers={policy!r}: relative error {error:.3g}")
        if core is not None:
            timers[f"core call, {policy}"] = core_timer(core, policy)
        end = f"outliers={policy!r}"
        calls = {
            "octavo.linear torch out=": f"linear(x, weight, bias, out=out, {end})",
            "octavo.linear torch": f"linear(x, weight, bias, {end})",
            "octavo.linear NumPy out=": f"linear(x_np, weight_np, bias_np, out=out_np, {end})",
            "octavo.linear NumPy": f"linear(x_np, weight_np, bias_np, {end})",
            "Int8Linear": "layer(x)",
        }
        for name, call in calls.items():
            timers[f"{name}, {policy}"] = python_timer(call, {**names, "layer": layer})
    timers["torch.nn.functional.linear"] = python_timer("functional(x, dense_weight, bias)", names)
    timers["torch.nn.Linear"] = python_timer("dense(x)", names)
    timers["torch.empty"] = python_timer(f"empty({M}, {N})", names)
    return timers


def python_timer(statement: str, names: dict[str, Any]) -> Callable[[int], float]:
    """The time of a Python statement."""
    timer = timeit.Timer(statement, globals=names)  # garbage collection is off while it runs
    return lambda calls: 1e9 * timer.timeit(calls) / calls


def core_timer(program: Path, policy: str) -> Callable[[int], float]:
    """The time of the core call."""

    def run(calls: int) -> float:
        command = [program, policy, M, K, N, calls]
        return float(subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout)

    return run


@contextmanager
def core_program(library: Path | None) -> Iterator[Path | None]:
    """bench/cpp/core_call.cpp, compiled; None, with the reason printed, where that cannot be done."""
    if library is None:
        found = sorted(ROOT.glob("build/*/liboctavo.a"), key=lambda path: path.stat().st_mtime)
        library = found[-1] if found else None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if library is None or compiler is None:
        print(f"no core call: {'no build/*/liboctavo.a' if library is None else 'no C++ compiler'}")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "core_call"
        source, include = ROOT / "bench" / "cpp" / "core_call.cpp", ROOT / "cpp" / "include"
        command = [compiler, "-std=c++20", "-O3", f"-I{include}", str(source), str(library), "-pthread", "-o", program]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            print(f"no core call: {compiler} failed:\n{result.stderr}")
            yield None
            return
        yield program


def summary(name: str, values: list[float]) -> dict[str, Any]:
    """A row of the table."""
    policy = name.rpartition(", ")[2] if name.endswith(POLICIES) else None
    return {
        "name": name,
        "policy": policy,
        "min_ns": round(min(values), 1),
        "median_ns": round(statistics.median(values), 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each contender."""
    lines = [f"m={M} k={K} n={N}, float32; ns per call", f"{'':38}{'min':>8}{'median':>9}{'over core':>11}"]
    for row in rows:
        over = "" if row["over_core_ns"] is None else f"{row['over_core_ns']:.0f}"
        lines.append(f"{row['name']:38}{row['min_ns']:8.0f}{row['median_ns']:9.0f}{over:>11}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "load": os.getloadavg(),
        "instruction_set": octavo.info()["cpu"]["instruction_set"],
        "python": platform.python_version(),
        "octavo": octavo.__version__,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
