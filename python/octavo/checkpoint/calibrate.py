"""Systematic outlier columns of a checkpoint, from a text: loads the model with transformers and runs it.

Unlike the conversion this holds the whole model in memory. Models whose linear layers are GPT-2's ``Conv1D`` are not
covered: `octavo.torch.calibrate_` sees ``nn.Linear`` only.
"""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoint.layers import CONV1D_MODELS
from octavo.checkpoint.source import open_source
from octavo.checkpoint.tasks import quantized_layers

_TOKENS = 256  # of a batch


def calibrate(
    model: str | Path,
    text: str | Path,
    *,
    threshold: float = 6.0,
    min_fraction: float = 0.06,
    batches: int = 32,
    progress: bool = True,
) -> dict[str, list[int]]:
    """Find the outlier columns of a checkpoint's linear layers, for `quantize` to keep in 16 bit.

    Args:
        model: a folder with weights, config and tokenizer.
        text: a file of text like what the model will see; up to `batches` times 256 tokens of it are used.
        threshold, min_fraction: see `octavo.torch.calibrate_`.
        batches: how many.
        progress: show a progress bar.

    Returns:
        Layer -> columns, under the names of the checkpoint, for the layers that were reached.

    Raises:
        RuntimeError: PyTorch or transformers is missing.
        OSError, ValueError: files that cannot be read, a model that transformers does not know, no text, no layers.
    """
    try:
        import torch
        import transformers

        from octavo.torch import calibrate_
    except ImportError as error:
        raise RuntimeError(
            f'calibration needs PyTorch and transformers: pip install "octavo[demo]" ({error})'
        ) from error
    stored = quantized_layers(open_source(model))
    config = transformers.AutoConfig.from_pretrained(model)
    if config.model_type in CONV1D_MODELS:
        raise ValueError(
            f"{model}: expected a model of nn.Linear layers, got {config.model_type}'s Conv1D: give a file of columns"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    # The very class that saved the checkpoint: others name its layers otherwise.
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"{model}: expected an architecture of transformers in config.json, got {architecture}")
    loaded = model_class.from_pretrained(model, dtype="auto")

    tokens = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
    if not tokens:
        raise ValueError(f"{text}: expected text to calibrate with, got none")
    length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    chunks = [tokens[start : start + length] for start in range(0, len(tokens), length)][:batches]
    inputs = [{"input_ids": torch.tensor([chunk])} for chunk in chunks]
    if config.is_encoder_decoder:
        inputs = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in inputs]
    found = calibrate_(loaded, inputs, threshold=threshold, min_fraction=min_fraction, skip=(), progress=progress)

    prefix = getattr(loaded, "base_model_prefix", "") + "."
    columns = {}
    for name, own in found.items():
        for spelling in (name, name.removeprefix(prefix), prefix + name):
            if spelling in stored:
                columns[spelling] = own.tolist()
                break
    if not columns:
        raise ValueError(
            f"{model}: expected linear layers that transformers names as the checkpoint does, got none "
            f"({config.model_type})"
        )
    return columns
