"""`octavo bench`: how long a linear layer takes in int8, in 16 and in 32 bit, on this machine.

`octavo.torch.Int8Linear`, as `octavo.torch.quantize_` makes it, against torch's linear in the dtypes asked for and
bitsandbytes' where that is installed, at shapes given or at those of a model. Every result is compared with the float64
product before anything is timed; then the layers take turns, call by call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_bench.bench.shapes import model_shapes
from octavo_bench.measuring.options import missing_packages, positive, wait_passively

if TYPE_CHECKING:
    from octavo_bench.measuring.contest import Contender

    from .report import Report

HIDDEN = (1024, 2048, 4096)
ROWS = (1, 16, 512)
DTYPES = ("bfloat16", "float16", "float32")
PACKAGES = ("octavo", "torch", "numpy", "bitsandbytes")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shapes: (k, n) -> how many layers of the model have it; 1 where there is no model.
        model: whose shapes these are.
        rows: tokens m.
        outliers: columns of X that are outlying.
        dtypes: of torch's linear; the first is also that of octavo's X and Y.
        seconds: of timing for each shape, all layers together.
        device: "cpu" or "cuda".
    """

    shapes: Mapping[tuple[int, int], int]
    model: Path | None = None
    rows: Sequence[int] = ROWS
    outliers: int = 6
    dtypes: Sequence[str] = ("bfloat16", "float32")
    seconds: float = 1.0
    device: str = "cpu"
    threads: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo bench`."""
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        metavar="MODEL",
        help="measure the linear layers of this model: a config.json, a folder with one, or an int8 checkpoint",
    )
    parser.add_argument(
        "--hidden", type=positive, nargs="+", metavar="W",
        help=f"layers w x w, w x 4w and 4w x w (features in x out); default: {_words(HIDDEN)}",
    )  # fmt: skip
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="K,N", help="layers of k input, n output features")
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=ROWS, metavar="M", help=f"tokens; default: {_words(ROWS)}"
    )
    parser.add_argument(
        "--outliers", type=_count, default=6, metavar="N", help="columns of X that are outlying; default: %(default)s"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=("bfloat16", "float32"),
        help="of torch's linear; the first is also that of what goes in and out of octavo's; default: bfloat16 float32",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores")
    parser.add_argument(
        "--seconds", type=_seconds, default=1.0, metavar="S",
        help="of timing for each shape and number of tokens, all together; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")


def main(args: argparse.Namespace) -> int:
    """`octavo bench`. Returns 0; 1 where octavo's own layer could not be measured; 2 for options that do not fit."""
    if sum(given is not None for given in (args.model, args.hidden, args.shapes)) > 1:
        print("octavo bench: MODEL, --hidden and --shapes exclude each other", file=sys.stderr)
        return 2
    missing = missing_packages(("torch",))
    if missing:
        raise RuntimeError(missing)
    if args.model is not None:
        shapes = model_shapes(args.model)
    else:
        widths = args.hidden or HIDDEN
        pairs = args.shapes or [(k, n) for w in widths for k, n in ((w, w), (w, 4 * w), (4 * w, w))]
        shapes = dict.fromkeys(pairs, 1)
    wait_passively()
    from octavo_bench.measuring import machine

    threads = args.threads or machine.available_cores()
    machine.set_threads(threads)
    settings = Settings(
        shapes,
        args.model,
        tuple(dict.fromkeys(args.rows)),
        args.outliers,
        tuple(dict.fromkeys(args.dtypes)),
        args.seconds,
        args.device,
        threads,
    )
    report = run(settings, show_progress=not args.quiet)
    print(report.as_json() if args.json else report.as_text())
    failure = report.failure()
    if failure:
        print(f"octavo bench: {failure}", file=sys.stderr)
    return 1 if failure else 0


def run(settings: Settings, *, show_progress: bool = True) -> Report:
    """Measure. Raises RuntimeError for a device that is not there."""
    import torch

    from octavo_bench.measuring import machine, turns
    from octavo_bench.measuring.contest import Case, measure
    from octavo_bench.measuring.progress import Progress

    from .report import Report

    _check_device(settings.device)
    chosen = layers(settings.dtypes)
    facts = machine.facts(settings.threads, PACKAGES) | {"device": settings.device}
    if settings.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    clock = turns.on_the_gpu if settings.device == "cuda" else turns.on_the_wall
    others = machine.Others()
    cases = []
    with torch.no_grad(), Progress(len(settings.shapes) * len(settings.rows), show=show_progress) as progress:
        for k, n in settings.shapes:
            of_shape = [Case(k, n, m, min(settings.outliers, k), settings.threads) for m in settings.rows]
            with progress.step(f"k={k} n={n}", len(of_shape)):
                measure(of_shape, chosen, settings.seconds, device=settings.device, clock=clock)
            cases += of_shape
    facts["cores_taken_by_others"] = others.cores()
    return Report(facts, settings, list(chosen), cases)


def layers(dtypes: Sequence[str]) -> dict[str, Contender]:
    """What is measured, by name, octavo first."""
    import torch

    from octavo_bench.measuring import contest
    from octavo_bench.measuring.schemes import THRESHOLD

    # Y is rounded once; X and W are exact in every dtype. What is left is the order of float32 sums.
    rounding = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5}
    dtype: torch.dtype = getattr(torch, dtypes[0])
    of_int8 = contest.within(THRESHOLD)
    found = {contest.OCTAVO: contest.Contender(contest.octavo_layer(dtype), dtype, of_int8)}
    for name in dtypes:
        dtype = getattr(torch, name)
        found[f"torch {name}"] = contest.Contender(contest.torch_linear(dtype), dtype, contest.at_most(rounding[name]))
    if not missing_packages(("bitsandbytes",)):
        layer = contest.bitsandbytes_linear(THRESHOLD)
        found["bitsandbytes"] = contest.Contender(layer, torch.float16, of_int8)
    return found


def _check_device(device: str) -> None:
    import octavo
    import torch

    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise RuntimeError(f"--device: expected one that is there, got cuda: torch {torch.__version__} sees no GPU")
    backends = octavo.info()["backends"]
    if "cuda" not in backends:
        raise RuntimeError(f"--device: expected one of octavo's backends ({', '.join(backends)}), got cuda")


def _shape(text: str) -> tuple[int, int]:
    words = text.split(",")
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"expected K,N, two whole numbers of at least 1, got {text!r}")
    return positive(words[0]), positive(words[1])


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
