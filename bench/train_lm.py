"""Trains a small language model on the documentation that is on this machine, for `octavo eval` and `octavo analyze`.

    .venv/bin/python bench/train_lm.py --setting small --output build/lm        # some minutes; full: an hour and more
    .venv/bin/octavo eval build/lm/model --text build/lm/heldout.txt --calibration build/lm/calibration.txt
    .venv/bin/octavo eval build/lm/outliers-58 --text build/lm/heldout.txt --calibration build/lm/calibration.txt

A GPT that normalizes before each block (an OPT, whose linear layers are `nn.Linear`), byte-pair encoding; Muon for the
linear layers' weights (bench/muon.py), AdamW for the rest. Run again after an interruption, it goes on where it was;
the same machine, text and number of threads give the same model.
Written into the output folder: `model` and, computing the same function, the three models of bench/lm_outliers.py;
`heldout.txt` and `calibration.txt`, from files that the training never saw; `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import corpus
import lm_outliers
import numpy as np
import torch
from measure import machine, set_threads, write
from muon import Muon
from octavo_bench.eval import perplexity
from octavo_bench.measuring import language
from octavo_bench.measuring.progress import Progress
from octavo_bench.measuring.systematic import FEATURES
from torch import Tensor
from tqdm import tqdm


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
    save_every: int  # steps
    evaluated: int  # held-out windows that the models are compared on


SETTINGS = {
    "full": Setting(40_000_000, 2048, 5, 256, 8, 256, 16, 1200, 4e-3, 50, 200),
    "small": Setting(4_000_000, 1024, 3, 128, 4, 128, 16, 400, 4e-3, 100, 50),
}
SEED = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="full", help="default: full")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="made; run again to go on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    args = parser.parse_args(arguments)
    set_threads(args.threads)
    run(SETTINGS[args.setting], args.output, args.threads)


def run(setting: Setting, output: Path, threads: int, roots: Sequence[Path] | None = None) -> None:
    """Everything, from the text to the models."""
    started = time.time()
    tokens = prepare(setting, output, roots)
    losses = train(setting, output, tokens)
    report = finish(setting, output)
    report |= {
        "setting": asdict(setting),
        "seed": SEED,
        "corpus": json.loads((output / "corpus.json").read_text()),
        "machine": machine(threads),
        "losses": losses,
        "seconds_of_this_run": time.time() - started,
    }
    write(output / "training.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    print(f"{output}: {report['parameters']:,} parameters, trained on {report['corpus']['train_tokens']:,} tokens")
    for name, own in report["perplexity"].items():
        print(f"  {name}: held-out perplexity {own:.6f}")


# --- text -------------------------------------------------------------------------------------------------------------


def prepare(setting: Setting, output: Path, roots: Sequence[Path] | None = None) -> np.ndarray[Any, Any]:
    """The training tokens, uint16. Made once and kept in `output`, so that a resumed training sees the same text.

    Raises ValueError where `output` belongs to another setting, or its text was chosen in another way.
    """
    output.mkdir(parents=True, exist_ok=True)
    about = output / "corpus.json"
    if about.exists():
        kept = json.loads(about.read_text())
        wanted = {"setting": asdict(setting), "version": corpus.VERSION}
        got = {name: kept.get(name) for name in wanted}
        if got != wanted:
            raise ValueError(f"{output}: expected a folder of this setting and corpus, {wanted}; got one of {got}")
        tokens: np.ndarray[Any, Any] = np.load(output / "tokens.npy")
        return tokens
    texts = corpus.load(setting.characters, roots)
    tokenizer = train_tokenizer(texts.train, setting.vocabulary)
    tokenizer.save_pretrained(output / "model")
    encoded = tokenizer.backend_tokenizer.encode_batch([text + "\n\n" for text in texts.train])
    tokens = np.concatenate([np.array(part.ids, np.uint16) for part in encoded])
    write(output / "tokens.npy", partial(np.save, arr=tokens))
    for name, part in (("heldout", texts.heldout), ("calibration", texts.calibration)):
        write(output / f"{name}.txt", partial(Path.write_text, data="\n\n".join(part), encoding="utf-8"))
    facts = {"setting": asdict(setting), "version": corpus.VERSION, "files": texts.files, "train_tokens": len(tokens)}
    write(about, lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))  # last: now the folder is whole
    return tokens


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-pair encoding of bytes: every text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# --- training ---------------------------------------------------------------------------------------------------------


def new_model(setting: Setting) -> Any:
    """The model as it is before training."""
    import transformers

    torch.manual_seed(SEED)
    config = transformers.OPTConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.width,
        word_embed_proj_dim=setting.width,
        num_hidden_layers=setting.layers,
        ffn_dim=4 * setting.width,
        num_attention_heads=setting.heads,
        max_position_embeddings=setting.window,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.OPTForCausalLM(config)


def new_optimizers(model: Any, setting: Setting) -> list[torch.optim.Optimizer]:
    """Muon for the weights of the layers, AdamW for embeddings, biases and gains."""
    hidden = [parameter for parameter in model.model.decoder.layers.parameters() if parameter.dim() == 2]
    chosen = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": [parameter for parameter in others if parameter.dim() == 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in others if parameter.dim() != 2], "weight_decay": 0.0},
    ]
    return [Muon(hidden, setting.rate), torch.optim.AdamW(groups, lr=setting.rate, betas=(0.9, 0.95))]


def train(setting: Setting, output: Path, tokens: np.ndarray[Any, Any], until: int | None = None) -> list[float]:
    """Train to the last step (or to step `until`), from where the folder's state is; returns the losses by step."""
    until = setting.steps if until is None else until
    model = new_model(setting)
    optimizers = new_optimizers(model, setting)
    losses: list[float] = []
    kept = output / "state.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept_state)
        losses = state["losses"]

    def save() -> None:
        own = [optimizer.state_dict() for optimizer in optimizers]
        state = {"model": model.state_dict(), "optimizers": own, "losses": losses}
        write(kept, lambda path: torch.save(state, path))

    model.train()
    with tqdm(total=setting.steps, initial=len(losses), desc="training", unit="step", mininterval=1) as bar:
        while len(losses) < until:
            step = len(losses)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate(setting, step)
            ids = batch(setting, tokens, step)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
            if len(losses) % setting.save_every == 0 or len(losses) == until:
                save()
    if not math.isfinite(losses[-1]):
        raise RuntimeError(f"training: expected a finite loss, got {losses[-1]} at step {len(losses)}")
    model.save_pretrained(output / "model")
    return losses


def batch(setting: Setting, tokens: np.ndarray[Any, Any], step: int) -> Tensor:
    """The sequences of a step, int64 [batch, window]. They depend on the step only, so none need be remembered."""
    generator = np.random.default_rng([SEED, step])
    starts = generator.integers(0, len(tokens) - setting.window + 1, setting.batch)
    return torch.from_numpy(np.stack([tokens[start : start + setting.window] for start in starts]).astype(np.int64))


def rate(setting: Setting, step: int) -> float:
    """The learning rate: rising over the first twentieth of the steps, then falling to a tenth along a cosine."""
    warm = max(1, setting.steps // 20)
    if step < warm:
        return setting.rate * (step + 1) / warm
    done = (step - warm) / max(1, setting.steps - warm)
    return setting.rate * (0.55 + 0.45 * math.cos(math.pi * done))


# --- the models -------------------------------------------------------------------------------------------------------


def finish(setting: Setting, output: Path) -> dict[str, Any]:
    """Write the models with outlier features; returns each one's perplexity and what else there is to say."""
    loaded = language.load(output / "model")
    heldout = language.read_windows(loaded, output / "heldout.txt", setting.window, limit=setting.evaluated)
    calibration = language.read_windows(loaded, output / "calibration.txt", setting.window, limit=setting.evaluated)
    seen = lm_outliers.observe(loaded.model, calibration)
    features = lm_outliers.largest_features(seen, FEATURES)
    models = {"model": loaded.model}
    for name, size in lm_outliers.SIZES.items():
        models[name] = lm_outliers.with_outliers(loaded.model, features, size, seen)
    found = {}
    with Progress(len(models) * len(heldout)) as progress:
        for name, model in models.items():
            if name != "model":
                model.save_pretrained(output / name)
                loaded.tokenizer.save_pretrained(output / name)
            scores = perplexity.score(model, heldout, progress, name)
            found[name] = math.exp(-math.fsum(scores.log_likelihoods) / sum(scores.tokens))
    return {
        "parameters": loaded.model.num_parameters(),
        "perplexity": found,
        "heldout_windows": len(heldout),
        "outlier_features": features,
    }


if __name__ == "__main__":
    main()
