"""p-hop induction: apply the induction rule p times and say the letter found (2402.09268, 2502.17416).

Shapes: B rows, N letters of a row, T = N + 1 tokens.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_NONE = 1
_FIRST_LETTER = 2
_MAX_REDRAWS = 200


@dataclass(frozen=True, kw_only=True)
class PHop(Task):
    """Jump to just after the previous occurrence of a letter, p times; say the letter there.

    With letters v_0 .. v_{N-1}, `find(i) = 1 + max{j < i: v_j = v_i}`, undefined where v_i is new, and the label of
    position i is the letter at `find` applied p times to i, or "~" where a hop is undefined. The row is the token of p,
    then the letters, in which no letter follows itself (it would be its own hop for ever).

    Dense rows have a label at every letter, as in Sanford et al. (2402.09268: 100 positions, 4 letters, p in 0 .. 16).
    Otherwise only the last letter is scored, as in Saunshi et al. (2502.17416: 256 letters, p = 16 or 32). They plant a
    chain of hops; here letters are random and labels follow from the definition, and a row in which the chain breaks
    off is drawn again.

    Attributes:
        alphabet: number of letters to choose from, 3 to 26.
        context: letters in a row, N.
        hops: the values of p, one drawn for each row.
        dense: whether every letter is scored, or the last alone.
        scored_from: number of first letters of dense rows that are not scored, where most hops are undefined.

    Raises:
        ValueError: a size is out of range; when drawing, hardly any row has as many hops.
    """

    kind = "task.p_hop"

    alphabet: int = 4
    context: int = 100
    hops: tuple[int, ...] = tuple(range(17))
    dense: bool = True
    scored_from: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(3 <= self.alphabet <= 26, "alphabet", "must be 3 to 26")
        self.require(self.context >= 2, "context", "must be at least 2")
        self.require_counts("hops", least=0, most=self.context)
        self.require(0 <= self.scored_from < self.context, "scored_from", f"must be 0 to {self.context - 1}")
        self.require(self.dense or not self.scored_from, "scored_from", "goes with dense rows; without, use 0")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, "~" for undefined, the letters, then a token for each value of `hops`."""
        return ("<pad>", "~", *string.ascii_lowercase[: self.alphabet], *(str(count) for count in self.hops))

    @property
    def length(self) -> int:
        """The token of p and the letters."""
        return self.context + 1

    @property
    def chance(self) -> float:
        """Guessing letters; for a single hop one letter is impossible, so a guesser gets 1 / (alphabet - 1)."""
        return float(self.alphabet) ** -(self.context - self.scored_from if self.dense else 1)

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random letters, labelled by the definition."""
        which_B = rng.integers(len(self.hops), size=size)
        hops_B = np.array(self.hops)[which_B]
        letters_BN = self._letters(rng, size)
        if self.dense:
            labels_BN = self.labels(letters_BN, hops_B)
            labels_BN[:, : self.scored_from] = IGNORE
        else:
            labels_BN = np.full_like(letters_BN, IGNORE)
            labels_BN[:, -1] = self._reachable(rng, letters_BN, hops_B)
        leading_B1 = (_FIRST_LETTER + self.alphabet + which_B)[:, None]
        return Rows(
            tokens_BT=np.concatenate([leading_B1, letters_BN + _FIRST_LETTER], axis=1),
            targets_BT=np.concatenate([np.full((size, 1), IGNORE), labels_BN], axis=1),
            keys={"hops": hops_B},
        )

    def labels(self, letters_BN: np.ndarray, hops_B: np.ndarray, places: Sequence[int] | None = None) -> np.ndarray:
        """Target tokens, int64 `[B, number of places]`.

        Args:
            letters_BN: letters from 0, int64.
            hops_B: hops of each row.
            places: the positions that are labelled; None is all of them.
        """
        size, num = letters_BN.shape
        # Rows with most hops first, so that those still hopping are a slice; positions count through all rows. Each
        # row gets one more position, which stands for "undefined" and leads to itself.
        order_B = np.argsort(-hops_B, kind="stable")
        undefined_BM = np.full((size, num + 1), num)
        undefined_BM[:, :num] = find(letters_BN[order_B], self.alphabet)
        first_B1 = np.arange(size)[:, None] * (num + 1)
        next_M = (undefined_BM + first_B1).ravel()
        place_BP = first_B1 + (np.arange(num) if places is None else np.array(places))
        still = np.searchsorted(-hops_B[order_B], -np.arange(int(hops_B.max())), side="left")
        for rows in still:
            place_BP[:rows] = next_M[place_BP[:rows]]
        tokens_BM = np.full((size, num + 1), _NONE)
        tokens_BM[:, :num] = letters_BN[order_B] + _FIRST_LETTER
        labels_BP = np.empty_like(place_BP)
        labels_BP[order_B] = tokens_BM.ravel()[place_BP]
        return labels_BP

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Follow the hops of each scored letter with plain searches."""
        hops = self.hops[int(tokens_T[0]) - _FIRST_LETTER - self.alphabet]
        letters = [int(token) for token in tokens_T[1:]]
        return tuple(
            _follow(letters, place, hops)
            for place in range(self.scored_from if self.dense else self.context - 1, self.context)
        )

    def _letters(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Uniform among the sequences in which no letter follows itself, int64 `[B, N]`."""
        steps_BN = rng.integers(1, self.alphabet, size=(size, self.context))
        steps_BN[:, 0] = rng.integers(self.alphabet, size=size)
        return steps_BN.cumsum(axis=1) % self.alphabet

    def _reachable(self, rng: np.random.Generator, letters_BN: np.ndarray, hops_B: np.ndarray) -> np.ndarray:
        """Redraw, in place, the letters of rows whose last letter has no answer; the answers `[B]`."""
        last = [self.context - 1]
        answer_B = self.labels(letters_BN, hops_B, last)[:, 0]
        for _ in range(_MAX_REDRAWS):
            (broken,) = np.nonzero(answer_B == _NONE)
            if not len(broken):
                return answer_B
            letters_BN[broken] = self._letters(rng, len(broken))
            answer_B[broken] = self.labels(letters_BN[broken], hops_B[broken], last)[:, 0]
        raise ValueError(
            f"{self.kind}: context={self.context} is too short for hops={max(self.hops)}: hardly any row has as many; "
            f"a hop goes back about {self.alphabet - 1} letters"
        )


def find(letters_BN: np.ndarray, alphabet: int) -> np.ndarray:
    """The position just after the latest earlier occurrence of each letter, int64 `[B, N]`; N where there is none."""
    num = letters_BN.shape[1]
    found_BN = np.full_like(letters_BN, num)
    places_N = np.arange(1, num + 1, dtype=np.int32)
    for letter in range(alphabet):
        here_BN = letters_BN == letter
        # Position after the latest occurrence so far; 0 before the first.
        after_BN = np.maximum.accumulate(places_N * here_BN, axis=1)[:, :-1]
        again_BN = here_BN[:, 1:] & (after_BN > 0)
        found_BN[:, 1:][again_BN] = after_BN[again_BN]
    return found_BN


def _follow(letters: list[int], place: int, hops: int) -> int:
    for _ in range(hops):
        earlier = [other for other in range(place) if letters[other] == letters[place]]
        if not earlier:
            return _NONE
        place = earlier[-1] + 1
    return letters[place]
