"""What the kernels of the CUDA backend cost by counting, and the bounds of that, for cuda_machine_code.py.

A kernel that needs more of these is slower, or fewer of its blocks fit a multiprocessor at a time, and all tests pass:

    registers, shared, stack   what the assembler says: registers of a thread, bytes of shared memory, spilled bytes
    code                       instructions in all
    per IMMA, per HMMA         instructions for each matrix instruction (of int8, of a warp or of four; of floats), in
                               the innermost loop that has any
    per 16 B                   instructions for each access of 16 bytes of global memory, in the innermost loop that has
                               any, and no matrix instruction. Of f16 these are 8 elements
    per output                 products that know their tile: instructions outside the loop over k for each output of a
                               thread. All ways are counted, of which a call takes one: zeropoints, three dtypes
    B per output               the same: bytes of global memory for each output where k is 4096, codes of both operands
                               and the output, of 16 bits or int32

Loops are those of the control flow (a branch to an instruction that dominates it). Of several loops the worst counts.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

BOUNDS = Path(__file__).resolve().parent / "cuda_bounds.txt"
COLUMNS = (
    *("registers", "shared", "stack", "code"),
    *("per IMMA", "per HMMA", "per 16 B", "per output", "B per output"),
)
Figures = Mapping[str, float | None]  # by column; None where there is nothing to count
Table = dict[tuple[str, str], Figures]  # by architecture and kernel

MATRIX = re.compile(r"\b(?:[IH]MMA|IGMMA)\.")
WIDE = re.compile(r"\b(?:LDG|STG|LDGSTS)\.E\.(?:\w+\.)*128")
BRANCH = re.compile(r"(?P<guard>@\S+ )?BRA\S* (?P<condition>.*?)0x(?P<target>[0-9a-f]+)")
BYTES = 16  # of an instruction
GRANULE = 8  # registers are given to a thread by as many
SLACK = 1.05  # by which counts may grow: another order of the same instructions
DEPTH = 4096


def figures(arguments: str, code: Sequence[str], registers: int, shared: int, stack: int, output_bytes: int) -> Figures:
    """The figures of a kernel, whose template arguments are in `arguments`, mangled."""
    all_loops = loops(code)
    with_matrix = [loop for loop in all_loops if any(MATRIX.search(code[place]) for place in loop)]
    others = [loop for loop in all_loops if loop not in with_matrix]
    found: dict[str, float | None] = dict.fromkeys(COLUMNS)
    found |= {"registers": registers, "shared": shared, "stack": stack}
    instructions = sum(not line.startswith("NOP") for line in code)
    found["code"] = instructions
    found["per IMMA"] = worst(code, with_matrix, re.compile(r"\bIG?MMA\."))
    found["per HMMA"] = worst(code, with_matrix, re.compile(r"\bHMMA\."))
    found["per 16 B"] = worst(code, others, WIDE)
    if sizes := tile_of(arguments):
        rows, cols, warp_rows, warp_cols = sizes
        over_k = {place for loop in with_matrix for place in loop}
        found["per output"] = round((instructions - len(over_k)) / (warp_rows * warp_cols / 32), 1)
        found["B per output"] = round(DEPTH / rows + DEPTH / cols + output_bytes, 2)
    return found


def tile_of(arguments: str) -> list[int] | None:
    """Rows and columns of the tile that a product computes, and of a warp's part of it."""
    if tile := re.search(r"4TileILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", arguments):
        return [int(size) for size in tile.groups()]
    if tile := re.search(r"9GroupTileILi(\d+)ELi(\d+)E", arguments):  # cuda/linear_wgmma.cuh
        return [int(tile[1]), int(tile[2]), 16, int(tile[2])]
    return None


def worst(code: Sequence[str], all_loops: Iterable[frozenset[int]], work: re.Pattern[str]) -> float | None:
    """The most instructions for each that is `work`, of the innermost loops that have any."""
    having = [loop for loop in all_loops if any(work.search(code[place]) for place in loop)]
    innermost = [loop for loop in having if not any(other < loop for other in having)]
    ratios = [len(loop) / sum(bool(work.search(code[place])) for place in loop) for loop in innermost]
    return round(max(ratios), 2) if ratios else None


def loops(code: Sequence[str]) -> list[frozenset[int]]:
    """The instructions of each natural loop; of what a subroutine does, nothing."""
    after = [successors(code, place) for place in range(len(code))]
    order, before = reachable(after)
    # Which instructions every way to one goes through, as bits.
    everything = (1 << len(code)) - 1
    dominators = dict.fromkeys(order, everything)
    changed = True
    while changed:
        changed = False
        for place in order:
            common = everything if before[place] else 0
            for each in before[place]:
                common &= dominators[each]
            own = (common if place else 0) | 1 << place
            changed, dominators[place] = changed or own != dominators[place], own
    bodies: dict[int, set[int]] = {}
    for place in order:
        for head in after[place]:
            if not dominators[place] >> head & 1:
                continue
            body, waiting = bodies.setdefault(head, {head}), [place]
            while waiting:
                if (each := waiting.pop()) not in body:
                    body.add(each)
                    waiting += before[each]
    return [frozenset(body) for head, body in bodies.items() if len(body) > 1 or head in after[head]]


def successors(code: Sequence[str], place: int) -> list[int]:
    """Where an instruction goes on."""
    following = [place + 1] if place + 1 < len(code) else []
    if match := BRANCH.match(code[place]):
        target = int(match["target"], 16) // BYTES
        return [target, *following] if match["guard"] or match["condition"] else [target]
    return [] if re.match(r"(EXIT|RET|BRX|JMP)\b", code[place]) else following


def reachable(after: Sequence[Sequence[int]]) -> tuple[list[int], dict[int, list[int]]]:
    """The instructions that the first leads to, each behind one that leads to it, and what leads to each."""
    before: dict[int, list[int]] = {0: []}
    order, waiting = [], [0]
    while waiting:
        place = waiting.pop()
        order.append(place)
        for target in after[place]:
            if target not in before:
                before[target] = []
                waiting.append(target)
            before[target].append(place)
    return order, before


def readable(mangled: Sequence[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters: linear_kernel<Tile<64,64,32,32,4>,0>."""
    command = ["c++filt", "--no-params"]
    text = subprocess.run(command, input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|\([\w:]+\)|\w+::|^void |\s", "", name) for name in text.splitlines()]


def written(table: Table) -> str:
    """A line for each architecture and kernel."""
    width = max(len(kernel) for _, kernel in table) + 2
    names = "".join(f"{name:>14}" for name in COLUMNS)
    lines = [f"{'arch':<8}{'kernel':<{width}}{names}"]
    for (architecture, kernel), own in table.items():
        shown = "".join(f"{'-' if (value := own[name]) is None else format(value, 'g'):>14}" for name in COLUMNS)
        lines.append(f"{architecture:<8}{kernel:<{width}}{shown}")
    return "\n".join(lines)


def read(text: str) -> Table:
    """What was written."""
    table: Table = {}
    for line in text.splitlines()[1:]:
        architecture, kernel, *values = line.split()
        numbers = [None if value == "-" else float(value) for value in values]
        table[architecture, kernel] = dict(zip(COLUMNS, numbers, strict=True))
    return table


def most(column: str, figure: float) -> float:
    """What is allowed where a figure was found before."""
    if column == "registers":
        return -(-figure // GRANULE) * GRANULE
    return figure if column in {"shared", "stack", "B per output"} else round(figure * SLACK, 2)


def over(table: Table, bounds: Table) -> list[str]:
    """The figures that are over their bounds; bounds without a kernel, and kernels without."""
    known = {architecture for architecture, _ in bounds}
    built = {architecture for architecture, _ in table}
    found = []
    for (architecture, kernel), own in table.items():
        if architecture not in known:
            continue
        if (bound := bounds.get((architecture, kernel))) is None:
            found.append(f"{architecture}: {kernel}: has no bounds")
            continue
        for column in COLUMNS:
            value, before = own[column], bound[column]
            if (value is None) != (before is None):
                found.append(f"{architecture}: {kernel}: {column}: expected {before}, got {value}")
            elif value is not None and before is not None and value > most(column, before):
                found.append(
                    f"{architecture}: {kernel}: {column}: expected at most {most(column, before):g} "
                    f"({before:g} before), got {value:g}"
                )
    missing = [(where, kernel) for where, kernel in bounds if where in built and (where, kernel) not in table]
    return found + [f"{architecture}: {kernel}: has bounds, but is not there" for architecture, kernel in missing]
