"""Systematic outlier columns of a checkpoint, from a text: transformers runs the model, which stays on the disk.

accelerate reads the weights of a module when it is called and lets go of them afterwards, so that one module's weights
are in memory at a time, and the activations of a batch. The price is that each batch reads the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo._text import unexpected
from octavo.checkpoint.layers import Patterns, choose
from octavo.checkpoint.meta_model import names_in_model
from octavo.checkpoint.reader import Checkpoint

_TOKENS = 256  # of a sequence
_SEQUENCES = 4  # of a batch


def calibrate(
    model: str | Path,
    text: str | Path | None = None,
    *,
    threshold: float = 6.0,
    relative: float | None = None,
    cap: float | None = None,
    min_fraction: float = 0.06,
    batches: int = 32,
    include: Patterns = None,
    skip: Patterns = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, list[int]]:
    """Find the outlier columns of a checkpoint's linear layers, for `quantize` to keep in 16 bit.

    Args:
        model: a folder with weights, config and tokenizer. Weights that transformers rearranges while it reads them
            (mixtures of experts), and those of PyTorch files, are first copied into a temporary folder (``TMPDIR``).
        text: a file of text like what the model will see; up to `batches` times 1024 tokens of it are used. Default:
            random token ids.
        threshold, relative, cap, min_fraction: see `octavo.torch.calibrate_`.
        batches: how many, of four sequences of up to 256 tokens; each reads the model once.
        include, skip: patterns of layer names, as `quantize` will be given.
        progress: show a progress bar.
        trust_remote_code: run the code that the model's folder brings, where Transformers has not the model itself.

    Returns:
        Layer -> columns, under the names of the checkpoint, for the layers that were reached.

    Raises:
        RuntimeError: PyTorch, transformers or accelerate is missing.
        OSError, ValueError: files that cannot be read, a model that transformers does not know, no text, no layers.
    """
    try:
        import accelerate  # noqa: F401 - transformers needs it, and says so late
        import transformers

        from octavo.torch import systematic_columns
        from octavo.torch.convert import random_tokens
    except ImportError as error:
        install = 'pip install "octavo[transformers]"'
        raise RuntimeError(f"calibration needs PyTorch, transformers and accelerate: {install} ({error})") from error
    source = Checkpoint(model, framework="numpy")
    stored = choose(source, include, skip, function="calibrate").int8
    own_code = "auto_map" in source.config and source.config.get("model_type") not in transformers.CONFIG_MAPPING
    if own_code and not trust_remote_code:
        runs_it = "trust_remote_code=True (--trust-remote-code) runs it"
        raise unexpected(model, "a model of Transformers", f"one that brings its own code: {runs_it}")
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    # The very class that saved the checkpoint: others name its layers otherwise.
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    own = [auto for auto, place in (source.config.get("auto_map") or {}).items() if place.endswith(f".{name}")]
    model_class = getattr(transformers, own[0] if own else name, None)
    if model_class is None:
        raise unexpected(model, "an architecture of transformers in config.json", name)
    if text is None:
        inputs = random_tokens(config)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        try:
            tokens = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
        except UnicodeDecodeError as error:
            raise unexpected(text, "text in UTF-8", error) from error
        if not tokens:
            raise unexpected(text, "text to calibrate with", "none")
        length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
        inputs = list(_batches(tokens, length, config.is_encoder_decoder))[:batches]

    with tempfile.TemporaryDirectory(prefix="octavo-calibrate-") as folder:
        with _progress_bars(progress):
            loaded = model_class.from_pretrained(
                model,
                dtype="auto",
                device_map={"": "disk"},
                offload_folder=folder,
                trust_remote_code=trust_remote_code,
            )
        layers = _layers(loaded, stored)
        if not layers:
            linear = f"linear layers that transformers names as the checkpoint does ({config.model_type})"
            raise unexpected(model, linear, "none")
        criterion: Any = {"threshold": threshold, "relative": relative, "cap": cap, "min_fraction": min_fraction}
        found = systematic_columns(loaded, layers, inputs, **criterion, progress=progress, function="calibrate")
    return {name: own.tolist() for name, own in found.items()}


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """Whether transformers shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not show:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _batches(tokens: Sequence[int], length: int, has_decoder: bool) -> Iterator[dict[str, Any]]:
    """Sequences of `length` tokens, some at a time; the last one, which is shorter, by itself."""
    import torch

    sequences = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    whole = len(tokens) // length
    for start in (*range(0, whole, _SEQUENCES), *range(whole, len(sequences))):
        ids = torch.tensor(sequences[start : min(start + _SEQUENCES, whole) if start < whole else None])
        yield {"input_ids": ids, "decoder_input_ids": ids} if has_decoder else {"input_ids": ids}


def _layers(model: Any, stored: Iterable[str]) -> dict[str, Any]:
    """The modules that hold the weights `stored`, by the names that these layers have in the checkpoint."""
    name_in_model = names_in_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: name_in_model(name) for name in stored}
    return {
        name.removesuffix(".weight"): modules[own.removesuffix(".weight")]
        for name, (own, operations) in found.items()
        if operations is None and own.removesuffix(".weight") in modules
    }
