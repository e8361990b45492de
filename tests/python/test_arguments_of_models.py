"""Things of 40 kinds as every argument of the functions that take models and checkpoints: see test_arguments.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo import checkpoint
from test_arguments import objects

torch = pytest.importorskip("torch", reason="these functions take models of PyTorch")
import octavo.torch as octavo_torch  # noqa: E402


def model() -> Any:
    """A normalization and two layers."""
    return torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))


def batches() -> list[Any]:
    return [torch.randn(4, 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("checkpoint")
    save_file({"layer.weight": np.ones((4, 8), np.float32)}, folder / "model.safetensors")
    return folder


def exported() -> Any:
    """A model of ONNX with one product."""
    onnx = pytest.importorskip("onnx")
    tensor, helper = onnx.TensorProto.FLOAT, onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, tensor, ["m", n]) for name, n in (("x", 8), ("y", 4)))
    return helper.make_model(
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    )


# By function what it is called with; `here` stands for the checkpoint, `there` for a folder that is not there yet.
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "quantize_": (octavo_torch.quantize_, lambda: {"model": model()}),
    "calibrate_": (octavo_torch.calibrate_, lambda: {"model": model(), "batches": batches()}),
    "smooth_": (octavo_torch.smooth_, lambda: {"model": model(), "batches": batches()}),
    "train_": (octavo_torch.train_, lambda: {"model": model(), "modules": ["*"]}),
    "untrain_": (octavo_torch.untrain_, lambda: {"model": model()}),
    "quantize": (checkpoint.quantize, lambda: {"model": "here", "output": "there"}),
    "load": (checkpoint.load, lambda: {"path": "here"}),
    "inspect": (checkpoint.inspect, lambda: {"path": "here"}),
}
# Those that test_arguments.py tries (options), and what is only shown or switched.
ELSEWHERE = {"options", "keywords", "threshold", "relative", "cap", "progress", "verify"}


def tried(function: str) -> list[str]:
    return [name for name in inspect.signature(FUNCTIONS[function][0]).parameters if name not in ELSEWHERE]


def raised(call: Callable[..., Any], given: dict[str, Any]) -> Exception | None:
    """What a call raises that may be raised."""
    try:
        call(**given)
    except (TypeError, ValueError, OSError) as error:
        return error
    return None


def refuse(function: str, call: Callable[..., Any], good: dict[str, Any], argument: str, value: Any) -> None:
    """Call; what is raised names the argument, or the file, or is about what a value of the right kind holds."""
    error = raised(call, {**good, argument: value})
    about_files = isinstance(value, str) or argument in ("path", "model", "output")
    about_content = argument in ("outlier_columns", "layer_options", "skip", "include", "measured", "pairs")
    if error is not None and not about_files and not about_content:
        assert re.search(rf"\b{argument}\b", str(error)), f"{function}: {value!r:.60}: {error!r}"


@pytest.mark.parametrize(("function", "argument"), [(name, each) for name in FUNCTIONS for each in tried(name)])
def test_any_object_as_any_argument(
    function: str, argument: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where strings are the names of folders to make
    call, make = FUNCTIONS[function]
    for number, value in enumerate(objects().values()):
        if argument == "batches" and isinstance(value, Iterable):
            continue  # what the model says of a batch that it cannot take is its own error
        places = {"here": folder, "there": tmp_path / f"out{number}"}
        good = {name: places.get(own, own) if isinstance(own, str) else own for name, own in make().items()}
        if "progress" in inspect.signature(call).parameters:
            good["progress"] = False
        refuse(function, call, good, argument, value)


@pytest.mark.parametrize("argument", ["model", "options", "outlier_columns", "skip"])
def test_any_object_for_onnx(argument: str) -> None:
    good = {"model": exported()}
    from octavo import onnx

    with pytest.raises(TypeError, match=r"^quantize_model: options: expected octavo.Options, got str$"):
        onnx.quantize_model(exported(), "absmax")  # type: ignore[arg-type]
    for value in objects().values():
        refuse("quantize_model", onnx.quantize_model, good, argument, value)


def test_a_string_is_no_list_of_patterns() -> None:
    with pytest.raises(TypeError, match=r"^skip: expected a sequence of patterns, got str$"):
        octavo_torch.quantize_(model(), skip="lm_head", progress=False)
    with pytest.raises(TypeError, match=r"^skip: expected patterns that are strings, got int$"):
        octavo_torch.quantize_(model(), skip=[1], progress=False)  # type: ignore[list-item]
