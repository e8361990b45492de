"""Which layers of a model become int8: the one decision, for every way to convert a model."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any

from torch import nn

from octavo._text import expect, expect_patterns, matches
from octavo.options import Options

# Not layers that lose little, but layers that others read: the logits of an output head or a classifier are compared
# with each other, a router's decide which expert runs.
HEADS = tuple(form for head in ("lm_head", "classifier", "score", "qa_outputs") for form in (head, f"*.{head}"))
ROUTERS = ("gate", "*.gate", "router", "*.router", "*.router.*", "*.shared_expert_gate")


@dataclass(frozen=True)
class Choice:
    """What `choose_layers` found, by qualified name."""

    layers: dict[str, Any]  # to convert; one that has several names is there under each
    kept: dict[str, str]  # why each other linear layer stays as it is


def choose_layers(
    model: nn.Module, *, include: Sequence[str] | None = None, skip: Sequence[str] | None = None, head: bool = False
) -> Choice:
    """The linear layers of `model` whose weight becomes int8, and why the others' does not.

    Linear layers are ``nn.Linear`` with its subclasses, and the ``Conv1D`` of Transformers. Only the structure of the
    model is read: it may be on the meta device.

    What stays: by default the output head (``get_output_embeddings()``, or ``lm_head``) and the routers of mixtures of
    experts. In any case: a weight that another kind of module uses, too (a tied embedding); one that a parametrization
    computes; layers that the model keeps in float32 for its dtype; what an adapter of PEFT has added; weights that are
    no floating-point matrix.

    Args:
        include: patterns of qualified names ("decoder.layers.0.fc1"), as in a shell ("*", "?", "[...]"); given, only
            layers that one of them matches, the output head and routers too.
        skip: patterns of layers to leave, in place of the output head and routers.
        head: do not leave the output head (``get_output_embeddings()``), even where it is tied to the embedding.
    """
    for name, patterns in (("include", include), ("skip", skip)):
        expect_patterns(name, patterns)
    reason, modules = _reasons(model, include, skip, head), model.named_modules(remove_duplicate=False)
    found = {name: (layer, reason(name, layer)) for name, layer in modules if is_linear(layer)}
    layers = {name: layer for name, (layer, why) in found.items() if not why}
    return Choice(layers, {name: why for name, (_, why) in found.items() if why})


def converts_head(function: str, head: bool | None, options: Options, devices: Iterable[object]) -> bool:
    """Whether the output head of a model that lies on `devices` becomes int8, too: `head`, or for None by default.

    By default it does on the CPU, where decoding waits for weights to be read, and with rotation, without which a head
    loses several times as much. Raises TypeError, naming `function`, for what is neither a bool nor None.
    """
    expect(f"{function}: head", head, (bool, NoneType), "a bool or None")
    return bool(options.rotation) and {*map(str, devices)} <= {"cpu"} if head is None else head


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a Conv1D of Transformers, whose weight is ``[in, out]``."""
    # Not imported for it: a model that has one has imported it.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def oriented(layer: nn.Module, weight: Any) -> Any:
    """A linear layer's weight as ``[n, k]``, and one of ``[n, k]`` as the layer has it: transposed for a Conv1D."""
    return weight.t() if is_conv1d(layer) else weight


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _reasons(
    model: nn.Module, include: Sequence[str] | None, skip: Sequence[str] | None, with_head: bool
) -> Callable[[str, Any], str]:
    """A function that tells why a layer stays as it is: "" where it does not."""
    modules = dict(model.named_modules())
    others = {name or type(module).__name__: module for name, module in modules.items() if not is_linear(module)}
    users = {id(own): name for name, module in others.items() for own in module.parameters(recurse=False)}
    head: Any = None
    with suppress(NotImplementedError, AttributeError):  # how a model says that it has none
        head = model.get_output_embeddings()  # type: ignore[operator]
    chosen_head = head if with_head else None
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied |= {source: target for target, source in tied.items()}
    plan = getattr(model, "_get_dtype_plan", None)
    float32 = () if plan is None else plan(getattr(model, "dtype"))  # noqa: B009 (of a PreTrainedModel)
    in_float32 = [re.compile(pattern.replace("*", ".*")) for pattern in float32]
    adapters = [f"{name}." if name else "" for name, module in modules.items() if hasattr(module, "base_layer")]

    def reason(name: str, layer: Any) -> str:
        weight = layer._parameters.get("weight")
        if weight is None:
            return "its weight is computed from other parameters"
        if type(weight).__name__ == "Int8Tensor":
            return "its weight is int8 already"
        if weight.dim() != 2 or not weight.is_floating_point():
            return f"its weight is {weight.dtype} of {weight.dim()} dimensions"
        user = users.get(id(weight)) or tied.get(f"{name}.weight")
        if user and layer is not chosen_head:
            return f"its weight is also that of {user}"
        if any(name.startswith(above) and not f"{name}.".startswith(f"{above}base_layer.") for above in adapters):
            return "it belongs to an adapter"
        if any(pattern.search(f"{name}.weight") for pattern in in_float32):
            return "the model keeps it in float32"
        if skip is not None and matches(name, skip):
            return "skipped"
        if include is not None:
            return "" if matches(name, include) else "not included"
        if skip is not None:
            return ""
        if layer is head or matches(name, HEADS):
            return "" if layer is chosen_head else "it is the output head"
        return "it is a router" if matches(name, ROUTERS) else ""

    return reason
