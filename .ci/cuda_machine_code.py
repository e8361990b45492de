"""Check the machine code of the CUDA backend, without a GPU: cuda_machine_code.py LIBRARY [--renew].

For each architecture that the library is built for: the tensor-core products have integer and half-precision matrix
instructions and, from sm_80 on, copy 16 bytes at a time without waiting; the streaming kernels read as much at a time;
no kernel keeps registers in local memory. Prints what all kernels cost by counting (cuda_figures.py) as a table, and
compares it with that of cuda_bounds.txt, which --renew writes anew. Needs cuobjdump and nvdisasm: on the path or, from
PyPI, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_figures

WIDE_LOAD = r"\bLDG\.E\.(\w+\.)*128"
WIDE_STORE = r"\bSTG\.E\.(\w+\.)*128"
WIDE_COPY = r"\bLDGSTS\.E\.(\w+\.)*128"  # to shared memory, from sm_80 on


@dataclass(frozen=True)
class Rule:
    """What every instance of a kernel must have, of those whose mangled template arguments match; on which GPUs."""

    kernel: str  # source.kernel
    instruction: str
    instances: str = ""
    first: int = 75
    last: int = 999
    of_one_gpu: bool = False  # only of code for what one GPU alone has, as 90a


# The instances for arrays of any strides read an element at a time: the others have `wide` (Lb1E), or 16 elements at a
# time (Li16E), as their last argument; quantize_kernel has `rotates` behind it. SliceCopyE0: of the int8 product, those
# that copy without waiting.
RULES = (
    Rule("outlier.mark_kernel", WIDE_LOAD, r"Lb1EE"),
    Rule("column_ranges.column_ranges_kernel", WIDE_LOAD, r"Lb1EE"),
    Rule("quantize.quantize_kernel", WIDE_LOAD, r"Lb1ELb[01]EE"),
    Rule("quantize.sum_codes_kernel", WIDE_LOAD, r"Lb1EE"),
    Rule("epilogue.epilogue_kernel", WIDE_LOAD, last=75),
    Rule("dequantize.dequantize_kernel", WIDE_LOAD, r"Li16EE"),
    Rule("gemm_mma.mma_kernel", r"\bIMMA\.\d+\.S8\.S8"),
    Rule("gemm_mma.mma_kernel", WIDE_COPY, r"SliceCopyE0E", first=80),
    Rule("linear_mma.linear_kernel", r"\bIMMA\.\d+\.S8\.S8", first=80),
    Rule("linear_mma.linear_kernel", r"\bHMMA\.\d+\.F32\.TF32", first=80),
    Rule("linear_mma.linear_kernel", r"\bHMMA\.16816\.F32", first=80),
    Rule("linear_mma.linear_kernel", WIDE_COPY, first=80),
    Rule("linear_wgmma.wgmma_kernel", r"\bIGMMA\.64x(128|256)x32\.S8\.S8", first=90, last=90, of_one_gpu=True),
    Rule("linear_wgmma.wgmma_kernel", r"\bHMMA\.\d+\.F32\.TF32", first=90, last=90, of_one_gpu=True),
    Rule("linear_wgmma.wgmma_kernel", r"\bHMMA\.16816\.F32", first=90, last=90, of_one_gpu=True),
    Rule("linear_wgmma.wgmma_kernel", WIDE_COPY, first=90, last=90, of_one_gpu=True),
    Rule("gemm_copies.copy_kernel", WIDE_STORE),
    Rule("gemm_copies.sum_kernel", r"\b(RED|REDG|ATOMG)\.E\.MIN\.64"),
    Rule("weight_only.dot_kernel", WIDE_LOAD),
    Rule("weight_only.mma_kernel", r"\bHMMA\.\d+\.F32", first=80),
    Rule("weight_only.mma_kernel", WIDE_COPY, first=80),
)
# A template's instance that an architecture has no use for is compiled to nothing: to fewer instructions than these.
LEAST_INSTRUCTIONS = 16


@dataclass
class Kernel:
    """What the assembler says of a kernel, and its code."""

    name: str  # source.kernel
    arguments: str  # what follows in the mangled name: template arguments and parameters
    registers: int
    stack: int
    shared: int
    code: str = ""

    @property
    def is_used(self) -> bool:
        """Whether there is more code than padding."""
        padding = r"^(NOP|BRA|EXIT)\b"
        return sum(not re.match(padding, line) for line in self.code.splitlines()) >= LEAST_INSTRUCTIONS


Kernels = dict[str, dict[str, Kernel]]  # by architecture and mangled name


def main(words: Sequence[str]) -> int:
    """Check, print, return the exit status."""
    if len(words) not in {1, 2} or words[1:] not in ([], ["--renew"]):
        sys.exit(__doc__)
    kernels = resources(run("cuobjdump", "--dump-resource-usage", words[0]))
    if not kernels:
        sys.exit(f"cuda_machine_code.py: {words[0]}: expected kernels, found none")
    add_code(kernels, run("cuobjdump", "--dump-sass", words[0]))
    counted = table(kernels)
    print(cuda_figures.written(counted))
    found = [fault for architecture in sorted(kernels) for fault in faults(architecture, kernels[architecture])]
    if words[1:]:
        cuda_figures.BOUNDS.write_text(cuda_figures.written(counted) + "\n")
    elif over := cuda_figures.over(counted, cuda_figures.read(cuda_figures.BOUNDS.read_text())):
        found += [*over, "where that is wanted: .ci/cuda_machine_code.py LIBRARY --renew, of what dev.py ci builds"]
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"machine code for {', '.join(sorted(kernels, key=number_of))}: {len(found)} faults")
    return 1 if found else 0


def run(*command: str) -> str:
    """The output of a command of the path, or of NVIDIA's packages in this environment."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    environment = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(packages)])}
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        sys.exit(f"cuda_machine_code.py: no {command[0]} (PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm)")
    if result.returncode != 0:
        sys.exit(f"cuda_machine_code.py: {' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def split(mangled: str) -> tuple[str, str]:
    """Source and name of a kernel, as source.kernel, and the rest of its mangled name.

    Kernels are in unnamed namespaces, which nvcc calls by the source: _GLOBAL__N__<hash>_<length>_<source>_cu_<hash>.
    """
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}(\d+)", mangled)
    if found is None:
        return mangled, ""
    end = found.end() + int(found[2])
    return f"{found[1]}.{mangled[found.end() : end]}", mangled[end:]


def number_of(architecture: str) -> int:
    """90 of sm_90 and of sm_90a."""
    return int(re.sub(r"\D", "", architecture))


def resources(text: str) -> Kernels:
    """The kernels of `cuobjdump --dump-resource-usage`, without their code."""
    kernels: Kernels = defaultdict(dict)
    architecture, name = "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\S+?):", line.strip()):
            name = match[1]
        elif name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            registers, stack, shared = (int(number) for number in match.groups())
            kernels[architecture][name] = Kernel(*split(name), registers, stack, shared)
            name = ""
    return dict(kernels)


def add_code(kernels: Kernels, text: str) -> None:
    """The instructions of the kernels, of `cuobjdump --dump-sass`."""
    architecture = ""
    kernel: Kernel | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture, kernel = match[1], None
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get(architecture, {}).get(match[1])
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)):
            kernel.code += match[1] + "\n"


def faults(architecture: str, kernels: dict[str, Kernel]) -> list[str]:
    """What is missing or wrong in the kernels of an architecture."""
    found = []
    for rule in RULES:
        if not rule.first <= number_of(architecture) <= rule.last or (rule.of_one_gpu and architecture[-1] != "a"):
            continue
        own = [
            kernel
            for kernel in kernels.values()
            if kernel.name == rule.kernel and kernel.is_used and re.search(rule.instances, kernel.arguments)
        ]
        if not own:
            found.append(f"{architecture}: expected a kernel {rule.kernel} {rule.instances}".rstrip() + ", found none")
        for kernel in own:
            if not re.search(rule.instruction, kernel.code):
                found.append(
                    f"{architecture}: {kernel.name}{kernel.arguments}: expected an instruction like "
                    f"'{rule.instruction}', found none"
                )
    for kernel in kernels.values():
        local = re.search(r"\b(LDL|STL)\b", kernel.code)
        if local or kernel.stack > 0:
            how = f"has {local[1]}" if local else f"has a stack of {kernel.stack} bytes"
            found.append(f"{architecture}: {kernel.name}{kernel.arguments}: keeps values in local memory ({how})")
        if not kernel.code:
            found.append(f"{architecture}: {kernel.name}{kernel.arguments}: expected code, found none")
    return found


def table(kernels: Kernels) -> cuda_figures.Table:
    """The figures of all kernels that an architecture has a use for."""
    own = [
        (architecture, mangled, kernel)
        for architecture in sorted(kernels, key=number_of)
        for mangled, kernel in kernels[architecture].items()
        if kernel.is_used
    ]
    names = cuda_figures.readable([mangled for _, mangled, _ in own])
    rows = {
        (architecture, f"{kernel.name.split('.')[0]}.{name}"): cuda_figures.figures(
            kernel.arguments, kernel.code.splitlines(), kernel.registers, kernel.shared, kernel.stack,
            4 if kernel.name == "gemm_mma.mma_kernel" else 2,
        )
        for (architecture, _, kernel), name in zip(own, names, strict=True)
    }  # fmt: skip
    return dict(sorted(rows.items(), key=lambda row: (number_of(row[0][0]), row[0][1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
