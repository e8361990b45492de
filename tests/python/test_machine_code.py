""".ci/cuda_machine_code.py: that it finds what it is for. The texts are as cuobjdump 13.5 prints them, shortened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".ci"))

import cuda_machine_code as checked

# Kernel, template arguments and the instructions it must have, enough of each for every rule to be met.
PRODUCT = "gemm_mma.mma_kernelINS1_4TileELNS1_9SliceCopyE0EEEvv"
KERNELS = {
    "outlier.mark_kernelI6__halfLb1EEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    "outlier.mark_kernelI6__halfLb0EEEvv": ["LDG.E.U16 R4, desc[UR8][R2.64]"],
    "quantize.quantize_kernelI6__halfLi0ELb1EEEvv": ["LDG.E.128.CONSTANT R4, [R2.64]"],
    "quantize.sum_codes_kernelILb1EEEvv": ["@!P0 LDG.E.128 R4, desc[UR8][R2.64]"],
    "epilogue.epilogue_kernelILi4ELb0E6__halfEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    "dequantize.dequantize_kernelI6__halfLi16EEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    "column_ranges.column_ranges_kernelI6__halfLi0ELb1EEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    PRODUCT: ["IMMA.16832.S8.S8 R72, R56.ROW, R60.COL, R72", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R0], [R2.64], P0"],
    "linear_mma.linear_kernelINS1_4TileELNS1_9SliceCopyE0EEEvv": [
        "IMMA.16832.S8.S8 R72, R56.ROW, R60.COL, R72",
        "HMMA.1688.F32.TF32 R72, R56, R60, R72",
        "LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R0], [R2.64], P0",
    ],
    "gemm_copies.copy_kernelEvv": ["STG.E.128 desc[UR8][R2.64], R4"],
    "gemm_copies.sum_kernelEvv": ["REDG.E.MIN.64.STRONG.GPU desc[UR8][R2.64], R4"],
    "weight_only.dot_kernelI6__halfLi1EEEvv": ["LDG.E.NA.LTC128B.128.CONSTANT R4, [R2.64]"],
    "weight_only.mma_kernelI6__halfLi1EEEvv": [
        "HMMA.16816.F32 R72, R56, R60, R72",
        "LDGSTS.E.BYPASS.LTC128B.128 [R0], desc[UR8][R2.64], !P0",
    ],
}
FILLER = ["IADD3 R1, R1, 1, RZ"] * checked.LEAST_INSTRUCTIONS


def mangled(name: str) -> str:
    source, rest = name.split(".", 1)
    kernel = rest[: rest.index("_kernel") + len("_kernel")]
    space = f"_GLOBAL__N__b07d9f3b_{len(source) + 3}_{source}_cu_8ba73713"
    return f"_ZN6octavo4cuda{len(space)}{space}{len(kernel)}{kernel}{rest.removeprefix(kernel)}"


def listing(code: dict[str, list[str]], architecture: str, stack: int = 0) -> checked.Kernels:
    """What is read of cuobjdump's two texts about these kernels."""
    head = f"\nFatbin elf code:\n================\narch = {architecture}\ncode version = [1,8]\nhost = linux\n"
    usage, sass = f"{head}\nResource usage:\n Common:\n  GLOBAL:0\n", f"{head}\n\tcode for {architecture}\n"
    for name, instructions in code.items():
        usage += f" Function {mangled(name)}:\n  REG:89 STACK:{stack} SHARED:9216 LOCAL:0 CONSTANT[0]:600 TEXTURE:0\n"
        sass += f'\t\tFunction : {mangled(name)}\n\t.headerflags\t@"EF_CUDA_SM90"\n'
        for i, instruction in enumerate(instructions):
            sass += f"        /*{16 * i:04x}*/                   {instruction} ;      /* 0x00000a00ff017b82 */\n"
            sass += "                                                          /* 0x000fe20000000800 */\n"
    kernels = checked.resources(usage)
    checked.add_code(kernels, sass)
    return kernels


def good() -> dict[str, list[str]]:
    return {name: [*FILLER, *instructions] for name, instructions in KERNELS.items()}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_nothing_is_wrong_with_what_is_right(architecture: str) -> None:
    kernels = listing(good(), architecture)
    assert list(kernels) == [architecture]
    assert checked.faults(architecture, kernels[architecture]) == []
    table = checked.table(kernels).splitlines()
    assert len(table) == len(KERNELS)  # two instances of a kernel share a line, and there is a heading
    assert table[1].split() == [architecture, "column_ranges.column_ranges_kernel", "1", "89", "9216", "0"]
    assert ["outlier.mark_kernel", "2"] in [line.split()[1:3] for line in table]


@pytest.mark.parametrize("name", [name for name in KERNELS if "Lb0EEE" not in name])
def test_a_kernel_without_its_instruction_is_reported(name: str) -> None:
    architecture = "sm_75" if name.startswith("epilogue.") else "sm_90"
    code = good() | {name: [*FILLER, "LDG.E R1, [R2.64]"]}
    found = checked.faults(architecture, listing(code, architecture)[architecture])
    assert len(found) == len(KERNELS[name])
    assert all(fault.startswith(f"{architecture}: {name}: expected an instruction like ") for fault in found)


@pytest.mark.parametrize("rule", checked.RULES, ids=lambda rule: rule.kernel)
def test_a_kernel_that_is_missing_is_reported(rule: checked.Rule) -> None:
    code = {name: lines for name, lines in good().items() if not name.startswith(rule.kernel)}
    architecture = f"sm_{min(90, rule.last)}"
    found = checked.faults(architecture, listing(code, architecture)[architecture])
    assert any(f"expected a kernel {rule.kernel}" in fault for fault in found)


def test_an_instance_that_is_compiled_to_nothing_counts_as_missing() -> None:
    unused = {PRODUCT: ["LDC R1, c[0x0][0x28]", "EXIT", "BRA 0x20", *["NOP"] * 20]}
    found = checked.faults("sm_90", listing(good() | unused, "sm_90")["sm_90"])
    assert found == [
        "sm_90: expected a kernel gemm_mma.mma_kernel, found none",
        "sm_90: expected a kernel gemm_mma.mma_kernel SliceCopyE0E, found none",
    ]
    beside = {"gemm_mma.mma_kernelINS1_5OtherEEEvv": unused[PRODUCT]}
    assert checked.faults("sm_90", listing(good() | beside, "sm_90")["sm_90"]) == []


def test_what_turing_lacks_is_not_asked_of_it() -> None:
    name = "weight_only.mma_kernelI6__halfLi1EEEvv"
    code = {other: lines for other, lines in good().items() if other != name}
    assert checked.faults("sm_75", listing(code, "sm_75")["sm_75"]) == []
    assert len(checked.faults("sm_80", listing(code, "sm_80")["sm_80"])) == 2
    waits = good() | {PRODUCT: [*FILLER, KERNELS[PRODUCT][0]]}
    assert checked.faults("sm_75", listing(waits, "sm_75")["sm_75"]) == []
    assert len(checked.faults("sm_80", listing(waits, "sm_80")["sm_80"])) == 1


@pytest.mark.parametrize("spill", ["STL.64 [R1], R4", "@P0 LDL R4, [R1+0x8]"])
def test_registers_in_memory_are_reported(spill: str) -> None:
    name = "outlier.mark_kernelI6__halfLb0EEEvv"
    found = checked.faults("sm_86", listing(good() | {name: [*FILLER, spill]}, "sm_86")["sm_86"])
    assert len(found) == 1
    assert found[0].startswith(f"sm_86: {name}: keeps values in local memory (has ")


def test_a_stack_is_reported() -> None:
    found = checked.faults("sm_90", listing(good(), "sm_90", stack=8)["sm_90"])
    assert len(found) == len(KERNELS)
    assert all("stack of 8 bytes" in fault for fault in found)


def test_a_kernel_whose_code_was_not_read_is_reported() -> None:
    kernels = listing(good(), "sm_90")
    for kernel in kernels["sm_90"].values():
        kernel.code = ""
    found = checked.faults("sm_90", kernels["sm_90"])
    assert sum("expected code, found none" in fault for fault in found) == len(KERNELS)
