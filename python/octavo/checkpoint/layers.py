"""Which tensors of a checkpoint are weights of linear layers.

A checkpoint does not say which module a tensor belongs to, so this is decided from names, shapes and config.json, and
where that is not enough, against quantizing:

- a linear layer's weight is named ``<layer>.weight``, has two dimensions, and is no embedding by its name;
- a weight with as many rows as the vocabulary is an embedding or the output head: both stay in 16 bit unless asked for;
- GPT-2 and its kin (`CONV1D_MODELS`) hold most linear weights as ``[in, out]`` (transformers' ``Conv1D``): those are
  transposed, for an int8 weight is always ``[out, in]``;
- stacked expert weights (three dimensions) and fused parameters of other names (``in_proj_weight``) stay as they are.

Patterns are those of a shell and are matched against qualified layer names ("model.layers.0.mlp.up_proj").
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

# Not layers that lose little, but layers that others read: the output head's logits are compared with each other, a
# router's decide which expert runs. The head is also found by its shape; this is for configs without a vocab_size.
DEFAULT_SKIP = ("*lm_head", "*.gate", "*.router", "*.shared_expert_gate")

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
# Embeddings whose name does not contain "emb".
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")


class LayerChoice:
    """Decides tensor by tensor; remembers which patterns matched.

    Args:
        config: the content of config.json, empty where there is none.
        include: patterns of layers; given, only these, the output head among them where it is not tied.
        skip: patterns of layers to leave; default `DEFAULT_SKIP`, or nothing where `include` is given.
        function: whose arguments these are, for its errors.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        include: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        *,
        function: str = "quantize",
    ) -> None:
        for name, patterns in (("include", include), ("skip", skip)):
            if isinstance(patterns, str):
                raise TypeError(f"{function}: {name}: expected a sequence of patterns, got a string")
        self._function = function
        self._config = config
        text = config.get("text_config")
        self._text_config: Mapping[str, Any] = text if isinstance(text, Mapping) else config
        self._include = include
        self._skip = tuple(skip) if skip is not None else (() if include is not None else DEFAULT_SKIP)
        self._matched: set[str] = set()

    def layer(self, name: str, shape: Sequence[int]) -> str | None:
        """The name of the linear layer whose weight this tensor is and that is to be quantized, else None."""
        layer = candidate(name, shape)
        if layer is None:
            return None
        if any(fnmatch.fnmatchcase(layer, pattern) for pattern in self._skip):
            return None
        if shape[0] == self._text_config.get("vocab_size") and (self._include is None or self._head_is_tied()):
            return None
        if self._include is not None:
            matching = {pattern for pattern in self._include if fnmatch.fnmatchcase(layer, pattern)}
            self._matched |= matching
            if not matching:
                return None
        return layer

    def transposed(self, layer: str) -> bool:
        """Whether the checkpoint holds the weight of `layer` as ``[in, out]``.

        Raises ValueError where the name leaves that open and there is no config to tell.
        """
        if layer.rpartition(".")[2] not in _CONV1D_LAYERS:
            return False
        if "model_type" not in self._config:
            raise ValueError(
                f"quantize: {layer}: expected a config.json beside the checkpoint whose model_type says whether this "
                "weight is [out, in] or GPT-2's [in, out], got none"
            )
        return self._config["model_type"] in CONV1D_MODELS

    def _head_is_tied(self) -> bool:
        """Whether the output head is the embedding, which stays in 16 bit. transformers ties unless told not to."""
        return all(config.get("tie_word_embeddings", True) for config in (self._config, self._text_config))

    def check_patterns(self) -> None:
        """Raise ValueError for an include pattern that no layer matched, once all tensors were seen."""
        for pattern in self._include or ():
            if pattern not in self._matched:
                raise ValueError(
                    f"{self._function}: include: expected patterns of linear layers, got {pattern!r}, which matches "
                    "none (an output head counts where config.json sets tie_word_embeddings to false)"
                )


def candidate(name: str, shape: Sequence[int]) -> str | None:
    """The layer whose weight a tensor is, by name and shape; None for an embedding and what is no weight matrix."""
    layer, _, leaf = name.rpartition(".")
    last = layer.rpartition(".")[2].lower()
    is_embedding = "emb" in last or last in _EMBEDDINGS
    return layer if leaf == "weight" and layer and len(shape) == 2 and 0 not in shape and not is_embedding else None


def is_stacked_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor holds a weight of every expert of a mixture: these are not quantized here."""
    return len(shape) == 3 and "experts" in name
