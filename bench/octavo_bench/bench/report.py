"""What was measured: as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from octavo_bench.measuring.contest import OCTAVO, Case, ratio
from octavo_bench.measuring.output import Table, as_text, to_json

if TYPE_CHECKING:
    from octavo_bench.bench import Settings


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        machine: what it was measured on.
        settings: what was asked.
        names: of the layers compared, octavo's first.
        cases: one for each shape and number of tokens.
    """

    machine: dict[str, Any]
    settings: Settings
    names: list[str]
    cases: list[Case]

    @property
    def peers(self) -> list[str]:
        """All but octavo's."""
        return [name for name in self.names if name != OCTAVO]

    def totals(self) -> list[dict[str, Any]]:
        """For a model: by number of tokens, the medians of all its linear layers together, in ms."""
        if self.settings.model is None:
            return []
        found = []
        for m in self.settings.rows:
            cases = [case for case in self.cases if case.m == m]
            times = {
                name: sum(self.settings.shapes[case.k, case.n] * case.times[name].median for case in cases)
                for name in self.names
                if all(name in case.times for case in cases)
            }
            found.append({"m": m, "layers": sum(self.settings.shapes.values()), "milliseconds": times})
        return found

    def failure(self) -> str | None:
        """Why octavo's own layer was not timed, where it was not."""
        for case in self.cases:
            if OCTAVO in case.left_out:
                return f"k={case.k} n={case.n} m={case.m}: {OCTAVO}: {case.left_out[OCTAVO]}"
        return None

    def as_json(self) -> str:
        """For programs."""
        settings = self.settings
        return to_json(
            {
                "format": 1,
                "machine": self.machine,
                "model": None if settings.model is None else str(settings.model),
                "dtypes": settings.dtypes,
                "seconds": settings.seconds,
                "cases": [
                    {
                        **asdict(case),
                        "layers": settings.shapes[case.k, case.n],
                        "ratios": {name: ratio(case, name) for name in self.peers if ratio(case, name) is not None},
                    }
                    for case in self.cases
                ],
                "totals": self.totals(),
            }
        )

    def as_text(self) -> str:
        """For people."""
        facts = self.machine
        packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
        others = facts["cores_taken_by_others"]
        where = f"{facts['gpu']}, beside {facts['cpu']}" if "gpu" in facts else facts["cpu"]
        lines = [
            f"{where}: {facts['instruction_set']}, {facts['threads']} of {facts['cores']} cores"
            + ("" if others is None else f"; other programs took {others:.2f}"),
            packages,
            "",
            as_text(self._cases()),
        ]
        if self.settings.model is not None:
            lines += ["", as_text(self._totals())]
        reasons = {f"{name}: {reason}" for case in self.cases for name, reason in case.left_out.items()}
        return "\n".join([*lines, *(f"left out: {reason}" for reason in sorted(reasons))])

    def _cases(self) -> Table:
        rows = []
        for case in self.cases:
            count = [str(self.settings.shapes[case.k, case.n])] if self.settings.model is not None else []
            cells = []
            for name in self.names:
                timing = case.times.get(name)
                if timing is None:
                    cells.append("left out")
                    continue
                factor = ratio(case, name)
                share = "" if name == OCTAVO or factor is None else f"  {factor:.2f}x"
                cells.append(f"{timing.median:.3f} [{timing.lower:.3f}, {timing.upper:.3f}]{share}")
            rows.append([f"{case.k} x {case.n}", *count, str(case.m), str(case.outliers), *cells])
        count = ["layers"] if self.settings.model is not None else []
        dtype = self.settings.dtypes[0]
        return Table(
            "Milliseconds of a call: median [quartiles], and how many times octavo's",
            ["k x n", *count, "m", "outliers", f"{OCTAVO}, {dtype}", *self.peers],
            rows,
            "Above 1x octavo is faster. Results were checked against float64 first; all were measured in turns.",
        )

    def _totals(self) -> Table:
        rows = []
        for total in self.totals():
            times = total["milliseconds"]
            cells = []
            for name in self.names:
                if name not in times:
                    cells.append("-")
                elif name == OCTAVO or OCTAVO not in times:
                    cells.append(f"{times[name]:.2f}")
                else:
                    cells.append(f"{times[name]:.2f}  {times[name] / times[OCTAVO]:.2f}x")
            rows.append([str(total["m"]), str(total["layers"]), *cells])
        return Table(
            f"{self.settings.model}: the medians of all linear layers together, milliseconds",
            ["m", "layers", OCTAVO, *self.peers],
            rows,
        )
