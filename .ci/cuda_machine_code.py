"""Check the machine code of the CUDA backend, without a GPU: cuda_machine_code.py LIBRARY [CUOBJDUMP].

For each architecture that the library is built for: the tensor-core products have integer and half-precision matrix
instructions, the streaming kernels read 16 bytes at a time, and no kernel keeps registers in local memory. Prints the
resources of all kernels as a table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass

# Kernels by a part of their names: what at least one of each must have. An instance for strided arrays has none.
REQUIRED: dict[str, str] = {
    "mark_kernel": r"LDG\.E\.(\w+\.)*128",
    "quantize_kernel": r"LDG\.E\.(\w+\.)*128",
    "dequantize_kernel": r"LDG\.E\.(\w+\.)*128",
    "epilogue_kernel": r"LDG\.E\.(\w+\.)*128",
    "product_kernel": r"IMMA\.\d+\.S8\.S8",
    "weight_only_mma_kernel": r"HMMA\.\d+\.F32",
    "weight_only_dot_kernel": r"LDG\.E\.(\w+\.)*128",
}


@dataclass
class Kernel:
    """What the assembler says of a kernel, and its code."""

    name: str
    registers: int
    stack: int
    shared: int
    code: str = ""


def main() -> int:
    """Check, print, return the exit status."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    library = sys.argv[1]
    cuobjdump = sys.argv[2] if len(sys.argv) == 3 else shutil.which("cuobjdump")
    if not cuobjdump:
        sys.exit("cuda_machine_code.py: no cuobjdump (PyPI: nvidia-cuda-cuobjdump)")
    kernels = resources(run(cuobjdump, "--dump-resource-usage", library))
    add_code(kernels, run(cuobjdump, "--dump-sass", library))
    if not kernels:
        sys.exit(f"cuda_machine_code.py: {library}: expected kernels, found none")
    print(table(kernels))
    found = [fault for architecture in sorted(kernels) for fault in faults(architecture, kernels[architecture])]
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"machine code of {len(kernels)} architectures: {len(found)} faults")
    return 1 if found else 0


def run(*command: str) -> str:
    """The output of a command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def short(mangled: str) -> str:
    """The name of a kernel without its parameters: the longest identifier in it that ends in _kernel."""
    names = re.findall(r"[a-z][a-z0-9_]*_kernel", mangled)
    return max(names, key=len) if names else mangled


def resources(text: str) -> dict[str, dict[str, Kernel]]:
    """Kernels by architecture and mangled name, of `cuobjdump --dump-resource-usage`."""
    kernels: dict[str, dict[str, Kernel]] = defaultdict(dict)
    architecture, name = "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\S+?):", line.strip()):
            name = match[1]
        elif "_kernel" in name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            kernels[architecture][name] = Kernel(short(name), *(int(number) for number in match.groups()))
    return kernels


def add_code(kernels: dict[str, dict[str, Kernel]], text: str) -> None:
    """The instructions of the kernels, of `cuobjdump --dump-sass`."""
    architecture = ""
    kernel: Kernel | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture, kernel = match[1], None
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get(architecture, {}).get(match[1])
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)):
            kernel.code += match[1] + "\n"


def faults(architecture: str, kernels: dict[str, Kernel]) -> list[str]:
    """What is missing or wrong in the kernels of an architecture."""
    found = []
    for name, pattern in REQUIRED.items():
        own = [kernel for kernel in kernels.values() if kernel.name == name]
        if not own:
            found.append(f"{architecture}: expected a kernel {name}, found none")
        elif not any(re.search(pattern, kernel.code) for kernel in own):
            found.append(f"{architecture}: {name}: expected an instruction like '{pattern}', found none")
    for mangled, kernel in kernels.items():
        local = re.search(r"\b(LDL|STL)\b", kernel.code)
        if local:
            found.append(f"{architecture}: {mangled}: keeps values in local memory ({local[1]})")
    return found


def table(kernels: dict[str, dict[str, Kernel]]) -> str:
    """A line for each architecture and kernel: instances, and the most of each resource."""
    lines = [f"{'arch':<8}{'kernel':<34}{'instances':>10}{'registers':>11}{'shared, B':>11}{'stack, B':>10}"]
    for architecture in sorted(kernels, key=lambda name: int(re.sub(r"\D", "", name))):
        by_name: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in kernels[architecture].values():
            by_name[kernel.name].append(kernel)
        for name, own in sorted(by_name.items()):
            most = [max(getattr(kernel, field) for kernel in own) for field in ("registers", "shared", "stack")]
            lines.append(f"{architecture:<8}{name:<34}{len(own):>10}{most[0]:>11}{most[1]:>11}{most[2]:>10}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
