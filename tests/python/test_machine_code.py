""".ci/cuda_machine_code.py: that it finds what it is for. The texts are as cuobjdump 13.5 prints them, shortened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".ci"))

import cuda_figures
import cuda_machine_code as checked

# Kernel, template arguments and the instructions it must have, enough of each for every rule to be met.
PRODUCT = "gemm_mma.mma_kernelINS1_4TileELNS1_9SliceCopyE0EEEvv"
KERNELS = {
    "outlier.mark_kernelI6__halfLb1EEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    "outlier.mark_kernelI6__halfLb0EEEvv": ["LDG.E.U16 R4, desc[UR8][R2.64]"],
    "quantize.quantize_kernelI6__halfLi0ELb1ELb0EEEvv": ["LDG.E.128.CONSTANT R4, [R2.64]"],
    "quantize.sum_codes_kernelILb1EEEvv": ["@!P0 LDG.E.128 R4, desc[UR8][R2.64]"],
    "epilogue.epilogue_kernelILi4ELb0E6__halfEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    "dequantize.dequantize_kernelI6__halfLi16EEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    "column_ranges.column_ranges_kernelI6__halfLi0ELb1EEEvv": ["LDG.E.128 R4, desc[UR8][R2.64]"],
    PRODUCT: ["IMMA.16832.S8.S8 R72, R56.ROW, R60.COL, R72", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R0], [R2.64], P0"],
    "linear_mma.linear_kernelINS1_4TileELNS1_9SliceCopyE0EEEvv": [
        "IMMA.16832.S8.S8 R72, R56.ROW, R60.COL, R72",
        "HMMA.1688.F32.TF32 R72, R56, R60, R72",
        "HMMA.16816.F32 R72, R56, R60, R72",
        "LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R0], [R2.64], P0",
    ],
    "linear_wgmma.wgmma_kernelINS0_9GroupTileILi128ELi128ELi3ELi2EEEvv": [
        "IGMMA.64x128x32.S8.S8 R24, gdesc[UR20], R24",
        "HMMA.1688.F32.TF32 R72, R56, R60, R72",
        "HMMA.16816.F32 R72, R56, R60, R72",
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


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a", "sm_120"])
def test_nothing_is_wrong_with_what_is_right(architecture: str) -> None:
    kernels = listing(good(), architecture)
    assert list(kernels) == [architecture]
    assert checked.faults(architecture, kernels[architecture]) == []
    table = checked.table(kernels)
    assert len(table) == len(KERNELS)
    own = table[architecture, "outlier.mark_kernel<__half,true>"]
    assert [own["registers"], own["shared"], own["stack"], own["code"]] == [89, 9216, 0, len(FILLER) + 1]


@pytest.mark.parametrize("name", [name for name in KERNELS if "Lb0EEE" not in name])
def test_a_kernel_without_its_instruction_is_reported(name: str) -> None:
    architecture = "sm_75" if name.startswith("epilogue.") else "sm_90a"
    code = good() | {name: [*FILLER, "LDG.E R1, [R2.64]"]}
    found = checked.faults(architecture, listing(code, architecture)[architecture])
    assert len(found) == len(KERNELS[name])
    assert all(fault.startswith(f"{architecture}: {name}: expected an instruction like ") for fault in found)


@pytest.mark.parametrize("rule", checked.RULES, ids=lambda rule: rule.kernel)
def test_a_kernel_that_is_missing_is_reported(rule: checked.Rule) -> None:
    code = {name: lines for name, lines in good().items() if not name.startswith(rule.kernel)}
    architecture = f"sm_{min(90, rule.last)}{'a' if rule.of_one_gpu else ''}"
    found = checked.faults(architecture, listing(code, architecture)[architecture])
    assert any(f"expected a kernel {rule.kernel}" in fault for fault in found)


def test_an_instance_that_is_compiled_to_nothing_counts_as_missing() -> None:
    unused = {PRODUCT: ["LDC R1, c[0x0][0x28]", "EXIT", "BRA 0x20", *["NOP"] * 20]}
    found = checked.faults("sm_90a", listing(good() | unused, "sm_90a")["sm_90a"])
    assert found == [
        "sm_90a: expected a kernel gemm_mma.mma_kernel, found none",
        "sm_90a: expected a kernel gemm_mma.mma_kernel SliceCopyE0E, found none",
    ]
    beside = {"gemm_mma.mma_kernelINS1_5OtherEEEvv": unused[PRODUCT]}
    assert checked.faults("sm_90a", listing(good() | beside, "sm_90a")["sm_90a"]) == []


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
    found = checked.faults("sm_90a", listing(good(), "sm_90a", stack=8)["sm_90a"])
    assert len(found) == len(KERNELS)
    assert all("stack of 8 bytes" in fault for fault in found)


def test_a_kernel_whose_code_was_not_read_is_reported() -> None:
    kernels = listing(good(), "sm_90a")
    for kernel in kernels["sm_90a"].values():
        kernel.code = ""
    found = checked.faults("sm_90a", kernels["sm_90a"])
    assert sum("expected code, found none" in fault for fault in found) == len(KERNELS)


# A loop over tiles with one over k inside, and a way off the line that comes back by a branch upwards.
NESTED = """
    MOV R1, c[0x0][0x28]
    LDG.E.128 R4, [R2.64]
    IMMA.16832.S8.S8 R72, R56.ROW, R60.COL, R72
    IADD3 R1, R1, 1, RZ
    @P0 BRA 0x20
    BRA.DIV UR4, 0xb0
    @!P1 BRA 0xa0
    STG.E.128 desc[UR8][R2.64], R4
    BRA P2, 0x10
    EXIT
    BRA 0x70
    NOP
    BRA 0x60
    BRA 0xd0
""".strip().splitlines()
STREAM = ["LDG.E.128 R4, [R2.64]", "FADD R1, R1, R2", "@P0 STG.E.128 [R2.64], R4", "FADD R1, R1, R2"]


def test_loops_are_those_of_the_control_flow() -> None:
    code = [line.strip() for line in NESTED]
    assert sorted(map(sorted, cuda_figures.loops(code))) == [[1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12], [2, 3, 4]]
    assert cuda_figures.loops(STREAM) == []
    assert [sorted(loop) for loop in cuda_figures.loops([*STREAM, "BRA 0x40"])] == [[4]]


def test_figures() -> None:
    tile = "linear_kernelINS0_4TileILi64ELi128ELi32ELi64ELi2EEE"
    own = cuda_figures.figures(tile, [line.strip() for line in NESTED], 90, 1024, 8, 2)
    assert own == {
        **{"registers": 90, "shared": 1024, "stack": 8, "code": 13, "per IMMA": 3, "per HMMA": None},
        # 13 instructions, of which 11 are in loops with IMMA; a thread has 64 outputs.
        **{"per 16 B": None, "per output": round(3 / 64, 1), "B per output": 4096 / 64 + 4096 / 128 + 2},
    }
    stream = [*STREAM, "@!P0 BRA 0x0", "EXIT"]
    own = cuda_figures.figures("mark_kernelIfEEvv", stream, 8, 0, 0, 2)
    assert [own["per 16 B"], own["per IMMA"], own["per output"], own["B per output"]] == [2.5, None, None, None]


PRODUCTS = "linear_mma.linear_kernel<Tile<256,128,64,64,1>,0>"


@pytest.fixture
def bounds() -> cuda_figures.Table:
    return cuda_figures.read(cuda_figures.BOUNDS.read_text())


def test_bounds_are_for_what_ci_builds(bounds: cuda_figures.Table) -> None:
    assert list(dict.fromkeys(architecture for architecture, _ in bounds)) == ["sm_75", "sm_80", "sm_90a", "sm_120"]
    sources = {path.stem for path in (Path(__file__).resolve().parents[2] / "cuda").glob("*.cu")}
    assert {kernel.split(".")[0] for _, kernel in bounds} == sources
    assert cuda_figures.read(cuda_figures.written(bounds)) == bounds
    assert cuda_figures.over(bounds, bounds) == []
    assert all(own["stack"] == 0 for own in bounds.values())


@pytest.mark.parametrize("column", cuda_figures.COLUMNS)
def test_a_figure_over_its_bound_is_reported(bounds: cuda_figures.Table, column: str) -> None:
    place = next(place for place, own in bounds.items() if place[0] == "sm_90a" and own[column] is not None)
    before = bounds[place][column]
    assert before is not None
    most = cuda_figures.most(column, before)
    assert before <= most < before + max(8, 0.06 * before)
    assert cuda_figures.over(bounds | {place: {**bounds[place], column: most}}, bounds) == []
    found = cuda_figures.over(bounds | {place: {**bounds[place], column: 2 * most + 1}}, bounds)
    expected = f"sm_90a: {place[1]}: {column}: expected at most {most:g} ({before:g} before), got {2 * most + 1:g}"
    assert found == [expected]


def test_a_loop_that_lost_its_instruction_is_reported(bounds: cuda_figures.Table) -> None:
    place = ("sm_80", PRODUCTS)
    found = cuda_figures.over(bounds | {place: {**bounds[place], "per IMMA": None}}, bounds)
    assert found == [f"sm_80: {PRODUCTS}: per IMMA: expected {bounds[place]['per IMMA']}, got None"]


def test_kernels_and_bounds_are_the_same_ones(bounds: cuda_figures.Table) -> None:
    place = ("sm_80", PRODUCTS)
    rest = {other: own for other, own in bounds.items() if other != place}
    assert cuda_figures.over(rest, bounds) == [f"sm_80: {PRODUCTS}: has bounds, but is not there"]
    assert cuda_figures.over(bounds, rest) == [f"sm_80: {PRODUCTS}: has no bounds"]
    only = {where: own for where, own in bounds.items() if where[0] == "sm_90a"}
    assert cuda_figures.over(only, bounds) == []  # a library for fewer architectures
    assert cuda_figures.over({("sm_86", PRODUCTS): bounds[place]}, bounds) == []  # one that CI does not build


def test_the_status_is_that_of_the_bounds(
    bounds: cuda_figures.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = listing(good(), "sm_90a")
    monkeypatch.setattr(checked, "run", lambda *words: "")
    monkeypatch.setattr(checked, "resources", lambda text: kernels)
    monkeypatch.setattr(checked, "add_code", lambda kernels, text: None)
    monkeypatch.setattr(cuda_figures, "BOUNDS", tmp_path / "bounds.txt")
    assert checked.main(["library", "--renew"]) == 0
    assert checked.main(["library"]) == 0
    assert "0 faults" in capsys.readouterr().out
    next(iter(kernels["sm_90a"].values())).registers = 97
    assert checked.main(["library"]) == 1
    said = capsys.readouterr().err
    assert "registers: expected at most 96 (89 before), got 97" in said
    assert "--renew" in said
