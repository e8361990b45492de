"""Tiny language models in Hugging Face folders, for the tests of the commands that load such folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = [f"w{i}" for i in range(16)]  # and "?" for all others: a vocabulary of 17


def tiny_opt(*, layers: int, width: int) -> Any:
    """An OPT of random weights: two heads, normalized before each block, 64 positions, 17 words."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=17,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return transformers.OPTForCausalLM(config).requires_grad_(False).eval()


def write_language_model(folder: Path, model: Any) -> None:
    """The model and a tokenizer that knows `WORDS`, by their numbers, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {**{word: index for index, word in enumerate(WORDS)}, "?": len(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    model.save_pretrained(folder)


_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
# Of each family of architectures one, scaled down: two layers of width 32.
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "OPTForCausalLM": {**_LAYERS, "ffn_dim": 96, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "GPTJForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "GPTNeoXForCausalLM": {**_LAYERS, "intermediate_size": 96},
    "LlamaForCausalLM": {**_LAYERS, "num_key_value_heads": 1, "intermediate_size": 96},
    "MistralForCausalLM": {**_LAYERS, "num_key_value_heads": 1, "intermediate_size": 96},
    "Qwen2ForCausalLM": {**_LAYERS, "num_key_value_heads": 1, "intermediate_size": 96},
    "Qwen3ForCausalLM": {**_LAYERS, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 96},
    "GemmaForCausalLM": {**_LAYERS, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 96},
    "MixtralForCausalLM": {**_LAYERS, "num_key_value_heads": 1, "intermediate_size": 96, "num_local_experts": 2},
    "BertForMaskedLM": {**_LAYERS, "intermediate_size": 96},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 2},
}


def tiny_model(name: str, **more: Any) -> Any:
    """A float32 model of `FAMILIES` with random weights, gains and biases, 17 words; the same each time."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(vocab_size=17, **{**_TOKENS, **FAMILIES[name], **more})
    model = model_class(config).float().requires_grad_(False).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the one that takes float64
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter) - 0.5)
        else:
            parameter.mul_(4)
    return model


def tiny_inputs(model: Any, count: int = 2, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for the model: `count` sequences of 12 words."""
    import torch

    ids = torch.randint(3, 17, (count, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
