"""The command ``octavo``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from octavo._sizes import shown

_TRACEBACK = "OCTAVO_TRACEBACK"  # in the environment


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
        return 2
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
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


# Commands of the laboratory, a package of its own.
_ELSEWHERE = dict.fromkeys(("demo", "eval", "analyze", "bench"), "octavo-bench")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command and of all its subcommands.

    Other packages add commands by entry points of the group ``octavo.commands``: functions that add their arguments to
    the parser given and return what runs the command; the first line of their docstring is the command's help.
    """
    import octavo
    from octavo import plan
    from octavo.checkpoint import commands as checkpoint

    parser = _Parser(prog="octavo", description="LLM.int8() as a native library.")
    parser.add_argument("--version", action="version", version=f"octavo {octavo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    for name, add_arguments, run, text in (
        ("quantize", checkpoint.add_quantize_arguments, checkpoint.run_quantize,
         "convert a checkpoint to int8, in bounded memory"),
        ("inspect", checkpoint.add_inspect_arguments, checkpoint.run_inspect,
         "show what a checkpoint holds and what int8 saves"),
        ("plan", plan.add_arguments, plan.main, "say whether a model fits on given GPUs in int8 and in 16 bit"),
        ("info", _add_info_arguments, _info, "show the version, backends and instruction set in use"),
    ):  # fmt: skip
        subparser = commands.add_parser(name, help=text)
        add_arguments(subparser)
        subparser.set_defaults(run=run)

    for entry in sorted(entry_points(group="octavo.commands"), key=lambda entry: entry.name):
        register = entry.load()
        help_line = (register.__doc__ or "").partition("\n")[0]
        subparser = commands.add_parser(entry.name, help=help_line[:1].lower() + help_line[1:].rstrip("."))
        subparser.set_defaults(run=register(subparser))
    return parser


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compute a fixed set of layers on the CPU and compare the hash of their bits",
    )


def _info(args: argparse.Namespace) -> int:
    import octavo

    info = octavo.info()
    right = True
    if args.verify:
        from octavo.verify import EXPECTED, verify

        found = verify()
        right = found == EXPECTED
        info["verify"] = {"hash": found, "expected": EXPECTED, "right": right}
    if args.json:
        print(json.dumps(info, indent=2))
    else:
        _print_fields(info)
    return 0 if right else 1


def _print_fields(fields: dict[str, Any], indent: str = "") -> None:
    for name, value in fields.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}  # CUDA's devices, by their number
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_fields(value, indent + "  ")
        else:
            print(f"{indent}{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


if __name__ == "__main__":
    sys.exit(main())
