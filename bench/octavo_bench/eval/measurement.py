"""The measurement itself, from top to bottom: what to run, every variant of the model on it, and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo_bench.measuring import language, machine, schemes
from octavo_bench.measuring.language import Language, Window
from octavo_bench.measuring.peers import BROKEN, PEERS, reason
from octavo_bench.measuring.progress import Progress
from octavo_bench.measuring.turns import spread, take_turns

from . import Settings, embeddings, perplexity, tasks, variants
from .report import Report, Timed
from .variants import Variant

# Of timing the peers. A time's ratio to octavo's is that of one round, and few rounds say little of their median.
_ROUNDS = 15


def run(
    model: Path, text: Path, settings: Settings, *, threads: int = 1, show_progress: bool = True, command: str = ""
) -> Report:
    """See `octavo_bench.eval.run`."""
    start = time.perf_counter()
    wanted = variants.chosen(settings.schemes)
    loaded = _load(model, settings)
    windows, calibration = _windows(loaded, text, settings, any(scheme.kept or scheme.smooth for scheme in wanted))
    questions = tasks.read(settings.task, loaded, settings.questions) if settings.task is not None else []
    found, left_out = variants.of_schemes(
        loaded.model,
        wanted,
        [window.inputs for window in calibration],
        insert=not loaded.causal,
        required=settings.schemes is not None,
    )
    peers: list[Variant] = []
    if settings.peers:
        peers, missing = variants.of_peers(loaded.model)
        left_out |= missing
    shown = {scheme.key for scheme in wanted} | {peer.key for peer in peers}
    measured = _Measured(loaded, windows, questions)
    times: list[Timed] = []
    untimed: dict[str, str] = {}
    packages = tuple(peer.package for peer in PEERS) if settings.peers else ()
    facts = machine.facts(threads, (*machine.PACKAGES, *packages))
    timing = 10 * settings.seconds if settings.peers else 0.0
    with Progress(measured.units * (len(found) + len(peers)) + timing, show=show_progress) as progress:
        for variant in (*found, *peers):
            try:
                measured.run(variant, progress, variant.key in shown)
            except BROKEN as error:
                if variant not in peers:
                    raise
                left_out[variant.name] = reason(error)
        if settings.peers:
            with progress.step("timing", timing):
                running = [peer for peer in peers if peer.name not in left_out]
                others = machine.Others()
                times, untimed = _times(loaded.model, running, windows[0], settings.seconds)
                facts["cores_taken_by_others"] = others.cores()
    return Report(
        command=command,
        machine=facts,
        settings={
            "model": str(model),
            "architecture": type(loaded.model).__name__,
            "parameters": loaded.model.num_parameters(),
            "text": str(text),
            "calibration": str(settings.calibration or text),
            "calibration_windows": len(calibration),
            "window": max(window.ids.shape[1] for window in windows),
            "stride": settings.stride,
            "threshold": schemes.THRESHOLD,
            "task": None if settings.task is None else str(settings.task),
            "questions": len(questions),
        },
        windows=len(windows),
        tokens=sum(window.scored if loaded.causal else window.ids.shape[1] for window in windows),
        causal=loaded.causal,
        results=measured.results,
        similarities=measured.similarities,
        accuracies=measured.accuracies,
        left_out=left_out,
        times=times,
        untimed=untimed,
        timed_tokens=windows[0].ids.shape[1],
        seconds=time.perf_counter() - start,
    )


def _load(model: Path, settings: Settings) -> Language:
    loaded = language.load(model)
    if not loaded.causal:
        found = loaded.model.config.architectures
        for option, value in (("--task", settings.task), ("--stride", settings.stride)):
            if value is not None:
                raise ValueError(
                    f"{option}: expected a causal language model in config.json's architectures, got {found}"
                )
        if getattr(loaded.model, "pooler", None) is not None:
            loaded.model.pooler = None  # embeddings are means of the last hidden states
    return loaded


def _windows(loaded: Language, text: Path, settings: Settings, calibrated: bool) -> tuple[list[Window], list[Window]]:
    """What is scored, and what is calibrated with."""
    count = settings.calibration_windows

    def read(path: Path, stride: int | None = None, limit: int | None = None) -> list[Window]:
        if loaded.causal:
            return language.read_windows(loaded, path, settings.window, stride, limit)
        return embeddings.read_passages(loaded, path, settings.window, limit)

    windows = read(text, settings.stride)
    calibration: list[Window] = []
    if calibrated and settings.calibration is not None:
        calibration = read(settings.calibration, limit=count)
    elif calibrated:
        calibration, windows = perplexity.set_aside(windows, count)
        if not windows:
            raise ValueError(
                f"{text}: expected more than the {count} windows of the calibration, got {len(calibration)} "
                "(give --calibration FILE, or fewer --calibration-windows)"
            )
    return windows[: settings.limit], calibration


class _Measured:
    """The rows, filled one variant after the other; float32 must be the first."""

    def __init__(self, loaded: Language, windows: Sequence[Window], questions: Sequence[tasks.Question]) -> None:
        self._loaded, self._windows, self._questions = loaded, windows, questions
        self._reference: Any = None
        self._answers: list[int] = []
        self.results: list[perplexity.Result] = []
        self.similarities: list[embeddings.Similarity] = []
        self.accuracies: list[tasks.Accuracy] = []

    @property
    def units(self) -> float:
        """Of progress, for each variant."""
        return len(self._windows) + sum(map(tasks.units, self._questions))

    def run(self, variant: Variant, progress: Progress, shown: bool) -> None:
        """Make the variant, run everything, compare with float32.

        Rows are added when everything has run: a variant that fails on the way has none.
        """
        converted = variant.make()
        found: perplexity.Scores | embeddings.Embedded
        if self._loaded.causal:
            found = perplexity.score(converted, self._windows, progress, variant.name)
        else:
            found = embeddings.embed(converted, self._windows, progress, variant.name)
        answers: list[int] = []
        if self._questions:
            answers = tasks.answers(converted, self._questions, progress, f"{variant.name}: task")
        held = variant.held(converted)
        self._reference = self._reference or found
        self._answers = self._answers or answers
        if not shown:
            return
        if isinstance(found, perplexity.Scores):
            self.results.append(perplexity.compare(variant, found, self._reference, held))
        else:
            self.similarities.append(embeddings.compare(variant, found, self._reference, held))
        if self._questions:
            self.accuracies.append(tasks.compare(variant, answers, self._answers, self._questions))


@torch.inference_mode()
def _times(
    model: nn.Module, peers: Sequence[Variant], window: Window, seconds: float
) -> tuple[list[Timed], dict[str, str]]:
    """Of the whole model on a window, in turns: octavo as it is by default, float32 and the peers.

    And why a peer is not timed, by name.
    """
    own = schemes.LLM_INT8
    names = {own.key: f"octavo, {own.name}", schemes.FLOAT32.key: schemes.FLOAT32.name}
    calls: dict[str, Callable[[], object]] = {
        own.key: partial(schemes.convert(model, own, path="auto"), **window.inputs),
        schemes.FLOAT32.key: partial(model, **window.inputs),
    }
    for call in calls.values():
        call()  # warm
    untimed = {}
    for peer in peers:
        try:
            call = partial(peer.make(), **window.inputs)
            call()
        except BROKEN as error:
            untimed[peer.name] = reason(error)
            continue
        names[peer.key], calls[peer.key] = peer.name, call
    times = take_turns(calls, seconds, least=_ROUNDS)
    ratios = {
        key: [time / octavo for time, octavo in zip(values, times[own.key], strict=True)]
        for key, values in times.items()
    }
    return [Timed(key, names[key], spread(times[key]), statistics.median(ratios[key])) for key in times], untimed
