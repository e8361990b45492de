"""Encoders without padding: a batch's rows that are no tokens are left out of the int8 products.

Attention ignores what is at padded positions, and everything else computes each position by itself, so an int8 layer
may give zeros there: the outputs at tokens are those of the whole batch, bit for bit where a row's result depends on no
other row. With outliers "columns" padded rows have no part in the choice of outlier columns.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from octavo import _core
from octavo.torch import Int8Tensor
from octavo.torch.choice import is_linear

# Encoders whose attention is masked, and whose other parts compute each position by itself.
MODEL_TYPES = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
_LEAST = 0.1  # of all rows: with less padding, to copy the others takes longer than to multiply these
_HOOKS = "_octavo_padding_hooks"


class _Call(threading.local):
    """The call of an encoder that runs in this thread."""

    shape: torch.Size | None = None  # [texts, positions]; None where nothing is left out
    rows: Any = None  # [tokens], of texts * positions
    whole: Any = None  # the last input, [texts, positions, k], and its tokens, [tokens, k]: q, k and v have the same
    version: Any = None  # of that input, which something may have written to since
    tokens: Any = None


_call = _Call()


def drop_padding_(model: nn.Module, on: bool = True) -> nn.Module:
    """Have the int8 layers of encoders in `model` leave out padded rows, or no longer; in place.

    Encoders are those of `MODEL_TYPES` with eager or scaled-dot-product attention, on the CPU, where nothing traces the
    model. `from_pretrained` and `octavo.torch.quantize_` do this: see ``OctavoConfig(drop_padding=False)``.
    """
    for module in model.modules():
        for hook in module.__dict__.pop(_HOOKS, ()):
            hook.remove()
    for encoder in model.modules() if on else ():
        config = getattr(encoder, "config", None)
        is_encoder = getattr(config, "model_type", None) in MODEL_TYPES and not getattr(config, "is_decoder", False)
        is_masked = getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        if not is_encoder or not is_masked or encoder is not getattr(encoder, "base_model", None):
            continue
        begin = encoder.register_forward_pre_hook(_begin, with_kwargs=True)
        end = encoder.register_forward_hook(_end, always_call=True)
        encoder.__dict__[_HOOKS] = [begin, end]
        for layer in encoder.modules():
            if is_linear(layer) and isinstance(layer.weight, Int8Tensor) and _HOOKS not in layer.__dict__:
                hooks = layer.register_forward_pre_hook(_gather), layer.register_forward_hook(_scatter)
                layer.__dict__[_HOOKS] = hooks
    return model


def _begin(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.device.type != "cpu":
        return
    if torch.compiler.is_compiling() or not _core.is_plain(mask):
        return
    rows = mask.flatten().nonzero().flatten()
    if len(rows) <= (1 - _LEAST) * mask.numel():
        _call.shape, _call.rows = mask.shape, rows


def _end(*_: Any) -> None:
    _call.__dict__.clear()


def _gather(layer: nn.Module, args: tuple[Any, ...]) -> Any:
    x = args[0]
    if _call.shape is None or x.shape[:-1] != _call.shape:
        return None
    version = None if x.is_inference() else x._version  # in inference mode nothing counts what is written
    if x is not _call.whole or version is None or version != _call.version:
        _call.whole, _call.version, _call.tokens = x, version, x.flatten(0, 1).index_select(0, _call.rows)
    return (_call.tokens,)


def _scatter(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
    if _call.shape is None or args[0] is not _call.tokens:
        return None
    padded = y.new_zeros(_call.shape.numel(), y.shape[-1]).index_copy_(0, _call.rows, y)
    return padded.unflatten(0, _call.shape)  # type: ignore[no-any-return]
