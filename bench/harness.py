"""Runs a task of the EleutherAI harness (`lm_eval`) on a model as it is and on the same model in int8.

    .venv/bin/pip install ".[eval]"
    .venv/bin/python bench/lm_task.py --text build/lm/heldout.txt --output build/lm/task
    .venv/bin/python bench/harness.py build/lm/model --tasks build/lm/task --task last_word

Nothing is downloaded where the task's data is local. Int8 models go through octavo.transformers: `OctavoConfig` while a
16/32-bit folder is loaded, or a folder that is int8 already. (`lm_eval` as a command of its own does not import
octavo.transformers, without which Transformers takes int8 codes for weights.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import octavo.transformers
import torch
import transformers


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder of a causal language model")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="folder of task descriptions (YAML)")
    parser.add_argument("--task", default="last_word", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions; default: all")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    for name, int8 in (("as it is", False), ("int8", True)):
        found = accuracy(args.model, args.tasks, args.task, int8=int8, limit=args.limit)
        print(f"{args.model}, {name}: {args.task}: accuracy {found['acc,none']:.4f} +- {found['acc_stderr,none']:.4f}")


def accuracy(model: Path, tasks: Path, task: str, *, int8: bool, limit: int | None = None) -> dict[str, Any]:
    """What the harness found, one question in a call; `int8`: converted by octavo while loading."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = {"quantization_config": octavo.transformers.OctavoConfig()} if int8 else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    # The harness wants a token to put in front of empty prompts, and there are none in a task. Tokenizers that have one
    # for the beginning or the end give theirs.
    named = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    prefix = None if named else 0
    harness = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=1, device="cpu", prefix_token_id=prefix)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results: Any = simple_evaluate(
        model=harness, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=False
    )
    found: dict[str, Any] = results["results"][task]
    return found


if __name__ == "__main__":
    main()
