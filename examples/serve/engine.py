"""Continuous batching: one thread steps all running texts; others join and leave them at any step."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import ragged
import torch
from torch import Tensor

Finish = Literal["stop", "length", "cancelled", "failed"]
logger = logging.getLogger("octavo.serve")


class FullError(Exception):
    """Too many texts are waiting."""


class ClosedError(Exception):
    """The engine takes no more texts."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest (temperature 0), or drawn from the likeliest `top_p` of the probability."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class Job:
    """A text to be continued.

    Attributes:
        prompt: tokens, at least one.
        most: how many new tokens at most, >= 1.
        deliver: called in the engine's thread with each new token, and once with (None, why) when no more will come.
    """

    prompt: list[int]
    most: int
    sampling: Sampling
    deliver: Callable[[int | None, Finish | None], None]
    cancelled: bool = False
    produced: int = 0
    random: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.random = torch.Generator()
            if self.sampling.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed(self.sampling.seed)


class Engine:
    """Runs jobs on a model.

    Args:
        model: a causal language model that `ragged.prepare_` has prepared.
        ends: the tokens that end a text; they are delivered to nobody.
        batch: texts in a step, at most.
        waiting: texts that wait for a place, at most.
        prompt_tokens: of prompts that are read in one step, at most (but one prompt in any case): others wait for it.
    """

    def __init__(self, model: Any, ends: set[int], *, batch: int, waiting: int, prompt_tokens: int = 512) -> None:
        self._model = model
        self._ends = ends
        self._batch = batch
        self._most_waiting = waiting
        self._prompt_tokens = prompt_tokens
        self._waiting: deque[Job] = deque()
        # A text's keys and values live here only, so that they are freed when it leaves, whoever still holds the job.
        self._running: list[tuple[Job, ragged.Text]] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Texts that are being continued."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether texts that are submitted will be continued."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Take a job. Raises FullError or ClosedError."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise ClosedError
            if len(self._waiting) >= self._most_waiting:
                raise FullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest of it. Before the next step it makes place for others; nothing if it is done."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs, finish those there are, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._gather():
            self._step()

    def _step(self) -> None:
        jobs, texts = zip(*self._running, strict=True)
        try:
            logits = ragged.step(self._model, texts)
        except Exception:  # of these jobs; the next ones may fare better
            logger.exception("a step over %d texts failed", len(jobs))
            self._running = []
            for job in jobs:
                _deliver(job, None, "failed")
            return
        goes_on = [self._continue(job, text, row) for job, text, row in zip(jobs, texts, logits, strict=True)]
        self._running = list(itertools.compress(self._running, goes_on))

    def _continue(self, job: Job, text: ragged.Text, logits: Tensor) -> bool:
        """Choose and deliver a text's next token; whether the job goes on."""
        try:
            token = _choose(logits, job)
        except Exception:  # of this job alone
            logger.exception("no token could be chosen")
            _deliver(job, None, "failed")
            return False
        text.unread = [token]
        return self._take(job, token)

    def _gather(self) -> bool:
        """Choose who takes part in the next step; waits until there is somebody. False: closed, and all is done."""
        with self._changed:
            while True:
                cancelled = [job for job in (*(job for job, _ in self._running), *self._waiting) if job.cancelled]
                if cancelled:
                    self._running = [(job, text) for job, text in self._running if not job.cancelled]
                    self._waiting = deque(job for job in self._waiting if not job.cancelled)
                for job in cancelled:
                    _deliver(job, None, "cancelled")
                tokens = 0
                while self._waiting and len(self._running) < self._batch:
                    job = self._waiting[0]
                    tokens += len(job.prompt)
                    if tokens > max(self._prompt_tokens, len(job.prompt)):
                        break
                    self._running.append((self._waiting.popleft(), ragged.Text(list(job.prompt))))
                if self._running:
                    return True
                if self._closed:
                    return False
                self._changed.wait()

    def _take(self, job: Job, token: int) -> bool:
        """Deliver a token; whether the job goes on."""
        if token in self._ends:
            _deliver(job, None, "stop")
            return False
        job.produced += 1
        _deliver(job, token, None)
        if job.produced == job.most:
            _deliver(job, None, "length")
            return False
        return True


def _nobody(token: int | None, finish: Finish | None) -> None:
    """In the place of `Job.deliver` once all is delivered."""


def _deliver(job: Job, token: int | None, finish: Finish | None) -> None:
    try:
        job.deliver(token, finish)
    except Exception:  # whoever asked is gone
        logger.exception("a token could not be delivered")
        job.cancelled = True
    if finish is not None:
        # It leads to whoever listens, who holds the job: a cycle would keep both, and their text, until the collector
        # comes by.
        job.deliver = _nobody


def _choose(logits: Tensor, job: Job) -> int:
    """The next token. logits float32 ``[words]``."""
    if job.random is None:
        return int(logits.argmax())
    # From the highest one down, so that no temperature, however low, makes an infinity of it.
    temperature = max(job.sampling.temperature, torch.finfo(logits.dtype).tiny)
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    if job.sampling.top_p < 1:
        # Stable: of tokens that are equally likely the first one leads, as in `argmax`.
        ordered, index = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= job.sampling.top_p] = 0  # the likeliest one always stays
        return int(index[torch.multinomial(ordered, 1, generator=job.random)])
    return int(torch.multinomial(probabilities, 1, generator=job.random))
