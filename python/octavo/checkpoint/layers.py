"""Which tensors of a checkpoint are weights of linear layers, and which of these become int8.

Where Transformers or diffusers has the model, its layers decide (`octavo.torch.choice.choose_layers`, as everywhere),
by the names that they have in the checkpoint. Else names and shapes do, against quantizing where they leave it open:

- a linear layer's weight is named ``<layer>.weight``, has two dimensions, and is no embedding by its name;
- a weight with as many rows as the vocabulary is an embedding or the output head: both stay in 16 bit;
- GPT-2 and its kin (`CONV1D_MODELS`) hold most linear weights as ``[in, out]`` (Transformers' ``Conv1D``): those are
  transposed, for an int8 weight is always ``[out, in]``;
- stacked expert weights (three dimensions) and fused parameters of other names (``in_proj_weight``) stay as they are.

Patterns are those of a shell and are matched against whole layer names ("model.layers.0.mlp.up_proj").
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from octavo._text import expect_patterns, matches, shown, unexpected
from octavo.checkpoint.files import Entry
from octavo.checkpoint.meta_model import meta_model, names_in_model
from octavo.checkpoint.reader import Checkpoint
from octavo.options import Options

# Not layers that lose little, but layers that others read: the output head's logits are compared with each other, a
# router's decide which expert runs. The head is also found by its shape; this is for configs without a vocab_size.
DEFAULT_SKIP = ("lm_head", "*.lm_head", "*.gate", "*.router", "*.shared_expert_gate")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")  # whose name does not contain "emb"
_STACKED = "its experts are stacked in one tensor (from_pretrained converts most)"

# Of a tensor: a reason to stay, whether it is stored as [in, out], or None for what is no linear layer's weight.
Decision = str | bool | None
Patterns = Sequence[str] | None


@dataclass(frozen=True)
class Chosen:
    """What becomes of a checkpoint's layers."""

    # By the name of a weight that becomes int8, whether it is stored as [in, out].
    int8: dict[str, bool] = field(default_factory=dict)
    # By the name of each other linear layer, or stack of experts, why it stays.
    kept: dict[str, str] = field(default_factory=dict)
    # By the name of an embedding's weight that of the output head, which is tied to it and becomes int8.
    heads: dict[str, str] = field(default_factory=dict)


def choose(
    model: Checkpoint, include: Patterns, skip: Patterns, *, head: bool | None = False, function: str = "quantize"
) -> Chosen:
    """Decide for every tensor of a checkpoint; the arguments are those of `quantize`, `function` whose they are.

    `head`: None: of a model that Transformers has.

    By default the output head and routers are left, or nothing where `include` is given. Raises TypeError or ValueError
    for arguments that do not fit the model, one that is quantized already, and one without layers to convert.
    """
    for argument, patterns in (("include", include), ("skip", skip)):
        expect_patterns(f"{function}: {argument}", patterns)
    method = model.config.get("quantization_config")
    if isinstance(method, dict):
        method = "octavo" if "octavo" in method else method.get("quant_method")
    if method or model.layers:
        raise unexpected(f"{function}: model", "a 16/32-bit model", f"one that {method or 'octavo'} has quantized")
    chosen = Chosen()
    by_model = _by_model(model, include, skip, head is not False)
    if head and by_model is None:
        raise unexpected(f"{function}: head", "a model that Transformers has", "another")
    decide, in_model, tied_head = by_model or (_by_name(model.config, include, skip), {}, {})
    decisions = {name: decide(name, entry) for name, entry in model.entries.items()}
    chosen.kept.update({name.removesuffix(".weight"): why for name, why in decisions.items() if isinstance(why, str)})
    chosen.int8.update({name: own for name, own in decisions.items() if isinstance(own, bool)})
    for name, first in model.ties.items():  # of tensors that are one, all become int8 or none
        if (name in chosen.int8) != (first in chosen.int8):
            for each in (name, first):
                chosen.int8.pop(each, None)
        chosen.kept.pop(name.removesuffix(".weight"), None)
    for name, own in tied_head.items():
        if own not in chosen.int8:
            chosen.heads[name] = own
            chosen.kept[name.removesuffix(".weight")] = f"an embedding; {own.removesuffix('.weight')} beside it is int8"
    layers = [name.removesuffix(".weight") for name in chosen.int8]
    for pattern in include or ():
        if not any(matches(each, [pattern]) for layer in layers for each in (layer, in_model.get(layer, layer))):
            none = "which matches none (an output head counts where config.json sets tie_word_embeddings to false)"
            raise unexpected(f"{function}: include", "patterns of linear layers", f"{shown(repr(pattern))}, {none}")
    if not layers:
        raise unexpected(f"{function}: model", "linear layers (two-dimensional .weight tensors)", "none to quantize")
    return chosen


def head_of(head: bool | None, options: Options) -> bool | None:
    """`choose`'s for `quantize`'s: None is False without rotation; see `octavo.torch.choice.converts_head`."""
    return False if head is None and not options.rotation else head


def keep_in_16_bit(chosen: Chosen, options: Mapping[str, object]) -> None:
    """Leave the layers whose options are None. Raises ValueError for one that does not become int8, or if none does."""
    tables = {own: name for name, own in chosen.heads.items()}
    for layer, own in options.items():
        weight = f"{layer}.weight"
        if weight not in chosen.int8 and weight not in tables:
            raise unexpected("quantize: layer_options", "layers that are quantized", repr(layer))
        if own is None:
            if chosen.int8.pop(weight, None) is None:
                del chosen.heads[tables[weight]], chosen.kept[tables[weight].removesuffix(".weight")]
            chosen.kept[layer] = "its options say so"
    if not chosen.int8:
        raise unexpected("quantize: layer_options", "a layer that becomes int8", "16 bit for all")


Decide = Callable[[str, Entry], Decision]


def _by_model(
    checkpoint: Checkpoint, include: Patterns, skip: Patterns, head: bool
) -> tuple[Decide, dict[str, str], dict[str, str]] | None:
    """By the model that the config describes, what it calls each layer, and `Chosen.heads`; None where none is."""
    try:
        # Whoever loads the checkpoint may ask for float16: some models then keep some layers in float32.
        model = meta_model(checkpoint.config, "float16")
        name_in_model = names_in_model(model)
    except (RuntimeError, ValueError):
        return None
    from octavo.torch.choice import choose_layers, is_conv1d

    found = {name: name_in_model(name) for name in checkpoint.entries}
    layer_in_model = {name.removesuffix(".weight"): own.removesuffix(".weight") for name, (own, _) in found.items()}

    def also_in_model(patterns: Patterns) -> list[str] | None:
        """The patterns, and what they match of the checkpoint's names by the model's."""
        if patterns is None:
            return None
        return [*patterns, *(own for name, own in layer_in_model.items() if matches(name, patterns))]

    choice = choose_layers(model, include=also_in_model(include), skip=also_in_model(skip), head=head)
    tied = {source: own for own, source in getattr(model, "all_tied_weights_keys", {}).items() if head}
    names = {name: tied.get(own, "") for name, (own, _) in found.items()}
    heads = {name: own for name, own in names.items() if own.removesuffix(".weight") in choice.layers}
    parameters = model.state_dict()
    by_name = _by_name(checkpoint.config, include, skip)

    def decide(name: str, entry: Entry) -> Decision:
        own, operations = found[name]
        layer, _, leaf = own.rpartition(".")
        if operations is not None:
            return _of_expert(model, own, operations, by_name(name, entry))
        if own not in parameters or (len(entry.shape) == 3 and "experts" in name):
            return by_name(name, entry)
        if leaf != "weight" or len(entry.shape) != 2:
            return None
        if layer in choice.layers:
            return is_conv1d(choice.layers[layer])
        return choice.kept.get(layer)

    return decide, layer_in_model, heads


def _of_expert(model: Any, parameter: str, operations: Sequence[Any], by_name: Decision) -> Decision:
    """Of a tensor that Transformers rearranges while it is loaded: an expert's may be int8, if it is only stacked."""
    if not isinstance(by_name, bool):
        return by_name
    from octavo.transformers.experts import is_convertible

    with suppress(AttributeError):
        experts = model.get_submodule(parameter.rpartition(".")[0])
        is_stacked = {type(each).__name__ for each in operations} <= {"MergeModulelist", "Concatenate"}
        if is_stacked and is_convertible(experts):
            return False
    return "Transformers rearranges it while loading"


def _by_name(config: Mapping[str, Any], include: Patterns, skip: Patterns) -> Decide:
    text = config.get("text_config")
    text_config: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    tied = all(each.get("tie_word_embeddings", True) for each in (config, text_config))
    skipped = DEFAULT_SKIP if skip is None and include is None else skip or ()

    def decide(name: str, entry: Entry) -> Decision:
        layer, _, leaf = name.rpartition(".")
        last = layer.rpartition(".")[2].lower()
        if len(entry.shape) == 3 and "experts" in name:
            return _STACKED
        if leaf != "weight" or not layer or len(entry.shape) != 2 or not entry.numel:
            return None
        if "emb" in last or last in _EMBEDDINGS:
            return None
        if matches(layer, skipped):
            return "skipped"
        if entry.shape[0] == text_config.get("vocab_size") and (include is None or tied):
            return "it has as many rows as the vocabulary: the output head or an embedding"
        if include is not None and not matches(layer, include):
            return "not included"
        if last not in _CONV1D_LAYERS:
            return False
        if "model_type" not in config:
            config_json = "a config.json whose model_type says whether this weight is [out, in] or GPT-2's [in, out]"
            raise unexpected(f"quantize: {shown(layer)}", config_json, "none")
        return config["model_type"] in CONV1D_MODELS

    return decide
