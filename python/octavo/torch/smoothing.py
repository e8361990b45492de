"""SmoothQuant (arXiv 2211.10438): the magnitude of outlier features moved from activations into weights.

What a normalization puts out is divided, feature by feature, and the linear layers that take it are multiplied: the
function stays, and what is left to be quantized is easier to quantize.

Which layers take what is seen while the calibration batches run, not known by name: it holds for every architecture,
and a use that the batches do not show is none that they were calibrated for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo._text import expect, unexpected
from octavo.torch.choice import choose_layers, oriented
from octavo.torch.convert import expect_runnable, run_batches
from octavo.torch.layer import CALIBRATED

_PROBED = 4  # rows of a normalization's input that its formula is recognized on
_LISTED = 3  # reasons that an error gives


def smooth_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    alpha: float = 0.5,
    pairs: Mapping[str, Sequence[str]] | None = None,
    insert: bool = False,
    skip: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """SmoothQuant: divide what normalizations put out, multiply the linear layers that take it, in place.

    For the input X of the linear layers W (all that take the same X), feature by feature (arXiv 2211.10438, Eq. 4)::

        s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha),  X_j / s_j,  W_j * s_j

    X / s goes into the gain and bias of the LayerNorm or RMSNorm (also one whose gain is 1 + weight, as Gemma's), so
    the model keeps its modules, its parameters' shapes and its speed, and can be saved. Its function stays, up to one
    rounding of each changed parameter to its dtype. It comes before `calibrate_` and `quantize_`, whose outlier columns
    it changes. Both ``nn.Linear`` and the ``Conv1D`` of Transformers are smoothed.

    Left as they are: normalizations whose output goes anywhere but into linear layers, as the residual of models that
    normalize after each block (BERT), a router or stacked experts, or the model's result; a linear layer that takes
    other inputs, too; weights that several layers share; what `skip` names.

    Args:
        batches: as in `calibrate_`.
        alpha: in [0, 1]: how much of the difficulty moves into the weights. The paper takes 0.5 for most models.
        pairs: normalization -> the linear layers that take its output, by qualified name; default: all that can be
            smoothed. They are checked against what the batches show.
        insert: where the output goes elsewhere, too, divide in front of each linear layer: it becomes
            ``nn.Sequential(InputScale, linear)``, and one more pass over its input is made in each call.
        skip: as in `quantize_`.
        progress: show a progress bar.

    Returns:
        Qualified name of the normalization -> s, float32 ``[k]``. A feature that is zero in X or in W has s = 1.

    The parameters are new ones; those the model had are not written to.

    Raises (before anything is changed):
        ValueError: `alpha` outside [0, 1]; no batches; nothing to be smoothed, or a pair that cannot be: the message
            says why; NaN or Inf in X or W; a parameter that would overflow its dtype.
    """
    expect_runnable("smooth_", model, batches)
    expect("smooth_: alpha", alpha, Real, "a number")
    if pairs is not None:
        expect("smooth_: pairs", pairs, Mapping, "a mapping of names to names")
    expect("smooth_: insert", insert, bool, "a bool")
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth_: alpha: expected a number in [0, 1], got {alpha}")
    layers = choose_layers(model, skip=skip).layers
    if not layers:
        raise ValueError("smooth_: model: expected linear layers, got none")
    seen = _watch(model, layers, batches, pairs, progress)
    held = (module.parameters(recurse=False) for module in model.modules())
    users = Counter(chain.from_iterable({id(parameter) for parameter in own} for own in held))
    shared = {parameter for parameter, count in users.items() if count > 1}  # held by more than one module
    chosen: list[_Norm] = []
    reasons: dict[str, str] = {}
    for norm in seen:
        if norm.layers and norm.largest is not None and not torch.isfinite(norm.largest).all():
            raise ValueError(f"smooth_: {norm.name}: expected finite values, got NaN or Inf in its output")
        if reason := norm.obstacle(shared, insert):
            reasons[norm.name] = reason
        else:
            chosen.append(norm)
    for norm in seen if pairs is not None else ():
        if norm.name in reasons:
            raise ValueError(f"smooth_: pairs: {norm.name} cannot be smoothed: {reasons[norm.name]}")
        taking, given = {layer.name for layer in norm.layers.values()}, set((pairs or {})[norm.name])
        if taking != given:
            expected = f"the layers that take its output, {sorted(taking)}"
            raise unexpected(f"smooth_: pairs: {norm.name}", expected, sorted(given))
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_LISTED])
        raise ValueError(
            "smooth_: model: expected LayerNorms or RMSNorms whose output only linear layers take, got none in "
            f"{type(model).__name__}" + (f" ({listed}{'; ...' if len(reasons) > _LISTED else ''})" if listed else "")
        )
    changes = [_change(norm, alpha) for norm in chosen]  # all are made before any is put in place
    for norm, (scale, changed) in zip(chosen, changes, strict=True):
        for (module, name), value in changed.items():
            setattr(module, name, nn.Parameter(value, getattr(module, name).requires_grad))
        for layer in norm.layers.values():
            vars(layer.module).pop(CALIBRATED, None)  # columns of what it took before
            if norm.elsewhere:
                factor = scale.reciprocal().to(layer.module.weight.dtype)
                model.set_submodule(layer.name, nn.Sequential(InputScale(factor), layer.module))
    return {norm.name: scale.float() for norm, (scale, _) in zip(chosen, changes, strict=True)}


class InputScale(nn.Module):
    """``x * factor``, feature by feature: what `smooth_` puts in front of a linear layer with ``insert=True``."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., k]``."""
        return x * self.factor


# --- what the batches show --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Layer:
    """A linear layer and the normalizations whose output it has taken; None: something else."""

    name: str
    module: Any
    inputs: set[_Norm | None] = field(default_factory=set)


@dataclass(eq=False)
class _Norm:
    """A normalization and what became of its output."""

    name: str
    module: Any
    largest: Tensor | None = None  # magnitude of its output, float32 [k]
    probe: Tensor | None = None  # rows of its input
    layers: dict[int, _Layer] = field(default_factory=dict)
    elsewhere: str = ""  # the first use that is not in a linear layer's input
    formula: str = ""  # "weight" or "1 + weight": its gain

    def obstacle(self, shared: set[int], insert: bool) -> str:
        """Why it cannot be smoothed; "" where it can."""
        if self.largest is None:
            return "no batch reaches it"
        if not self.layers:
            return f"its output goes into no linear layer{self.elsewhere and f' but into {self.elsewhere}'}"
        for layer in self.layers.values():
            if layer.inputs != {self}:
                return f"{layer.name} takes other inputs, too"
            if id(layer.module.weight) in shared:
                return f"the weight of {layer.name} is shared"
        if insert and self.elsewhere:
            return ""
        if self.elsewhere:
            return f"its output also goes into {self.elsewhere}"
        if any(id(parameter) in shared for parameter in self.module.parameters(recurse=False)):
            return "its parameters are shared"
        self.formula = self._formula()
        return "" if self.formula else f"{type(self.module).__name__} is no LayerNorm or RMSNorm with a gain"

    def _formula(self) -> str:
        """How the gain follows from the parameter `weight`, tried out; "" where it is neither way."""
        module, x = self.module, self.probe
        parameters = dict(module.named_parameters())
        weight = parameters.get("weight")
        if x is None or weight is None or weight.dim() != 1 or not parameters.keys() <= {"weight", "bias"}:
            return ""
        bare = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

        def output(gain: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(module, {**bare, "weight": gain}, (x,))
            return found.float()

        zero, one, actual = (output(gain) for gain in (bare["weight"], torch.ones_like(weight), weight))
        near = partial(torch.allclose, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6)
        if not one.any() or not torch.isfinite(one).all():
            return ""
        if not zero.any():
            return "weight" if near(actual, one * weight.float()) else ""
        is_shifted = near(one, 2 * zero) and near(actual, zero * (1 + weight.float()), rtol=2 * near.keywords["rtol"])
        return "1 + weight" if is_shifted else ""


class _Uses(TorchDispatchMode):
    """Sees which operations read the outputs of normalizations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: dict[int, _Norm] = {}  # by the address of its output
        self.alive: list[Tensor] = []  # else another tensor might get that address
        self.layer = 0  # > 0: inside of a linear layer

    def source(self, x: Any) -> _Norm | None:
        """The normalization in whose output's memory `x` lies."""
        return self.sources.get(_address(x)) if isinstance(x, Tensor) else None

    def note_use(self, values: Any, what: str, views: Any = ()) -> None:
        """Something other than a linear layer takes `values`; what of them is in `views` is no use yet."""
        for leaf in tree_leaves(values):
            norm = self.source(leaf)
            if norm is not None and _address(leaf) not in views:
                norm.elsewhere = norm.elsewhere or what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.layer:  # a view is not a use yet; an operation that writes to it is
            made = () if func._schema.is_mutable else tree_leaves(result)
            self.note_use((args, kwargs), str(func), {_address(leaf) for leaf in made if isinstance(leaf, Tensor)})
        return result


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _watch(
    model: nn.Module,
    layers: Mapping[str, Any],
    batches: Iterable[Any],
    pairs: Mapping[str, Sequence[str]] | None,
    progress: bool,
) -> list[_Norm]:
    """Run the batches; returns the normalizations (those of `pairs`, or all), in the model's order."""
    uses, norms = _Uses(), _norms(model, pairs)
    known: dict[int, _Layer] = {}
    for name, module in layers.items():
        known.setdefault(id(module), _Layer(name, module))

    def leave_norm(norm: _Norm, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        x = args[0].detach()
        norm.probe = x.reshape(-1, x.shape[-1])[:_PROBED].clone() if x.dim() else None
        largest = output.detach().reshape(-1, output.shape[-1]).float().abs().amax(0)
        norm.largest = largest if norm.largest is None else torch.maximum(norm.largest, largest)
        uses.sources[_address(output)] = norm
        uses.alive.append(output)

    def enter_layer(layer: _Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        norm = uses.source(x)
        layer.inputs.add(norm)
        if norm is not None:
            norm.layers[id(module)] = layer
            if not _whole_rows(x, norm):
                norm.elsewhere = norm.elsewhere or f"a part of the input of {layer.name}"
        uses.layer += 1

    def leave_layer(*_: Any) -> None:
        uses.layer -= 1

    def leave_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        uses.note_use(output, "the model's result")
        uses.sources.clear()
        uses.alive.clear()

    hooks = [norm.module.register_forward_hook(partial(leave_norm, norm)) for norm in norms]
    for layer in known.values():
        hooks.append(layer.module.register_forward_pre_hook(partial(enter_layer, layer), with_kwargs=True))
        hooks.append(layer.module.register_forward_hook(leave_layer))
    hooks.append(model.register_forward_hook(leave_model))
    with uses:
        run_batches(model, batches, hooks, doing="smooth", progress=progress)
    if not any(layer.inputs for layer in known.values()):
        raise ValueError("smooth_: batches: expected at least one that reaches a linear layer, got none")
    return norms


def _whole_rows(x: Tensor, norm: _Norm) -> bool:
    """Whether the last dimension of `x` is the normalization's features, in their order."""
    assert norm.largest is not None
    width = norm.largest.shape[0]
    steps = (x.storage_offset(), *x.stride()[:-1])
    return x.shape[-1] == width and x.stride(-1) == 1 and not any(step % width for step in steps)


def _norms(model: nn.Module, pairs: Mapping[str, Sequence[str]] | None) -> list[_Norm]:
    """Those of `pairs`, or the modules that call themselves a norm and have no parts; their formula is tried later."""
    modules = dict(model.named_modules())
    for name in () if pairs is None else (*pairs, *chain.from_iterable(pairs.values())):
        if name not in modules:
            raise ValueError(f"smooth_: pairs: expected qualified names of the model's modules, got {name!r}")
    named = [name for name, own in modules.items() if "norm" in type(own).__name__.lower() and not any(own.children())]
    return [_Norm(name, modules[name]) for name in (named if pairs is None else pairs)]


# --- the change -------------------------------------------------------------------------------------------------------


def _change(norm: _Norm, alpha: float) -> tuple[Tensor, dict[tuple[Any, str], Tensor]]:
    """s, float64 ``[k]``, and the new parameters by module and name, made in float64 and rounded once."""
    assert norm.largest is not None
    x = norm.largest.double()
    weights = [oriented(layer.module, layer.module.weight.detach()) for layer in norm.layers.values()]
    w = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    if not torch.isfinite(w).all():
        names = ", ".join(layer.name for layer in norm.layers.values())
        raise ValueError(f"smooth_: {names}: expected finite weights, got NaN or Inf")
    nonzero = (x > 0) & (w > 0)
    scale = torch.where(nonzero, x**alpha / w.clamp_min(torch.finfo(w.dtype).tiny) ** (1 - alpha), 1.0)
    changed = {}
    for name, parameter in norm.module.named_parameters() if not norm.elsewhere else ():
        one = 1.0 if name == "weight" and norm.formula == "1 + weight" else 0.0
        value = (parameter.detach().double() + one) / scale - one
        changed[norm.module, name] = _rounded(value, parameter, f"{norm.name}.{name}")
    for layer in norm.layers.values():
        weight = layer.module.weight
        by_column = scale if isinstance(layer.module, nn.Linear) else scale[:, None]
        changed[layer.module, "weight"] = _rounded(weight.detach().double() * by_column, weight, f"{layer.name}.weight")
    return scale, changed


def _rounded(value: Tensor, parameter: Tensor, name: str) -> Tensor:
    rounded = value.to(parameter.dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"smooth_: {name}: expected values that {parameter.dtype} holds, got larger ones")
    return rounded
