"""The command ``octavo``.

Each command is a function that adds its arguments to a parser and returns what runs it; the first line of its docstring
is its help. Other packages add commands in the same way, by entry points of the group ``octavo.commands``.
"""

import argparse
import inspect
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import octavo
from octavo import checkpoint, plan
from octavo._text import format_size, matches, parse_size, shown, table, unexpected
from octavo.checkpoint import convert
from octavo.checkpoint.folder import read_json
from octavo.checkpoint.layers import DEFAULT_SKIP, head_of
from octavo.file_format import Format
from octavo.options import WHOLE_MODELS, Options, options_of

_TRACEBACK = "OCTAVO_TRACEBACK"  # in the environment
_USAGE, _DOES_NOT_FIT = 2, 3  # exit statuses: arguments that do not fit each other; a model that does not fit
# Commands of the laboratory, a package of its own.
_ELSEWHERE = dict.fromkeys(("demo", "eval", "analyze", "bench"), "octavo-bench")

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.

    3 where `octavo plan` finds that a model does not fit. 141 where whoever reads the output has gone
    (``octavo inspect MODEL | head``): as a shell has it for other programs. A failure is said in one line;
    ``OCTAVO_TRACEBACK=1`` in the environment shows where it comes from, too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    if words and words[0] in _ELSEWHERE and not any(e.name == words[0] for e in entry_points(group="octavo.commands")):
        package = _ELSEWHERE[words[0]]
        print(f"octavo: {words[0]} is a command of {package}: pip install {package}", file=sys.stderr)
        return _USAGE
    args = parser.parse_args(words)
    # What reports say they were made with.
    args.command_line = shlex.join(["octavo", *words])
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("octavo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Else the interpreter complains once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get(_TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"octavo {args.command}: {_in_one_line(error, args.command)}", file=sys.stderr)
        return 1
    return status


def _in_one_line(error: Exception, command: str) -> str:
    """What an error says. Of those that octavo does not raise on purpose the type, too, and how to learn more."""
    text = shown(re.sub(r"\s*\n\s*", " ", str(error).strip()), 2000)
    if isinstance(error, (OSError, RuntimeError, ValueError)) and text:
        return text.removeprefix(f"{command}: ")  # functions put their name first, which here the command already is
    return f"{type(error).__name__}: {text} ({_TRACEBACK}=1 shows where)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to read on, in the place of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command and of all its subcommands."""
    parser = _Parser(prog="octavo", description="LLM.int8() as a native library.")
    parser.add_argument("--version", action="version", version=f"octavo {octavo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    registered: dict[str, Any] = {"quantize": _quantize, "inspect": _inspect, "plan": _plan, "info": _info}
    others = sorted(entry_points(group="octavo.commands"), key=lambda entry: entry.name)
    for name, register in {**registered, **{entry.name: entry.load() for entry in others}}.items():
        line = (register.__doc__ or "").partition("\n")[0]
        subparser = commands.add_parser(name, help=line[:1].lower() + line[1:].rstrip("."))
        subparser.set_defaults(run=register(subparser))
        if name in registered:
            subparser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


# --- quantize ---------------------------------------------------------------------------------------------------------


def _quantize(parser: argparse.ArgumentParser) -> Run:
    """Convert a checkpoint to int8, in bounded memory."""
    add = parser.add_argument
    add("model", type=Path, help="a Hugging Face folder, or a .safetensors, .bin or .pt file")
    add("output", type=Path, help="the folder to make; run again after an interruption to go on")
    about = described(convert.quantize)
    add("--format", choices=get_args(Format), default="octavo", help=about["format"])
    add_options(parser)
    add("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    skip = f"no layers that match; may be repeated; default: {' '.join(DEFAULT_SKIP)}"
    add("--skip", action="append", metavar="PATTERN", help=skip)
    add("--head", action=argparse.BooleanOptionalAction, help=about["head"])
    text = "run the model on a text file, or else on random tokens, and keep its systematic outlier columns in 16 bit"
    text += " (the model stays on the disk; needs transformers and accelerate)"
    add("--calibrate", type=Path, nargs="?", const=False, metavar="TEXT", help=text)
    bound = "choose options for each layer such that the model's divergence from what it was, measured on text, stays"
    bound += " within this, in nats a token (with --calibrate TEXT on that text; the model is in memory, in float32)"
    add("--kl", type=float, metavar="X", help=bound)
    trust = "with --calibrate and --kl: run the Python code that the model brings; without, such a model is refused"
    add("--trust-remote-code", action="store_true", help=trust)
    columns = "a file of the columns to keep by layer; with --calibrate it is written, or read if it is there; those of"
    columns += " layers that --include and --skip leave out are not used"
    add("--outlier-columns", type=Path, metavar="JSON", help=columns)
    add("--jobs", type=_positive, metavar="N", help=about["jobs"])
    add("--memory", type=partial(parse_size, least=1), metavar="SIZE", help=about["memory"])
    add("--quiet", action="store_true", help="no progress bar")
    return _run_quantize


def _run_quantize(args: argparse.Namespace) -> int:
    given = _given(args)
    calibrated = args.outlier_columns is not None or (args.calibrate is not None and args.kl is None)
    options = options_of("octavo quantize", default=convert.RECIPES[args.format], calibrated=calibrated, **given)
    wrong = convert.misfit(options, args.format, calibrated, args.head)
    if args.kl is not None and (given or calibrated or args.format == "bitsandbytes"):
        wrong = "--kl chooses the options, and goes with no others, no outlier columns and octavo's formats"
    if wrong:
        print(f"octavo quantize: {wrong}", file=sys.stderr)
        return _USAGE
    which: dict[str, Any] = {name: getattr(args, name) for name in ("include", "skip", "head")}
    which["progress"] = not args.quiet
    run = {**which, "text": args.calibrate or None, "trust_remote_code": args.trust_remote_code}
    choice = None if args.kl is None else checkpoint.choose_options(args.model, args.kl, **run)
    which |= {"layer_options": choice and choice.options, "measured": choice and choice.notes()}
    which["outlier_columns"] = _outlier_columns(args, options, run) if calibrated else None
    which |= {name: getattr(args, name) for name in ("format", "jobs", "memory")}
    report = checkpoint.quantize(args.model, args.output, options=options, **which)
    print(json.dumps(asdict(report), indent=2) if args.json else _text(report))
    return 0


def described(documented: Any) -> dict[str, str]:
    """What a docstring says of each argument or attribute, as help."""
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {6,}.+)*)", inspect.getdoc(documented) or "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("`", "").replace("%", "%%") for name, text in found}


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option of the command for each of `octavo.Options`, whose docstring is their help; see `_given`."""
    recipe = f"the options that are not given; default: {WHOLE_MODELS}, of bitsandbytes' format paper"
    parser.add_argument("--recipe", choices=("paper", "best"), help=recipe)
    for name, hint in get_type_hints(Options).items():
        choices = [value for value in get_args(hint) if isinstance(value, str)]
        number: dict[str, Any] = {"type": partial(_option, name, int if hint is int else float), "metavar": "X"}
        parser.add_argument(f"--{name}", **({"choices": choices} if choices else number), help=described(Options)[name])


def _option(name: str, kind: type, text: str) -> Any:
    try:
        return getattr(Options(**{name: kind(text)}), name)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"Options: {name}: ")) from None


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the recipe and of the options."""
    names = ("recipe", *(field.name for field in fields(Options)))
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _outlier_columns(args: argparse.Namespace, options: Options, run: dict[str, Any]) -> dict[str, list[int]]:
    path: Path | None = args.outlier_columns
    if path is not None and (path.exists() or args.calibrate is None):
        columns: dict[str, list[int]] = read_json(path)
        if not all(isinstance(own, list) and all(type(item) is int for item in own) for own in columns.values()):
            raise unexpected(path, '{"layer": [column, ...], ...}', "something else")
        # A file of columns may hold those of a run that chose other layers.
        columns = {n: own for n, own in columns.items() if not matches(n, args.skip or ())}
        return {n: own for n, own in columns.items() if args.include is None or matches(n, args.include)}
    head = head_of(args.head, options)
    columns = checkpoint.calibrate(args.model, **options.criterion, **{**run, "head": head})
    if path is not None:
        text = json.dumps(columns, indent=1) + "\n"
        convert.write_whole(path, lambda hidden: hidden.write_text(text, encoding="utf-8"))
    return columns


def _text(report: checkpoint.Report) -> str:
    lines = [
        f"{report.output}: {report.layers} linear layers in int8, "
        f"{format_size(report.source_bytes)} -> {format_size(report.output_bytes)}, {report.seconds:.1f} s"
    ]
    if report.left:
        lines += ["left as they are:", *_some([(shown(name), shown(report.reasons[name])) for name in report.left])]
    if report.not_copied:
        lines += ["not copied, as it links out of the model's folder:"]
        lines += _some([(shown(name),) for name in report.not_copied])
    if report.resumed:
        lines.append(f"{report.resumed} of {report.tensors} tensors were there from an interrupted run")
    return "\n".join(lines)


def _some(rows: Sequence[Sequence[str]], limit: int = 8) -> list[str]:
    more = [f"and {len(rows) - limit} more"] if len(rows) > limit else []
    return [f"  {line}" for line in [*table(rows[:limit], left=(0, 1)), *more]]


# --- inspect, plan, info ----------------------------------------------------------------------------------------------


def _inspect(parser: argparse.ArgumentParser) -> Run:
    """Show what a checkpoint holds and what int8 saves."""
    parser.add_argument("checkpoint", type=Path, help="a folder or file, int8 (octavo, bitsandbytes) or not")
    parser.add_argument("--verify", action="store_true", help="read everything and compare the checksums")

    def run(args: argparse.Namespace) -> int:
        summary = checkpoint.inspect(args.checkpoint, verify=args.verify)
        print(summary.as_json() if args.json else summary.as_table())
        return 0

    return run


def _plan(parser: argparse.ArgumentParser) -> Run:
    """Say whether a model fits on given GPUs in int8 and in 16 bit."""
    parser.epilog = f"Exit status: 0 where the model fits in int8, {_DOES_NOT_FIT} where it does not, 1 for a failure."
    add = parser.add_argument
    add("config", type=Path, help="a config.json, or the folder of a model")
    memory = "of each GPU, such as 24GB (24 * 2^30 bytes)"
    add("--gpu-memory", type=partial(parse_size, least=2**20), required=True, metavar="SIZE", help=memory)
    add("--gpus", type=_positive, default=1, metavar="N", help="how many; default: 1")
    add("--batch", type=_positive, default=1, metavar="N", help="sequences at a time; default: 1")
    add("--context", type=_positive, default=2048, metavar="N", help="tokens of each; default: 2048")
    reserve = "of each GPU, for its context, workspace and activations; default: 0.5GB"
    add("--reserve", type=parse_size, default=plan.DEFAULT_RESERVE, metavar="SIZE", help=reserve)

    def run(args: argparse.Namespace) -> int:
        asked = {name: getattr(args, name) for name in ("gpu_memory", "gpus", "batch", "context", "reserve")}
        file: Path = args.config / "config.json" if args.config.is_dir() else args.config
        if not file.exists():
            raise unexpected(file, "a model's config.json", "no such file", FileNotFoundError)
        found = plan.plan(read_json(file), **asked)
        print(found.as_json() if args.json else found.as_text())
        return 0 if found.int8.fits else _DOES_NOT_FIT

    return run


def _info(parser: argparse.ArgumentParser) -> Run:
    """Show the version, backends and instruction set in use."""
    verify = "compute a fixed set of layers on the CPU and compare the hash of their bits"
    parser.add_argument("--verify", action="store_true", help=verify)

    def run(args: argparse.Namespace) -> int:
        info = octavo.info()
        right = True
        if args.verify:
            from octavo.verify import EXPECTED, verify

            found = verify()
            right = found == EXPECTED
            info["verify"] = {"hash": found, "expected": EXPECTED, "right": right}
        print(json.dumps(info, indent=2) if args.json else "\n".join(_lines(info)))
        return 0 if right else 1

    return run


def _lines(fields: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in fields.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}  # CUDA's devices, by their number
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
