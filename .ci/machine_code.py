"""Check that the kernels of a build have the instructions they are written for: machine_code.py BUILD_FOLDER [OBJDUMP].

A kernel that the compiler no longer vectorizes still gives the right numbers, only many times slower; and x86 has
instructions that saturate, which give wrong numbers for few inputs only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# Per instruction set and source, as objdump prints them.
REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {
    "scalar": {},
    "avx2": {
        "product": (r"vpmaddwd .*%ymm", r"vpaddw .*%ymm", r"vpmaddubsw .*%ymm"),
        "streaming": (r"vpmaxuw .*%ymm", r"vfn?m\w*ps .*%ymm"),
        "epilogue": (r"vcvtdq2ps .*%ymm", r"vfmadd\w*ps .*%ymm"),
    },
    "avx_vnni": {"product": (r"\{vex\} vpdpbusd .*%ymm",)},
    "avx512bw": {"product": (r"vpmaddwd .*%zmm",), "epilogue": (r"vcvtdq2ps .*%zmm", r"vfmadd\w*ps .*%zmm")},
    "avx512_vnni": {
        "product": (r"vpdpbusd .*%zmm",),
        "streaming": (r"vpmaxuw .*%zmm", r"vfn?m\w*ps .*%zmm"),
        "epilogue": (r"vcvtdq2ps .*%zmm", r"vfmadd\w*ps .*%zmm"),
    },
    "avx512_bf16": {
        "product": (r"vpdpbusd .*%zmm",),
        "epilogue": (r"vcvtne2ps2bf16 .*%zmm",),
        "weight_only": (r"vdpbf16ps .*%zmm",),
    },
    "amx": {"product": (r"tdpbssd .*%tmm", r"tileloaddt1 .*%tmm"), "epilogue": (r"vcvtne2ps2bf16 .*%zmm",)},
    "neon_dotprod": {
        "product": (r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[3\]",),
        "streaming": (r"umax\s+v\d+\.8h", r"fmls\s+v\d+\.4s", r"fmla\s+v\d+\.4s"),
        "epilogue": (r"scvtf\s+v\d+\.4s", r"fmla\s+v\d+\.4s"),
    },
    "neon_i8mm": {"product": (r"smmla\s+v\d+\.4s", r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[3\]")},
}
# Sums of products of bytes that stick at the ends of their range. AVX2's product has vpmaddubsw where it says that no
# sum reaches them, and epilogues where one factor is 1 or -1.
PAIRS = r"\bvpmaddubsw\b"
FORBIDDEN = (PAIRS, r"\bvpdpbu[us]ds\b", r"\bvpdpwssds\b")
MAY_HAVE_PAIRS = {("avx2", "product"), *((isa, "epilogue") for isa in REQUIRED)}


def faults(isa: str, objects: list[Path], objdump: str) -> list[str]:
    """What is missing from or forbidden in the objects of an instruction set."""
    code = {}
    for path in objects:
        command = [objdump, "--disassemble", "--no-show-raw-insn", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # "  1c:<tab>instruction<tab>comment"
        code[path.name.split(".")[0]] = re.sub(r"^ *[0-9a-f]+:\t", "", listing, flags=re.MULTILINE)
    found = []
    for source, patterns in REQUIRED[isa].items():
        missing = [pattern for pattern in patterns if not re.search(pattern, code.get(source, ""))]
        found += [f"{isa}: {source}: expected an instruction like '{pattern}', found none" for pattern in missing]
    for source, text in code.items():
        wrong = [pattern for pattern in FORBIDDEN if pattern != PAIRS or (isa, source) not in MAY_HAVE_PAIRS]
        matches = [match.group() for pattern in wrong if (match := re.search(pattern, text))]
        found += [f"{isa}: {source}: has the saturating instruction {name}" for name in matches]
    return found


def main() -> int:
    """Check all instruction sets that the build has; prints what is wrong and returns the exit status."""
    if len(sys.argv) not in (2, 3):
        sys.exit("machine_code.py: expected a build folder and, where it is not objdump, the name of objdump")
    folder = Path(sys.argv[1]) / "CMakeFiles"
    objdump = sys.argv[2] if len(sys.argv) == 3 else "objdump"
    kernels = {path.name[len("octavo_kernels_") : -len(".dir")]: path for path in folder.glob("octavo_kernels_*.dir")}
    if len(kernels) < 2:
        sys.exit(f"machine_code.py: expected kernels of several instruction sets in {folder}, found {list(kernels)}")
    failed = False
    for isa, path in sorted(kernels.items()):
        if isa not in REQUIRED:
            problems = [f"{isa}: say in .ci/machine_code.py which instructions it must have"]
        else:
            problems = faults(isa, sorted(path.rglob("*.o")), objdump)
        print(f"{isa}: {'FAILED' if problems else 'ok'}")
        for problem in problems:
            print(f"    {problem}")
        failed = failed or bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
