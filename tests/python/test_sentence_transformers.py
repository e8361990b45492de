"""Modules of sentence-transformers that write their own weights, after quantize_."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import TORCH

if TORCH.missing:
    pytest.skip(TORCH.missing, allow_module_level=True)

import octavo.torch as ot
import torch
from torch import nn

modules = pytest.importorskip(
    "sentence_transformers.sentence_transformer.modules", reason="sentence-transformers is not installed"
)


@pytest.mark.parametrize("safe", [True, False])
def test_a_dense_module_is_saved_as_its_readers_know_it(safe: bool, tmp_path: Path) -> None:
    model = ot.quantize_(nn.Sequential(modules.Dense(24, 8)), progress=False)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    expected = model[0]({"sentence_embedding": x})["sentence_embedding"]
    assert isinstance(model[0].linear.weight, ot.Int8Tensor)
    model[0].save(str(tmp_path), safe_serialization=safe)
    loaded = modules.Dense.load(str(tmp_path))
    assert torch.equal(loaded.linear.weight, model[0].linear.weight.dequantize())
    found = loaded({"sentence_embedding": x})["sentence_embedding"]
    assert (found - expected).norm() < 0.02 * expected.norm()
