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

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from octavo._sizes import shown
from octavo.checkpoint.files import Entry
from octavo.checkpoint.model import meta_model, names_in_model
from octavo.checkpoint.source import Source
from octavo.file_format import find_weights

# Not layers that lose little, but layers that others read: the output head's logits are compared with each other, a
# router's decide which expert runs. The head is also found by its shape; this is for configs without a vocab_size.
DEFAULT_SKIP = ("lm_head", "*.lm_head", "*.gate", "*.router", "*.shared_expert_gate")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")  # whose name does not contain "emb"


@dataclass(frozen=True)
class Chosen:
    """What becomes of a checkpoint's layers.

    Attributes:
        int8: by the name of a weight that becomes int8, whether it is stored as ``[in, out]``.
        kept: by the name of each other linear layer, or stack of experts, why it stays.
    """

    int8: dict[str, bool] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def choose(
    source: Source, include: Sequence[str] | None, skip: Sequence[str] | None, *, function: str = "quantize"
) -> Chosen:
    """Decide for every tensor of a checkpoint.

    Args:
        source: the checkpoint.
        include: patterns of layers; given, only these.
        skip: patterns of layers to leave; default: the output head and routers, or nothing where `include` is given.
        function: whose arguments these are, for its errors.

    Raises:
        TypeError: a pattern in the place of a sequence of them.
        ValueError: a model that is quantized already; an include pattern that no layer matches; no layer to convert;
            one stored as nobody can tell.
    """
    for argument, patterns in (("include", include), ("skip", skip)):
        if isinstance(patterns, str):
            raise TypeError(f"{function}: {argument}: expected a sequence of patterns, got a string")
    method = source.config.get("quantization_config")
    if isinstance(method, dict):
        method = "octavo" if "octavo" in method else method.get("quant_method")
    if method or find_weights({name: entry.dtype for name, entry in source.entries.items()}):
        said = f"expected a 16/32-bit model, got one that {method or 'octavo'} has quantized"
        raise ValueError(f"{function}: model: {said}")
    chosen = Chosen()
    decide, in_model = _by_model(source, include, skip) or (_by_name(source.config, include, skip), {})
    ties = {name: first for shard in source.shards for name, first in shard.ties.items()}
    for name, entry in source.entries.items():
        decision = decide(name, entry)
        if isinstance(decision, str):
            chosen.kept[name.removesuffix(".weight")] = decision
        elif decision is not None:
            chosen.int8[name] = decision
    for name, first in ties.items():  # of tensors that are one, all become int8 or none
        if (name in chosen.int8) != (first in chosen.int8):
            for each in (name, first):
                chosen.int8.pop(each, None)
        chosen.kept.pop(name.removesuffix(".weight"), None)
    layers = [name.removesuffix(".weight") for name in chosen.int8]
    for pattern in include or ():
        if not any(fnmatchcase(each, pattern) for layer in layers for each in (layer, in_model.get(layer, layer))):
            raise ValueError(
                f"{function}: include: expected patterns of linear layers, got {shown(repr(pattern))}, which matches "
                "none (an output head counts where config.json sets tie_word_embeddings to false)"
            )
    if not layers:
        raise ValueError(
            f"{function}: model: expected linear layers (two-dimensional .weight tensors), got none to quantize"
        )
    return chosen


# Of a tensor: a reason to stay, whether it is stored as [in, out], or None for what is no linear layer's weight.
Decide = Callable[[str, Entry], "str | bool | None"]


def _by_model(
    source: Source, include: Sequence[str] | None, skip: Sequence[str] | None
) -> tuple[Decide, dict[str, str]] | None:
    """By the model that the config describes, and what it calls each layer; None where nobody has it."""
    try:
        # Whoever loads the checkpoint may ask for float16, beside which some models keep some layers in float32.
        model = meta_model(source.config, "float16")
        name_in_model = names_in_model(model)
    except (RuntimeError, ValueError):
        return None
    from octavo.torch.choice import choose_layers, is_conv1d

    found = {name: name_in_model(name) for name in source.entries}
    layer_in_model = {name.removesuffix(".weight"): own.removesuffix(".weight") for name, (own, _) in found.items()}

    def also_in_model(patterns: Sequence[str] | None) -> list[str] | None:
        """The patterns, and what they match of the checkpoint's names by the model's."""
        if patterns is None:
            return None
        matched = [own for name, own in layer_in_model.items() if any(fnmatchcase(name, each) for each in patterns)]
        return [*patterns, *matched]

    choice = choose_layers(model, include=also_in_model(include), skip=also_in_model(skip))
    parameters = model.state_dict()
    by_name = _by_name(source.config, include, skip)

    def decide(name: str, entry: Entry) -> str | bool | None:
        own, operations = found[name]
        layer, _, leaf = own.rpartition(".")
        if operations is not None:
            return _of_expert(model, own, operations, by_name(name, entry))
        if own not in parameters:
            return by_name(name, entry)
        if len(entry.shape) == 3 and "experts" in name:
            return STACKED
        if leaf != "weight" or len(entry.shape) != 2:
            return None
        if layer in choice.kept:
            return choice.kept[layer]
        return is_conv1d(choice.layers[layer]) if layer in choice.layers else None

    return decide, layer_in_model


STACKED = "its experts are stacked in one tensor (from_pretrained converts most)"


def _of_expert(model: Any, parameter: str, operations: Sequence[Any], by_name: str | bool | None) -> str | bool | None:
    """Of a tensor that Transformers rearranges while it is loaded: an expert's may be int8, if it is only stacked."""
    if not isinstance(by_name, bool):
        return by_name
    try:
        from octavo.transformers.experts import is_convertible

        experts = model.get_submodule(parameter.rpartition(".")[0])
        is_stacked = {type(each).__name__ for each in operations} <= {"MergeModulelist", "Concatenate"}
        if is_stacked and is_convertible(experts):
            return False
    except AttributeError:
        pass
    return "Transformers rearranges it while loading"


def _by_name(config: Mapping[str, Any], include: Sequence[str] | None, skip: Sequence[str] | None) -> Decide:
    text = config.get("text_config")
    text_config: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    tied = all(each.get("tie_word_embeddings", True) for each in (config, text_config))
    skipped = DEFAULT_SKIP if skip is None and include is None else skip or ()

    def decide(name: str, entry: Entry) -> str | bool | None:
        layer, _, leaf = name.rpartition(".")
        last = layer.rpartition(".")[2].lower()
        if len(entry.shape) == 3 and "experts" in name:
            return STACKED
        if leaf != "weight" or not layer or len(entry.shape) != 2 or not entry.numel:
            return None
        if "emb" in last or last in _EMBEDDINGS:
            return None
        if any(fnmatchcase(layer, pattern) for pattern in skipped):
            return "skipped"
        if entry.shape[0] == text_config.get("vocab_size") and (include is None or tied):
            return "it has as many rows as the vocabulary: the output head or an embedding"
        if include is not None and not any(fnmatchcase(layer, pattern) for pattern in include):
            return "not included"
        if last not in _CONV1D_LAYERS:
            return False
        if "model_type" not in config:
            raise ValueError(
                f"quantize: {shown(layer)}: expected a config.json beside the checkpoint whose model_type says whether "
                "this weight is [out, in] or GPT-2's [in, out], got none"
            )
        return config["model_type"] in CONV1D_MODELS

    return decide
