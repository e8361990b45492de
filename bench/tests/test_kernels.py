"""octavo_bench.layers.kernels, as far as a machine without a GPU can run it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from octavo_bench.layers import kernels


def test_times_are_those_of_kernels_by_their_names() -> None:
    device = torch.autograd.DeviceType
    events = [
        SimpleNamespace(name=name, device_type=kind, device_time=time)
        for name, kind, time in (
            ("linear_kernel", device.CUDA, 5.0),
            ("aten::linear", device.CPU, 9.0),
            ("at::native::reduce_kernel<512>", device.CUDA, 70.0),
            ("mark_kernel", device.CUDA, 1.0),
            ("linear_kernel", device.CUDA, 7.0),
        )
    ]
    found = kernels.by_name(events)
    assert found == {"linear_kernel": [5.0, 7.0], "mark_kernel": [1.0]}
    assert kernels.line("m=1", found) == "m=1: linear_kernel 6.0 us x0.2; mark_kernel 1.0 us x0.1"


def test_every_case_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHAPES", ((32, 16), (16, 8)))
    monkeypatch.setattr(kernels, "ROWS", (1, 3))
    monkeypatch.setattr(kernels, "BUFFER", 1 << 10)
    shapes = []
    monkeypatch.setattr(kernels, "times", lambda call, flush: {"kernel": [float(shapes.append(call().shape) or 2)]})
    kernels.main(tmp_path / "kernels.txt", "cpu")
    lines = (tmp_path / "kernels.txt").read_text().splitlines()
    assert len(lines) == 2 * 2 * 3
    assert lines[0] == "k=32 n=16 m=1 float16: kernel 2.0 us x0.1"
    assert [tuple(shape) for shape in shapes] == [(1, 16)] * 3 + [(3, 16)] * 3 + [(1, 8)] * 3 + [(3, 8)] * 3
