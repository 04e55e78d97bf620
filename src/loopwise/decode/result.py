"""What decoders have in common: prompts as spans of a cache, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from loopwise.decode.cache import Span

OnToken = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a decoder made.

    Attributes:
        tokens: new tokens of every row, the one that stopped it included.
        finish: why each row ended: "stop" (a stop token) or "length".
        depths: for every new token, how many rungs the position that predicted it ran.
        passes: sequential runs of rungs for new tokens, the prompt's not counted: those that had to wait for each
            other.
        visits: visits of layers for new tokens, summed over tokens and rows.
        cache_bytes: bytes of keys and values per token.
        seconds: wall clock for new tokens, without the prompt.
        notes: what else a decoder counts, by name.
    """

    tokens: list[list[int]]
    finish: list[str]
    depths: list[list[int]]
    passes: int
    visits: int
    cache_bytes: float
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(map(len, self.tokens))

    @property
    def mean_depth(self) -> float:
        """Mean number of rungs per new token; not a number where there is none."""
        return sum(map(sum, self.depths)) / max(1, self.num_tokens) if self.num_tokens else float("nan")

    @property
    def passes_per_token(self) -> float:
        """Sequential core passes per token of the longest row."""
        return self.passes / max(1, max(map(len, self.tokens), default=0))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the wall clock."""
        return self.num_tokens / max(self.seconds, 1e-9)


class Output:
    """The new tokens of some rows while they are made.

    Args:
        num_rows: B.
        max_new_tokens: after which a row ends.
        stop_ids: tokens that end a row.
        on_token: called with (row, token) for every token that is final.
    """

    def __init__(
        self, num_rows: int, max_new_tokens: int, stop_ids: Sequence[int] = (), on_token: OnToken | None = None
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: at least 1")
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.depths: list[list[int]] = [[] for _ in range(num_rows)]
        self.finish: list[str] = [""] * num_rows
        self.max_new_tokens, self.stop_ids, self.on_token = max_new_tokens, frozenset(stop_ids), on_token
        self._began = time.perf_counter()

    def begin(self) -> None:
        """The prompt is done: the clock starts."""
        self._began = time.perf_counter()

    def add(self, row: int, token: int, depth: int) -> bool:
        """Take the next token of a row; returns False when the row has ended with it."""
        self.tokens[row].append(token)
        self.depths[row].append(depth)
        if token in self.stop_ids:
            self.finish[row] = "stop"
        elif len(self.tokens[row]) >= self.max_new_tokens:
            self.finish[row] = "length"
        if self.on_token is not None:
            self.on_token(row, token)
        return not self.finish[row]

    @property
    def running(self) -> list[int]:
        """Rows that have not ended."""
        return [row for row, reason in enumerate(self.finish) if not reason]

    def decoded(self, *, passes: int, visits: int, cache_bytes: float, **notes: float) -> Decoded:
        """All of it."""
        seconds = time.perf_counter() - self._began
        return Decoded(
            tokens=self.tokens,
            finish=self.finish,
            depths=self.depths,
            passes=passes,
            visits=visits,
            cache_bytes=cache_bytes,
            seconds=seconds,
            notes=dict(notes),
        )


def prompt_span(prompts: Sequence[Sequence[int]], device: torch.device, rows: Sequence[int] | None = None) -> Span:
    """Prompts as a span from position 0 of each row; shorter ones are followed by places without a token.

    Raises:
        ValueError: there is no prompt, or an empty one.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    length = max(map(len, prompts))
    tokens = [[*prompt, *[0] * (length - len(prompt))] for prompt in prompts]
    positions = [[*range(len(prompt)), *[-1] * (length - len(prompt))] for prompt in prompts]
    where = list(range(len(prompts))) if rows is None else list(rows)
    return Span(
        rows_b=torch.tensor(where, device=device),
        tokens_bt=torch.tensor(tokens, device=device),
        positions_bt=torch.tensor(positions, device=device),
    )


def next_span(rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], device: torch.device) -> Span:
    """One token for each of some rows."""
    return Span(
        rows_b=torch.tensor(list(rows), device=device),
        tokens_bt=torch.tensor(list(tokens), device=device)[:, None],
        positions_bt=torch.tensor(list(positions), device=device)[:, None],
    )
