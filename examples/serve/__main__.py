r"""Serve an int8 language model with OpenAI's interface.

    python examples/serve MODEL --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
         -d '{"prompt": "Once upon", "max_tokens": 20, "temperature": 0, "stream": true}'

MODEL: a Hugging Face folder of a causal language model, in int8 (`octavo quantize`, `save_pretrained`) or in 16 or 32
bits, which is then converted while it is loaded. Needs `pip install "octavo[serve]"`.

A request's tokens do not depend on the other requests, so where it is cut off, repeated or moved to another server of
the same kind, it is the same text: int8 layers that look for outliers in the whole batch (outliers="columns") are set
to look in each token ("rows"), and attention is computed for each text alone. SIGTERM and Ctrl-C finish what runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for whoever runs or imports this from elsewhere

import app
import loading
import octavo
import ragged
import torch
import transformers
import uvicorn
from engine import Engine
from octavo._sizes import positive


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python examples/serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--name", help="of the model in requests; default: the folder's")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="texts at once; default: 16")
    parser.add_argument(
        "--waiting", type=positive, default=64, metavar="N", help="texts that may wait, others get 429; default: 64"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the model; default: all cores")
    parser.add_argument("--dtype", default="auto", help="of what stays unquantized; default: the checkpoint's")
    parser.add_argument(
        "--grace", type=positive, default=60, metavar="SECONDS", help="to finish in after SIGTERM; default: 60"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        octavo.set_num_threads(args.threads)
    if not (args.model / "config.json").is_file():
        parser.error(f"MODEL: expected a Hugging Face folder with config.json, got {args.model}")
    try:
        model = loading.load(args.model, args.dtype)
        context = ragged.prepare_(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except (ImportError, OSError, RuntimeError, ValueError) as problem:  # whatever is wrong with the folder's files
        parser.error(re.sub(r"\s*\n\s*", " ", str(problem).strip()))
    served = app.Served(
        name=args.name or args.model.resolve().name,
        engine=Engine(model, loading.ends(model), batch=args.batch, waiting=args.waiting),
        tokenizer=tokenizer,
        context=context,
        words=model.get_input_embeddings().num_embeddings,
    )
    print(f"serving {served.name}: texts of {context} tokens, {args.batch} at once", flush=True)
    uvicorn.run(
        app.create(served), host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=args.grace
    )


if __name__ == "__main__":
    main()
