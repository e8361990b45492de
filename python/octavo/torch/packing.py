"""The two orders of a weight's codes as PyTorch tensors: ``[n, k]``, and the packed one of `octavo.Int8Weight`.

Rank tells them apart: packed codes have rank 4. In CPU memory codes are packed, on other devices they are ``[n, k]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core


def is_packed(codes: Tensor) -> bool:
    """Whether codes are in packed order."""
    return codes.dim() == 4


def has_memory(tensor: Tensor) -> bool:
    """Whether the core can read a tensor: no fake one, none on the meta device, no wrapper."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def pack(codes: Tensor) -> Tensor:
    """Codes in the order of their device: ``[n, k]`` ones in CPU memory are packed, others stay as they are."""
    if is_packed(codes) or codes.device.type != "cpu" or not has_memory(codes):
        return codes
    packed: Tensor = _core.pack(codes.detach())
    return packed


def unpack(codes: Tensor, n: int, k: int) -> Tensor:
    """``[n, k]`` codes, wherever packed ones are; themselves where they are that already."""
    if not is_packed(codes):
        return codes
    if codes.device.type == "cpu" and has_memory(codes):
        rows: Tensor = _core.unpack(codes.detach(), n, k)
        return rows
    blocks, groups, width, depth = codes.shape
    return codes.permute(0, 2, 1, 3).reshape(blocks * width, groups * depth)[:n, :k].contiguous()
