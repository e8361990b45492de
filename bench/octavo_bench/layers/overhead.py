"""`octavo bench --overhead`: what a call costs apart from its product, by framework.

Of one row, 64 features in and 16 out, in float32, almost everything is overhead. Contenders take turns, a loop of many
calls each; the fastest turn is the one that other programs disturbed least. The core's call is the same product in a
loop of a C++ program (bench/cpp/core_call.cpp), compiled against the library that octavo's wheel carries; what is over
it is all of Python's share: reading arguments, allocating the result, the interpreter's own loop. In ``jax.jit`` an
operation is measured among its like, a chain of them in one program, beside XLA's own product of the same shape.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy
import octavo
import octavo.torch
import torch

from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table
from ..turns import take_turns

M, K, N = 1, 64, 16
CALLS, CHAIN = 2000, 200  # of a turn; operations of a jitted program
POLICIES: tuple[Literal["none", "columns"], ...] = ("none", "columns")
_BENCH = Path(__file__).resolve().parents[2]
_SOURCE = _BENCH / "cpp" / "core_call.cpp"


def run(seconds: float, facts: Facts, progress: Progress) -> Report:
    """Measure for `seconds`, at least three turns of each. Raises RuntimeError for a wrong result."""
    progress.begin(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), progress.step("calls"):
        program, absent = compile_core(Path(folder))
        samples = take_turns(contenders(program), seconds, clock=_nanoseconds)
        operations = in_jax(program)
        jitted = take_turns(operations, seconds, clock=_nanoseconds) if operations else {}
    note = f"The word behind the comma is the policy of outliers. Turns of {CALLS} calls." + absent
    tables = [_table(f"The cost of a call: m={M} k={K} n={N}, float32", samples, note)]
    if jitted:
        title = f"The cost of an operation in jax.jit: m={M} k={K} n={K}, float32"
        tables += [_table(title, jitted, f"Chains of {CHAIN}, each on the result of the one before." + absent)]
    return Report("octavo bench: what a call costs apart from its product", facts.now(), tables)


def _table(title: str, samples: dict[str, list[float]], note: str) -> Table:
    fastest = {name: min(values) for name, values in samples.items()}
    rows = []
    for name, values in samples.items():
        core = fastest.get(f"C++, {name.rpartition(', ')[2]}")
        over = None if core is None or name.startswith("C++") else fastest[name] - core
        rows.append([name, fastest[name], statistics.median(values), over])
    return Table(title, {"call": "", "fastest, ns": ".0f", "median, ns": ".0f", "over C++, ns": ".0f"}, rows, note)


def in_jax(program: Path | None) -> dict[str, Callable[[], float]]:
    """By name, what runs a turn of operations in a jitted chain and returns its seconds; empty without JAX."""
    try:
        import jax
        import octavo.jax
    except ImportError:
        return {}
    dense = jax.random.normal(jax.random.key(0), (K, K)) / K**0.5  # which keeps the length of a row
    weight, x = octavo.jax.quantize_weight(dense.T), jax.numpy.ones((M, K))
    operations: dict[str, Callable[..., Any]] = {"jax.numpy.matmul": jax.numpy.matmul}
    for policy in POLICIES:
        options = octavo.Options(outliers=policy)
        operations[f"octavo.jax.linear, {policy}"] = partial(octavo.jax.linear, options=options)
        _check(octavo.jax.linear(x, weight, options=options), torch.from_numpy(numpy.array(x @ dense)))

    def chain(operation: Callable[..., Any], x: Any, weight: Any) -> Any:
        for _ in range(CHAIN):
            x = operation(x, weight)
        return x

    found: dict[str, Callable[[], float]] = {}
    for name, operation in operations.items():
        given = (x, weight if name.startswith("octavo") else dense)
        names = {"jitted": jax.jit(partial(chain, operation)), "given": given}
        timer = timeit.Timer("jitted(*given).block_until_ready()", globals=names)
        timer.timeit(1)  # compiled
        found[name] = partial(timer.timeit, CALLS // CHAIN)
    if program is not None:
        found |= {f"C++, {policy}": partial(_run_core, program, policy, K) for policy in POLICIES}
    return found


def contenders(program: Path | None) -> dict[str, Callable[[], float]]:
    """By name, what runs a turn and returns its seconds."""
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.rand(M, K, generator=generator), torch.nn.Linear(K, N)
    weight, bias, out = dense.weight.detach(), dense.bias.detach(), torch.empty(M, N)
    tensors: dict[str, Any] = {"x": x, "bias": bias, "out": out}
    tensors["weight"] = octavo.quantize_weight(weight)
    arrays: dict[str, Any] = {"x": x.numpy(), "bias": bias.numpy(), "out": out.numpy()}
    arrays["weight"] = octavo.quantize_weight(weight.numpy())
    found = {"Python's loop alone": _turn("pass", {})}
    for policy in POLICIES:
        options = octavo.Options(outliers=policy)
        layer = octavo.torch.Int8Linear.from_linear(dense, outliers=policy)
        if program is not None:
            found[f"C++, {policy}"] = partial(_run_core, program, policy, N)
        for name, given in (("torch", tensors), ("NumPy", arrays)):
            names = {**given, "linear": octavo.linear, "options": options}
            _check(octavo.linear(given["x"], given["weight"], given["bias"], options=options), dense(x))
            found[f"octavo.linear, {name}, out=, {policy}"] = _turn(
                "linear(x, weight, bias, options=options, out=out)", names
            )
            found[f"octavo.linear, {name}, {policy}"] = _turn("linear(x, weight, bias, options=options)", names)
        _check(layer(x), dense(x))
        found[f"Int8Linear, {policy}"] = _turn("layer(x)", {"layer": layer, "x": x})
        found[f"torch.ops.octavo.linear, {policy}"] = _operation(layer, x)
    names = {"linear": torch.nn.functional.linear, "x": x, "weight": weight, "bias": bias, "dense": dense}
    found["torch.nn.functional.linear"] = _turn("linear(x, weight, bias)", names)
    found["torch.nn.Linear"] = _turn("dense(x)", names)
    found["torch.empty"] = _turn(f"empty({M}, {N})", {"empty": torch.empty})
    return found


def compile_core(folder: Path) -> tuple[Path | None, str]:
    """The C++ program, or None and why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    package = Path(octavo.__file__).parent
    library, program = package / "lib" / "liboctavo.a", folder / "core_call"
    for there, what in ((compiler, "C++ compiler"), (library.is_file(), library), (_SOURCE.is_file(), _SOURCE)):
        if not there:
            return None, f" No call of C++: no {what}."
    include = [f"-I{package / 'include'}", f"-I{_BENCH.parent / 'tests' / 'cpp'}"]
    words = [compiler, "-std=c++20", "-O3", *include, _SOURCE, library, "-pthread", "-o", program]
    try:
        subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f" No call of C++: {error}."
    return program, ""


def _nanoseconds(turn: Callable[[], Any]) -> float:
    """Of one call: `turn` returns the seconds of `CALLS`."""
    return float(1e9 / CALLS * turn())


def _run_core(program: Path, policy: str, n: int) -> float:
    words = [program, policy, M, K, n, CALLS]
    done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    return CALLS * float(done.stdout) / 1e9


def _turn(statement: str, names: dict[str, Any]) -> Callable[[], float]:
    return partial(timeit.Timer(statement, globals=names).timeit, CALLS)  # without garbage collection


def _operation(layer: Any, x: torch.Tensor) -> Callable[[], float]:
    arrays = layer.weight._arrays
    names = {"linear": torch.ops.octavo.linear.default, "x": x, "rest": (*arrays.tensors(), layer.bias, arrays.text)}
    return _turn("linear(x, *rest)", names)


def _check(found: Any, expected: torch.Tensor) -> None:
    error = float((torch.as_tensor(found) - expected).norm() / expected.norm())
    if not error < 0.02:
        raise RuntimeError(f"octavo.linear: wrong: error {error:.3g} with k={K}")
