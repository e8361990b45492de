"""The commands ``octavo quantize`` and ``octavo inspect``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from octavo._sizes import format_size, parse_size, positive
from octavo.checkpoint.calibrate import calibrate
from octavo.checkpoint.convert import Report, quantize
from octavo.checkpoint.layers import DEFAULT_SKIP
from octavo.checkpoint.summary import inspect

_USAGE = 2  # the exit status for arguments that do not fit each other, as argparse has it for those it checks


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo quantize`."""
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a .safetensors, .bin or .pt file")
    parser.add_argument("output", type=Path, help="the folder to make; run again after an interruption to go on")
    parser.add_argument("--format", choices=("octavo", "bitsandbytes"), default="octavo", help="default: octavo")
    parser.add_argument("--scheme", choices=("absmax", "zeropoint"), default="absmax", help="default: absmax")
    parser.add_argument(
        "--granularity", choices=("vector", "row", "tensor"), default="vector", help="of the product; default: vector"
    )
    parser.add_argument("--threshold", type=_threshold, default=6.0, metavar="X", help="of outliers; default: 6")
    parser.add_argument(
        "--outliers", choices=("columns", "rows", "static", "none"), default="columns", help="default: columns"
    )
    parser.add_argument("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help=f"no layers that match; may be repeated; default: {' '.join(DEFAULT_SKIP)}",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT",
        help="run the model on a text file and keep its systematic outlier columns in 16 bit (the model stays on the "
        "disk; needs transformers and accelerate)",
    )
    parser.add_argument(
        "--outlier-columns",
        type=Path,
        metavar="JSON",
        help="a file of the columns to keep by layer; with --calibrate it is written, or read if it is there; those of "
        "layers that --include and --skip leave out are not used",
    )
    parser.add_argument("--jobs", type=positive, metavar="N", help="tensors at a time; default: threads, at most 8")
    parser.add_argument(
        "--memory",
        type=_memory,
        metavar="SIZE",
        help="for all jobs together; default: that of the largest tensor in float32",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


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
        scheme=args.scheme,
        granularity=args.granularity,
        threshold=args.threshold,
        outliers=args.outliers,
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
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value


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
    )
    if path is not None:
        beside = path.with_name(path.name + ".partial")
        beside.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    return columns


def _asked_for(layer: str, args: argparse.Namespace) -> bool:
    """Whether the patterns given choose a layer: a file of columns may hold those of a run that had none."""
    included = args.include is None or any(fnmatch.fnmatchcase(layer, pattern) for pattern in args.include)
    return included and not any(fnmatch.fnmatchcase(layer, pattern) for pattern in args.skip or ())


def _read_columns(path: Path) -> dict[str, list[int]]:
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
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
        lines.append(f"left as they are: {_some(report.left)}")
    if report.resumed:
        lines.append(f"{report.resumed} of {report.tensors} tensors were there from an interrupted run")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    shown = 8
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
