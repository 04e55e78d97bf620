"""Choosing the next token, each row with a generator of its own, so that a row does not depend on its batch mates.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits.

    Attributes:
        temperature: 0 takes the likeliest token, whatever the other fields say.
        top_k: only the likeliest k tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability, from above 0 to 1.
        min_p: only tokens with at least this share of the largest probability, from 0 to 1.
        seed: of the row's generator.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature}: 0 (greedy) or a positive number")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: a whole number, 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p}: from 0 to 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a whole number of 64 bits")

    @property
    def is_greedy(self) -> bool:
        """True when the likeliest token is taken."""
        return self.temperature == 0

    def probabilities(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The distribution that is drawn from, float32 `[..., V]`; greedy: all mass on the likeliest token."""
        logits_V = logits_V.float()
        if self.is_greedy:
            best = logits_V.argmax(-1, keepdim=True)
            return torch.zeros_like(logits_V).scatter_(-1, best, 1.0)
        # Below the largest, so that a tiny temperature gives 0 and -inf and no overflow; float32 ends near 1e-38.
        logits_V = (logits_V - logits_V.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)
        if 0 < self.top_k < logits_V.shape[-1]:
            least = logits_V.topk(self.top_k, dim=-1).values[..., -1:]
            logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
        p_V = logits_V.softmax(-1)
        if self.min_p > 0:
            p_V = p_V.masked_fill(p_V < self.min_p * p_V.amax(-1, keepdim=True), 0.0)
        if self.top_p < 1:
            sorted_V, order = p_V.sort(-1, descending=True)
            before_V = sorted_V.cumsum(-1) - sorted_V
            out_V = (before_V > 0) & (before_V >= self.top_p * p_V.sum(-1, keepdim=True))  # never the likeliest
            sorted_V = sorted_V.masked_fill(out_V, 0.0)
            p_V = torch.zeros_like(p_V).scatter_(-1, order, sorted_V)
        return p_V / p_V.sum(-1, keepdim=True)


GREEDY = Sampling()


class Samplers:
    """The choice of tokens in some rows.

    Args:
        settings: one for all rows, or one per row. Rows with the same settings draw from generators of their own all
            the same: row i has the seed `seed + i` where one is given for all.
        num_rows: B.
    """

    def __init__(self, settings: Sampling | Sequence[Sampling], num_rows: int):
        if isinstance(settings, Sampling):
            settings = [replace(settings, seed=settings.seed + row) for row in range(num_rows)]
        if len(settings) != num_rows:
            raise ValueError(f"sampling settings of {len(settings)} rows for {num_rows}")
        self.rows = list(settings)
        self.generators = [torch.Generator().manual_seed(item.seed) for item in self.rows]

    def pick(self, logits_bV: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """One token per row: logits floating `[b, V]` -> int64 `[b]`; `rows` says which rows these are."""
        rows = range(len(logits_bV)) if rows is None else rows
        best_b = logits_bV.argmax(-1)
        chosen = [
            int(best_b[place]) if self.rows[row].is_greedy else self.draw(row, self.rows[row].probabilities(logits_V))
            for place, (row, logits_V) in enumerate(zip(rows, logits_bV, strict=True))
        ]
        return torch.tensor(chosen, device=logits_bV.device)

    def draw(self, row: int, p_V: torch.Tensor) -> int:
        """Draw a token of one row from a distribution, float32 `[V]`."""
        return int(torch.multinomial(p_V.cpu(), 1, generator=self.generators[row]))

    def uniform(self, row: int) -> float:
        """A number of one row's generator, from 0 to 1."""
        return float(torch.rand((), generator=self.generators[row]))
