"""Language models from Hugging Face folders, and text cut into windows for them."""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LONGEST = 512  # tokens of a window, where nobody asked for more
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers names models that predict the next token


@dataclass(frozen=True)
class Language:
    """A float32 model for inference and its tokenizer.

    `causal`: it predicts the next token; otherwise it is an encoder, whose attention can be read out.
    """

    path: Path
    model: Any  # of transformers, which has no type hints
    tokenizer: Any
    causal: bool


@dataclass(frozen=True)
class Window:
    """Tokens that the model sees at once."""

    ids: Tensor  # int64 [1, w]
    first: int  # the tokens from here on are scored (>= 1: each from those before it)
    begin: int  # where it begins in the text, in tokens

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The model's keyword arguments."""
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}


def load(path: Path, *, trust_remote_code: bool = False) -> Language:
    """Load a folder in float32. Nothing is downloaded.

    It is a causal language model where its config's ``architectures`` says so, and else an encoder. GPT-2's ``Conv1D``
    become ``nn.Linear`` of the same function, for octavo to convert.

    Args:
        path: the folder.
        trust_remote_code: run Python code that the folder brings. No question is asked where it is False.

    Raises:
        ValueError: no such folder, no config in it, an encoder-decoder, or no linear layers in the model; a model that
            brings its own code, unless that is trusted.
        OSError: weights or tokenizer that transformers cannot read.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a Hugging Face folder with config.json, got none")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it must never ask the network
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        kinds = config.architectures or [config.model_type]
        causal = any(name.endswith(_CAUSAL) for name in kinds)
        if config.is_encoder_decoder and not causal:
            raise ValueError(f"{path}: expected a causal language model or an encoder, got {', '.join(kinds)}")
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        eager = {} if causal else {"attn_implementation": "eager"}  # whose softmax can be read out
        model = auto.from_pretrained(path, dtype=torch.float32, **eager, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{path}: the model brings Python code of its own: --trust-remote-code runs it") from error
    model.requires_grad_(False).eval()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # embeddings are means of the last hidden states
    use_linear_(model)
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(f"{path}: expected a model with linear layers, got {type(model).__name__} without")
    return Language(path, model, tokenizer, causal)


def use_linear_(model: nn.Module) -> None:
    """Puts an ``nn.Linear`` in place of each ``Conv1D`` of transformers, whose weight is the transpose."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, Conv1D):
                linear = nn.Linear(conv.weight.shape[0], conv.weight.shape[1], device="meta").eval()
                linear.weight = nn.Parameter(conv.weight.T.contiguous(), requires_grad=False)
                linear.bias = conv.bias
                setattr(parent, name, linear)


def read_windows(
    language: Language, text: Path, window: int | None = None, stride: int | None = None, limit: int | None = None
) -> list[Window]:
    """A text file in windows: of a causal model pieces of the whole text, of an encoder each line that is not blank.

    `window`: tokens of one, at which lines are cut off; default: what the model takes, at most 512. `stride`: tokens
    from one to the next, of a causal model; default: `window`. `limit`: only the first windows.

    Raises ValueError for a text that is not UTF-8 or too short, and for sizes that do not fit.
    """
    config = language.model.config
    most = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        most -= 2  # their positions begin after the padding index
    window = window or min(_LONGEST, most)
    if not 2 <= window <= most:
        raise ValueError(f"window: expected 2 to {most} tokens, got {window}")
    if stride is not None and not (language.causal and stride <= window):
        raise ValueError(f"stride: expected at most the window's {window} tokens of a causal model, got {stride}")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: expected UTF-8, got {error}") from error
    if language.causal:
        # The length is the windows' business: the tokenizer must not warn of it.
        found = cut(language.tokenizer(content, verbose=False)["input_ids"], window, stride or window)
    else:
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        parts = [language.tokenizer(line, truncation=True, max_length=window)["input_ids"] for line in lines[:limit]]
        begins = itertools.accumulate(map(len, parts), initial=0)
        found = [Window(torch.tensor([part]), 1, begin) for part, begin in zip(parts, begins, strict=False)]
    if not found:
        raise ValueError(f"{text}: expected text of at least two tokens, got less")
    return found[:limit]


def cut(tokens: Sequence[int], window: int, stride: int) -> list[Window]:
    """Windows that begin every `stride` tokens. Each token is scored once at most, and with the most context.

    The first token is never scored, and where windows do not overlap neither is the first of each.
    """
    found, scored = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        first = max(scored, begin + 1)
        if first < end:
            found.append(Window(torch.tensor([tokens[begin:end]]), first - begin, begin))
        scored = end
        if end == len(tokens):
            break
    return found


def set_aside(windows: Sequence[Window], count: int) -> tuple[list[Window], list[Window]]:
    """The first `count` windows, and those after them that share no token with them."""
    end = max((window.begin + window.ids.shape[1] for window in windows[:count]), default=0)
    return list(windows[:count]), [window for window in windows[count:] if window.begin >= end]


@torch.inference_mode()
def log_probabilities(model: Any, window: Window) -> Tensor:
    """Of a causal model: natural logarithms of each token's probability at each scored place, float32 [scored, words].

    The model is not given the last token, which predicts none.
    """
    inputs = {name: tensor[:, :-1] for name, tensor in window.inputs.items()}
    logits: Tensor = model(**inputs).logits[0, window.first - 1 :].float()
    return logits.log_softmax(-1)
