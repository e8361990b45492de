"""`Int8Stack`: the weights of all experts of a mixture, which Transformers keeps stacked in one parameter, in int8."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from octavo._text import unexpected
from octavo.options import Options
from octavo.torch import Int8Tensor
from octavo.torch.choice import is_conv1d


class Int8Stack(nn.Module):
    """Stands where a module of experts had a parameter ``[experts, n, k]``; to be indexed, like it, by an expert.

    Args:
        weights: an Int8Tensor for each expert, ``[n, k]``; a transposed one where the model keeps ``[k, n]``.

    Its parameters are "0", "1", ...: so a state dict of the model has ``experts.gate_up_proj.0``.
    """

    _is_hf_initialized = True

    def __init__(self, weights: Iterable[Int8Tensor]) -> None:
        super().__init__()
        for index, weight in enumerate(weights):
            self.register_parameter(str(index), nn.Parameter(weight, requires_grad=False))

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[Tensor]:
        return self.parameters()

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        name = str(int(expert))
        weight = self._parameters[name]
        assert weight is not None
        hook: Any = self.__dict__.get("_hf_hook")  # accelerate's, where it has taken the weights away
        if hook is not None and weight.device.type == "meta":
            return hook.weights_map[name].to(hook.execution_device)  # type: ignore[no-any-return]
        return weight

    # Of the parameter in whose place this is.
    shape = property(lambda self: torch.Size((len(self), *self[0].shape)))
    dtype = property(lambda self: self[0].dtype)
    device = property(lambda self: self[0].device)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter in whose place this is."""
        return torch.stack([weight.dequantize(dtype) for weight in self])  # type: ignore[call-arg]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.bmm and isinstance(args[1], cls) and not kwargs:
            return torch.stack([x @ weight for x, weight in zip(*args, strict=True)])
        if func is torch.cat and (kwargs or {}).get("dim") == 1:  # before the weights of a model are put
            return cls(torch.cat(rows) for rows in zip(*args[0], strict=True))
        got = f"the int8 weights of {len(args)} arguments' experts: leave this module in 16 bit"
        where = getattr(func, "__name__", func)
        raise unexpected(where, "one expert's weight", f"{got} with modules_to_not_convert", TypeError)


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The parameters of `model` that stack experts: qualified name, module, name in the module. Also `Int8Stack`."""
    for name, module in model.named_modules():
        own: dict[str, Any] = {**dict(module.named_parameters(recurse=False)), **dict(module.named_children())}
        for leaf, weight in own.items():
            is_stack = isinstance(weight, Int8Stack)
            if is_stack or (
                isinstance(weight, Tensor) and weight.dim() == 3 and "expert" in f"{name}.{type(module)}".lower()
            ):
                yield f"{name}.{leaf}" if name else leaf, module, leaf


def is_convertible(module: nn.Module) -> bool:
    """Whether the forward of `module` takes the weight of one expert after the other, or all in ``torch.bmm``."""
    is_elsewhere = getattr(module, "_is_expert_parallel", False)  # some of the experts are in other processes
    is_known = hasattr(module, "is_concatenated") and not is_elsewhere
    return is_known or type(module).__name__ in ("JetMoeParallelExperts", "Llama4TextExperts")


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of an expert is ``[k, n]``."""
    return getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")


def quantized(module: nn.Module, weights: Tensor, options: Options) -> Iterator[Int8Tensor]:
    """The int8 weights ``[n, k]`` of a module's parameter: one, or one after the other where it stacks experts."""
    turned = weights.mT if is_conv1d(module) or is_transposed(module) else weights
    return (Int8Tensor.from_float(weight, options) for weight in (turned if turned.dim() == 3 else [turned]))


def put(module: nn.Module, name: str, weights: Iterable[Int8Tensor]) -> None:
    """Replace a parameter of experts by the int8 weights ``[n, k]`` of each."""
    stack = Int8Stack(weight.t() if is_transposed(module) else weight for weight in weights)  # type: ignore[misc]
    delattr(module, name)
    module.add_module(name, stack)
    if hasattr(module, "config"):
        # The other implementations of Transformers read all experts at once.
        config: Any = copy.deepcopy(module.config)
        config._experts_implementation = "eager"
        module.config = config
