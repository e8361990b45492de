"""octavo and the interpreter's life: signals, daemon threads at exit, subinterpreters, no global lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time

import pytest

PRELUDE = """
import sys, threading, time
import numpy as np
import octavo
weight = octavo.quantize_weight(np.ones((2048, 2048), np.float32))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("path", ["int8", "weight_only"])
def test_a_signal_ends_a_long_call(path: str) -> None:
    program = f"""{PRELUDE}
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
x = np.broadcast_to(np.ones(2048, np.float16), (1 << 15, 2048))
print("calling", flush=True)
try:
    octavo.linear(x, weight, path={path!r})
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(octavo.linear(np.ones((1, 2048), np.float32), weight)[0, 0])
"""
    slow = {**os.environ, "OCTAVO_CPU_ISA": "scalar", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=slow)
    assert process.stdout is not None
    assert process.stdout.readline() == "calling\n"
    time.sleep(1)  # so that the call is under way
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert process.stdout.readline() == "interrupted\n"
    assert time.monotonic() - sent < 5  # a fraction of a second on a machine that has nothing else to do
    assert process.stdout.readline() == "2048.0\n"
    assert process.wait(60) == 0


def test_exit_while_a_daemon_thread_computes() -> None:
    result = run(f"""{PRELUDE}
def compute():
    x = np.ones((256, 2048), np.float32)
    while True:
        octavo.linear(x, weight)

threading.Thread(target=compute, daemon=True).start()
time.sleep(0.5)
""")
    assert (result.returncode, result.stderr) == (0, "")


def test_subinterpreters_are_refused() -> None:
    result = run("""
try:
    import _interpreters as interpreters  # Python 3.13
except ImportError:
    import _xxsubinterpreters as interpreters
program = '''
try:
    import octavo._core
except ImportError as error:
    print(error, flush=True)
'''
interpreters.run_string(interpreters.create(), program)
""")
    # Python refuses by itself where it knows that the module does not say it can, from 3.13 on: in other words.
    assert result.stdout.strip().endswith("subinterpreters"), result.stderr


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not free-threaded")
def test_free_threaded_python_stays_without_its_lock() -> None:
    result = run("import sys, octavo; print(sys._is_gil_enabled())")
    assert (result.stdout, result.stderr) == ("False\n", "")
