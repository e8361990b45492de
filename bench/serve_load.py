"""Load test of examples/serve: an hour's worth of requests in a few minutes.

    .venv/bin/python bench/serve_load.py --output bench/results/serve

An hour's worth: 3600 requests, one for each second of an hour; `--clients` send them one after the other without pause.
Texts come whole or as streams; some clients hang up before the end, and some requests are wrong. The model is tiny, of
random weights, with outlier features in every layer (`--model` takes another folder). Checked, and the exit status is 1
where it does not hold:

- nothing is lost or mixed up: each response has the tokens, and the text, that `model.generate` gives for its prompt
  alone, in this process; each wrong request gets its error; no text runs on whose client hung up, and some of those are
  counted as cancelled, none more than once (one may be finished before it is noticed, or gone before it is read);
- memory stays flat: over the time after the first fifth of the requests, the straight line through the server's
  resident and through its private memory rises by at most 1 MiB (`--limit`) for 1000 requests;
- SIGTERM lets the texts that are running be finished.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo_bench.measuring.options import wait_passively

wait_passively()

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "serve"))

import httpx2
import loading
import numpy as np
import torch
from matplotlib import pyplot as plt
from measure import Others, machine, set_threads, write
from octavo_bench.measuring import drawing
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "examples" / "serve"
START = 600  # seconds until a server answers, at most: other programs may have the machine
SETTLED = 0.2  # of the requests, until memory pools and caches have their size
PACKAGES = ("transformers", "fastapi", "starlette", "uvicorn", "pydantic")
KINDS = {"whole": 0.45, "stream": 0.40, "hang up": 0.08, "wrong": 0.07}
# Wrong requests: body, status, and the parameter that the error names.
WRONG: list[tuple[str, int, str | None]] = [
    ('{"prompt": ""}', 400, "prompt"),
    ('{"prompt": 3}', 400, "prompt.str"),
    ('{"prompt": [1, 99999999]}', 400, "prompt"),
    ('{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
    ('{"prompt": "a", "max_tokens": 1000000}', 400, "max_tokens"),
    ('{"prompt": "a", "temperature": -1}', 400, "temperature"),
    ('{"prompt": "a", "model": "another"}', 400, "model"),
    ('{"prompt": "a", "best_of": 3}', 400, "best_of"),
    ('{"prompt": "a"', 400, None),
    ("{}", 400, "prompt"),
]


@dataclass(frozen=True)
class Case:
    """A request and what the model gives for it alone."""

    prompt: str
    most: int  # new tokens
    tokens: list[int]
    text: str
    finish: str


@dataclass
class Outcome:
    """What became of the requests. Times in seconds from the start of the load."""

    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=lambda: {"whole": [], "stream": []})
    first: list[float] = field(default_factory=list)  # of streams, from request to first token
    tokens: int = 0
    retries: int = 0  # after 429
    seconds: float = 0.0
    samples: list[dict[str, float]] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict)  # MiB for 1000 requests


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3600, metavar="N", help="default: 3600")
    parser.add_argument("--clients", type=int, default=24, metavar="N", help="at once; default: 24")
    parser.add_argument("--cases", type=int, default=150, metavar="N", help="different prompts; default: 150")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="texts that the server runs at once; default: 8"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the model in the server; default: 1")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="an int8 or 16-bit model; default: a tiny one is made"
    )
    parser.add_argument(
        "--limit", type=float, default=1.0, metavar="MIB", help="of growth for 1000 requests; default: 1"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for serve.json and serve.png; default: none")
    args = parser.parse_args(arguments)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder) / "model"
            make_model(model)
        others = Others()
        cases = make_cases(model, args.cases)
        with serving([str(SERVER), str(model), "--batch", str(args.batch), "--threads", str(args.threads)]) as server:
            outcome = asyncio.run(load(server, cases, args.requests, args.clients))
            outcome.faults += asyncio.run(check_shutdown(server, cases))
    outcome.slopes = slopes(outcome)
    for name, slope in outcome.slopes.items():
        if slope > args.limit:
            outcome.faults.append(
                f"memory: {name} grows by {slope:.2f} MiB for 1000 requests; expected at most {args.limit}"
            )
    report = summary(outcome) | {
        "command": " ".join(["bench/serve_load.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "limit_mib_per_1000_requests": args.limit,
        "clients": args.clients,
        "batch": args.batch,
        "model": str(args.model) if args.model else "made here: Llama, 3 layers, width 128, random weights, bfloat16",
        "other_programs_cores": others.cores(),
        "machine": machine(args.threads) | {"serving": {name: version(name) for name in PACKAGES}},
    }
    print(as_text(report))
    if args.output:
        content = report | {"samples": outcome.samples}
        write(args.output / "serve.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
        drawing.save_all({"serve.png": lambda: draw(outcome)}, args.output)
    return 1 if outcome.faults else 0


# --- model and requests -----------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """A tiny Llama in int8, of random weights, and a tokenizer from this repository's texts.

    In each layer three features are outliers by their scale, others now and then: whether a feature is one depends on
    the token, as in large models. Some tokens end a text.
    """
    import transformers
    from octavo.transformers import OctavoConfig
    from train_lm import train_tokenizer

    tokenizer = train_tokenizer(texts(), 1024)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=list(range(0, 1024, 100)),
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[torch.randperm(128)[:3]] = 8.0
                norm.weight[torch.randperm(128)[:8]] *= 2.5
    with tempfile.TemporaryDirectory() as original:
        model.to(torch.bfloat16).save_pretrained(original)
        # "columns", the default: the server has to make the layers independent of the batch
        int8 = transformers.AutoModelForCausalLM.from_pretrained(original, quantization_config=OctavoConfig())
    int8.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts() -> list[str]:
    """This repository's documents and sources."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "python").rglob("*.py")]
    return [path.read_text(encoding="utf-8") for path in sorted(paths)]


def make_cases(folder: Path, number: int) -> list[Case]:
    """Prompts of 1 to 100 tokens, each continued alone by `model.generate`, up to 1 to 48 tokens."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = loading.load(folder)
    ends = loading.ends(model)
    chosen = random.Random(0)
    source = "\n\n".join(texts())
    cases = []
    for _ in tqdm(range(number), desc="each prompt alone", unit="prompt", mininterval=1):
        begin = chosen.randrange(len(source) - 1000)
        ids = tokenizer(source[begin : begin + 1000])["input_ids"][: chosen.randint(1, 100)]
        prompt = tokenizer.decode(ids)
        ids = tokenizer(prompt)["input_ids"]  # what the server makes of it
        most = chosen.randint(1, 48)
        with torch.inference_mode():
            found = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)[0, len(ids) :].tolist()
        finish = "stop" if found[-1] in ends else "length"
        tokens = found[:-1] if finish == "stop" else found
        cases.append(Case(prompt, most, tokens, tokenizer.decode(tokens, skip_special_tokens=True), finish))
    return cases


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    url: str

    def memory(self) -> dict[str, float]:
        """MiB: resident, and private (of no other process, no file's)."""
        fields: Counter[str] = Counter()
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, kibibytes = line.split()[:2]
            fields[name.rstrip(":")] = int(kibibytes)
        private = fields["Private_Clean"] + fields["Private_Dirty"]
        return {"resident": fields["Rss"] / 1024, "private": private / 1024}


@contextlib.contextmanager
def serving(command: Sequence[str], seconds: float = START) -> Iterator[Server]:
    """A server, from when it answers; ended at the end, whatever happens. `command`: Python's arguments, but the port.

    Raises RuntimeError where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT
        )
        server = Server(process, f"http://127.0.0.1:{port}")
        try:
            end = time.monotonic() + seconds
            while not _answers(server.url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


# --- the load ---------------------------------------------------------------------------------------------------------


async def load(server: Server, cases: Sequence[Case], requests: int, clients: int) -> Outcome:
    """Send `requests`, `clients` at once, and look at the server's memory meanwhile."""
    outcome = Outcome()
    chosen = random.Random(1)
    kinds = chosen.choices(list(KINDS), list(KINDS.values()), k=requests)
    plan = iter([(kind, chosen.choice(cases), chosen.random()) for kind in kinds])
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
    begin = time.monotonic()
    async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        with tqdm(total=requests, desc="requests", unit="request", mininterval=1) as bar:

            async def client() -> None:
                for kind, case, chance in plan:
                    try:
                        fault = await one(http, kind, case, chance, outcome)
                    except (httpx2.HTTPError, ValueError, KeyError, IndexError) as error:
                        fault = f"{type(error).__name__}: {error}"
                    if fault:
                        outcome.faults.append(f"{kind}, prompt {case.prompt[:30]!r}, {case.most} tokens: {fault}")
                    outcome.kinds[kind] += 1
                    outcome.ends.append(time.monotonic() - begin)
                    bar.update()

            watcher = asyncio.create_task(watch(server, outcome, begin))
            await asyncio.gather(*(client() for _ in range(clients)))
            outcome.seconds = time.monotonic() - begin
            watcher.cancel()
        outcome.faults += await check_counts(http, outcome)
    return outcome


async def one(http: httpx2.AsyncClient, kind: str, case: Case, chance: float, outcome: Outcome) -> str:
    """One request; returns what was wrong with its response, or nothing."""
    if kind == "wrong":
        body, status, parameter = WRONG[int(chance * len(WRONG))]
        response = await http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        error = response.json()["error"]
        good = response.status_code == status and parameter in (None, error["param"]) and error["message"]
        return "" if good else f"{body}: got {response.status_code} {response.text}"
    if kind == "hang up":
        return await hang_up(http, case, chance)
    begin = time.monotonic()
    streamed = kind == "stream"
    while True:
        response, got = await (stream if streamed else whole)(http, case)
        if response.status_code != 429:
            break
        outcome.retries += 1
        await asyncio.sleep(float(response.headers["Retry-After"]))
    outcome.latencies[kind].append(time.monotonic() - begin)
    if "first" in got:
        outcome.first.append(got["first"])
    outcome.tokens += len(got.get("tokens", ()))
    if response.status_code != 200:
        return f"got {response.status_code} {got}"
    expected = {"tokens": case.tokens, "text": case.text, "finish": case.finish, "usage": len(case.tokens)}
    wrong = [
        f"{name}: expected {value!r}, got {got.get(name)!r}" for name, value in expected.items() if got[name] != value
    ]
    return "; ".join(wrong)


def request_of(case: Case, **more: Any) -> dict[str, Any]:
    """The body of a request."""
    return {"prompt": case.prompt, "max_tokens": case.most, "temperature": 0, "return_token_ids": True, **more}


async def whole(http: httpx2.AsyncClient, case: Case) -> tuple[httpx2.Response, dict[str, Any]]:
    """A response that comes at once."""
    response = await http.post("/v1/completions", json=request_of(case))
    if response.status_code != 200:
        return response, {"error": response.text}
    body = response.json()
    (choice,) = body["choices"]
    got = {"tokens": choice["token_ids"], "text": choice["text"], "finish": choice["finish_reason"]}
    return response, got | {"usage": body["usage"]["completion_tokens"]}


async def stream(http: httpx2.AsyncClient, case: Case) -> tuple[httpx2.Response, dict[str, Any]]:
    """A response in pieces, put together. Raises ValueError where it does not end as a stream has to."""
    begin = time.monotonic()
    body = request_of(case, stream=True, stream_options={"include_usage": True})
    got: dict[str, Any] = {"tokens": [], "text": "", "finish": None, "usage": None}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return response, {"error": response.text}
        done = False
        async for event in events(response):
            if done:
                raise ValueError(f"expected nothing after [DONE], got {event}")
            if event == "[DONE]":
                done = True
                continue
            content = json.loads(event)
            if "error" in content:
                raise ValueError(f"got {content}")
            for choice in content["choices"]:
                got.setdefault("first", time.monotonic() - begin)
                got["text"] += choice["text"]
                got["tokens"] += choice["token_ids"]
                got["finish"] = choice["finish_reason"]
            if "usage" in content:
                got["usage"] = content["usage"]["completion_tokens"]
    if not done:
        raise ValueError("expected [DONE] at the end of the stream, got none")
    return response, got


async def events(response: httpx2.Response) -> AsyncIterator[str]:
    """The data of server-sent events."""
    async for line in response.aiter_lines():
        if line:
            if not line.startswith("data: "):
                raise ValueError(f"expected a line of data, got {line!r}")
            yield line.removeprefix("data: ")


async def hang_up(http: httpx2.AsyncClient, case: Case, chance: float) -> str:
    """Go away early: a stream after some events, which must be right so far, a whole response after some time."""
    if chance < 0.5:
        with contextlib.suppress(httpx2.TimeoutException):
            await http.post("/v1/completions", json=request_of(case), timeout=0.002 + 0.1 * chance)
        return ""
    got: list[int] = []
    async with http.stream("POST", "/v1/completions", json=request_of(case, stream=True)) as response:
        if response.status_code != 200:
            return "" if response.status_code == 429 else f"got {response.status_code}"
        async for event in events(response):
            if event != "[DONE]":
                got += json.loads(event)["choices"][0]["token_ids"]
            if len(got) > 10 * (chance - 0.5):
                break
    return "" if got == case.tokens[: len(got)] else f"expected the beginning of {case.tokens}, got {got}"


async def watch(server: Server, outcome: Outcome, begin: float) -> None:
    """The server's memory, twice a second."""
    while True:
        sample = {"seconds": time.monotonic() - begin, "requests": float(len(outcome.ends))}
        outcome.samples.append(sample | server.memory())
        await asyncio.sleep(0.5)


# --- checks afterwards ------------------------------------------------------------------------------------------------


async def check_counts(http: httpx2.AsyncClient, outcome: Outcome) -> list[str]:
    """Whether the server's own counts say that every request ended as it should, and that nothing is left."""
    for _ in range(100):  # the last ones to hang up may not have been noticed yet
        counted = await metrics(http)
        if not counted["texts_running"] and not counted["texts_waiting"]:
            break
        await asyncio.sleep(0.1)
    outcome.counted = counted
    faults = [f"server: {counted[name]:.0f} {name}" for name in ("texts_running", "texts_waiting") if counted[name]]
    ended = {
        name: int(counted.get(f'requests_total{{outcome="{name}"}}', 0))
        for name in ("finished", "cancelled", "invalid", "refused", "failed")
    }
    answered = outcome.kinds["whole"] + outcome.kinds["stream"]
    # Who hung up may have been too late, or too early for the server to have read the request.
    late = ended["finished"] - answered
    if ended["invalid"] != outcome.kinds["wrong"] or ended["failed"] or late < 0:
        faults.append(f"server: expected {answered} finished, {outcome.kinds['wrong']} invalid, 0 failed, got {ended}")
    if late + ended["cancelled"] > outcome.kinds["hang up"] or (outcome.kinds["hang up"] and not ended["cancelled"]):
        faults.append(f"server: expected at most {outcome.kinds['hang up']} cancelled and more than 0, got {ended}")
    return faults


async def metrics(http: httpx2.AsyncClient) -> dict[str, float]:
    """The server's counts by name and labels."""
    lines = (await http.get("/metrics")).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def taken(counted: dict[str, float]) -> float:
    """Texts that a server has read: those that it has, and those that are finished."""
    names = ("texts_running", "texts_waiting", 'requests_total{outcome="finished"}')
    return sum(counted.get(name, 0) for name in names)


async def check_shutdown(server: Server, cases: Sequence[Case], seconds: float = 60) -> list[str]:
    """SIGTERM while texts are running and waiting: all are finished, then the server ends without an error."""
    long = sorted(cases, key=lambda case: len(case.tokens))[-12:]
    faults = []
    async with httpx2.AsyncClient(base_url=server.url, timeout=120) as http:
        before = taken(await metrics(http))
        answers = [asyncio.create_task((stream if i % 2 else whole)(http, case)) for i, case in enumerate(long)]
        end = time.monotonic() + seconds
        # One that the server has not read yet would be refused.
        while (read := taken(await metrics(http)) - before) < len(long) and not all(each.done() for each in answers):
            if time.monotonic() > end:
                faults.append(f"SIGTERM: expected {len(long)} texts in the server in {seconds:.0f} s, got {read:.0f}")
                break
            await asyncio.sleep(0.001)
        server.process.send_signal(signal.SIGTERM)
        found = await asyncio.gather(*answers, return_exceptions=True)
    for case, answer in zip(long, found, strict=True):
        if isinstance(answer, BaseException) or answer[1].get("tokens") != case.tokens:
            faults.append(f"SIGTERM: prompt {case.prompt[:30]!r}: expected {len(case.tokens)} tokens, got {answer!r}")
    try:
        status = server.process.wait(30)
    except subprocess.TimeoutExpired:
        return [*faults, "SIGTERM: expected the server to end, it did not in 30 seconds"]
    return faults if status in (0, -signal.SIGTERM) else [*faults, f"SIGTERM: expected status 0, got {status}"]


def slopes(outcome: Outcome) -> dict[str, float]:
    """MiB for 1000 requests: the slope of the straight line (least squares) through memory after the first requests."""
    settled = [sample for sample in outcome.samples if sample["requests"] >= SETTLED * len(outcome.ends)]
    if len(settled) < 3:
        raise RuntimeError(f"memory: expected at least 3 samples, got {len(settled)}: send more requests")
    requests = [sample["requests"] for sample in settled]
    return {
        name: 1000 * float(np.polyfit(requests, [sample[name] for sample in settled], 1)[0])
        for name in ("resident", "private")
    }


# --- results ----------------------------------------------------------------------------------------------------------


def summary(outcome: Outcome) -> dict[str, Any]:
    """What to report."""
    times = {**outcome.latencies, "first token of a stream": outcome.first}
    settled = [sample for sample in outcome.samples if sample["requests"] >= SETTLED * len(outcome.ends)]
    return {
        "faults": outcome.faults,
        "requests": dict(outcome.kinds),
        "retries_after_429": outcome.retries,
        "server_counts": {name: value for name, value in outcome.counted.items() if name.startswith("requests_total")},
        "seconds": outcome.seconds,
        "requests_per_second": len(outcome.ends) / outcome.seconds,
        "tokens_per_second": outcome.tokens / outcome.seconds,
        "tokens_compared": outcome.tokens,
        "latency_ms": {
            name: {f"p{p}": 1e3 * float(np.percentile(values, p)) for p in (50, 90, 99, 100)}
            for name, values in times.items()
            if values
        },
        "memory_mib": {
            name: {
                "first": settled[0][name],
                "last": settled[-1][name],
                "highest": max(sample[name] for sample in outcome.samples),
                "mib_per_1000_requests": outcome.slopes[name],
            }
            for name in ("resident", "private")
        },
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{sum(report['requests'].values())} requests ({', '.join(f'{n} {k}' for k, n in report['requests'].items())}) "
        f"in {report['seconds']:.0f} s: {report['requests_per_second']:.1f} requests/s, "
        f"{report['tokens_per_second']:.0f} tokens/s",
        f"{report['tokens_compared']} tokens compared with those of the model alone",
    ]
    for name, values in report["latency_ms"].items():
        lines.append(f"{name}: " + ", ".join(f"{p} {value:.0f} ms" for p, value in values.items()))
    for name, values in report["memory_mib"].items():
        lines.append(
            f"{name} memory: {values['first']:.1f} MiB after a fifth, {values['last']:.1f} MiB at the end, "
            f"{values['mib_per_1000_requests']:+.3f} MiB for 1000 requests"
        )
    lines += [f"FAULT {fault}" for fault in report["faults"][:20]]
    lines.append(
        f"{len(report['faults'])} faults" if report["faults"] else "nothing lost, nothing mixed up, memory flat"
    )
    return "\n".join(lines)


def draw(outcome: Outcome) -> Any:
    """Memory over time, and the distribution of latencies."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    seconds = [sample["seconds"] for sample in outcome.samples]
    for name, color in (("resident", drawing.BLUE), ("private", drawing.VERMILION)):
        left.plot(seconds, [sample[name] for sample in outcome.samples], color=color, label=name)
    left.set(xlabel="seconds", ylabel="MiB", title="memory of the server", ylim=(0, None))
    requests = left.twinx()
    requests.plot(seconds, [sample["requests"] for sample in outcome.samples], color=drawing.GRAY, linestyle=":")
    requests.set(ylabel="requests answered (dotted)", ylim=(0, None))
    left.legend(loc="center right")
    times = {**outcome.latencies, "first token of a stream": outcome.first}
    for (name, values), color in zip(times.items(), (drawing.BLUE, drawing.VERMILION, drawing.GREEN), strict=True):
        ordered = sorted(values)
        right.plot([1e3 * value for value in ordered], np.linspace(0, 1, len(ordered)), color=color, label=name)
    right.set(xlabel="ms", ylabel="share of requests answered by then", title="latency", ylim=(0, 1), xlim=(0, None))
    right.legend(loc="lower right")
    drawing.quiet(left, "both")
    drawing.quiet(right, "both")
    return figure


def version(package: str) -> str:
    """Of an installed package."""
    import importlib.metadata

    return importlib.metadata.version(package)


if __name__ == "__main__":
    sys.exit(main())
