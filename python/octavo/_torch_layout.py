"""The two orders of a layer's codes: ``[n, k]``, and the packed one of `octavo.Int8Weight`, as PyTorch tensors.

Rank tells them apart: packed codes have rank 4. In CPU memory a layer holds packed codes, on other devices ``[n, k]``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from octavo import _core


def is_packed(codes: Tensor) -> bool:
    """Whether codes are in packed order."""
    return codes.dim() == 4


def pack(codes: Tensor) -> Tensor:
    """``[n, k]`` codes in CPU memory, packed."""
    packed: Tensor = _core.pack(codes.detach())
    return packed


def unpack(codes: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` codes, on whatever device packed ones are; itself where they are that already."""
    if not is_packed(codes):
        return codes
    if codes.device.type == "cpu" and type(codes) in (Tensor, nn.Parameter):  # no FakeTensor
        natural: Tensor = _core.unpack(codes.detach(), n, k)
        return natural
    if hasattr(codes, "full_tensor"):  # a DTensor: blocks of rows are on several devices
        codes = codes.full_tensor()
        return unpack(codes, n, k)
    blocks, groups, width, depth = codes.shape
    rows = codes.detach().permute(0, 2, 1, 3).reshape(blocks * width, groups * depth)
    return rows[:n, :k].contiguous()


def sum_codes(codes: Tensor, n: int) -> Tensor:
    """Sums over k of codes in either order, int32 ``[n]``."""
    if is_packed(codes):
        return codes.detach().sum((1, 3), dtype=torch.int32).flatten()[:n].clone()
    return codes.detach().sum(1, dtype=torch.int32)


class Converted:
    """Results of a conversion of tensors, for as long as somebody else holds both: tied weights stay tied by it."""

    def __init__(self) -> None:
        self._results: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, source: Tensor, convert: Callable[[], Tensor]) -> Tensor:
        """What `convert` made of `source` before, if that is still there and `source` unchanged; else what it makes."""
        found = self._results.get(source)
        if found is not None:
            result, version = found[0](), found[1]
            if result is not None and version == source._version:
                return result  # type: ignore[no-any-return]
        made = convert()
        self._results[source] = (weakref.ref(made), source._version)
        return made


_settled = Converted()
_natural = Converted()


def settled(codes: nn.Parameter, n: int, k: int) -> nn.Parameter:
    """The parameter in the order of its device; layers that share one get one."""
    on_cpu = codes.device.type == "cpu"
    if is_packed(codes) == on_cpu:
        return codes
    result = _settled.get(
        codes, lambda: nn.Parameter(pack(codes) if on_cpu else unpack(codes, n, k), requires_grad=False)
    )
    assert isinstance(result, nn.Parameter)
    return result


def natural(codes: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` codes for a state dict, in which layers that share a weight are to share it too."""
    return _natural.get(codes, lambda: unpack(codes.detach(), n, k)) if is_packed(codes) else codes.detach()
