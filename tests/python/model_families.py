"""One scaled-down model, of random weights, of each family that octavo.transformers is tested with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_models import FAMILIES as LANGUAGE_MODELS
from tiny_models import tiny_inputs as language_inputs
from tiny_models import tiny_model


@dataclass(frozen=True)
class Family:
    """Of a class of Transformers.

    Attributes:
        sizes: for its config; None: those of `tiny_models`.
        left: linear layers that stay as they are, the numbers in their names as "#".
        error: of the int8 model's output at most, relative to the float32 one's.
        inputs: "words" or what else the model takes.
    """

    sizes: dict[str, Any] | None = None
    left: tuple[str, ...] = ()
    error: float = 0.1
    inputs: str = "words"


_WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_KEY_VALUES = {"num_key_value_heads": 2}
_SOUND = {
    **_WIDE,
    "intermediate_size": 96,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "num_codevectors_per_group": 16,
}
_IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE |= {"image_size": 16, "patch_size": 8}

FAMILIES: dict[str, Family] = {
    **{name: Family() for name in LANGUAGE_MODELS},
    # Random weights have no outliers, and zeros that a ReLU leaves are rotated into something: the recipe costs here.
    "T5ForConditionalGeneration": Family(error=0.25),
    "FalconForCausalLM": Family(_WIDE),
    "RwkvForCausalLM": Family({**_WIDE, "attention_hidden_size": 64, "rescale_every": 1}),
    "MambaForCausalLM": Family({"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "Mamba2ForCausalLM": Family(
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1}
    ),
    "FunnelModel": Family(
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 96},
    ),
    "Wav2Vec2ForCTC": Family(_SOUND, left=("lm_head",), inputs="sound"),
    "Wav2Vec2ForPreTraining": Family(_SOUND, inputs="sound"),
    "WavLMModel": Family(_SOUND, inputs="sound"),
    "UniSpeechModel": Family(_SOUND, inputs="sound"),
    "SiglipVisionModel": Family(_IMAGE, inputs="image"),
    "CLIPVisionModel": Family(_IMAGE, inputs="image"),
    "GraniteMoeForCausalLM": Family(
        {**_WIDE, **_KEY_VALUES, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "Qwen2MoeForCausalLM": Family(
        {
            **_WIDE,
            **_KEY_VALUES,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        left=("model.layers.#.mlp.shared_expert_gate",),
    ),
    "JetMoeForCausalLM": Family(
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "intermediate_size": 64,
            "num_local_experts": 4,
        },
        left=("model.layers.#.mlp.router.layer", "model.layers.#.self_attention.experts.router.layer"),
    ),
    "GptOssForCausalLM": Family(
        {
            **_WIDE,
            **_KEY_VALUES,
            "intermediate_size": 48,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
    ),
    "Llama4ForCausalLM": Family(
        {
            **_WIDE,
            **_KEY_VALUES,
            "intermediate_size": 64,
            "intermediate_size_mlp": 64,
            "head_dim": 16,
            "num_local_experts": 2,
            "moe_layers": [0],
        },
        left=("model.layers.#.feed_forward.router",),
    ),
}


def family_model(name: str) -> Any:
    """The float32 model of a family; the same each time."""
    sizes = FAMILIES[name].sizes
    if sizes is None:
        return tiny_model(name)
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    words = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return kind(kind.config_class(**({} if FAMILIES[name].inputs == "image" else words), **sizes)).eval()


def family_inputs(model: Any) -> dict[str, Any]:
    """Keyword arguments for the model of a family."""
    family = FAMILIES[type(model).__name__]
    if family.inputs == "words":
        return language_inputs(model)
    generator = torch.Generator().manual_seed(0)
    if family.inputs == "sound":
        return {"input_values": torch.randn(1, 2000, generator=generator)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def relative_error(found: Any, expected: Any) -> float:
    """``|found - expected| / |expected|``."""
    return ((found.detach().float() - expected.float()).norm() / expected.float().norm()).item()
