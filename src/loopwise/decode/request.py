"""What a batching engine is asked for, and what it says while it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopwise.decode.sampling import GREEDY, Sampling
from loopwise.loop.config import Component

FINISHES = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: after which it ends.
        sampling: how tokens are chosen; its seed is also that of random first states of the loop.
        stop_ids: tokens that end it; the one that did is part of the answer.
        loops: iterations of the main loop; None for the engine's.
        halting: the rule by which its tokens leave the loop early, or its text; None for the engine's. `fixed` with no
            number takes every iteration.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: Sequence[int] = ()
    loops: int | None = None
    halting: Component | str | None = None

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("prompt has no tokens: it needs at least one")
        if not _is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: a whole number, at least 1")
        if self.loops is not None and (not _is_whole(self.loops) or self.loops < 1):
            raise ValueError(f"loops {self.loops}: a whole number, at least 1")


@dataclass(frozen=True)
class Event:
    """One new token of a request, or its end.

    Attributes:
        request_id: what `submit` returned.
        token: the token; None where a request ends without one.
        depth: rungs that the position which predicted it ran; 0 without a token.
        finish: None while the request goes on; "stop" or "length" with its last token; "cancelled", or "error" where
            its numbers are no longer finite.
    """

    request_id: int
    token: int | None
    depth: int = 0
    finish: str | None = None


def check_fits(request: Request, *, capacity: int, vocabulary: int, max_loops: int, has_loop: bool) -> None:
    """Refuse what an engine cannot hold.

    Raises:
        ValueError: the request is too long, has unknown tokens, or more loops than the engine has.
    """
    total = len(request.prompt) + request.max_new_tokens
    if total > capacity:
        raise ValueError(
            f"prompt of {len(request.prompt)} tokens and max_new_tokens {request.max_new_tokens} are over the context "
            f"limit of {capacity} tokens"
        )
    for token in request.prompt:
        if not _is_whole(token) or not 0 <= token < vocabulary:
            raise ValueError(f"prompt holds the token {token!r}: ids from 0 to {vocabulary - 1} are known")
    if request.loops is not None and not has_loop:
        raise ValueError(f"loops {request.loops}: this model has no loop whose iterations could be chosen")
    if request.loops is not None and request.loops > max_loops:
        raise ValueError(f"loops {request.loops}: at most {max_loops} here")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
