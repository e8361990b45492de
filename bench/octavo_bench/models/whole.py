"""Times whole models in octavo and in other engines, in one run and one process, calls in turns.

    python -m octavo_bench whole smollm2 --threads 1 --json whole.json

Language models: the logits of the last token of prompts, and greedy decoding; encoders: the last hidden states of
padded batches of sentences. Every engine's outputs are compared with torch's in float32 before anything is timed: the
relative error stands beside its times. What it takes to load a model, in time and memory, is measured in a process of
its own for each engine. Files that an engine needs (int8 folders, GGUF, CTranslate2's) are made once, in the cache.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import octavo.checkpoint
import torch
from octavo import Options, recipe
from torch import Tensor

from .. import machine
from ..commands import expect_known
from ..progress import Progress
from ..tables import Report, Table
from ..turns import on_the_cpu, on_the_wall, take_turns
from . import find
from .modules import linear_layers
from .peers import ctranslate2_decoder, llama_cpp, onnxruntime_encoder, openvino_int8
from .variants import attempt, bitsandbytes_layer

REFERENCE = "torch float32"
_BEST, _CALIBRATED = recipe("best"), recipe("best", calibrated=True)
WRONG = 0.5  # relative error of an engine whose files or calls cannot be right


@dataclass(frozen=True)
class Case:
    """What is timed: a prompt or, with `new` tokens, decoding; of an encoder a batch of sentences."""

    name: str
    batch: int
    tokens: int = 0
    new: int = 0


DECODER = (
    Case("prompt of 128 tokens", 1, 128),
    Case("prompt of 512 tokens", 1, 512),
    Case("16 new tokens, batch 1", 1, 8, 16),
    Case("16 new tokens, batch 8", 8, 8, 16),
)
ENCODER = tuple(Case(f"{count} sentence{'s' * (count > 1)}", count) for count in (1, 16, 64))


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    Attributes:
        make: of a folder: a function of token ids ``[b, t]``, a mask and new tokens that gives what `REFERENCE` gives.
        package: that has to be installed.
        kinds: of models: "decoder", "encoder".
    """

    make: Callable[[Path], Callable[[Tensor, Tensor, int], Any]]
    package: str = "torch"
    kinds: tuple[str, ...] = ("decoder", "encoder")


def _torch(dtype: torch.dtype, change: Callable[[Any], Any], folder: Path, **options: Any) -> Any:
    """A model of Transformers, changed."""
    import transformers

    kind = transformers.AutoModelForCausalLM if is_decoder(folder) else transformers.AutoModel
    model = kind.from_pretrained(folder, dtype=dtype, **options).eval()
    change(model)

    @torch.inference_mode()
    def run(ids: Tensor, mask: Tensor, new: int) -> Tensor:
        if not is_decoder(folder):
            hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
            return hidden[mask.bool()].float()
        found = model(ids, logits_to_keep=1, use_cache=new > 0)
        for _ in range(new - 1):
            ids = found.logits.argmax(-1)
            found = model(ids, past_key_values=found.past_key_values, logits_to_keep=1)
        logits: Tensor = found.logits[:, -1].float()
        return logits

    return run


def _octavo(dtype: torch.dtype, folder: Path, options: Options = _BEST, head: bool | None = None) -> Any:
    """The folder as ``octavo quantize --format packed`` makes it, by default; with --calibrate for those options."""
    made_with = hashlib.sha256(f"{options.text} {head}".encode()).hexdigest()[:8]
    packed = find.cache() / f"{folder.name}-int8-{made_with}"
    if not packed.exists():
        given: dict[str, Any] = {"options": options, "head": head, "format": "packed", "progress": False}
        if options == _CALIBRATED:
            given["outlier_columns"] = octavo.checkpoint.calibrate(folder, **options.criterion, progress=False)
        octavo.checkpoint.quantize(folder, packed, **given)
    return _torch(dtype, lambda model: None, packed)


def _bitsandbytes(model: Any) -> None:
    for name, linear in list(linear_layers(model)):
        model.set_submodule(name, bitsandbytes_layer(linear))


def _torchao(model: Any) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


_16, _32 = torch.bfloat16, torch.float32
ENGINES: Mapping[str, Engine] = {
    "octavo float32": Engine(partial(_octavo, _32)),
    "octavo bfloat16": Engine(partial(_octavo, _16)),
    "octavo bfloat16, 16-bit head": Engine(partial(_octavo, _16, head=False), kinds=("decoder",)),
    "octavo bfloat16, calibrated": Engine(partial(_octavo, _16, options=_CALIBRATED), kinds=("decoder",)),
    "octavo bfloat16, LLM.int8()": Engine(partial(_octavo, _16, options=recipe("paper"))),
    "octavo bfloat16, vector-wise": Engine(partial(_octavo, _16, options=Options(outliers="none"))),
    REFERENCE: Engine(partial(_torch, _32, lambda model: None)),
    "torch bfloat16": Engine(partial(_torch, _16, lambda model: None)),
    "bitsandbytes": Engine(partial(_torch, torch.float16, _bitsandbytes), "bitsandbytes"),
    "torchao": Engine(partial(_torch, _16, _torchao), "torchao"),
    "llama.cpp Q8_0": Engine(llama_cpp, "xllamacpp", ("decoder",)),
    "CTranslate2 int8": Engine(ctranslate2_decoder, "ctranslate2", ("decoder",)),
    "OpenVINO int8": Engine(lambda folder: openvino_int8(is_decoder(folder), folder), "openvino"),
    "ONNX Runtime float32": Engine(partial(onnxruntime_encoder, "float32"), "onnxruntime", ("encoder",)),
    "ONNX Runtime int8": Engine(partial(onnxruntime_encoder, "int8"), "onnxruntime", ("encoder",)),
    "octavo in ONNX Runtime": Engine(partial(onnxruntime_encoder, "operator"), "onnxruntime", ("encoder",)),
}


def is_decoder(folder: Path) -> bool:
    """Whether a folder's model predicts the next token."""
    architectures = json.loads((folder / "config.json").read_text())["architectures"]
    return any(name.endswith("ForCausalLM") for name in architectures)


def inputs(folder: Path, case: Case) -> tuple[Tensor, Tensor, int]:
    """Token ids, drawn, or of sentences; their mask; how many are to follow."""
    if case.tokens:
        words = json.loads((folder / "config.json").read_text())["vocab_size"]
        ids = torch.randint(words, (case.batch, case.tokens), generator=torch.Generator().manual_seed(case.tokens))
        return ids, torch.ones_like(ids), case.new
    from transformers import AutoTokenizer

    text = (files("octavo.checkpoint") / "text.txt").read_text(encoding="utf-8")
    own = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    sentences = [own[index % len(own)] for index in range(case.batch)]
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"], 0


def command(args: argparse.Namespace, facts: machine.Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench whole``."""
    expect_known("--engines", args.engines or (), ENGINES)
    folder = {**find.NAMED, "llama": find.llama}[args.model]()
    if args.load:  # the child of `_load`
        print(json.dumps(_load_here(ENGINES[args.load], folder)))
        sys.exit()
    return run(args, folder, facts, progress), None


def run(args: argparse.Namespace, folder: Path, facts: machine.Facts, progress: Progress) -> Report:
    """The table of a model."""
    threads = torch.get_num_threads()
    kind = "decoder" if is_decoder(folder) else "encoder"
    asked = {*(args.engines or ENGINES), REFERENCE}
    wanted = {name: engine for name, engine in ENGINES.items() if kind in engine.kinds and name in asked}
    not_here = {name: each.package for name, each in wanted.items() if importlib.util.find_spec(each.package) is None}
    missing = {name: f"{package} is not installed" for name, package in not_here.items()}
    progress.begin(2 * len(wanted) + 1)
    made: dict[str, Any] = {}
    loads: dict[str, Mapping[str, float]] = {}
    for name, engine in wanted.items():
        if name in missing:
            continue
        with progress.step(f"loading {name}", 2), attempt(name, missing):
            made[name] = engine.make(folder)
            loads[name] = _load(name, args.model, threads) if args.loads else {}
    cases = DECODER if kind == "decoder" else ENCODER
    given = {case: inputs(folder, case) for case in cases}
    expected = _every(made[REFERENCE], given)
    errors: dict[str, float] = {}
    for name, engine in made.items():
        with attempt(name, missing):
            errors[name] = float((_every(engine, given) - expected).norm() / expected.norm())
            if not errors[name] < WRONG:
                raise RuntimeError(f"expected {REFERENCE}'s outputs, got others: relative error {errors[name]:.2f}")
    made = {name: engine for name, engine in made.items() if name not in missing}
    clock = on_the_cpu if threads == 1 else on_the_wall
    times: dict[str, list[float]] = {name: [] for name in made}
    with progress.step("timing"):
        for case in cases:
            calls = {name: partial(engine, *given[case]) for name, engine in made.items()}
            for name, samples in take_turns(calls, args.seconds, least=args.rounds, clock=clock).items():
                times[name].append(statistics.median(samples))
    first = next((name for name in ("octavo bfloat16", *made) if name in made and name.startswith("octavo")), REFERENCE)
    columns = {"engine": "", "error": ".4f", **{f"{case.name}, ms": ".1f" for case in cases}}
    columns |= {f"{case.name}, to octavo": ".2f" for case in cases}
    columns |= {"load, s": ".1f", "peak, MiB": ".0f", "steady, MiB": ".0f"}
    rows = []
    for name, own in times.items():
        ratios = [each / base for each, base in zip(own, times[first], strict=True)]
        memory = [loads[name].get(each) for each in ("seconds", "peak", "steady")]
        rows.append([name, errors[name], *own, *ratios, *memory])
    about = f"{args.model}, {threads} thread{'s' * (threads > 1)}"
    note = f"Times are {'processor' if threads == 1 else 'wall'} time, medians of calls in turns; load, peak and steady"
    note += " memory of a process of its own, above what the imports take."
    versions = {each.package: machine.installed(each.package) for each in wanted.values()}
    left = [f"{name}: left out: {why}" for name, why in missing.items()]
    told = facts.now(model=args.model, engines=versions)
    return Report(f"Whole models: {about}", told, [Table(about, columns, rows, note)], left)


def _every(engine: Any, given: Mapping[Case, Any]) -> Tensor:
    """Its outputs for all that is given, without new tokens."""
    return torch.cat([torch.as_tensor(engine(ids, mask, 0)).flatten() for ids, mask, _ in given.values()])


def _load(name: str, model: str, threads: int) -> Mapping[str, float]:
    words = [sys.executable, "-m", "octavo_bench", "whole", model, "--load", name, "--threads", str(threads), "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _load_here(engine: Engine, folder: Path) -> dict[str, float]:
    """Seconds and MiB that a model takes to load and to be used once: the highest is counted from here on."""
    import octavo.transformers  # noqa: F401 (what engines import is not their model)
    import transformers  # noqa: F401

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.process_time()
    model = engine.make(folder)
    seconds = time.process_time() - begin
    model(*inputs(folder, (DECODER if is_decoder(folder) else ENCODER)[0])[:2], 0)
    return {"seconds": seconds, "peak": _status("VmHWM") - before, "steady": _status("VmRSS") - before}


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {name} in /proc/self/status, got none: this is no Linux")
