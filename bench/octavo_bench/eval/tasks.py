"""Zero-shot accuracy on a task file: which of several continuations a causal model finds likeliest.

A task file is UTF-8 text of one JSON object in each line::

    {"prompt": "The capital of France is", "choices": [" Paris", " Rome", " Madrid"], "answer": 0}

`prompt`: not empty; `choices`: two or more texts that may follow, as they follow: with their space in front, where
there is one; `answer`: the place of the right one, from 0. Other keys are ignored.

As `multiple_choice` of the EleutherAI harness scores ("acc"): the choice with the largest log-likelihood after the
prompt is the model's answer, the first of equals. Blanks at the prompt's end belong to the continuation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo_bench.measuring.language import Language, Window, log_likelihoods
from octavo_bench.measuring.progress import Progress

from .variants import Variant


@dataclass(frozen=True)
class Question:
    """Choices as windows of which only the continuation is scored."""

    choices: list[Window]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """One row of the table."""

    key: str
    name: str
    accuracy: float
    standard_error: float  # of the accuracy, questions being drawn; NaN where there is only one
    difference: float  # from float32's
    difference_error: float  # paired over the questions
    changed: int  # questions that are answered in another way than by float32
    answers: list[int]


def read(path: Path, language: Language, limit: int | None = None) -> list[Question]:
    """The questions of a task file. Prompts too long for the model lose their beginning.

    Raises ValueError, which names the line, for one that is not as above.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    questions = [_question(f"{path}:{number}", line, language) for number, line in numbered]
    if not questions:
        raise ValueError(f"{path}: expected at least one question, got none")
    return questions


def _question(where: str, line: str, language: Language) -> Question:
    try:
        read: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got {error}") from error
    if not isinstance(read, dict) or not {"prompt", "choices", "answer"} <= read.keys():
        raise ValueError(f"{where}: expected an object with prompt, choices and answer, got {line[:60]}")
    prompt, choices, answer = read["prompt"], read["choices"], read["answer"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: prompt: expected text, got {prompt!r}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"{where}: choices: expected a list of at least two texts, got {choices!r}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer: expected the place of a choice, 0 to {len(choices) - 1}, got {answer!r}")
    return Question([_window(where, prompt, choice, language) for choice in choices], answer)


def _window(where: str, prompt: str, choice: str, language: Language) -> Window:
    """Prompt and choice together, tokenized as one text: so a token may not reach from one into the other."""
    bare = prompt.rstrip()
    choice = prompt[len(bare) :] + choice

    def tokens(text: str) -> list[int]:
        found: list[int] = language.tokenizer(text, verbose=False)["input_ids"]
        return found

    whole, context = tokens(bare + choice), len(tokens(bare))
    most = language.positions
    if most is not None and len(whole) > most + 1:  # the last token is predicted only
        context -= len(whole) - (most + 1)
        whole = whole[-(most + 1) :]
    if not 1 <= context < len(whole):
        raise ValueError(f"{where}: expected tokens of the prompt and of the choice {choice!r}, got none of one")
    return Window(torch.tensor([whole]), context, 0)


def answers(model: Any, questions: Sequence[Question], progress: Progress, doing: str) -> list[int]:
    """The model's answer to each question. Each choice is a call of its own, as each window is."""
    found = []
    for question in questions:
        with progress.step(doing, units(question)):
            sums = [float(log_likelihoods(model, window)[0].sum()) for window in question.choices]
            found.append(max(range(len(sums)), key=lambda i: (sums[i] if not math.isnan(sums[i]) else -math.inf, -i)))
    return found


def units(question: Question) -> float:
    """Of progress: a window of text is one, and has some 256 tokens."""
    return sum(window.ids.shape[1] for window in question.choices) / 256


def compare(variant: Variant, found: list[int], reference: list[int], questions: Sequence[Question]) -> Accuracy:
    """A variant's row from its answers and float32's."""
    own = [float(answer == question.answer) for answer, question in zip(found, questions, strict=True)]
    before = [float(answer == question.answer) for answer, question in zip(reference, questions, strict=True)]
    differences = [a - b for a, b in zip(own, before, strict=True)]
    return Accuracy(
        variant.key,
        variant.name,
        statistics.fmean(own),
        _error(own),
        statistics.fmean(differences),
        _error(differences),
        sum(a != b for a, b in zip(found, reference, strict=True)),
        found,
    )


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
