"""The table of whole models: on a tiny one, with engines that fail and that are wrong."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from octavo_bench.models import find, whole
from octavo_bench.progress import Progress


def broken(folder: Path) -> Any:
    raise OSError(f"{folder.name} is not for this one")


def test_whole(tmp_path: Path, facts: Any, progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=300, tie_word_embeddings=True, initializer_range=0.1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    find.cache().mkdir(parents=True)
    monkeypatch.setattr(whole, "DECODER", (whole.Case("prompt", 1, 7), whole.Case("new", 2, 3, 2)))
    wrong = whole.Engine(lambda folder: lambda ids, mask, new: torch.zeros(len(ids), 300))
    more = {"broken": whole.Engine(broken), "wrong": wrong, "absent": whole.Engine(broken, "a_package_of_nobody")}
    monkeypatch.setattr(whole, "ENGINES", {**whole.ENGINES, **more})
    engines = [
        name
        for name, each in whole.ENGINES.items()
        if "decoder" in each.kinds and name.startswith(("octavo", "torch "))
    ]
    args = argparse.Namespace(model="tiny", engines=[*engines, *more], rounds=2, seconds=0.0, loads=False)
    report = whole.run(args, tmp_path / "tiny", facts, progress)
    (table,) = report.tables
    assert table.column("engine") == engines
    errors = dict(zip(engines, table.column("error"), strict=True))
    assert errors.pop(whole.REFERENCE) == 0
    assert all(1e-4 < error < 0.1 for error in errors.values()), errors
    assert errors["octavo bfloat16, 16-bit head"] < errors["octavo bfloat16"]
    for name in ("prompt, ms", "new, ms"):
        assert min(table.column(name)) > 0
    assert table.column("new, to octavo")[engines.index("octavo bfloat16")] == 1
    said = dict(line.split(": left out: ") for line in report.conclusions)
    assert said["broken"] == "OSError: tiny is not for this one"
    assert said["absent"] == "a_package_of_nobody is not installed"
    assert said["wrong"].startswith("RuntimeError: expected torch float32's outputs")


def test_engines_that_there_are_not(facts: Any, progress: Progress) -> None:
    args = argparse.Namespace(model="smollm2", engines=["octavo bfloat16", "octavo, bfloat16"])
    with pytest.raises(
        ValueError, match=r"--engines: expected some of 'octavo float32', .*, got \['octavo, bfloat16'\]"
    ):
        whole.command(args, facts, progress)
