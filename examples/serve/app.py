"""The web application: requests in, texts of the engine out, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from engine import ClosedError, Engine, Finish, FullError, Job, Sampling
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from protocol import Answer, ChatRequest, Common, CompletionRequest, error
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from tokenizers.decoders import DecodeStream

MOST_BYTES = 4 << 20  # of a request
DEFAULT_TOKENS = 16  # new ones, where the request does not say; OpenAI's default


@dataclass(frozen=True)
class Served:
    """A model that is being served: its name, its engine, and its tokenizer."""

    name: str
    engine: Engine
    tokenizer: Any
    context: int  # tokens of a text at most, the prompt's among them
    words: int  # tokens are below


class BadRequestError(Exception):
    """The request asks for what this server cannot do. `parameter`: which one."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Metrics:
    """What the server counts, for Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("requests", "Requests, by how they ended.", ["outcome"], registry=self.registry)
        self.read = Counter("prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.written = Counter("completion_tokens", "New tokens.", registry=self.registry)
        self.first = Histogram("first_token_seconds", "From request to first token.", registry=self.registry)
        self.whole = Histogram("request_seconds", "From request to last token.", registry=self.registry)
        for name, value in (("running", lambda: engine.running), ("waiting", lambda: engine.waiting)):
            Gauge(f"texts_{name}", f"Texts that are {name}.", registry=self.registry).set_function(value)


class Completion:
    """One text on its way: tokens arrive from the engine's thread, text leaves in the event loop.

    Attributes:
        tokens: new ones, so far.
        finish: why no more will come, once that is so.
    """

    def __init__(self, served: Served, metrics: Metrics, prompt: list[int], request: Common, most: int) -> None:
        self.prompt, self.tokens, self.finish = prompt, list[int](), ""
        self._served, self._metrics, self._stops = served, metrics, request.stops()
        self._decoder, self._decoded = DecodeStream(skip_special_tokens=True), 0
        self._begin, self._seen_first = time.monotonic(), False
        self._arrived: asyncio.Queue[tuple[int | None, Finish | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(token: int | None, finish: Finish | None) -> None:
            loop.call_soon_threadsafe(self._arrive, token, finish)

        self._job = Job(prompt, most, Sampling(request.temperature, request.top_p, request.seed), deliver)
        served.engine.submit(self._job)
        metrics.read.inc(len(prompt))

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        read, written = len(self.prompt), len(self.tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def cancel(self) -> None:
        """Nobody wants the rest. Nothing, once it is done."""
        self._served.engine.cancel(self._job)

    async def pieces(self) -> AsyncIterator[tuple[str, list[int]]]:
        """Text, and the tokens that came with it; when it ends, `finish` says why."""
        held, given = "", 0  # `held` may be the beginning of a stop string
        while True:
            token, finish = await self._arrived.get()
            if token is None:
                self.finish = finish or "failed"
                held += self._decode_rest()
                if held or given < len(self.tokens):
                    yield held, self.tokens[given:]
                return
            self.tokens.append(token)
            held += self._decode(token)
            cut = min((held.find(stop) for stop in self._stops if stop in held), default=None)
            if cut is not None:
                self.finish = "stop"
                self.cancel()
                yield held[:cut], self.tokens[given:]
                return
            ready = len(held) - _beginning(held, self._stops)
            if ready:
                yield held[:ready], self.tokens[given:]
                held, given = held[ready:], len(self.tokens)

    def _arrive(self, token: int | None, finish: Finish | None) -> None:
        """What the engine delivers, counted. Its last delivery says how the text ended, whoever still listens."""
        seconds = time.monotonic() - self._begin
        if token is not None:
            self._metrics.written.inc()
            if not self._seen_first:
                self._seen_first = True
                self._metrics.first.observe(seconds)
        else:
            finished = finish in ("stop", "length") or self.finish == "stop"  # at one of the request's stop strings
            self._metrics.requests.labels("finished" if finished else finish).inc()
            self._metrics.whole.observe(seconds)
        self._arrived.put_nowait((token, finish))

    def _decode(self, token: int) -> str:
        """The text that a token completes: the bytes of one character may be spread over several tokens."""
        text = self._decoder.step(self._served.tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(text)
        return text

    def _decode_rest(self) -> str:
        """What the last tokens say that do not complete a character."""
        whole: str = self._served.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return whole[self._decoded :]


class Stream(StreamingResponse):
    """Server-sent events. Whichever way it ends, also before it begins, nothing runs on for nobody."""

    def __init__(self, completion: Completion, answer: Answer, body: Common) -> None:
        super().__init__(events(completion, answer, body), media_type="text/event-stream")
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()


def _beginning(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def create(served: Served) -> FastAPI:
    """The application. Its shutdown finishes all texts and ends the engine."""
    metrics = Metrics(served.engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.engine.close)

    app = FastAPI(title="octavo", lifespan=lifespan, max_body_size=MOST_BYTES)

    def refuse(status: int, outcome: str, body: dict[str, Any]) -> JSONResponse:
        metrics.requests.labels(outcome).inc()
        return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return refuse(400, "invalid", error(f"{place}: {first['msg']}", "invalid_request_error", place))

    @app.exception_handler(BadRequestError)
    async def bad(_: Request, problem: BadRequestError) -> JSONResponse:
        return refuse(400, "invalid", error(str(problem), "invalid_request_error", problem.parameter))

    @app.exception_handler(HTTPException)
    async def other(request: Request, problem: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {problem.detail}"
        gone = isinstance(problem.__cause__, ClientDisconnect)  # while the request was being read
        return refuse(problem.status_code, "cancelled" if gone else "invalid", error(message, "invalid_request_error"))

    @app.exception_handler(FullError)
    async def full(*_: Any) -> JSONResponse:
        return refuse(429, "refused", error("too many requests are waiting: try again later", "rate_limit_error"))

    @app.exception_handler(ClosedError)
    async def closed(*_: Any) -> JSONResponse:
        return refuse(503, "refused", error("the server is shutting down", "service_unavailable"))

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = served.engine.alive
        return JSONResponse({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": served.name, "object": "model", "owned_by": "octavo", "max_model_len": served.context}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        if isinstance(body.prompt, str):
            prompt = served.tokenizer(body.prompt, verbose=False)["input_ids"]
        else:
            prompt = body.prompt
        return await respond(request, body, prompt, body.max_tokens or DEFAULT_TOKENS, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        if not served.tokenizer.chat_template:
            raise BadRequestError(f"messages: {served.name} has no chat template: use /v1/completions", "messages")
        turns = [message.model_dump() for message in body.messages]
        prompt = served.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        most = body.max_completion_tokens or body.max_tokens or served.context - len(prompt)
        return await respond(request, body, prompt, most, chat=True)

    async def respond(request: Request, body: Common, prompt: list[int], most: int, *, chat: bool) -> Response:
        check(served, body, prompt, most, "messages" if chat else "prompt")
        completion = Completion(served, metrics, prompt, body, most)
        answer = Answer(served.name, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", chat=chat)
        if body.stream:
            return Stream(completion, answer, body)
        gone = asyncio.create_task(until_gone(request, completion))
        try:
            text = "".join([piece async for piece, _ in completion.pieces()])
        finally:
            gone.cancel()
            completion.cancel()
        if completion.finish == "failed":
            return JSONResponse(error("the model failed on this request", "server_error"), 500)
        if completion.finish == "cancelled":
            return Response(status_code=499)  # nobody reads it
        tokens = completion.tokens if body.return_token_ids else None
        return JSONResponse(answer.whole(text, tokens, completion.finish, completion.usage))

    return app


def check(served: Served, body: Common, prompt: list[int], most: int, parameter: str) -> None:
    """Raise BadRequestError for what the model cannot do."""
    if body.model not in (None, served.name):
        raise BadRequestError(f"model: expected {served.name!r}, got {body.model!r}", "model")
    if not prompt:
        raise BadRequestError(f"{parameter}: expected at least one token, got none", parameter)
    if len(prompt) >= served.context:
        raise BadRequestError(
            f"{parameter}: expected at most {served.context - 1} tokens, and place for a new one, got {len(prompt)}",
            parameter,
        )
    if len(prompt) + most > served.context:
        raise BadRequestError(
            f"max_tokens: expected at most {served.context} tokens with the prompt's, got {len(prompt)} of the prompt "
            f"and {most} new ones",
            "max_tokens",
        )
    if max(prompt) >= served.words:
        raise BadRequestError(f"{parameter}: expected tokens below {served.words}, got {max(prompt)}", parameter)


async def until_gone(request: Request, completion: Completion) -> None:
    """Cancels the text when its client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    completion.cancel()


async def events(completion: Completion, answer: Answer, body: Common) -> AsyncIterator[str]:
    """A stream's server-sent events."""

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    async for text, tokens in completion.pieces():
        yield event(answer.piece(text, tokens if body.return_token_ids else None, None))
    if completion.finish == "failed":
        yield event(error("the model failed on this request", "server_error"))
        return
    yield event(answer.piece("", [] if body.return_token_ids else None, completion.finish))
    if body.stream_options and body.stream_options.include_usage:
        yield event(answer.usage(completion.usage))
    yield "data: [DONE]\n\n"
