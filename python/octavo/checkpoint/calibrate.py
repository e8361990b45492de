"""Systematic outlier columns of a checkpoint: transformers runs the model, which stays on the disk.

accelerate reads the weights of a module when it is called and lets go of them afterwards, so that one module's weights
are in memory at a time, and the activations of a batch. The price is that each batch reads the whole model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from octavo.checkpoint.layers import Patterns
from octavo.checkpoint.running import Running
from octavo.options import DEFAULT, WHOLE_MODELS, options_of


def calibrate(
    model: str | Path,
    text: str | Path | None = None,
    *,
    recipe: str = DEFAULT,
    threshold: float = DEFAULT,
    relative: float | None = DEFAULT,
    cap: float | None = DEFAULT,
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
            random token ids, as in `octavo.torch.calibrate_`.
        recipe, threshold, relative, cap, min_fraction: see `octavo.torch.calibrate_`.
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
    single: dict[str, Any] = {"recipe": recipe, "threshold": threshold, "relative": relative, "cap": cap}
    options = options_of("calibrate", default=WHOLE_MODELS, **single)
    running = Running(model, include, skip, trust_remote_code, "calibrate")
    from octavo.torch.convert import random_tokens, systematic_columns

    inputs = random_tokens(running.config) if text is None else running.batches(text)[:batches]
    with tempfile.TemporaryDirectory(prefix="octavo-calibrate-") as folder:
        loaded, layers = running.load(progress, dtype="auto", device_map={"": "disk"}, offload_folder=folder)
        criterion: Any = {name: getattr(options, name) for name in ("threshold", "relative", "cap")}
        criterion["min_fraction"] = min_fraction
        found = systematic_columns(loaded, layers, inputs, **criterion, progress=progress, function="calibrate")
    return {name: own.tolist() for name, own in found.items()}
