"""The tensors of transformers, from their configs: names and shapes as transformers saves them.

Of well-known architectures they are listed here; of others the transformers package is asked, where it is installed. A
tied output head is no tensor of its own. Defaults are those of transformers' config classes, which leave out of
config.json what equals them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Tensors = Iterator[tuple[str, tuple[int, ...]]]
_LAYER = re.compile(r"^(.*?\.\d+)\.")
_STACKED_EXPERT = re.compile(r"\.experts\.\d+\.(gate_up_proj|up_proj|down_proj)\.weight$")
_SIZES = (
    *("hidden_size", "ffn_dim", "intermediate_size", "word_embed_proj_dim", "vocab_size", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_embd", "n_embed", "n_inner", "n_layer", "n_positions"),
    *("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "relative_attention_num_buckets"),
)


def tensors_of(config: Config) -> Tensors:
    """Name and shape of every parameter, embedding first, head last.

    Raises ValueError for a ``model_type`` that neither `ARCHITECTURES` nor transformers has, and a config that lacks a
    size or has something else in its place.
    """
    list_tensors = _architecture(config)[0]
    try:
        tensors = list(list_tensors(config))
    except KeyError as error:
        raise ValueError(f"config: expected {error} for model_type {config['model_type']}, got none") from error
    except TypeError as error:  # of arithmetic with null: everything else `_architecture` has refused
        raise ValueError(f"config: expected sizes for model_type {config['model_type']}, got {error}") from error
    for name, shape in tensors:
        if not all(isinstance(extent, int) for extent in shape):
            raise ValueError(f"config: expected sizes for {name}, got {list(shape)}")
    yield from tensors


def cache_per_token(config: Config) -> dict[str, int]:
    """Bytes of keys and values per token, in 16 bit, by the layer (`layer_of`) that holds them."""
    return _architecture(config)[1](config)


def layer_of(name: str) -> str:
    """What a tensor has to share a GPU with: its layer ("model.layers.3"); outside of layers, only itself."""
    match = _LAYER.match(name)
    return match[1] if match else name


def is_stacked_expert(name: str) -> bool:
    """Whether a tensor of `tensors_of` is one expert's weight, which the model keeps in one parameter with others."""
    return _STACKED_EXPERT.search(name) is not None


def _architecture(config: Config) -> tuple[Callable[[Config], Tensors], Callable[[Config], dict[str, int]]]:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"config: model_type: expected the name of an architecture, got {kind!r}")
    if kind not in ARCHITECTURES:
        return _asked_tensors, _asked_cache
    for name in _SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"config: {name}: expected a whole number of at least 1, got {value!r}")
    return ARCHITECTURES[kind]


def _linear(name: str, n: int, k: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (n, k)
    if bias:
        yield f"{name}.bias", (n,)


def _norm(name: str, width: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


# --- OPT --------------------------------------------------------------------------------------------------------------


def _opt(config: Config) -> Tensors:
    h, ffn, vocab = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    embedding = config.get("word_embed_proj_dim") or h
    bias = config.get("enable_bias", True)
    affine = config.get("layer_norm_elementwise_affine", True)
    pre_norm = config.get("do_layer_norm_before", True)
    root = "model.decoder"
    yield f"{root}.embed_tokens.weight", (vocab, embedding)
    yield f"{root}.embed_positions.weight", (config.get("max_position_embeddings", 2048) + 2, h)
    if embedding != h:
        yield from _linear(f"{root}.project_in", h, embedding, False)
    for i in range(config["num_hidden_layers"]):
        layer = f"{root}.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", h, h, bias)
        yield from _linear(f"{layer}.fc1", ffn, h, bias)
        yield from _linear(f"{layer}.fc2", h, ffn, bias)
        if affine:
            yield from _norm(f"{layer}.self_attn_layer_norm", h)
            yield from _norm(f"{layer}.final_layer_norm", h)
    if affine and pre_norm and not config.get("_remove_final_layer_norm", False):
        yield from _norm(f"{root}.final_layer_norm", h)
    if embedding != h:
        yield from _linear(f"{root}.project_out", embedding, h, False)
    if not config.get("tie_word_embeddings", True):
        yield from _linear("lm_head", vocab, embedding, False)


def _opt_cache(config: Config) -> dict[str, int]:
    return _same_cache("model.decoder.layers", config["num_hidden_layers"], config["hidden_size"])


# --- BLOOM ------------------------------------------------------------------------------------------------------------


def _bloom(config: Config) -> Tensors:
    h = _bloom_width(config)
    yield "transformer.word_embeddings.weight", (config["vocab_size"], h)
    yield from _norm("transformer.word_embeddings_layernorm", h)
    for i in range(_bloom_layers(config)):
        layer = f"transformer.h.{i}"
        yield from _norm(f"{layer}.input_layernorm", h)
        yield from _linear(f"{layer}.self_attention.query_key_value", 3 * h, h)
        yield from _linear(f"{layer}.self_attention.dense", h, h)
        yield from _norm(f"{layer}.post_attention_layernorm", h)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", 4 * h, h)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", h, 4 * h)
    yield from _norm("transformer.ln_f", h)
    if not config.get("tie_word_embeddings", True):
        yield from _linear("lm_head", config["vocab_size"], h, False)


def _bloom_width(config: Config) -> int:
    # The published configs call it n_embed, and transformers lets that win.
    return int(config.get("n_embed") or config["hidden_size"])


def _bloom_layers(config: Config) -> int:
    return int(config.get("n_layer") or config["num_hidden_layers"])


def _bloom_cache(config: Config) -> dict[str, int]:
    return _same_cache("transformer.h", _bloom_layers(config), _bloom_width(config))


# --- GPT-2, GPT-J, GPT-NeoX -------------------------------------------------------------------------------------------


def _gpt2(config: Config) -> Tensors:
    h = config["n_embd"]
    inner = config.get("n_inner") or 4 * h
    yield "transformer.wte.weight", (config["vocab_size"], h)
    yield "transformer.wpe.weight", (config.get("n_positions", 1024), h)
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        yield from _norm(f"{layer}.ln_1", h)
        for name, k, n in (
            ("attn.c_attn", h, 3 * h),
            ("attn.c_proj", h, h),
            ("mlp.c_fc", h, inner),
            ("mlp.c_proj", inner, h),
        ):
            yield f"{layer}.{name}.weight", (k, n)  # Conv1D
            yield f"{layer}.{name}.bias", (n,)
        yield from _norm(f"{layer}.ln_2", h)
    yield from _norm("transformer.ln_f", h)
    if not config.get("tie_word_embeddings", True):
        yield from _linear("lm_head", config["vocab_size"], h, False)


def _gptj(config: Config) -> Tensors:
    h = config["n_embd"]
    inner = config.get("n_inner") or 4 * h
    yield "transformer.wte.weight", (config["vocab_size"], h)
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        yield from _norm(f"{layer}.ln_1", h)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.attn.{name}", h, h, False)
        yield from _linear(f"{layer}.mlp.fc_in", inner, h)
        yield from _linear(f"{layer}.mlp.fc_out", h, inner)
    yield from _norm("transformer.ln_f", h)
    yield from _linear("lm_head", config["vocab_size"], h)


def _gpt_cache(config: Config) -> dict[str, int]:
    return _same_cache("transformer.h", config["n_layer"], config["n_embd"])


def _gpt_neox(config: Config) -> Tensors:
    h, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    bias = config.get("attention_bias", True)
    yield "gpt_neox.embed_in.weight", (vocab, h)
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        yield from _norm(f"{layer}.input_layernorm", h)
        yield from _norm(f"{layer}.post_attention_layernorm", h)
        yield from _linear(f"{layer}.attention.query_key_value", 3 * h, h, bias)
        yield from _linear(f"{layer}.attention.dense", h, h, bias)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", inner, h)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", h, inner)
    yield from _norm("gpt_neox.final_layer_norm", h)
    if not config.get("tie_word_embeddings", False):
        yield from _linear("embed_out", vocab, h, False)


def _gpt_neox_cache(config: Config) -> dict[str, int]:
    return _same_cache("gpt_neox.layers", config["num_hidden_layers"], config["hidden_size"])


# --- Llama, Mistral, Qwen ---------------------------------------------------------------------------------------------


def _llama(config: Config) -> Tensors:
    h, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kind = config["model_type"]
    heads, kv_heads, width = _llama_heads(config)
    qkv_bias = config.get("attention_bias", False) or kind == "qwen2"
    out_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    yield "model.embed_tokens.weight", (vocab, h)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _linear(f"{layer}.self_attn.q_proj", heads * width, h, qkv_bias)
        yield from _linear(f"{layer}.self_attn.k_proj", kv_heads * width, h, qkv_bias)
        yield from _linear(f"{layer}.self_attn.v_proj", kv_heads * width, h, qkv_bias)
        yield from _linear(f"{layer}.self_attn.o_proj", h, heads * width, out_bias)
        if kind == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (width,)
            yield f"{layer}.self_attn.k_norm.weight", (width,)
        yield from _linear(f"{layer}.mlp.gate_proj", inner, h, mlp_bias)
        yield from _linear(f"{layer}.mlp.up_proj", inner, h, mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", h, inner, mlp_bias)
        yield from _norm(f"{layer}.input_layernorm", h, False)
        yield from _norm(f"{layer}.post_attention_layernorm", h, False)
    yield from _norm("model.norm", h, False)
    if not config.get("tie_word_embeddings", False):
        yield from _linear("lm_head", vocab, h, False)


_KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # where the config does not say


def _llama_heads(config: Config) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the width of one."""
    heads = config["num_attention_heads"]
    # Of Llama's, and where it is null, as many as there are heads.
    kv_heads = config.get("num_key_value_heads", _KEY_VALUE_HEADS.get(config["model_type"])) or heads
    default = 128 if config["model_type"] == "qwen3" else config["hidden_size"] // heads
    return heads, kv_heads, config.get("head_dim") or default


def _llama_cache(config: Config) -> dict[str, int]:
    _, kv_heads, width = _llama_heads(config)
    return _same_cache("model.layers", config["num_hidden_layers"], kv_heads * width)


# --- T5 ---------------------------------------------------------------------------------------------------------------


def _t5(config: Config) -> Tensors:
    h, ffn = config["d_model"], config["d_ff"]
    inner = config["num_heads"] * config["d_kv"]
    buckets = config.get("relative_attention_num_buckets", 32)
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")

    def attention(name: str, relative: bool) -> Tensors:
        for part in ("q", "k", "v"):
            yield from _linear(f"{name}.{part}", inner, h, False)
        yield from _linear(f"{name}.o", h, inner, False)
        if relative:
            yield f"{name}.relative_attention_bias.weight", (buckets, config["num_heads"])

    yield "shared.weight", (config["vocab_size"], h)
    for stack, layers in (("encoder", config["num_layers"]), ("decoder", _t5_decoder_layers(config))):
        for i in range(layers):
            block = f"{stack}.block.{i}"
            last = 1
            yield from attention(f"{block}.layer.0.SelfAttention", relative=i == 0)
            yield from _norm(f"{block}.layer.0.layer_norm", h, False)
            if stack == "decoder":
                last = 2
                yield from attention(f"{block}.layer.1.EncDecAttention", relative=False)
                yield from _norm(f"{block}.layer.1.layer_norm", h, False)
            for name in ("wi_0", "wi_1") if gated else ("wi",):
                yield from _linear(f"{block}.layer.{last}.DenseReluDense.{name}", ffn, h, False)
            yield from _linear(f"{block}.layer.{last}.DenseReluDense.wo", h, ffn, False)
            yield from _norm(f"{block}.layer.{last}.layer_norm", h, False)
        yield from _norm(f"{stack}.final_layer_norm", h, False)
    if not config.get("tie_word_embeddings", True):
        yield from _linear("lm_head", config["vocab_size"], h, False)


def _t5_decoder_layers(config: Config) -> int:
    return int(config.get("num_decoder_layers") or config["num_layers"])


def _t5_cache(config: Config) -> dict[str, int]:
    """Of the decoder's own tokens, and of as many of the encoder's."""
    inner = config["num_heads"] * config["d_kv"]
    return _same_cache("decoder.block", _t5_decoder_layers(config), 2 * inner)


# --- all others -------------------------------------------------------------------------------------------------------


def _asked_tensors(config: Config) -> Tensors:
    """The parameters of a model that transformers makes, without memory."""
    known = _asked_config(config)
    import torch
    import transformers

    architecture = (known.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"config: expected an architecture of transformers, got {architecture}")
    with torch.device("meta"):
        model = model_class.from_config(known) if architecture.startswith("Auto") else model_class(known)
    transposed = _stacked_experts(model)
    for name, parameter in model.named_parameters():
        if name in transposed:  # each expert's weight by itself, as what it becomes in int8
            experts, projection = name.rsplit(".", 1)
            count, *shape = parameter.shape
            n, k = reversed(shape) if transposed[name] else shape
            for expert in range(count):
                yield f"{experts}.{expert}.{projection}.weight", (n, k)
        else:
            yield name, tuple(parameter.shape)


def _stacked_experts(model: Any) -> dict[str, bool]:
    """The parameters that stack the weights of experts and that octavo converts -> whether as ``[in, out]``."""
    try:
        from octavo.transformers.experts import PROJECTIONS, is_convertible
    except ImportError:  # a Transformers that does not stack experts yet
        return {}
    return {
        f"{name}.{projection}": module.is_transposed
        for name, module in model.named_modules()
        if is_convertible(module)
        for projection in PROJECTIONS
        if hasattr(module, projection)
    }


def _asked_cache(config: Config) -> dict[str, int]:
    """Of a model that generates: as the sizes of its attention say, in each numbered layer with one."""
    known = _asked_config(config)
    architecture = (known.architectures or ["AutoModelForCausalLM"])[0]
    if not any(word in architecture for word in ("CausalLM", "LMHead", "ConditionalGeneration")):
        return {}
    layers = dict.fromkeys(
        layer_of(name) for name, _ in _asked_tensors(config) if "attn" in name or "attention" in name
    )
    if not layers:  # Mamba
        return {}
    text = known.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (heads and getattr(text, "hidden_size", 0) // heads)
    if not (isinstance(kv_heads, int) and isinstance(width, int) and kv_heads > 0 and width > 0):
        raise ValueError(
            "config: expected num_attention_heads and hidden_size, which say how large the cache of model_type "
            f"{config['model_type']} is, got none"
        )
    return dict.fromkeys(layers, 4 * kv_heads * width)


def _asked_config(config: Config) -> Any:
    known = ", ".join(sorted(ARCHITECTURES))
    try:
        import torch  # noqa: F401 - transformers has configs without it, but no models
        import transformers
    except ImportError as error:
        raise ValueError(
            f"config: expected a model_type of {known}, got {config['model_type']!r}: for others install PyTorch and "
            "transformers"
        ) from error
    fields = {key: value for key, value in config.items() if key != "model_type"}
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"config: expected a model_type of {known}, or one that transformers has, got {config['model_type']!r}"
        )
    try:
        return transformers.AutoConfig.for_model(config["model_type"], **fields)
    except Exception as error:  # each config class checks its fields in its own way
        raise ValueError(
            f"config: expected one that transformers takes for model_type {config['model_type']}, got {error}"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------


def _same_cache(layers: str, count: int, width: int) -> dict[str, int]:
    """A key and a value of `width` elements of two bytes in each layer."""
    return {f"{layers}.{i}": 4 * width for i in range(count)}


# Of each model_type the tensors and the cache.
ARCHITECTURES: dict[str, tuple[Callable[[Config], Tensors], Callable[[Config], dict[str, int]]]] = {
    "opt": (_opt, _opt_cache),
    "bloom": (_bloom, _bloom_cache),
    "gpt2": (_gpt2, _gpt_cache),
    "gptj": (_gptj, _gpt_cache),
    "gpt_neox": (_gpt_neox, _gpt_neox_cache),
    "llama": (_llama, _llama_cache),
    "mistral": (_llama, _llama_cache),
    "qwen2": (_llama, _llama_cache),
    "qwen3": (_llama, _llama_cache),
    "t5": (_t5, _t5_cache),
}
