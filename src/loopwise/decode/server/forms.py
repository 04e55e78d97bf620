"""How answers look, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

from loopwise.decode.server.protocol import Chat, ChatChoice, ChatMessage, Completion, CompletionChoice, Usage
from loopwise.decode.server.reply import Piece


class CompletionForm:
    """How answers of /v1/completions look.

    Args:
        name: of the model.
    """

    kind = chunk_kind = "text_completion"

    def __init__(self, name: str):
        self.shared = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices before any text."""
        return []

    def choices(self, piece: Piece) -> list[dict[str, Any]]:
        """Choices of a piece of text."""
        return [{"index": piece.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}]

    def whole(self, texts: Sequence[str], finishes: Sequence[Any], usage: Usage) -> Any:
        """The answer in one."""
        choices = [
            CompletionChoice(index=index, text=text, finish_reason=finish)
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return Completion(choices=choices, usage=usage, **cast(Any, self.shared))


class ChatForm:
    """How answers of /v1/chat/completions look.

    Args:
        name: of the model.
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, name: str):
        self.shared = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices before any text."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choices(self, piece: Piece) -> list[dict[str, Any]]:
        """Choices of a piece of text."""
        delta = {"content": piece.text} if piece.text else {}
        return [{"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": piece.finish}]

    def whole(self, texts: Sequence[str], finishes: Sequence[Any], usage: Usage) -> Any:
        """The answer in one."""
        choices = [
            ChatChoice(index=index, message=ChatMessage(content=text), finish_reason=finish)
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return Chat(choices=choices, usage=usage, **cast(Any, self.shared))


Form = CompletionForm | ChatForm
