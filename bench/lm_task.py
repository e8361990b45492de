"""Makes a zero-shot task from held-out text: which word ends the sentence, of four.

    .venv/bin/python bench/lm_task.py --text build/lm/heldout.txt --output build/lm/task
    .venv/bin/octavo eval build/lm/model --text build/lm/heldout.txt --task build/lm/task/last_word.jsonl

The prompt is a paragraph up to the last word of one of its sentences; the wrong words are the last words of other
sentences, drawn sentence by sentence: as often common ones as the right word is, so that gives nothing away. The same
text and seed make the same task. Written: the questions as `octavo eval --task` reads them, and the description of a
task that the EleutherAI harness (`lm_eval`) reads, which bench/harness.py runs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from measure import write
from octavo_bench.demo.data import split_sentences

TASK = "last_word"
CHOICES = 4
SEED = 0
CONTEXT = 400  # characters in front of the sentence, at most
_LAST_WORD = re.compile(r"^(.*\S) ([a-z]{4,})\.$")
_HARNESS = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class Question:
    """A line of the task file; see octavo_bench.eval.tasks."""

    prompt: str
    choices: list[str]
    answer: int


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="made where it is not there")
    parser.add_argument("--questions", type=int, default=500, metavar="N", help="at most; default: %(default)s")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="default: %(default)s")
    args = parser.parse_args(arguments)
    path = build(args.text, args.output, args.questions, args.seed)
    print(f"{path}: {len(path.read_text().splitlines())} questions")


def build(text: Path, output: Path, count: int, seed: int = SEED) -> Path:
    """Write the task into `output`; returns the questions' file. Raises ValueError where the text has too few."""
    output.mkdir(parents=True, exist_ok=True)
    found = questions(text.read_text(encoding="utf-8"), count, seed)
    if len(found) < 2:
        raise ValueError(f"{text}: expected sentences that end in a word of four letters or more, got {len(found)}")
    path = (output / f"{TASK}.jsonl").resolve()
    lines = "".join(json.dumps(asdict(question)) + "\n" for question in found)
    write(path, partial(Path.write_text, data=lines, encoding="utf-8"))
    description = _HARNESS.format(task=TASK, path=json.dumps(str(path)))
    write(output / f"{TASK}.yaml", partial(Path.write_text, data=description, encoding="utf-8"))
    return path


def questions(text: str, count: int, seed: int) -> list[Question]:
    """At most `count` questions, one from a paragraph, drawn from all."""
    draw = random.Random(seed)
    found = list(dict.fromkeys(_sentences(text)))
    words = [word for _, word in found]
    if len(set(words)) < CHOICES:
        return []
    draw.shuffle(found)
    made = []
    for prompt, word in found[:count]:
        choices = [word]
        while len(choices) < CHOICES:
            other = draw.choice(words)
            if other not in choices:
                choices.append(other)
        draw.shuffle(choices)
        made.append(Question(prompt, [f" {choice}" for choice in choices], choices.index(word)))
    return made


def _sentences(text: str) -> Iterator[tuple[str, str]]:
    """Of each paragraph the last sentence that ends in a word: what is in front of that word, and the word."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        for sentence in reversed(list(split_sentences(block))):
            match = _LAST_WORD.match(sentence)
            if match:
                before = paragraph[: paragraph.index(sentence)]
                context = before[max(0, len(before) - CONTEXT) :]
                yield context + match[1], match[2]
                break


if __name__ == "__main__":
    main()
