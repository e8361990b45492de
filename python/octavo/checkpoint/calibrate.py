"""Systematic outlier columns of a checkpoint: transformers runs the model, which stays on the disk.

accelerate reads the weights of a module when it is called and lets go of them afterwards, so that one module's weights
are in memory at a time, and the activations of a batch. The price is that each batch reads the whole model.
"""

import tempfile
from pathlib import Path
from typing import Any

from octavo._text import unexpected
from octavo.checkpoint.layers import Patterns, choose, head_of
from octavo.checkpoint.meta_model import names_in_model
from octavo.checkpoint.reader import Checkpoint
from octavo.options import DEFAULT, WHOLE_MODELS, options_of

_TOKENS = 256  # of a sequence


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
    head: bool | None = None,
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
        include, skip, head: as `quantize` will be given; None: the output head where the recipe rotates.
        progress: show a progress bar.
        trust_remote_code: run the code that the model's folder brings, where Transformers has not the model itself.

    Returns:
        Layer -> columns, under the names of the checkpoint, for the layers that were reached.

    Raises:
        RuntimeError: PyTorch, transformers or accelerate is missing.
        OSError, ValueError: files that cannot be read, a model that transformers does not know, no text, no layers.
    """
    single: dict[str, Any] = {"recipe": recipe, "threshold": threshold, "relative": relative, "cap": cap}
    options = options_of("calibrate", default=WHOLE_MODELS, calibrated=True, **single)
    which: dict[str, Any] = {"include": include, "skip": skip, "head": head_of(head, options)}
    running = Running("calibrate", model, trust_remote_code, **which)
    from octavo.torch.convert import random_tokens, systematic_columns

    inputs = random_tokens(running.config) if text is None else running.batches(text)[:batches]
    with tempfile.TemporaryDirectory(prefix="octavo-calibrate-") as folder:
        loaded, layers = running.load(progress, dtype="auto", device_map={"": "disk"}, offload_folder=folder)
        how: dict[str, Any] = {"min_fraction": min_fraction, "progress": progress, "function": "calibrate"}
        found = systematic_columns(loaded, layers, inputs, **options.criterion, **how)
    return {name: own.tolist() for name, own in found.items()}


class Running:
    """A model that Transformers can run; the arguments are those of `function`, which it names in errors.

    Attributes:
        config: the model's.
        stored: the weights of the layers that are asked about, by the names that they have in the checkpoint.
    """

    def __init__(self, function: str, model: str | Path, trust_remote_code: bool, **which: Any) -> None:
        source = Checkpoint(model, framework="numpy")
        chosen = choose(source, **which, function=function)
        self.stored, self._heads = [*chosen.int8, *chosen.heads.values()], set(chosen.heads.values())
        try:
            import accelerate  # noqa: F401 - transformers needs it, and says so late
            import transformers
        except ImportError as error:
            install = 'pip install "octavo[transformers]"'
            raise RuntimeError(f"this needs PyTorch, transformers and accelerate: {install} ({error})") from error
        own_code = "auto_map" in source.config and source.config.get("model_type") not in transformers.CONFIG_MAPPING
        if own_code and not trust_remote_code:
            runs_it = "trust_remote_code=True (--trust-remote-code) runs it"
            raise unexpected(model, "a model of Transformers", f"one that brings its own code: {runs_it}")
        self.model, self._trust = model, {"trust_remote_code": trust_remote_code}
        self.config = transformers.AutoConfig.from_pretrained(model, **self._trust)
        # The very class that saved the checkpoint: others name its layers otherwise.
        name = (self.config.architectures or ["AutoModelForCausalLM"])[0]
        places = source.config.get("auto_map") or {}  # a model's is a string, a tokenizer's a pair
        own = [auto for auto, place in places.items() if isinstance(place, str) and place.endswith(f".{name}")]
        self._class: Any = getattr(transformers, own[0] if own else name, None)
        if self._class is None:
            raise unexpected(model, "an architecture of transformers in config.json", name)

    def load(self, progress: bool, **how: Any) -> tuple[Any, dict[str, Any]]:
        """The model, from ``from_pretrained`` with arguments of its own, and its layers by the checkpoint's names."""
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        if not progress:
            logging.disable_progress_bar()
        try:
            model = self._class.from_pretrained(self.model, **how, **self._trust)
        finally:
            if shown:
                logging.enable_progress_bar()
        name_in_model, modules = names_in_model(model), dict(model.named_modules(remove_duplicate=False))
        layers = {}
        for name in self.stored:
            own, operations = (name, None) if name in self._heads else name_in_model(name)
            layer = modules.get(own.removesuffix(".weight"))
            if operations is None and layer is not None:
                layers[name.removesuffix(".weight")] = layer
        if not layers:
            linear = f"linear layers that transformers names as the checkpoint does ({self.config.model_type})"
            raise unexpected(self.model, linear, "none")
        return model, layers

    def batches(self, text: str | Path, sequences: int = 4) -> list[dict[str, Any]]:
        """The model's arguments for a file of text: some sequences of 256 tokens at a time; a shorter one alone."""
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, **self._trust)
        try:
            tokens = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
        except UnicodeDecodeError as error:
            raise unexpected(text, "text in UTF-8", error) from error
        if not tokens:
            raise unexpected(text, "text to calibrate with", "none")
        length = min(_TOKENS, getattr(self.config, "max_position_embeddings", None) or _TOKENS)
        whole = len(tokens) // length * length
        ids = list(torch.tensor(tokens[:whole], dtype=torch.int64).reshape(-1, length).split(sequences))
        ids = [each for each in (*ids, torch.tensor(tokens[whole:], dtype=torch.int64)[None]) if each.numel()]
        names = ("input_ids", "decoder_input_ids") if self.config.is_encoder_decoder else ("input_ids",)
        return [dict.fromkeys(names, own) for own in ids]
