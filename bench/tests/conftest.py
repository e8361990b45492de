"""The laboratory's tests use the tiny models of the library's."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# The suite runs on shared machines: torch's own threads only get in the way of what is tested.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))

import pytest
from octavo_bench.progress import Progress
from octavo_bench.tables import Report


class FixedFacts:
    """Facts that need no machine."""

    def now(self, **more: Any) -> dict[str, Any]:
        return {"command": "a test", "cpu": "none", "date": "2026-01-01", **more}


@pytest.fixture
def facts() -> Any:
    return FixedFacts()


@pytest.fixture
def progress() -> Progress:
    return Progress(show=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model in `model` and a text of 600 words in `text.txt`."""
    import torch
    from tiny_models import WORDS, tiny_opt, write_language_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_opt(layers=2, width=32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)
    # Feature 5 is large at every position: it comes out of the LayerNorms with a bias of 20.
    for layer in model.model.decoder.layers:
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            norm.bias[5] = 20.0
    write_language_model(folder / "model", model)
    draws = torch.randint(0, len(WORDS), (600,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text(" ".join(WORDS[int(draw)] for draw in draws))
    return folder


def row(report: Report, title: str, name: str) -> dict[str, Any]:
    """A row of a table as a dictionary by column."""
    table = report.table(title)
    (found,) = (each for each in table.rows if each[0] == name)
    return dict(zip(table.columns, found, strict=True))
