"""The command ``octavo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("octavo: interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f"octavo {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    import octavo
    from octavo import analysis, demo, plan
    from octavo import eval as evaluation
    from octavo.checkpoint import commands as checkpoint

    parser = argparse.ArgumentParser(prog="octavo", description="LLM.int8() as a native library.")
    parser.add_argument("--version", action="version", version=f"octavo {octavo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo_parser = commands.add_parser("demo", help="convert a real sentence transformer to int8 and compare")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.main)

    quantize_parser = commands.add_parser("quantize", help="convert a checkpoint to int8, in bounded memory")
    checkpoint.add_quantize_arguments(quantize_parser)
    quantize_parser.set_defaults(run=checkpoint.run_quantize)

    inspect_parser = commands.add_parser("inspect", help="show what a checkpoint holds and what int8 saves")
    checkpoint.add_inspect_arguments(inspect_parser)
    inspect_parser.set_defaults(run=checkpoint.run_inspect)

    eval_parser = commands.add_parser("eval", help="perplexity of a language model by every scheme of the paper")
    evaluation.add_arguments(eval_parser)
    eval_parser.set_defaults(run=evaluation.main)

    analyze_parser = commands.add_parser("analyze", help="find the outlier features of a model, and what they carry")
    analysis.add_arguments(analyze_parser)
    analyze_parser.set_defaults(run=analysis.main)

    plan_parser = commands.add_parser("plan", help="say whether a model fits on given GPUs in int8 and in 16 bit")
    plan.add_arguments(plan_parser)
    plan_parser.set_defaults(run=plan.main)

    info_parser = commands.add_parser("info", help="show the version, backends and instruction set in use")
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    info_parser.set_defaults(run=_info)
    return parser


def _info(args: argparse.Namespace) -> int:
    import octavo

    info = octavo.info()
    if args.json:
        print(json.dumps(info, indent=2))
    else:
        _print_fields(info)
    return 0


def _print_fields(fields: dict[str, Any], indent: str = "") -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_fields(value, indent + "  ")
        else:
            print(f"{indent}{name}: {', '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    sys.exit(main())
