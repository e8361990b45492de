"""SmolLM2 answers three questions: in bfloat16, and with int8 linear layers of octavo; one also with bitsandbytes'."""

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from octavo.torch.convert import random_tokens
from torch import Tensor

from ..accuracy.scores import AGREED, DIVERGENCE, Judge
from ..models import variants
from ..models.language import Language, Window
from ..models.modules import linear_bytes
from ..models.variants import BEST, BEST_KEPT, BROKEN, LLM_INT8, Maker, reason
from ..progress import Progress
from ..tables import Table

QUESTIONS = (
    "What is the capital of France, and which river runs through it?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
)
BITSANDBYTES = next(each for each in variants.PEERS if each.key == "bitsandbytes")
AS_IT_IS = replace(variants.FLOAT32, name="bfloat16")


def run(loaded: Language, tokens: int, progress: Progress) -> tuple[list[Table], list[str]]:
    """A table of costs, and one of answers of up to `tokens` tokens for each question; what the costs are, in words."""
    model = copy.deepcopy(loaded.model).bfloat16()
    loaded = replace(loaded, model=model)
    prompts = [_prompt(loaded.tokenizer, question) for question in QUESTIONS]
    maker = Maker(model, random_tokens(model.config))
    exact: list[Tensor] = []
    costs: list[list[Any]] = []
    answers: list[list[list[Any]]] = [[] for _ in QUESTIONS]
    note = "KL and argmax: on bfloat16's answers. bitsandbytes answers the first question alone."
    progress.begin(5)
    for variant in (AS_IT_IS, LLM_INT8, BEST, BEST_KEPT, BITSANDBYTES):
        with progress.step(f"SmolLM2 answers: {variant.name}"):
            try:
                made = maker.make(variant)
                asked = prompts[:1] if variant is BITSANDBYTES else prompts  # it takes as long as all others together
                begin = time.perf_counter()
                found = [_answer(made, prompt, tokens) for prompt in asked]
                seconds = time.perf_counter() - begin
            except BROKEN as error:
                note += f" Left out: {variant.name}: {reason(error)}."
                continue
            exact = exact or found
            pairs = zip(prompts, exact, strict=True)
            judge = Judge(loaded, [Window(torch.cat(pair, 1), pair[0].shape[1], 0) for pair in pairs])
            scores = judge.score(made, Progress(show=False), "")
            rate, mebibytes = sum(each.shape[1] for each in found) / seconds, linear_bytes(made) / 2**20
            costs.append([variant.name, scores.mean(DIVERGENCE), 100 * scores.mean(AGREED), rate, mebibytes])
            for rows, own, other in zip(answers, found, exact, strict=False):
                text = " ".join(loaded.tokenizer.decode(own[0], skip_special_tokens=True).split())
                rows.append([variant.name, differs(own, other), text])
    columns = {"linear layers": "", "KL": ".5f", "same argmax, %": ".1f", "tokens per second": ".1f", "MiB": ".1f"}
    tables = [Table("SmolLM2 answers three questions: what int8 costs", columns, costs, note)]
    for question, rows in zip(QUESTIONS, answers, strict=True):
        columns = {"linear layers": "", "differs from token": "", "answer": ""}
        tables.append(Table(f"SmolLM2: {question}", columns, rows))
    told = [
        f"SmolLM2 (weights that its packer rounded to 4 bits), {name}: KL {cost:.4f}, {same:.1f} % of the likeliest "
        f"tokens as in bfloat16, linear layers of {size:.0f} MiB."
        for name, cost, same, _, size in costs
    ]
    return tables, told


def _prompt(tokenizer: Any, question: str) -> Tensor:
    """Token ids [1, tokens]."""
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": question}]
        question = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(question, return_tensors="pt")["input_ids"]


@torch.inference_mode()
def _answer(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The likeliest token again and again, [1, up to `tokens`]."""
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    found: Tensor = model.generate(prompt, attention_mask=mask, **options)
    return found[:, prompt.shape[1] :]


def differs(own: Tensor, other: Tensor) -> str:
    """The place, from 1, of the first token that differs."""
    same = min(own.shape[1], other.shape[1])
    places = (own[0, :same] != other[0, :same]).nonzero()
    if len(places):
        return str(int(places[0]) + 1)
    return "-" if own.shape == other.shape else str(same + 1)
