"""What OpenAI's clients send and expect: the requests, the responses, the errors."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class StreamOptions(BaseModel):
    """`include_usage`: one more event at the end, with the numbers of tokens."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of requests have. What is not here is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    return_token_ids: bool = False  # as in vLLM: `token_ids` beside the text

    def stops(self) -> list[str]:
        """The strings that end the text."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [string for string in strings if string]


class CompletionRequest(Common):
    """POST /v1/completions. `prompt`: text or tokens."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class Answer:
    """The shape of a response, whole or in pieces: of a completion, or of a chat."""

    def __init__(self, model: str, identity: str, *, chat: bool) -> None:
        self._chat = chat
        self._head = {"id": identity, "created": int(time.time()), "model": model}

    def whole(self, text: str, tokens: list[int] | None, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The response without streaming."""
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [_choice(content, tokens, finish)], "usage": usage}

    def piece(self, text: str, tokens: list[int] | None, finish: str | None) -> dict[str, Any]:
        """One event of a stream."""
        content: dict[str, Any] = {"delta": {"content": text}} if self._chat else {"text": text}
        return {**self._head, "object": self._piece, "choices": [_choice(content, tokens, finish)]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The event of `StreamOptions.include_usage`."""
        return {**self._head, "object": self._piece, "choices": [], "usage": usage}

    @property
    def _piece(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"


def _choice(content: dict[str, Any], tokens: list[int] | None, finish: str | None) -> dict[str, Any]:
    more = {} if tokens is None else {"token_ids": tokens}
    return {"index": 0, **content, **more, "logprobs": None, "finish_reason": finish}


def error(message: str, kind: str, parameter: str | None = None) -> dict[str, Any]:
    """The body of a response that is an error."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}
