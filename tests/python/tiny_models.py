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
