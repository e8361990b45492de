"""Threads: equal results at any number of them, from any of them, with the interpreter free meanwhile; and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import pytest
import reference as ref
from support import HAS_TORCH, NUMPY, Typed, equal, make

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = octavo.get_num_threads()
    yield
    octavo.set_num_threads(before)


def operations(typed: Typed, m: int = 259, k: int = 1027, n: int = 515) -> dict[str, Callable[[], list[Any]]]:
    """Every operation with every policy, as calls that return host arrays. Large enough to be split."""
    x, w = typed.array(make("outliers", (m, k), typed.dtype)), typed.array(make("normal", (n, k), typed.dtype))
    weight = octavo.quantize_weight(w, outlier_columns=[1, k - 1])
    affine = octavo.quantize_weight(w, scheme="zeropoint")
    bias = typed.array(make("normal", (n,), typed.dtype))
    q = octavo.quantize(x)

    def host(*arrays: Any) -> list[Any]:
        return [typed.host(a) for a in arrays if a is not None]

    calls: dict[str, Callable[[], list[Any]]] = {
        "quantize row": lambda: host(*octavo.quantize(x)),
        "quantize tensor": lambda: host(*octavo.quantize(x, granularity="tensor", scheme="zeropoint")),
        "quantize_weight": lambda: host(octavo.quantize_weight(w).codes),
        "find_outliers": lambda: host(octavo.find_outliers(x)),
        "int8_matmul": lambda: host(octavo.int8_matmul(q.codes, weight.codes)),
        "dequantize": lambda: host(octavo.dequantize(q)),
        "weight_only": lambda: host(octavo.linear(x, weight, bias, path="weight_only")),
        "zeropoint": lambda: host(octavo.linear(x, affine, bias)),
        "one row": lambda: host(octavo.linear(x[:1], weight, bias)),
    }
    for outliers in ref.OUTLIERS:
        calls[outliers] = lambda o=outliers: host(octavo.linear(x, weight, bias, outliers=o))  # type: ignore[misc]
    return calls


def all_equal(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        equal(a, b)


def test_set_and_get() -> None:
    for count in (1, 2, 3):
        octavo.set_num_threads(count)
        assert octavo.get_num_threads() == count


def test_the_number_of_threads_does_not_change_a_bit(typed: Typed) -> None:
    octavo.set_num_threads(1)
    calls = operations(typed)
    alone = {name: call() for name, call in calls.items()}
    for count in (2, 3, 7):
        octavo.set_num_threads(count)
        for name, call in calls.items():
            all_equal(call(), alone[name])


def test_concurrent_calls(typed: Typed) -> None:
    """Four Python threads, shared inputs and weights, every operation: what one thread gets alone."""
    octavo.set_num_threads(2)
    calls = operations(typed)
    alone = {name: call() for name, call in calls.items()}
    names = [name for _ in range(6) for name in calls]
    with ThreadPoolExecutor(4) as pool:
        for name, got in zip(names, pool.map(lambda name: calls[name](), names), strict=True):
            all_equal(got, alone[name])


def test_concurrent_calls_while_the_number_of_threads_changes() -> None:
    calls = operations(Typed(NUMPY, "float16"), 33, 129, 65)
    alone = {name: call() for name, call in calls.items()}
    stop = threading.Event()

    def change() -> None:
        count = 0
        while not stop.is_set():
            octavo.set_num_threads(1 + count % 3)
            count += 1
            time.sleep(0.001)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            names = [*calls] * 4
            for name, got in zip(names, pool.map(lambda name: calls[name](), names), strict=True):
                all_equal(got, alone[name])
    finally:
        stop.set()
        changer.join()


def test_errors_in_threads_stay_in_their_thread() -> None:
    calls = operations(Typed(NUMPY, "float32"), 8, 64, 32)
    expected = calls["columns"]()
    x = np.ones((2, 3), np.float64)

    def work(i: int) -> Any:
        if i % 2:
            with pytest.raises(TypeError, match="quantize: x"):
                octavo.quantize(x)
            return expected
        return calls["columns"]()

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(work, range(40)):
            all_equal(got, expected)


@pytest.mark.parametrize("operation", ["linear", "int8_matmul", "quantize_weight"])
def test_the_interpreter_runs_meanwhile(operation: str) -> None:
    """During one long call another Python thread wakes up many times. With the lock held it could not."""
    octavo.set_num_threads(1)
    rows = 512
    while True:  # long enough to tell: a tenth of a second
        x = np.ones((rows, 2048), np.float32)
        weight = octavo.quantize_weight(x[:2048])
        codes = np.ones((rows, 2048), np.int8)
        call: Callable[[], Any] = {
            "linear": lambda x=x, w=weight: octavo.linear(x, w, path="weight_only"),
            "int8_matmul": lambda c=codes: octavo.int8_matmul(c, c[:4096]),
            "quantize_weight": lambda x=x: octavo.quantize_weight(x, scheme="zeropoint"),
        }[operation]
        start = time.thread_time()  # of the processor: not what other programs take of it
        call()
        if time.thread_time() - start > 0.1 or rows >= 2**16:
            break
        rows *= 2
    running, finished = threading.Event(), threading.Event()

    def work() -> None:
        running.set()
        call()
        finished.set()

    worker = threading.Thread(target=work)
    worker.start()
    running.wait()
    wakes = 0
    while not finished.is_set():
        time.sleep(0.002)
        wakes += 1
    worker.join()
    assert wakes >= 5, f"woke {wakes} times during a call of {operation} of {rows} rows"


# A process of its own for each case: in this one set_num_threads has been called. Threads that calls start are counted,
# and octavo's own, which bear its name; others are PyTorch's.
FOLLOWING = """
    import os, threading, time
    import numpy as np, torch, octavo
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    x, w = torch.randn(256, 512), torch.randn(512, 512)
    tiny, tiny_w = torch.randn(4, 64), torch.randn(16, 64)
    def started(work):
        before = set(os.listdir("/proc/self/task"))  # torch.set_num_threads may have started some
        work()
        return len(set(os.listdir("/proc/self/task")) - before)

    def own(count):  # before long: those that come too late for a call take no part in it
        for _ in range(500):
            comms = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
            if sum(comm.read_text() == "octavo\\n" for comm in comms) == count:
                return True
            time.sleep(0.01)

    def call(x=x, w=w):
        return octavo.linear(x, octavo.quantize_weight(w))
"""
FOLLOWING_CASES = {
    "torch.set_num_threads is followed, with torch's threads": """
        torch.set_num_threads(3)
        assert started(call) == 2
        assert own(0)
    """,
    "a single thread": """
        torch.set_num_threads(1)
        assert started(call) == 0
    """,
    "the environment reaches both": """
        assert torch.get_num_threads() == octavo.get_num_threads() == 1
        assert started(call) == 0
        assert started(lambda: octavo.linear(x.numpy(), octavo.quantize_weight(w.numpy()))) == 0
    """,
    "octavo.set_num_threads wins": """
        torch.set_num_threads(1)
        octavo.set_num_threads(2)
        assert started(call) == 1
        assert own(1)
        torch.set_num_threads(6)
        call()
        assert octavo.get_num_threads() == 2
        assert own(1)
    """,
    "NumPy does not follow torch": """
        torch.set_num_threads(5)
        expected = octavo.get_num_threads()
        assert started(lambda: octavo.linear(x.numpy(), octavo.quantize_weight(w.numpy()))) == expected - 1
        assert octavo.get_num_threads() == expected
        assert own(expected - 1)
    """,
    "the setting may change": """
        torch.set_num_threads(1)
        expected = call()
        for count in (4, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(call(), expected)
            assert own(0)
    """,
    "several Python threads share the helpers": """
        torch.set_num_threads(3)
        expected = call()
        start = threading.Barrier(4)
        def work(_):
            start.wait()
            return all(torch.equal(call(), expected) and own(0) for _ in range(10)), torch.get_num_threads()
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(4)))
        assert results == [(True, 3)] * 4, results
    """,
    "tiny products wake nobody": """
        torch.set_num_threads(8)
        def calls():
            weight = octavo.quantize_weight(tiny_w)
            for outliers in ("columns", "rows", "none"):
                for path in ("int8", "weight_only"):
                    octavo.linear(tiny, weight, outliers=outliers, path=path)
            octavo.find_outliers(tiny)
            octavo.dequantize(octavo.quantize(tiny))
            octavo.int8_matmul(weight.codes, weight.codes)
            octavo.set_num_threads(8)
            octavo.linear(tiny.numpy(), octavo.quantize_weight(tiny_w.numpy()))
        assert started(calls) == 0
    """,
    "a module and its operation": """
        import octavo.torch
        torch.set_num_threads(1)
        layer = octavo.torch.Int8Linear.from_linear(torch.nn.Linear(512, 512))
        torch.set_num_threads(3)
        arrays = layer.weight._arrays
        with torch.no_grad():
            assert started(lambda: torch.ops.octavo.linear(x, *arrays.tensors(), None, arrays.text)) == 2
            layer(x)
        assert own(0)
    """,
    "a forked child has threads of its own": """
        torch.set_num_threads(3)
        weight = octavo.quantize_weight(w)
        expected = octavo.linear(x, weight).numpy()  # PyTorch's threads exist now, in the parent only
        child = os.fork()
        if child == 0:
            same = np.array_equal(octavo.linear(x, weight).numpy(), expected)
            os._exit(0 if same and own(2) else 3)
        assert os.waitpid(child, 0)[1] == 0
        assert np.array_equal(octavo.linear(x, weight).numpy(), expected)
    """,
}


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc, which is not here")
@pytest.mark.parametrize("case", FOLLOWING_CASES)
def test_number_of_threads_with_torch(case: str) -> None:
    code = textwrap.dedent(FOLLOWING) + textwrap.dedent(FOLLOWING_CASES[case])
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if case == "the environment reaches both":
        environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr


FORK = """
    import os, sys, numpy as np, octavo
    octavo.set_num_threads(2)
    x = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    weight = octavo.quantize_weight(x)
    expected = octavo.linear(x, weight)          # threads exist now, in the parent only
    child = os.fork()
    if child == 0:
        ok = np.array_equal(octavo.linear(x, weight), expected)
        octavo.set_num_threads(1)
        ok &= np.array_equal(octavo.linear(x, weight), expected)
        os._exit(0 if ok else 3)
    _, status = os.waitpid(child, 0)
    ok = np.array_equal(octavo.linear(x, weight), expected)
    sys.exit(os.waitstatus_to_exitcode(status) or (0 if ok else 4))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_fork_after_use() -> None:
    """A forked child has none of its parent's threads: it must neither wait for them nor compute wrongly."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, (result.returncode, result.stderr)


IMPORT = """
    import sys, octavo
    heavy = {"torch", "jax", "cupy", "transformers"} & set(sys.modules)
    sys.exit(f"import octavo imports {heavy}" if heavy else 0)
"""


def test_import_is_light_and_quiet(tmp_path: Path) -> None:
    """No framework is imported before it is needed; nothing is printed; the exit is clean, also out of threads."""
    for code in (IMPORT, "import octavo, threading; threading.Thread(target=octavo.info).start()"):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_info() -> None:
    info = octavo.info()
    assert info["version"] == octavo.__version__
    assert octavo.__version__[0].isdigit()
    assert "cpu" in info["backends"]
    assert str(octavo.get_num_threads()) in str(info) or "threads" in str(info)
