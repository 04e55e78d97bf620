"""What the HTTP server reads and answers: the OpenAI forms of completions and chat, checked strictly.

A field that is not listed here is refused rather than ignored, so that a mistyped `temprature` cannot pass unseen.
Beside OpenAI's fields a request may have `top_k`, `min_p`, `loops` and `halting`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from loopwise.decode.sampling import Sampling
from loopwise.loop.config import suggest

MAX_PROMPTS = 128
COMPLETION_TOKENS = 16
# Below these a division or a sum leaves the range of float32; the likeliest token has all mass long before.
_LEAST_TEMPERATURE = 1e-6
_LEAST_TOP_P = 1e-6


def _encodable(text: str) -> str:
    # JSON can spell halves of surrogate pairs, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is not text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenIds = Annotated[list[int], Field(min_length=1)]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]


class ApiError(Exception):
    """An answer in OpenAI's error form.

    Attributes:
        status: of HTTP.
        message: one line.
        param: the field that is wrong, if there is one.
        code: a word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message), param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream says beside the text."""

    include_usage: bool = False


class _Settings(_Strict):
    """Fields that completions and chat share."""

    model: Text | None = Field(None, description="name of the model that is served; may be left out")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, le=2**31)
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: Literal[1] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="accepted for clients that send it, and not used")
    loops: int | None = Field(None, ge=1, description="iterations of the main loop")
    halting: Text | None = Field(None, max_length=1000, description='such as "kl(threshold=1e-3)"')

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; without a seed, one that nobody knows."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            temperature=0.0 if temperature < _LEAST_TEMPERATURE else temperature,
            top_k=self.top_k or 0,
            top_p=max(_LEAST_TOP_P, 1.0 if self.top_p is None else self.top_p),
            min_p=self.min_p or 0.0,
            seed=secrets.randbelow(2**62) if self.seed is None else self.seed,
        )

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer and are not part of it."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def includes_usage(self) -> bool:
        """True when the stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, name: str) -> None:
        """Raise ApiError where fields that are right alone are wrong together, or another model is meant."""
        if self.model is not None and self.model != name:
            raise ApiError(
                f"model {self.model!r} is not served here, {name!r} is",
                status=404,
                param="model",
                code="model_not_found",
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options needs stream: true", param="stream_options")


class CompletionRequest(_Settings):
    """Body of POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt of its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def text(self) -> str:
        """Its content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Settings):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def check(self, name: str) -> None:
        """See `_Settings.check`."""
        super().check(name)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError("give max_tokens or max_completion_tokens, not both", param="max_tokens")


class Usage(BaseModel):
    """What an answer took; `mean_depth` is the mean number of rungs (iterations) per new token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    mean_depth: float | None


class CompletionChoice(BaseModel):
    """The answer to one prompt."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Chat(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loopwise"
    plan: str | None
    max_model_len: int
    max_loops: int | None


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of GET /health."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


# Where a value may have several forms, what pydantic says of each of them is many lines.
_FORMS = {
    "prompt": "must be text, a list of texts, token ids, or a list of lists of token ids, none of them empty",
    "stop": "must be text or a list of up to 4 texts",
    "messages": "must be a list of {role, content}, the content text or a list of {type: text, text}",
}


def explained(errors: Sequence[Any], model: type[BaseModel] | None = None) -> ApiError:
    """The first thing that pydantic found wrong with a body, as one line that names the field.

    Args:
        errors: as `ValidationError.errors()` gives them, each location starting with "body".
        model: what was read, for the names of its fields.
    """
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json")
    if not where or not first["loc"] or first["loc"][0] != "body":
        return ApiError("the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    field = where[0]
    if first["type"] == "extra_forbidden":
        near = suggest(field[:100], model.model_fields) if model is not None and len(where) == 1 else ""
        return ApiError(f"unknown field {'.'.join(where)[:100]!r}{near}", param=field[:100], code="unknown_field")
    if first["type"] == "missing":
        return ApiError(f"field {'.'.join(where)!r} is missing", param=field, code="missing_field")
    detail = _FORMS.get(field) or first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(f"{field}: {detail}", param=field, code="invalid_value")


def one_line(text: str, limit: int = 300) -> str:
    """Text that any client can read: one line, not long, and valid UTF-8 whatever the request held."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def sse(data: Any) -> bytes:
    """One server-sent event; text is sent as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
