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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.language import Language, Window, log_probabilities, own
from ..progress import Progress
from ..tables import Table
from .scores import ratio_of_sums


@dataclass(frozen=True)
class Question:
    """Choices as windows of which only the continuation is scored."""

    choices: list[Window]
    answer: int

    @property
    def units(self) -> float:
        """Of progress: a window of text is one, and has some 256 tokens."""
        return sum(window.ids.shape[1] for window in self.choices) / 256


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
        found: Any = json.loads(line)
        prompt, choices, answer = found["prompt"], found["choices"], found["answer"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: expected an object with prompt, choices and answer, got {line[:60]}") from error
    for what, right in (
        ("prompt: expected text", isinstance(prompt, str) and prompt.strip()),
        ("choices: expected two texts or more", isinstance(choices, list) and len(choices) > 1),
        ("choices: expected texts", all(isinstance(each, str) and each.strip() for each in list(choices))),
        ("answer: expected the place of a choice", type(answer) is int and 0 <= answer < len(choices)),
    ):
        if not right:
            raise ValueError(f"{where}: {what}, got {line[:60]}")
    return Question([_window(where, prompt, choice, language) for choice in choices], answer)


def _window(where: str, prompt: str, choice: str, language: Language) -> Window:
    """Prompt and choice together, tokenized as one text: so a token may not reach from one into the other."""
    bare = prompt.rstrip()

    def tokens(text: str) -> list[int]:
        found: list[int] = language.tokenizer(text, verbose=False)["input_ids"]
        return found

    whole, context = tokens(prompt + choice), len(tokens(bare))
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
        with progress.step(doing, question.units):
            sums = [float(own(log_probabilities(model, window), window).sum()) for window in question.choices]
            found.append(max(range(len(sums)), key=lambda i: (sums[i] if not math.isnan(sums[i]) else -math.inf, -i)))
    return found


def table(task: Path, names: Mapping[str, str], given: Mapping[str, list[int]], questions: Sequence[Question]) -> Table:
    """A row for each variant's answers, by key, the model's own first."""
    reference = next(iter(given.values()))
    right = {key: [100 * (a == q.answer) for a, q in zip(own, questions, strict=True)] for key, own in given.items()}
    before, ones = next(iter(right.values())), [1] * len(questions)
    rows = []
    for key, found in right.items():
        lost = [b - a for a, b in zip(found, before, strict=True)]
        changed = sum(a != b for a, b in zip(given[key], reference, strict=True))
        rows.append([names[key], *ratio_of_sums(found, ones), *ratio_of_sums(lost, ones), changed])
    return Table(
        f"Zero-shot accuracy on {len(questions)} questions of {task.name}",
        {"scheme": "", "accuracy, %": ".1f", "±": ".1f", "loss": "+.1f", "loss ±": ".1f", "answers changed": "d"},
        rows,
        "In percentage points; the loss against the first row and its error are paired over the questions.",
    )
