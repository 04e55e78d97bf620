"""Induction copy: repeat a random sequence (2409.19044).

Shapes: B rows, N symbols of a sequence, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_AGAIN = 1
_FIRST_SYMBOL = 2


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Write a random sequence a second time.

    The row is the sequence, "|", and the sequence again; every symbol of the second time is scored.

    Attributes:
        symbols: number of symbols to choose from, at least 2.
        sizes: lengths of the sequence, one drawn for each row.
        distinct: whether no symbol occurs twice, so that the one after an earlier occurrence is always right.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.induction"

    symbols: int = 26
    sizes: tuple[int, ...] = (4, 8, 16)
    distinct: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.symbols >= 2, "symbols", "must be at least 2")
        self.require_counts("sizes", least=1, most=self.symbols if self.distinct else None)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, "|" and the symbols: letters, or numbered where there are more than 26."""
        if self.symbols <= 26:
            return ("<pad>", "|", *(chr(ord("a") + symbol) for symbol in range(self.symbols)))
        return ("<pad>", "|", *(f"s{symbol}" for symbol in range(self.symbols)))

    @property
    def length(self) -> int:
        """The sequence twice; the last symbol of the second time is only a target, and "|" takes its place."""
        return 2 * max(self.sizes)

    @property
    def chance(self) -> float:
        """Guessing every symbol of the shortest sequence."""
        return float(self.symbols) ** -min(self.sizes)

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random sequences."""
        sizes_B = rng.choice(np.array(self.sizes), size=size)
        tokens_BT = np.zeros((size, self.length), dtype=np.int64)
        targets_BT = np.full((size, self.length), IGNORE, dtype=np.int64)
        for num in sorted(self.sizes):
            (of_num,) = np.nonzero(sizes_B == num)
            sequence_BN = self._sequences(rng, len(of_num), num) + _FIRST_SYMBOL
            tokens_BT[of_num, :num] = sequence_BN
            tokens_BT[of_num, num] = _AGAIN
            tokens_BT[of_num, num + 1 : 2 * num] = sequence_BN[:, :-1]
            targets_BT[of_num, num : 2 * num] = sequence_BN
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"size": sizes_B})

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """What stands before "|"."""
        tokens = [int(token) for token in tokens_T]
        return tuple(tokens[: tokens.index(_AGAIN)])

    def _sequences(self, rng: np.random.Generator, size: int, num: int) -> np.ndarray:
        """Uniform sequences of symbols from 0, int64 `[B, N]`."""
        if self.distinct:
            return rng.permuted(np.tile(np.arange(self.symbols), (size, 1)), axis=1)[:, :num]
        return rng.integers(self.symbols, size=(size, num))
