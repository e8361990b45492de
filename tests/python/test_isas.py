"""Every instruction set of this processor: the same oracle, and the same integers and outputs as the one in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import octavo
import pytest
import reference as ref
from octavo.verify import EXPECTED
from support import KINDS, make

HERE = Path(__file__).parent
INSTRUCTION_SETS: list[str] = octavo.info()["cpu"]["instruction_sets"]
# The tests that go through every kernel, on one framework.
SELECTION = "(oracle or every_combination or every_kind or float32_edges or exhaustively or saturate) and numpy"


def run(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OCTAVO_CPU_ISA": instruction_set}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, env=environment, cwd=HERE
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[1:])
def test_the_oracle_on_the_others(instruction_set: str) -> None:
    """The first is what the rest of the suite runs on."""
    stems = [f"test_{stem}.py" for stem in ("quantize", "outlier", "gemm", "dequantize", "linear")]
    result = run(instruction_set, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SELECTION, *stems)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(result.stdout.split(" passed")[0].split()[-1].lstrip("=, ")) >= 15


def integers() -> list[np.ndarray]:
    """Codes, zero points, accumulators and outlier columns of all kinds of data."""
    found: list[np.ndarray] = []
    for kind in KINDS:
        for dtype in ("float32", "float16"):
            x = make(kind, (19, 131), dtype).astype(dtype)
            for scheme in ref.SCHEMES:
                for granularity in ("tensor", "row"):
                    q = octavo.quantize(x, scheme=scheme, granularity=granularity)
                    found += [q.codes, octavo.int8_matmul(q.codes, q.codes)]
                    found += [] if q.zeropoint is None else [q.zeropoint]
            found.append(octavo.find_outliers(x))
    return found


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_integers_are_the_same_everywhere(instruction_set: str, tmp_path: Path) -> None:
    path = str(tmp_path / "integers.npz")
    code = "import sys, numpy, test_isas, octavo; numpy.savez(sys.argv[1], *test_isas.integers());"
    code += "print(octavo.info()['cpu']['instruction_set'])"
    result = run(instruction_set, "-c", code, path)
    assert result.stdout.strip() == instruction_set, result.stderr
    with np.load(path) as theirs:
        ours = integers()
        assert len(theirs.files) == len(ours) > 100
        for name, array in zip(theirs.files, ours, strict=True):
            np.testing.assert_array_equal(theirs[name], array, strict=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_outputs_are_the_same_everywhere(instruction_set: str, threads: int) -> None:
    code = f"import octavo, octavo.verify; octavo.set_num_threads({threads}); print(octavo.verify.verify())"
    result = run(instruction_set, "-c", code)
    assert result.stdout.strip() == EXPECTED, result.stderr


def test_an_unknown_instruction_set_is_refused() -> None:
    result = run("sse9", "-c", "import octavo, numpy; octavo.quantize(numpy.ones((1, 1), 'float32'))")
    assert result.returncode != 0
    assert "OCTAVO_CPU_ISA" in result.stderr
    assert all(name in result.stderr for name in INSTRUCTION_SETS)
