"""Transformers' own server with an int8 model: 16 clients at once get the tokens that `generate` gives each alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

if any(
    importlib.util.find_spec(name) is None
    for name in ("torch", "transformers", "accelerate", "fastapi", "uvicorn", "openai")
):
    pytest.skip("octavo[transformers] and transformers[serving]: not all is installed", allow_module_level=True)

import torch
import transformers
from octavo.transformers import OctavoConfig
from tiny_models import WORDS, tiny_model, write_language_model

CLIENTS = 16
TOKENS = 8
START = 300  # seconds, on a machine that does other things too


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 Llama; outliers are looked for token by token, so that a text does not depend on those beside it."""
    root = tmp_path_factory.mktemp("served")
    model = tiny_model("LlamaForCausalLM", eos_token_id=None)  # which nothing ends
    write_language_model(root / "float32", model)
    config = OctavoConfig(outliers="rows", path="int8")
    int8 = transformers.AutoModelForCausalLM.from_pretrained(root / "float32", quantization_config=config)
    write_language_model(root / "int8", int8)
    return root / "int8"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "octavo.transformers", "serve", str(folder)]
    command += ["--device", "cpu", "--continuous-batching", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + START
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.communicate()[1]
                assert time.monotonic() < end, "the server did not answer"
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def complete(url: str, folder: Path, prompt: Any) -> dict[str, Any]:
    body = {"model": str(folder), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_16_clients_get_the_tokens_that_each_gets_alone(url: str, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + i for i in range(CLIENTS)]
    prompts = [" ".join(WORDS[i] for i in torch.randint(3, 16, (n,), generator=generator).tolist()) for n in lengths]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda prompt: complete(url, folder, prompt), prompts))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert answer["choices"][0]["text"].split() == tokenizer.decode(alone).split()
        assert answer["usage"]["completion_tokens"] == TOKENS


def test_a_request_that_is_not_understood_is_refused(url: str, folder: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        complete(url, folder, 3)
    assert complete(url, folder, "w5 w6")["usage"]["completion_tokens"] == TOKENS


def test_code_that_a_model_brings_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Unless it is trusted; nobody is asked, though somebody would answer; one line says what to do."""
    model = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((model / "config.json").read_text())
    places = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": places}))
    was_run = tmp_path / "was_run"
    (model / "own.py").write_text(f"open({str(was_run)!r}, 'w').close()\nraise OSError('so it was run')\n")
    command = [sys.executable, "-m", "octavo.transformers", "serve", str(model), "--device", "cpu"]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, check=False, timeout=START)
    assert done.returncode == 1
    said = "octavo.transformers: the model brings Python code of its own: --trust-remote-code runs it"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr
    assert not was_run.exists()
