"""Makes int8 models known to Transformers and diffusers without ``import octavo``.

PyTorch imports the entry points of its group ``torch.backends`` by itself. This one imports neither octavo nor
Transformers: it waits until the registry of quantizers is imported, and until that is asked for a model of octavo's.
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

# The registries: the module, what of it reads a config.json's quantization_config, and what of octavo registers there.
REGISTRIES = {
    "transformers.quantizers.auto": (
        {"AutoQuantizationConfig": "from_dict", "AutoHfQuantizer": "supports_quant_method"},
        "octavo.transformers",
    ),
    "diffusers.quantizers.auto": ({"DiffusersAutoQuantizer": "from_dict"}, "octavo.transformers.diffusers"),
}


def init() -> None:
    """What PyTorch calls when it is imported."""
    if os.environ.get("OCTAVO_AUTOLOAD", "1") == "0":
        return
    sys.meta_path.insert(0, _Finder())


def watch(registry: ModuleType) -> None:
    """Have a registry, one of `REGISTRIES`, import octavo when it reads a config of octavo's."""
    if hasattr(registry, "_watched_by_octavo"):
        return
    registry._watched_by_octavo = True  # type: ignore[attr-defined]
    readers, ours = REGISTRIES[registry.__name__]
    for owner_name, method in readers.items():
        owner = getattr(registry, owner_name)
        setattr(owner, method, staticmethod(_reader(getattr(owner, method), ours)))


def _reader(read: Callable[[dict[str, Any]], Any], ours: str) -> Callable[[dict[str, Any]], Any]:
    def read_ours_too(quantization_config_dict: dict[str, Any]) -> Any:
        # config.json names no method (see octavo.file_format), so that a reader without octavo refuses it.
        is_ours = "octavo" in quantization_config_dict and quantization_config_dict.get("quant_method") is None
        if is_ours or quantization_config_dict.get("quant_method") == "octavo":
            importlib.import_module(ours)
            quantization_config_dict = {**quantization_config_dict, "quant_method": "octavo"}
        return read(quantization_config_dict)

    return read_ours_too


class _Finder(MetaPathFinder):
    """Finds nothing itself, but sees what is imported."""

    def __init__(self) -> None:
        # Imported already, perhaps not to the end: where they themselves have imported PyTorch.
        self._begun = [sys.modules[name] for name in REGISTRIES if name in sys.modules]
        self._look()

    def _look(self) -> None:
        for registry in list(self._begun):
            if not getattr(registry.__spec__, "_initializing", False):
                self._begun.remove(registry)
                watch(registry)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if self._begun:
            self._look()
        if name not in REGISTRIES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            watch(module)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec
