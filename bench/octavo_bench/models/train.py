"""Trains a small language model on the documentation that is on this machine, for `octavo eval` and `octavo analyze`.

    python -m octavo_bench train --setting small --output build/lm        # some minutes; full: an hour and more
    octavo eval build/lm/outliers-58 --text build/lm/heldout.txt --calibration build/lm/calibration.txt

An OPT with byte-pair encoding; Muon for the linear layers' weights, AdamW for the rest. The same machine, text and
number of threads give the same model. Written into the output folder: `model` and, computing the same function, the
models of `systematic.SIZES`; `heldout.txt` and `calibration.txt`, from files that the training never saw;
`training.json`.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..accuracy.scores import LOSS, Judge, perplexity
from ..machine import Facts
from ..progress import Progress
from ..tables import Report, Table, write_atomically, write_text
from . import language, systematic, text


@dataclass(frozen=True)
class Setting:
    """Sizes of model and training."""

    characters: int  # of the corpus
    vocabulary: int
    layers: int
    width: int
    heads: int
    window: int  # tokens of a sequence
    batch: int  # sequences of a step
    steps: int
    rate: float  # learning rate, at its highest
    evaluated: int  # held-out windows that the models are compared on


SETTINGS = {
    "full": Setting(40_000_000, 2048, 5, 256, 8, 256, 16, 1200, 4e-3, 200),
    "small": Setting(4_000_000, 1024, 3, 128, 4, 128, 16, 250, 4e-3, 50),
}
SEED = 0
KEEP_EVERY = 50  # steps: training that is ended goes on from there
Tokens = np.ndarray[Any, Any]


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, None]:
    """``python -m octavo_bench train``."""
    return run(SETTINGS[args.setting], args.output, facts, progress), None


def run(setting: Setting, output: Path, facts: Facts, progress: Progress) -> Report:
    """Everything, from the text to the models."""
    progress.begin(100)
    with progress.step("reading documentation", 5):
        tokens = prepare_text(setting, output)
    losses = train(setting, output, tokens, progress.part(85))
    table, features = finish(setting, output, progress.part(10))
    about = {"setting": asdict(setting), "corpus_version": text.VERSION, "train_tokens": len(tokens), "seed": SEED}
    some = losses[:: max(1, len(losses) // 50)]
    report = Report("A small language model", facts.now(losses=some, outlier_features=features, **about), [table])
    write_text(output / "training.json", report.json())
    return report


def prepare_text(setting: Setting, output: Path) -> Tokens:
    """Writes the tokenizer and the texts that are not trained with; returns the training tokens, uint16."""
    texts = text.corpus(setting.characters)
    tokenizer = train_tokenizer(texts["train"], setting.vocabulary)
    tokenizer.save_pretrained(output / "model")
    encoded = tokenizer.backend_tokenizer.encode_batch([each + "\n\n" for each in texts["train"]])
    tokens: Tokens = np.concatenate([np.array(part.ids, np.uint16) for part in encoded])
    for name in ("heldout", "calibration"):
        write_text(output / f"{name}.txt", "\n\n".join(texts[name]))
    return tokens


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-pair encoding of bytes: every text can be encoded."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


def new_model(setting: Setting, seed: int = SEED) -> Any:
    """The model as it is before training."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.OPTConfig(
        vocab_size=setting.vocabulary, hidden_size=setting.width, word_embed_proj_dim=setting.width,
        num_hidden_layers=setting.layers, ffn_dim=4 * setting.width, num_attention_heads=setting.heads,
        max_position_embeddings=setting.window, dropout=0.0, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def new_optimizers(model: Any, setting: Setting) -> list[torch.optim.Optimizer]:
    """Muon for the weights of the layers, AdamW for embeddings, biases and gains."""
    matrices = {name: each for name, each in model.named_parameters() if each.dim() == 2}
    hidden = [each for name, each in matrices.items() if ".layers." in name]
    embeddings = [each for name, each in matrices.items() if ".layers." not in name]
    others = [each for each in model.parameters() if each.dim() != 2]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, setting.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=setting.rate, betas=(0.9, 0.95)),
    ]


def learn(model: Any, optimizers: Sequence[torch.optim.Optimizer], rate: float, loss: Tensor) -> float:
    """A step of the optimizers at a learning rate, along the gradients of a loss; returns the loss."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train(setting: Setting, output: Path, tokens: Tokens, progress: Progress) -> list[float]:
    """Train, and write the model; returns the losses by step. Goes on where one that was ended had got to."""
    model = new_model(setting)
    optimizers = new_optimizers(model, setting)
    losses: list[float] = []
    kept, text = output / "state.pt", hashlib.sha256(tokens.tobytes()).hexdigest()
    if kept.exists() and (state := torch.load(kept))["run"] == [asdict(setting), text]:
        losses = state["losses"]
        for owner, values in zip((model, *optimizers), state["values"], strict=True):
            owner.load_state_dict(values)
    progress.begin(setting.steps - len(losses))
    model.train()
    for step in range(len(losses), setting.steps):
        with progress.step(f"training: loss {losses[-1]:.3f}" if losses else "training"):
            ids = batch(setting, tokens, step)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            losses.append(learn(model, optimizers, rate(setting, step), loss))
        if len(losses) % KEEP_EVERY == 0:
            values = [owner.state_dict() for owner in (model, *optimizers)]
            state = {"run": [asdict(setting), text], "losses": losses, "values": values}
            write_atomically(kept, partial(torch.save, state))
    if not math.isfinite(losses[-1]):
        raise RuntimeError(f"training: expected a finite loss, got {losses[-1]} at step {len(losses)}")
    model.save_pretrained(output / "model")
    kept.unlink(missing_ok=True)
    return losses


def batch(setting: Setting, tokens: Tokens, step: int, seed: int = SEED) -> Tensor:
    """The sequences of a step, int64 [batch, window]. They depend on step and seed only, so none need be remembered."""
    generator = np.random.default_rng([seed, step])
    starts = generator.integers(0, len(tokens) - setting.window + 1, setting.batch)
    return torch.from_numpy(np.stack([tokens[start : start + setting.window] for start in starts]).astype(np.int64))


def rate(setting: Setting, step: int) -> float:
    """The learning rate: rising over the first twentieth of the steps, then falling to a tenth along a cosine."""
    warm = max(1, setting.steps // 20)
    if step < warm:
        return setting.rate * (step + 1) / warm
    done = (step - warm) / max(1, setting.steps - warm)
    return setting.rate * (0.55 + 0.45 * math.cos(math.pi * done))


def finish(setting: Setting, output: Path, progress: Progress) -> tuple[Table, list[int]]:
    """Write the models with outlier features; returns each one's perplexity, and the features."""
    loaded = language.load(output / "model")
    heldout = language.read_windows(loaded, output / "heldout.txt", setting.window, limit=setting.evaluated)
    calibration = language.read_windows(loaded, output / "calibration.txt", setting.window, limit=setting.evaluated)
    seen = systematic.observe(loaded.model, [window.inputs for window in calibration])
    features = systematic.largest_features(seen)
    models = {"model": loaded.model}
    for name, size in systematic.SIZES.items():
        models[name] = systematic.with_outliers(loaded.model, features, size, seen)
        models[name].save_pretrained(output / name)
        loaded.tokenizer.save_pretrained(output / name)
    progress.begin(len(models) * len(heldout))
    judge = Judge(loaded, heldout)
    rows = [[name, perplexity(judge.score(model, progress, name).mean(LOSS))] for name, model in models.items()]
    title = f"Perplexity of {loaded.model.num_parameters():,} parameters on {len(heldout)} held-out windows"
    return Table(title, {"model": "", "perplexity": ".6f"}, rows), features
