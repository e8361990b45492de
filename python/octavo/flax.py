"""Flax models (nnx) in int8: ``octavo.flax.quantize_(model)``."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array

from octavo._text import matches, unexpected
from octavo.jax import linear, quantize_weight
from octavo.options import Options

__all__ = ["Int8Linear", "quantize_"]


class Int8Linear(nnx.Module):  # type: ignore[misc]  # Flax comes without types
    """``nnx.Linear`` with an int8 weight, which is no parameter; the bias stays one.

    Attributes:
        weight: `octavo.jax.Int8Weight`.
        bias: ``nnx.Param`` ``[n]``, or None.
        dtype: that x is cast to and y has, where it is not None.
    """

    def __init__(self, layer: nnx.Linear, options: Options) -> None:
        self.weight = nnx.data(quantize_weight(layer.kernel[...].T, options=options))
        self.bias = layer.bias
        self.dtype = layer.dtype

    def __call__(self, x: Array) -> Array:
        """X ``[..., k]`` -> ``[..., n]``."""
        bias = None if self.bias is None else self.bias[...]
        return linear(x if self.dtype is None else jnp.asarray(x, self.dtype), self.weight, bias)


def quantize_(model: nnx.Module, options: Options | None = None, *, skip: Sequence[str] = ()) -> list[str]:
    """Replace every ``nnx.Linear`` of a model, in place, by one with an int8 weight.

    Args:
        model: any nnx module that has them as attributes, in ``nnx.List`` or in ``nnx.Dict``.
        options: see `octavo.Options`.
        skip: shell patterns of names, as "decoder.*", of layers that stay.

    Returns:
        The names of the layers that are int8 now.

    Raises:
        ValueError: there is no such layer, or a weight holds NaN or Inf.
    """
    options = options or Options()
    modules = dict(nnx.iter_modules(model))
    found = {
        ".".join(map(str, path)): (path, layer) for path, layer in modules.items() if path and type(layer) is nnx.Linear
    }
    chosen = {name: at for name, at in found.items() if not matches(name, skip)}
    if not chosen:
        raise unexpected("quantize_: model", "nnx.Linear layers", f"{len(found)}, of which none is not skipped")
    made = {name: Int8Linear(layer, options) for name, (_, layer) in chosen.items()}
    for name, (path, _) in chosen.items():
        parent = modules[path[:-1]]
        if isinstance(parent, (nnx.List, nnx.Dict)):
            parent[path[-1]] = made[name]
        else:
            setattr(parent, str(path[-1]), made[name])
    return sorted(made)
