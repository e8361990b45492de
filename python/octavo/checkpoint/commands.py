"""The commands ``octavo quantize`` and ``octavo inspect``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from octavo._sizes import format_size, parse_size, positive, shown, table
from octavo.checkpoint.calibrate import calibrate
from octavo.checkpoint.convert import Report, quantize
from octavo.checkpoint.layers import DEFAULT_SKIP
from octavo.checkpoint.summary import inspect
from octavo.options import Options

_USAGE = 2  # the exit status for arguments that do not fit each other, as argparse has it for those it checks


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo quantize`."""
    add = parser.add_argument
    default = Options()
    add("model", type=Path, help="a Hugging Face folder, or a .safetensors, .bin or .pt file")
    add("output", type=Path, help="the folder to make; run again after an interruption to go on")
    add("--format", choices=("octavo", "bitsandbytes"), default="octavo", help="default: octavo")
    add("--scheme", choices=("absmax", "zeropoint"), default=default.scheme, help="default: absmax")
    granularities = ("vector", "row", "tensor")
    add("--granularity", choices=granularities, default=default.granularity, help="of the product; default: vector")
    add("--threshold", type=_threshold, default=default.threshold, metavar="X", help="of outliers; default: 6")
    policies = ("columns", "rows", "static", "none")
    add("--outliers", choices=policies, default=default.outliers, help="default: columns")
    add("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    skip = f"no layers that match; may be repeated; default: {' '.join(DEFAULT_SKIP)}"
    add("--skip", action="append", metavar="PATTERN", help=skip)
    text = (
        "run the model on a text file and keep its systematic outlier columns in 16 bit (the model stays on the disk; "
    )
    add("--calibrate", type=Path, metavar="TEXT", help=f"{text}needs transformers and accelerate)")
    trust = "with --calibrate: run the Python code that the model brings; without, such a model is refused"
    add("--trust-remote-code", action="store_true", help=trust)
    columns = (
        "a file of the columns to keep by layer; with --calibrate it is written, or read if it is there; those of "
    )
    columns += "layers that --include and --skip leave out are not used"
    add("--outlier-columns", type=Path, metavar="JSON", help=columns)
    add("--jobs", type=positive, metavar="N", help="tensors at a time; default: threads, at most 8")
    memory = "for the weights of all jobs together; default: that of the largest tensor in float32"
    add("--memory", type=_memory, metavar="SIZE", help=memory)
    add("--quiet", action="store_true", help="no progress bar")
    add("--json", action="store_true", help="print the report as JSON")


def run_quantize(args: argparse.Namespace) -> int:
    """`octavo quantize`. Returns the exit status."""
    calibrated = args.calibrate is not None or args.outlier_columns is not None
    if args.format == "bitsandbytes" and (args.scheme != "absmax" or args.granularity != "vector" or calibrated):
        return _wrong("--format bitsandbytes goes with --scheme absmax, --granularity vector and no outlier columns")
    if args.outliers == "static" and not calibrated:
        return _wrong("--outliers static needs --calibrate or --outlier-columns")
    report = quantize(
        args.model,
        args.output,
        options=Options(
            scheme=args.scheme, granularity=args.granularity, threshold=args.threshold, outliers=args.outliers
        ),
        include=args.include,
        skip=args.skip,
        outlier_columns=_outlier_columns(args) if calibrated else None,
        format=args.format,
        jobs=args.jobs,
        memory=args.memory,
        progress=not args.quiet,
    )
    print(json.dumps(asdict(report), indent=2) if args.json else _text(report))
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo inspect`."""
    parser.add_argument("checkpoint", type=Path, help="a folder or file, int8 (octavo, bitsandbytes) or not")
    parser.add_argument("--verify", action="store_true", help="read everything and compare the checksums")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_inspect(args: argparse.Namespace) -> int:
    """`octavo inspect`. Returns the exit status."""
    summary = inspect(args.checkpoint, verify=args.verify)
    print(summary.as_json() if args.json else summary.as_table())
    return 0


def _threshold(text: str) -> float:
    try:
        return Options(threshold=float(text)).threshold
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}") from None


def _memory(text: str) -> int:
    size = parse_size(text)
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected at least a byte, got {text!r}")
    return size


def _wrong(message: str) -> int:
    print(f"octavo quantize: {message}", file=sys.stderr)
    return _USAGE


def _outlier_columns(args: argparse.Namespace) -> dict[str, list[int]]:
    path: Path | None = args.outlier_columns
    if path is not None and (path.exists() or args.calibrate is None):
        return {layer: own for layer, own in _read_columns(path).items() if _asked_for(layer, args)}
    columns = calibrate(
        args.model,
        args.calibrate,
        threshold=args.threshold,
        include=args.include,
        skip=args.skip,
        progress=not args.quiet,
        trust_remote_code=args.trust_remote_code,
    )
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    return columns


def _asked_for(layer: str, args: argparse.Namespace) -> bool:
    """Whether the patterns given choose a layer: a file of columns may hold those of a run that had none."""
    included = args.include is None or any(fnmatchcase(layer, pattern) for pattern in args.include)
    return included and not any(fnmatchcase(layer, pattern) for pattern in args.skip or ())


def _read_columns(path: Path) -> dict[str, list[int]]:
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {shown(str(error))}") from error
    if not isinstance(columns, dict) or not all(_is_list_of_ints(own) for own in columns.values()):
        raise ValueError(f'{path}: expected {{"layer": [column, ...], ...}}, got something else')
    return columns


def _is_list_of_ints(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _text(report: Report) -> str:
    lines = [
        f"{report.output}: {report.layers} linear layers in int8, "
        f"{format_size(report.source_bytes)} -> {format_size(report.output_bytes)}, {report.seconds:.1f} s"
    ]
    if report.left:
        lines += ["left as they are:", *_some([(shown(name), report.reasons[name]) for name in report.left])]
    if report.not_copied:
        lines += [
            "not copied, as it links out of the model's folder:",
            *_some([(shown(n),) for n in report.not_copied]),
        ]
    if report.resumed:
        lines.append(f"{report.resumed} of {report.tensors} tensors were there from an interrupted run")
    return "\n".join(lines)


def _some(rows: Sequence[Sequence[str]], limit: int = 8) -> list[str]:
    more = [f"and {len(rows) - limit} more"] if len(rows) > limit else []
    return [f"  {line}" for line in [*table(rows[:limit], left=(0, 1)), *more]]
