"""`octavo bench --overhead`: what a call costs apart from its product, by framework.

Of one row, 64 features in and 16 out, in float32, almost everything is overhead. Contenders take turns, a loop of many
calls each; the fastest turn is the one that other programs disturbed least. The core's call is the same product in a
loop of a C++ program (bench/cpp/core_call.cpp), compiled against the library that octavo's wheel carries; what is over
it is all of Python's share: reading arguments, allocating the result, the interpreter's own loop. In ``jax.jit`` an
operation is measured among its like, a chain of them in one program, beside XLA's own product of the same shape.
"""

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
from . import programs

M, K, N = 1, 64, 16
CALLS, CHAIN = 2000, 200  # of a turn; operations of a jitted program
POLICIES: tuple[Literal["none", "columns"], ...] = ("none", "columns")
Turn = Callable[[], float]  # of CALLS calls; returns the nanoseconds of one


def run(seconds: float, facts: Facts, progress: Progress) -> Report:
    """Measure for `seconds`, at least three turns of each. Raises RuntimeError for a wrong result."""
    progress.begin(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), progress.step("calls"):
        program, absent = compile_core(Path(folder))
        samples = take_turns(contenders(program), seconds, clock=_itself)
        operations = in_jax(program)
        jitted = take_turns(operations, seconds, clock=_itself) if operations else {}
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


def in_jax(program: Path | None) -> dict[str, Turn]:
    """By name, what takes a turn of operations in a jitted chain; empty without JAX."""
    try:
        import jax
        import octavo.jax
    except ImportError:
        return {}
    dense = jax.random.normal(jax.random.key(0), (K, K)) / K**0.5  # which keeps the length of a row
    weight, x = octavo.jax.quantize_weight(dense.T), jax.numpy.ones((M, K))
    operations: dict[str, tuple[Any, Any]] = {"jax.numpy.matmul": (jax.numpy.matmul, dense)}
    for policy in POLICIES:
        linear = partial(octavo.jax.linear, options=octavo.Options(outliers=policy))
        _check(linear(x, weight), torch.from_numpy(numpy.array(x @ dense)))
        operations[f"octavo.jax.linear, {policy}"] = linear, weight

    def chain(operation: Callable[..., Any], x: Any, weight: Any) -> Any:
        for _ in range(CHAIN):
            x = operation(x, weight)
        return x

    found = {}
    for name, (operation, given) in operations.items():
        jitted = jax.jit(partial(chain, operation))
        jitted(x, given)  # compiled
        found[name] = _turn("jitted(x, given).block_until_ready()", CHAIN, jitted=jitted, x=x, given=given)
    return found | _of_core(program, K)


def contenders(program: Path | None) -> dict[str, Turn]:
    """By name, what takes a turn of calls."""
    x, dense = torch.rand(M, K, generator=torch.Generator().manual_seed(0)), torch.nn.Linear(K, N)
    weight, bias = dense.weight.detach(), dense.bias.detach()
    found = {"Python's loop alone": _turn("pass"), **_of_core(program, N)}
    for policy in POLICIES:
        options = octavo.Options(outliers=policy)
        for name, of in (("torch", torch.Tensor.detach), ("NumPy", torch.Tensor.numpy)):
            names: dict[str, Any] = {"x": of(x), "bias": of(bias), "out": of(torch.empty(M, N)), "options": options}
            names |= {"weight": octavo.quantize_weight(of(weight)), "linear": octavo.linear}
            _check(octavo.linear(names["x"], names["weight"], names["bias"], options=options), dense(x))
            for out in (", out=out", ""):
                call = f"linear(x, weight, bias, options=options{out})"
                found[f"octavo.linear, {name}{out[:-3]}, {policy}"] = _turn(call, **names)
        layer = octavo.torch.Int8Linear.from_linear(dense, outliers=policy)
        _check(layer(x), dense(x))
        found[f"Int8Linear, {policy}"] = _turn("layer(x)", layer=layer, x=x)
        arrays, operation = layer.weight._arrays, torch.ops.octavo.linear.default
        rest = (*arrays.tensors(), layer.bias, arrays.text)
        found[f"torch.ops.octavo.linear, {policy}"] = _turn("operation(x, *rest)", operation=operation, x=x, rest=rest)
    names = {"linear": torch.nn.functional.linear, "x": x, "weight": weight, "bias": bias}
    found["torch.nn.functional.linear"] = _turn("linear(x, weight, bias)", **names)
    found["torch.nn.Linear"] = _turn("dense(x)", dense=dense, x=x)
    found["torch.empty"] = _turn(f"empty({M}, {N})", empty=torch.empty)
    return found


def compile_core(folder: Path) -> tuple[Path | None, str]:
    """The C++ program, or None and why there is none."""
    package = Path(octavo.__file__).parent
    include = (package / "include", programs.ROOT / "tests" / "cpp")
    try:
        return programs.compile_program("core_call", folder, include, package / "lib" / "liboctavo.a", "-pthread"), ""
    except RuntimeError as error:
        return None, f" No call of C++: {error}."


def _of_core(program: Path | None, n: int) -> dict[str, Turn]:
    """The C++ program's turns: it prints the nanoseconds of a call."""

    def turn(policy: str) -> float:
        words = map(str, (program, policy, M, K, n, CALLS))
        return float(subprocess.run(list(words), check=True, capture_output=True, text=True).stdout)

    return {} if program is None else {f"C++, {policy}": partial(turn, policy) for policy in POLICIES}


def _turn(statement: str, operations: int = 1, **names: Any) -> Turn:
    """A turn of a statement that makes so many operations."""
    timer = timeit.Timer(statement, globals=names)  # without garbage collection
    return lambda: 1e9 / CALLS * timer.timeit(CALLS // operations)


def _itself(turn: Callable[[], Any]) -> float:
    """The clock of `take_turns`: a turn says itself what an operation took."""
    return turn()


def _check(found: Any, expected: torch.Tensor) -> None:
    error = float((torch.as_tensor(found) - expected).norm() / expected.norm())
    if not error < 0.02:
        raise RuntimeError(f"octavo.linear: wrong: error {error:.3g} with k={K}")
