"""Multi-query associative recall: pairs first, then some of the keys again, each to be answered by its value.

Shapes: B rows, T tokens, P pairs, S places for queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loopwise.tasks.base import IGNORE, PAD, Rows, Task


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Give at each key the value that it was paired with, `k1 v1 k2 v2 ... k2 . k1` (MQAR).

    The distribution of Arora et al. (2312.04927): different keys from the lower half of the vocabulary, different
    values from the upper; every key is asked once, at one of every second place after the pairs, the s-th with weight
    s^(a - 1); every position between is filled at random and not scored. Unlike in the published generator the filling
    has no padding and none of the row's keys, so that the tokens alone say what is asked.

    Attributes:
        num_symbols: size of the vocabulary, padding included.
        num_tokens: T.
        num_pairs: P; 4 P is at most T.
        power: a of the power law; 1 is uniform.
        random_filling: fill with random symbols instead of padding.
    """

    kind: ClassVar[str | None] = "task.mqar"
    num_symbols: int = 8192
    num_tokens: int = 64
    num_pairs: int = 4
    power: float = 0.01
    random_filling: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.num_pairs >= 1, "num_pairs", "must be at least 1")
        self.require(
            self.num_tokens % 2 == 0 and self.num_tokens >= 4 * self.num_pairs,
            "num_tokens",
            f"must be even and at least 4 * num_pairs ({4 * self.num_pairs})",
        )
        self.require(self.num_symbols // 2 > self.num_pairs, "num_symbols", "must be more than 2 * num_pairs + 1")
        self.require(self.power > 0, "power", "must be positive")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, keys k1, k2, ..., values v1, v2, ..."""
        keys = [f"k{number}" for number in range(1, self._first_value)]
        return ("<pad>", *keys, *(f"v{number}" for number in range(1, self.num_symbols - self._first_value + 1)))

    @property
    def length(self) -> int:
        """T."""
        return self.num_tokens

    @property
    def chance(self) -> float:
        """Giving each key one of the row's values."""
        return self.num_pairs ** -float(self.num_pairs)

    @property
    def _first_value(self) -> int:
        return self.num_symbols // 2

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Rows, each operation over all of them at once."""
        key_BP = 1 + _distinct(rng, size, self._first_value - 1, self.num_pairs)
        value_BP = self._first_value + _distinct(rng, size, self.num_symbols - self._first_value, self.num_pairs)
        context = 2 * self.num_pairs
        tokens_BT = np.full((size, self.num_tokens), PAD)
        if self.random_filling:
            tokens_BT = _without(rng.integers(1, self.num_symbols - self.num_pairs, size=tokens_BT.shape), key_BP)
        tokens_BT[:, 0:context:2] = key_BP
        tokens_BT[:, 1:context:2] = value_BP
        place_BP = context + 2 * self._gaps(rng, size)
        targets_BT = np.full(tokens_BT.shape, IGNORE)
        np.put_along_axis(tokens_BT, place_BP, key_BP, axis=1)
        np.put_along_axis(targets_BT, place_BP, value_BP, axis=1)
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT)

    def _gaps(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Different places for the P queries of each row, int64 `[size, P]`, the s-th with weight (s + 1)^(a - 1)."""
        num_places = self.num_tokens // 2 - self.num_pairs
        log_weight_S = (self.power - 1) * np.log(np.arange(1, num_places + 1))
        # The largest of log weight + Gumbel noise, in order, are draws without replacement one after the other.
        return (-(log_weight_S + rng.gumbel(size=(size, num_places)))).argsort(axis=1)[:, : self.num_pairs]

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The value of every key of the pairs that stands after them, by looking it up."""
        context = 2 * self.num_pairs
        pairs = [int(token) for token in tokens_T[:context]]
        value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return tuple(value_of[int(token)] for token in tokens_T[context:] if int(token) in value_of)

    def prompt(self, rows: Rows) -> np.ndarray:
        """The pairs in the order of their keys: neither the order nor the filling makes another problem."""
        context = 2 * self.num_pairs
        key_BP, value_BP = rows.tokens_BT[:, 0:context:2], rows.tokens_BT[:, 1:context:2]
        order_BP = key_BP.argsort(axis=1)
        return np.concatenate([np.take_along_axis(part, order_BP, axis=1) for part in (key_BP, value_BP)], axis=1)


def _distinct(rng: np.random.Generator, size: int, num: int, count: int) -> np.ndarray:
    """`count` different numbers below `num` in random order for each row, int64 `[size, count]`."""
    # argpartition chooses them and leaves their order to its own ways, so they are sorted by the noise as well.
    noise = rng.random((size, num), dtype=np.float32)
    chosen = noise.argpartition(count - 1, axis=1)[:, :count]
    order = np.take_along_axis(noise, chosen, axis=1).argsort(axis=1)
    return np.take_along_axis(chosen, order, axis=1)


def _without(token_BT: np.ndarray, key_BP: np.ndarray) -> np.ndarray:
    """Numbers counted from 1 as if the row's keys were not there: a uniform choice among all other symbols."""
    for key_B in np.sort(key_BP, axis=1).T:
        token_BT += token_BT >= key_B[:, None]
    return token_BT
