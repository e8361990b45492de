"""Reads each kind of result file into the same few things: a title, facts, sentences and tables.

The commands write their tables with the figures. The benchmarks write figures, of which tables are made here.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from octavo.measuring.output import Table

Content = Mapping[str, Any]
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Result:
    """What a result file says. `rank` is its place in the report; `details` are the facts that few readers need."""

    rank: int
    title: str
    facts: list[tuple[str, str]]
    details: list[tuple[str, str]]
    sentences: list[str]
    tables: list[Table]
    plots: list[str]  # names of the pictures that it says are its own


def read(content: Any, name: PurePosixPath) -> Result:
    """The result in a parsed JSON file. Raises ValueError, saying why, for JSON that is no result."""
    if not isinstance(content, dict):
        raise ValueError(f"no result: expected a JSON object, got {type(content).__name__}")
    kind = next((kind for kind in _KINDS if all(isinstance(content.get(key), each) for key, each in kind.keys)), None)
    if kind is None:
        raise ValueError("no result of octavo: it has no tables, and is of no benchmark that is known")
    try:
        tables = kind.tables(content)
        title = kind.title(content)
    except (LookupError, TypeError, AttributeError, ZeroDivisionError, StopIteration) as error:
        raise ValueError(f"not as {kind.what} writes it: {type(error).__name__}: {error}") from error
    own = content.get("title")
    title = own if isinstance(own, str) and own else title or name.stem.replace("_", " ")
    sentences = [line for line in _list(content.get("conclusions")) if isinstance(line, str)]
    plots = [name for name in _list(content.get("plots")) if isinstance(name, str)]
    return Result(kind.rank, title, _facts(content), _details(content), sentences, tables, plots)


# --- facts ------------------------------------------------------------------------------------------------------------


def _facts(content: Content) -> list[tuple[str, str]]:
    """What a measurement has to be read with. What the file does not say is "not recorded"."""
    machine, settings, options = (_dict(content.get(key)) for key in ("machine", "settings", "options"))
    context = _dict(content.get("context"))  # of google-benchmark
    info = _dict(_dict(machine.get("octavo_info")).get("cpu"))
    processor = str(machine.get("gpu") or machine.get("cpu") or context.get("host_name") or NOT_RECORDED)
    cores = machine.get("cores") or context.get("num_cpus")
    threads = machine.get("threads") or context.get("threads")
    isa = machine.get("instruction_set") or info.get("instruction_set") or context.get("instruction_set")
    count = (
        f"{_count(threads, 'thread')}, {_count(cores, 'core')}"
        if threads and cores
        else _count(cores, "core")
        if cores
        else ""
    )
    found = {
        "Command": content.get("command") or machine.get("command") or context.get("executable"),
        "Machine": ", ".join(str(part) for part in (processor, count, isa) if part),
        "Date": _date(machine.get("date") or context.get("date")),
        "Commit": content.get("commit") or machine.get("commit"),
        "Seed": next((_seed(each["seed"]) for each in (content, settings, options, machine) if "seed" in each), None),
    }
    return [(name, NOT_RECORDED if value in (None, "") else str(value)) for name, value in found.items()]


def _details(content: Content) -> list[tuple[str, str]]:
    machine = _dict(content.get("machine"))
    packages = _dict(machine.get("packages")) or machine
    names = ("octavo", "torch", "transformers", "numpy", "bitsandbytes", "torchao")
    versions = [f"{name} {packages[name]}" for name in names if isinstance(packages.get(name), str)]
    versions += [f"Python {machine['python']}"] if machine.get("python") else []
    environment = [f"{name}={value}" for name, value in _dict(machine.get("environment")).items() if value]
    busy = machine.get("cores_taken_by_others", content.get("other_programs_cores"))
    settings = {**_dict(content.get("settings")), **_dict(content.get("setting")), **_dict(content.get("shape"))}
    listed = [f"{name.replace('_', ' ')}: {value}" for name, value in settings.items() if _is_plain(value)]
    seconds = content.get("seconds")
    found = {
        "Versions": ", ".join(versions),
        "System": machine.get("system"),
        "Environment": " ".join(environment),
        "Other programs": f"took {busy:.2f} cores meanwhile" if isinstance(busy, float | int) else None,
        "Settings": "; ".join(listed),
        "Measured in": f"{seconds:.0f} s" if isinstance(seconds, float | int) else None,
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _seed(value: Any) -> str:
    """A seed, those of several things, or null where a result is written that draws nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {seed}" for name, seed in value.items())
    return "nothing is drawn" if value is None else str(value)


def _date(value: Any) -> Any:
    """A time as a reader has it: 2026-11-21 04:42 UTC."""
    try:
        time = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return value
    return value if time.tzinfo is None else f"{time.astimezone(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"


def _count(number: Any, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# --- tables that the file has -----------------------------------------------------------------------------------------


def _own_tables(content: Content) -> list[Table]:
    return [_own_table(number, each) for number, each in enumerate(content["tables"])]


def _own_table(number: int, table: Any) -> Table:
    where = f"tables[{number}]"
    if not isinstance(table, dict) or not isinstance(table.get("title"), str):
        raise ValueError(f"{where}: expected an object with a title")
    columns, rows, note = table.get("columns"), table.get("rows"), table.get("note")
    if not isinstance(columns, list) or not columns:
        raise ValueError(f"{where}: expected names of columns, got {columns!r}")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise ValueError(f"{where}: expected rows of {len(columns)} cells")
    return Table(
        table["title"], [_cell(each) for each in columns], [[_cell(each) for each in row] for row in rows],
        note if isinstance(note, str) else "",
    )  # fmt: skip


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _title_of_command(content: Content) -> str:
    """Of `octavo demo`; the others write one themselves."""
    return "MiniLM in int8" if "package" in _dict(content.get("settings")) else ""


# --- bench/linear.py, bench/gpu.py ------------------------------------------------------------------------------------

_OCTAVO = ("octavo int8", "octavo")  # with its defaults, as bench/linear.py and bench/gpu.py name it


def _linear_tables(content: Content) -> list[Table]:
    cases = content["cases"]
    names = list(dict.fromkeys(name for case in cases for name in case["times"]))
    octavo = next(name for name in _OCTAVO if name in names)
    peers = [name for name in names if name != octavo]
    ratios = [{peer: _ratio(case["times"], peer, octavo) for peer in peers} for case in cases]
    summary = []
    for peer in peers:
        found = [(ratio, case) for of_case, case in zip(ratios, cases, strict=True) if (ratio := of_case[peer])]
        if found:
            lowest, at = min(found, key=lambda pair: pair[0])
            values = [ratio for ratio, _ in found]
            where = f"{_shape_of(at)}, {_count(at['m'], 'row')}, {_count(at['outliers'], 'outlier column')}"
            spread = (lowest, statistics.median(values), max(values))
            summary.append([peer, str(len(values)), *(f"{value:.2f}x" for value in spread), where])
    reasons = sorted({f"{name}: {why}" for case in cases for name, why in case.get("left_out", {}).items()})
    left_out = " Left out: " + "; ".join(reasons) + "." if reasons else ""
    rows = []
    for case, of_case in zip(cases, ratios, strict=True):
        own = case["times"].get(octavo)
        cells = [f"{ratio:.2f}x" if (ratio := of_case[peer]) else "-" for peer in peers]
        shape = [_shape_of(case), str(case["m"]), str(case["outliers"])]
        rows.append([*shape, f"{_median(own):.3f}" if own else "-", *cells])
    return [
        Table(
            "Time of each peer over octavo's", ["peer", "cases", "lowest", "median", "highest", "lowest at"], summary,
            "Above 1: octavo is faster. The ratio of the medians of calls that took turns in one process.",
        ),
        Table(
            "Every case", ["k x n", "m", "outlier columns", "octavo, ms", *peers], rows,
            "k input features, n output features, m rows of X; the median of octavo's calls, and how many times as "
            "long each peer takes." + left_out,
        ),
    ]  # fmt: skip


def _shape_of(case: Content) -> str:
    """Of W, and how it was quantized where that is not by the defaults (bench/gpu.py)."""
    kinds = [case.get("scheme", "absmax"), case.get("granularity", "vector")]
    return ", ".join([f"{case['k']} x {case['n']}", *(kind for kind in kinds if kind not in ("absmax", "vector"))])


def _ratio(times: Content, peer: str, octavo: str) -> float | None:
    return _median(times[peer]) / _median(times[octavo]) if peer in times and octavo in times else None


def _median(spread: Any) -> float:
    """Of bench/linear.py's {median, lower, upper} and bench/gpu.py's [lower, median, upper]."""
    return float(spread["median"] if isinstance(spread, dict) else spread[1])


# --- bench/targets.py -------------------------------------------------------------------------------------------------


def _target_tables(content: Content) -> list[Table]:
    rows = []
    for line in content["lines"]:
        k, n, m = str(line["shape"]).split(", ")
        measured = "-" if line["measured"] is None else f"{line['measured']:.3g}{line['unit']}"
        target = f"{'<=' if line['at_most'] else '>='} {line['limit']:g}{line['unit']}"
        rows.append([f"{k} x {n}", m, line["what"], target, measured, line["verdict"], line["note"]])
    met = sum(line["verdict"] == "pass" for line in content["lines"])
    return [
        Table(
            f"{met} of {len(rows)} targets met",
            ["k x n", "m", "what", "target", "measured", "", "note"],
            rows,
            "One thread, bfloat16 in and out, 6 outlier columns unless a line says otherwise. "
            "k input features, n output features, m rows of X.",
        )
    ]


# --- bench/call_overhead.py, load tests of the server, bench/train_lm.py, the C++ benchmarks --------------------------


def _overhead_tables(content: Content) -> list[Table]:
    shape = content["shape"]
    rows = [
        [
            row["name"],
            *("-" if row[key] is None else f"{row[key]:.0f}" for key in ("min_ns", "median_ns", "over_core_ns")),
        ]
        for row in content["rows"]
    ]
    title = f"A call on {shape['m']} x {shape['k']} by {shape['k']} x {shape['n']}, ns"
    note = "Over the core: the lowest time less that of the same call in C++."
    return [Table(title, ["call", "lowest", "median", "over the core"], rows, note)]


def _serve_tables(content: Content) -> list[Table]:
    latencies = content["latency_ms"]
    columns = list(dict.fromkeys(key for spread in latencies.values() for key in spread))
    rows = [[name, *(f"{spread[key]:.0f}" for key in columns)] for name, spread in latencies.items()]
    sent = ", ".join(f"{count} {name}" for name, count in content["requests"].items())
    note = (
        f"{content['clients']} clients for {content['seconds']:.0f} s, batches of up to {content['batch']}; {sent}; "
        f"{content['requests_per_second']:.1f} requests and {content['tokens_per_second']:.0f} tokens a second. "
        f"Model: {content['model']}."
    )
    memory = content["memory_mib"]
    figures = ("first", "last", "highest", "mib_per_1000_requests")
    held = [[name, *(f"{spread[key]:.2f}" for key in figures)] for name, spread in memory.items()]
    grown = f"A server that leaks grows with the requests; allowed are {content['limit_mib_per_1000_requests']:g} MiB."
    return [
        Table("Time of a request, ms", ["request", *columns], rows, note),
        Table("Memory, MiB", ["memory", "first", "last", "highest", "per 1000 requests"], held, grown),
    ]


def _training_tables(content: Content) -> list[Table]:
    rows = [[name, f"{value:.6f}"] for name, value in content["perplexity"].items()]
    note = f"{content['parameters']:,} parameters; {content['heldout_windows']} windows that training never saw."
    return [Table("Held-out perplexity", ["model", "perplexity"], rows, note)]


def _google_tables(content: Content) -> list[Table]:
    listed = content["benchmarks"]
    standard = {"name", "family_index", "per_family_instance_index", "run_name", "run_type", "repetitions", "threads",
                "repetition_index", "iterations", "real_time", "cpu_time", "time_unit", "aggregate_name",
                "aggregate_unit", "label", "error_occurred", "error_message"}  # fmt: skip
    counters = list(dict.fromkeys(key for each in listed for key in each if key not in standard))
    rows = [
        [
            str(each["name"]),
            f"{each['real_time']:.4g} {each['time_unit']}",
            *(f"{each[key]:.4g}" if isinstance(each.get(key), float | int) else "-" for key in counters),
        ]
        for each in listed
        if "real_time" in each
    ]
    return [Table("Benchmarks", ["benchmark", "time", *counters], rows, "Time on the clock, for each iteration.")]


# --- kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """A kind of file: the keys it is known by, who writes it, its place in the report."""

    what: str
    keys: Sequence[tuple[str, type]]
    rank: int
    title: Callable[[Content], str]
    tables: Callable[[Content], list[Table]]


# A file with tables of its own needs no reader, so that comes first.
_KINDS = (
    _Kind("octavo", [("tables", list)], 0, _title_of_command, _own_tables),
    _Kind("bench/train_lm.py", [("perplexity", dict), ("parameters", int)], 1,
          lambda _: "A language model from the documentation", _training_tables),
    _Kind("bench/gpu.py", [("cases", list), ("ceilings", dict), ("machine", dict)], 2,
          lambda _: "The linear layer against its peers, on a GPU", _linear_tables),
    _Kind("bench/linear.py", [("cases", list), ("machine", dict)], 2,
          lambda _: "The linear layer against its peers", _linear_tables),
    _Kind("bench/targets.py", [("lines", list), ("machine", dict)], 3,
          lambda _: "Speed against its targets", _target_tables),
    _Kind("bench/call_overhead.py", [("rows", list), ("shape", dict)], 4,
          lambda _: "What calling costs", _overhead_tables),
    _Kind("the load test of the server", [("latency_ms", dict), ("requests", dict)], 4,
          lambda _: "The server under load", _serve_tables),
    _Kind("google-benchmark", [("benchmarks", list), ("context", dict)], 5,
          lambda content: PurePosixPath(str(content["context"].get("executable", ""))).name, _google_tables),
)  # fmt: skip
