"""Makes int8 models known to Transformers, diffusers and accelerate without ``import octavo``.

PyTorch imports the entry points of its group ``torch.backends`` by itself. This one imports neither octavo nor any of
these: it waits until their modules that read models are imported, and until those meet a model of octavo's.
``OCTAVO_AUTOLOAD=0`` switches it off, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` all such entry points.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def init() -> None:
    """What PyTorch calls when it is imported."""
    if os.environ.get("OCTAVO_AUTOLOAD", "1") != "0":
        install()


def install() -> None:
    """Watch the modules of `_CHANGES`, those that are imported already, too."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _reader(read: Callable[[dict[str, Any]], Any], ours: str) -> Any:
    """A method that reads the quantization_config of a config.json, and imports octavo where that is octavo's."""

    def read_ours_too(quantization_config_dict: dict[str, Any]) -> Any:
        # config.json names no method (see octavo.file_format), so that a reader without octavo refuses it.
        is_ours = "octavo" in quantization_config_dict and quantization_config_dict.get("quant_method") is None
        if is_ours or quantization_config_dict.get("quant_method") == "octavo":
            importlib.import_module(ours)
            quantization_config_dict = {**quantization_config_dict, "quant_method": "octavo"}
        return read(quantization_config_dict)

    return staticmethod(read_ours_too)


def _change_transformers(auto: Any) -> None:
    for owner, method in ((auto.AutoQuantizationConfig, "from_dict"), (auto.AutoHfQuantizer, "supports_quant_method")):
        setattr(owner, method, _reader(getattr(owner, method), "octavo.transformers"))


def _change_diffusers(auto: Any) -> None:
    owner = auto.DiffusersAutoQuantizer
    owner.from_dict = _reader(owner.from_dict, "octavo.transformers.diffusers")


def _change_accelerate(modeling: Any) -> None:
    load = modeling.load_state_dict

    def load_plain(checkpoint_file: Any, device_map: Any = None) -> Any:
        state = load(checkpoint_file, device_map)
        if device_map is not None and any(key.endswith(".codes") and f"{key[:-6]}.options" in state for key in state):
            raise ValueError(
                f"load_checkpoint_and_dispatch: expected a checkpoint of 16-bit weights, got {checkpoint_file}, whose "
                "weights octavo has made int8: load the folder with from_pretrained(..., device_map=...)"
            )
        return state

    modeling.load_state_dict = load_plain


_CHANGES: dict[str, Callable[[Any], None]] = {
    "transformers.quantizers.auto": _change_transformers,
    "diffusers.quantizers.auto": _change_diffusers,
    "accelerate.utils.modeling": _change_accelerate,
}


class _Finder(MetaPathFinder):
    """Finds nothing itself, but sees what is imported."""

    def __init__(self) -> None:
        # Imported already, perhaps not to the end: where they themselves have imported PyTorch.
        self._begun = [sys.modules[name] for name in _CHANGES if name in sys.modules]
        self._look()

    def _look(self) -> None:
        for module in list(self._begun):
            if not getattr(module.__spec__, "_initializing", False):
                self._begun.remove(module)
                self._change(module)

    @staticmethod
    def _change(module: ModuleType) -> None:
        if not hasattr(module, "_watched_by_octavo"):
            module._watched_by_octavo = True  # type: ignore[attr-defined]
            _CHANGES[module.__name__](module)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if self._begun:
            self._look()
        spec = PathFinder.find_spec(name, path) if name in _CHANGES else None
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            self._change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
