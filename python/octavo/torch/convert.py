"""The conversion of whole models in place: `calibrate_`, then `quantize_`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from octavo._text import expect, unexpected
from octavo.functional import find_outliers
from octavo.options import DEFAULT, WHOLE_MODELS, Options, options_of
from octavo.torch.choice import choose_layers, converts_head, oriented
from octavo.torch.layer import CALIBRATED, Int8Linear, watch_loading
from octavo.torch.operation import FLOAT_DTYPES
from octavo.torch.tensor import Int8Tensor
from octavo.torch.training import untrain_

MIN_FRACTION = 0.06  # of positions, from which on the paper calls an outlier column systematic (section 4)
# Models of these packages have stacked experts, and save themselves.
_HUB = ("transformers.", "diffusers.")


def quantize_(
    model: nn.Module,
    *,
    skip: Sequence[str] | None = None,
    head: bool | None = None,
    progress: bool = True,
    options: Options | None = None,
    **keywords: Any,
) -> nn.Module:
    """Make the weight of every linear layer of `model` an `Int8Tensor`, in place, one after the other.

    The layers stay what they are, with their class, hooks and attributes (``nn.Linear`` becomes its subclass
    `Int8Linear`). The 16/32-bit weight of a layer is released as soon as its int8 form exists. Layers that share a
    weight go on sharing it. Which layers stay as they are: see `octavo.torch.choice.choose_layers`. Columns that
    `calibrate_` recorded are kept in 16 bit (see `octavo.Options.keeping`). What `train_` changed is undone first.

    Args:
        skip: patterns as in a shell ("*", "?", "[...]") of qualified names ("decoder.layers.0.fc1"); default: the
            routers of mixtures of experts, and the output head unless `head` says otherwise.
        head: convert the output head of a Transformers model, too, or not; one that is tied to the embedding gets a
            weight of its own beside it, which takes memory and makes decoding faster on CPUs. None: where the model is
            on the CPU and `rotation` is not 0.
        progress: show a progress bar.
        options: see `octavo.Options`; or single ones by name, such as ``threshold=5.0``, and ``recipe=`` for the
            others (see `octavo.recipe`).

    Returns:
        model.

    Raises (before anything is replaced):
        ValueError: a weight with NaN or Inf, or without memory (meta device); "static" and a layer that was not
            calibrated; `model` is itself an ``nn.Linear`` (use `Int8Linear.from_linear`).
        TypeError: a weight of another dtype than float32, float16 and bfloat16.
    """
    expect("quantize_: model", model, nn.Module, "an nn.Module")
    if isinstance(model, nn.Linear):
        linear = "an nn.Linear (use Int8Linear.from_linear)"
        raise unexpected("quantize_: model", "a module that holds layers", linear)
    calibrated = any(hasattr(module, CALIBRATED) for module in model.modules())
    chosen = options_of("quantize_", options, default=WHOLE_MODELS, calibrated=calibrated, **keywords)
    layers = choose_layers(model, skip=skip, head=converts_head("quantize_", head, chosen, _devices(model))).layers
    _check_layers(layers, chosen)
    untrain_(model)

    # By identity only: nothing here may hold on to a weight that has been converted.
    sharers: dict[int, dict[int, Any]] = {}
    for layer in layers.values():
        sharers.setdefault(id(layer.weight), {})[id(layer)] = layer
    for users in tqdm(sharers.values(), desc="quantize", unit="weight", disable=not progress):
        first, *others = users.values()
        convert_(first, chosen)
        for layer in others:
            hold(layer, first.weight)
    if any(kind.__module__.startswith(_HUB) for module in model.modules() for kind in type(module).__mro__):
        from octavo.transformers.model import finish_

        finish_(model, chosen, skip)
    for module in model.modules():
        # A module of sentence-transformers that writes its own state dict, such as a Dense one.
        has_pretrained = any(hasattr(own, "save_pretrained") for own in module.modules())
        if hasattr(module, "save_torch_weights") and not has_pretrained:
            module.save_torch_weights = partial(_save_dequantized, module)  # type: ignore[assignment]
    return model


def _save_dequantized(module: nn.Module, output_path: str, safe_serialization: bool = True) -> None:
    """``save_torch_weights`` of sentence-transformers, whose readers know no int8: the weights are dequantized."""
    state = {key: own.dequantize() if isinstance(own, Int8Tensor) else own for key, own in module.state_dict().items()}
    if safe_serialization:
        save_file(state, Path(output_path, "model.safetensors"))
    else:
        torch.save(state, Path(output_path, "pytorch_model.bin"))


def convert_(layer: Any, options: Options) -> None:
    """Make the weight of one linear layer an Int8Tensor."""
    weight = Int8Tensor.from_float(oriented(layer, layer.weight), options, getattr(layer, CALIBRATED, None))
    hold(layer, nn.Parameter(oriented(layer, weight), requires_grad=False))


def hold(layer: Any, weight: nn.Parameter) -> None:
    """Give a linear layer its int8 weight."""
    layer.weight = weight
    if type(layer) is nn.Linear:
        layer.__class__ = Int8Linear
    watch_loading(layer)


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    recipe: str = DEFAULT,
    threshold: float = DEFAULT,
    relative: float | None = DEFAULT,
    cap: float | None = DEFAULT,
    min_fraction: float = MIN_FRACTION,
    skip: Sequence[str] | None = None,
    head: bool | None = None,
    progress: bool = True,
    options: Options | None = None,
) -> dict[str, Tensor]:
    """Find the systematic outlier columns of each linear layer, for `quantize_` to keep in 16 bit.

    Runs `batches` through the 16/32-bit model (it needs the original weights, so it comes before `quantize_`) and
    records, layer by layer, the input features whose magnitude is >= `threshold` at a fraction of at least
    `min_fraction` of all positions. The paper calls outliers systematic from 6 % of positions on (section 4). With
    `relative` it records the columns that `octavo.find_outliers` finds in all positions together.

    Args:
        batches: each a tensor (``model(batch)``), a tuple or list (``model(*batch)``), or a mapping
            (``model(**batch)``). Default: for a language model of Transformers, 1536 random token ids. Columns that
            are large whatever the text are what is looked for: on real models those found with random ids, with text
            that a model made itself and with text of the kind it was measured on served equally well.
        recipe: whose criterion it is where none of the next three is given; see `octavo.recipe`.
        threshold, relative: as in `octavo.find_outliers`.
        cap: the most columns, as a part of k; of more those of the largest magnitude stay.
        min_fraction: in [0, 1]; 0 records every column that was ever an outlier. Unused with `relative`.
        skip, head: as in `quantize_`.
        progress: show a progress bar.
        options: whose `threshold`, `relative` and `cap` to use, instead of single ones.

    Returns:
        Qualified name -> int32 ``[r]``, ascending, for every layer that the batches reached.

    The model is run in eval mode without autograd; its mode and parameters are left as they were.

    Raises:
        TypeError, ValueError: options that octavo does not have, `min_fraction` outside [0, 1], no batches, no linear
            layers, or layers that are quantized already; no `batches`, and a model without a vocabulary.
    """
    expect("calibrate_: min_fraction", min_fraction, Real, "a number")
    expect_runnable("calibrate_", model, () if batches is None else batches)
    single: dict[str, Any] = {"recipe": recipe, "threshold": threshold, "relative": relative, "cap": cap}
    chosen = options_of("calibrate_", options, default=WHOLE_MODELS, calibrated=True, **single)
    how = {**chosen.criterion, "progress": progress}
    layers = choose_layers(model, skip=skip, head=converts_head("calibrate_", head, chosen, _devices(model))).layers
    if batches is None:
        batches = random_tokens(getattr(model, "config", None), next(model.parameters()).device)
    columns = systematic_columns(model, layers, batches, **how, min_fraction=float(min_fraction))
    for name, own in columns.items():
        setattr(layers[name], CALIBRATED, own)
    return columns


def _devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


def random_tokens(config: Any, device: Any = "cpu") -> list[dict[str, Tensor]]:
    """Two batches of three sequences of up to 256 token ids, drawn from the vocabulary of a model's `config`.

    The same for the same vocabulary. Raises ValueError for a config without one.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ValueError("calibrate_: batches: expected some for a model whose config has no vocab_size, got none")
    length = min(256, getattr(config, "max_position_embeddings", None) or 256)
    ids = torch.randint(vocabulary, (6, length), generator=torch.Generator().manual_seed(0)).to(device)
    names = ("input_ids", "decoder_input_ids") if getattr(config, "is_encoder_decoder", False) else ("input_ids",)
    return [dict.fromkeys(names, own) for own in ids.split(3)]


def systematic_columns(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    threshold: float,
    relative: float | None = None,
    cap: float | None = None,
    min_fraction: float,
    progress: bool,
    function: str = "calibrate_",
) -> dict[str, Tensor]:
    """What `calibrate_` returns, of the modules `layers` of `model`, by any names; nothing is recorded in them.

    `function`: whose arguments these are, for its errors.
    """
    if not threshold >= 0:
        raise ValueError(f"{function}: threshold: expected a number >= 0, got {threshold}")
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"{function}: min_fraction: expected a number in [0, 1], got {min_fraction}")
    if not layers:
        raise ValueError(f"{function}: model: expected linear layers, got none")
    seen: dict[nn.Module, tuple[Any, Any, int]] = {}  # by column outliers and the largest magnitude; positions

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        magnitudes = x.detach().reshape(-1, x.shape[-1]).float().abs()
        zeros = magnitudes.new_zeros(magnitudes.shape[1])
        outliers, largest, positions = seen.get(module, (zeros, zeros, 0))
        # As in find_outliers: compared in float32, and NaN and Inf count.
        outliers = outliers + (~(magnitudes < threshold)).sum(0)
        largest = torch.maximum(largest, magnitudes.amax(0) if len(magnitudes) else zeros)
        seen[module] = outliers, largest, positions + len(magnitudes)

    modules = {id(layer): layer for layer in layers.values()}.values()
    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in modules]
    run_batches(model, batches, hooks, doing="calibrate", progress=progress)
    if not seen:
        raise ValueError(f"{function}: batches: expected at least one that reaches a linear layer, got none")

    columns: dict[str, Tensor] = {}
    for name, (outliers, largest, positions) in ((name, seen[own]) for name, own in layers.items() if own in seen):
        if relative is None:
            largest = largest.where(outliers >= min_fraction * positions, 0)
        # The maxima stand for every position: from 512 on, how many there are matters to no criterion.
        rows = largest.cpu().expand(min(positions, 512), -1)
        columns[name] = find_outliers(rows, threshold=threshold, relative=relative, cap=cap)
    return columns


def expect_runnable(function: str, model: object, batches: object) -> None:
    """Raise TypeError or ValueError, naming it, for what is no 16/32-bit model, and for what are no batches."""
    expect(f"{function}: model", model, nn.Module, "an nn.Module")
    expect(f"{function}: batches", batches, Iterable, "batches")
    if any(isinstance(parameter, Int8Tensor) for parameter in model.parameters()):  # type: ignore[attr-defined]
        raise ValueError(f"{function}: model: expected the 16/32-bit model, got one that quantize_ has converted")


def run_batches(
    model: nn.Module, batches: Iterable[Any], hooks: Iterable[RemovableHandle], *, doing: str, progress: bool
) -> None:
    """Run each batch in eval mode without autograd; the modules' modes are left as they were, `hooks` are removed.

    A tensor is given as ``model(batch)``, a tuple or list as ``model(*batch)``, a mapping as ``model(**batch)``.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc=doing, unit="batch", disable=not progress):
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training


def _check_layers(layers: Mapping[str, Any], options: Options) -> None:
    """Raise now what would stop the conversion of a layer."""
    for name, layer in layers.items():
        weight = layer.weight
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"quantize_: {name}.weight: expected float32, float16 or bfloat16, got {weight.dtype}")
        if weight.device.type == "meta":
            raise ValueError(f"quantize_: {name}.weight: expected a tensor with memory, got one on the meta device")
        if not torch.isfinite(weight).all():
            raise ValueError(f"quantize_: {name}.weight: expected finite values, got NaN or Inf")
        if options.outliers == "static" and not hasattr(layer, CALIBRATED):
            calibrated = "a calibrated layer for outliers='static' (run calibrate_ first)"
            raise unexpected(f"quantize_: {name}", calibrated, "none")
