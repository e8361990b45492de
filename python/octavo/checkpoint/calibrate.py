"""Systematic outlier columns of a checkpoint, from a text: transformers runs the model, which stays on the disk.

accelerate reads the weights of a module when it is called and lets go of them afterwards, so that one module's weights
are in memory at a time, and the activations of a batch. The price is that each batch reads the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.checkpoint.layers import choose
from octavo.checkpoint.model import names_in_model
from octavo.checkpoint.source import Source, open_source

_TOKENS = 256  # of a sequence
_SEQUENCES = 4  # of a batch


def calibrate(
    model: str | Path,
    text: str | Path,
    *,
    threshold: float = 6.0,
    min_fraction: float = 0.06,
    batches: int = 32,
    include: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, list[int]]:
    """Find the outlier columns of a checkpoint's linear layers, for `quantize` to keep in 16 bit.

    Args:
        model: a folder with weights, config and tokenizer. Weights that transformers rearranges while it reads them
            (mixtures of experts), and those of PyTorch files, are first copied into a temporary folder (``TMPDIR``).
        text: a file of text like what the model will see; up to `batches` times 1024 tokens of it are used.
        threshold, min_fraction: see `octavo.torch.calibrate_`.
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
    except ImportError as error:
        raise RuntimeError(
            f'calibration needs PyTorch, transformers and accelerate: pip install "octavo[transformers]" ({error})'
        ) from error
    source = open_source(model)
    stored = choose(source, include, skip, function="calibrate").int8
    own_code = "auto_map" in source.config and source.config.get("model_type") not in transformers.CONFIG_MAPPING
    if own_code and not trust_remote_code:
        raise ValueError(
            f"{model}: expected a model of Transformers, got one that brings its own code: trust_remote_code=True "
            "(--trust-remote-code) runs it"
        )
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    model_class = _model_class(model, source, config)
    tokens = tokenizer(_read_text(Path(text)))["input_ids"]
    if not tokens:
        raise ValueError(f"{text}: expected text to calibrate with, got none")
    length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    inputs = list(_batches(tokens, length))[:batches]
    if config.is_encoder_decoder:
        inputs = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in inputs]

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
            raise ValueError(
                f"{model}: expected linear layers that transformers names as the checkpoint does, got none "
                f"({config.model_type})"
            )
        found = systematic_columns(
            loaded,
            layers,
            inputs,
            threshold=threshold,
            min_fraction=min_fraction,
            progress=progress,
            function="calibrate",
        )
    return {name: own.tolist() for name, own in found.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got {error}") from error


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


def _batches(tokens: Sequence[int], length: int) -> Iterator[dict[str, Any]]:
    """Sequences of `length` tokens, some at a time; the last one, which is shorter, by itself."""
    import torch

    whole = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    for start in range(0, len(whole), _SEQUENCES):
        yield {"input_ids": torch.tensor(whole[start : start + _SEQUENCES])}
    rest = tokens[len(whole) * length :]
    if rest:
        yield {"input_ids": torch.tensor([rest])}


def _layers(model: Any, stored: Iterable[str]) -> Mapping[str, Any]:
    """The modules that hold the weights `stored`, by the names that these layers have in the checkpoint."""
    name_in_model = names_in_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for name in stored:
        parameter, operations = name_in_model(name)
        module = modules.get(parameter.removesuffix(".weight"))
        if module is not None and operations is None:
            layers[name.removesuffix(".weight")] = module
    return layers


def _model_class(model: str | Path, source: Source, config: Any) -> Any:
    """The very class that saved the checkpoint: others name its layers otherwise."""
    import transformers

    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    own = [name for name, place in (source.config.get("auto_map") or {}).items() if place.endswith(f".{architecture}")]
    model_class = getattr(transformers, own[0] if own else architecture, None)
    if model_class is None:
        raise ValueError(f"{model}: expected an architecture of transformers in config.json, got {architecture}")
    return model_class
