"""Addition of many numbers, the answer written at once (2502.17416).

Shapes: B rows, N operands, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_FIRST_DIGIT = 1
_PLUS = 11
_EQUALS = 12
_END = 13


@dataclass(frozen=True, kw_only=True)
class Addition(Task):
    """Add n numbers of fixed width: `123+045+007=175`.

    Operands are uniform in 0 .. 10^digits - 1 and padded with zeros; the sum has no leading zeros and ends with
    "<end>". The published form (2502.17416) writes the most significant digit first and trains on n drawn uniformly
    from {2, 4, 8, 16, 32}.

    Attributes:
        operands: the values of n, one drawn for each row.
        digits: width of an operand, 1 to 9.
        reverse: whether sum and operands are written with the least significant digit first.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.addition"
    separator = ""

    operands: tuple[int, ...] = (2, 4, 8, 16, 32)
    digits: int = 3
    reverse: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require_counts("operands", least=1, most=10_000)
        self.require(1 <= self.digits <= 9, "digits", "must be 1 to 9")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, the digits, "+", "=" and the end of the answer."""
        return ("<pad>", *"0123456789", "+", "=", "<end>")

    @property
    def length(self) -> int:
        """The longest problem and the longest sum; the end of the answer is only ever a target."""
        return max(self.operands) * (self.digits + 1) + self._width(max(self.operands))

    @property
    def chance(self) -> float:
        """Share of the likeliest sum of two operands; of more operands every sum is rarer."""
        return 10.0**-self.digits

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random operands and their sum."""
        operands_B = rng.choice(np.array(self.operands), size=size)
        tokens_BT = np.zeros((size, self.length), dtype=np.int64)
        targets_BT = np.full((size, self.length), IGNORE, dtype=np.int64)
        for num in sorted(self.operands):
            (of_num,) = np.nonzero(operands_B == num)
            values_BN = rng.integers(10**self.digits, size=(len(of_num), num))
            prompt = num * (self.digits + 1)
            tokens_BT[of_num, :prompt] = self._problems(values_BN)
            answer_BA = self._answers(values_BN.sum(axis=1), self._width(num))
            told_BA = np.where(answer_BA == _END, 0, answer_BA)[:, :-1]
            tokens_BT[of_num, prompt : prompt + told_BA.shape[1]] = told_BA
            scored_BA = np.where(answer_BA == 0, IGNORE, answer_BA)
            targets_BT[of_num, prompt - 1 : prompt - 1 + answer_BA.shape[1]] = scored_BA
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"operands": operands_B})

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Read the operands off the text and add them."""
        symbols = "".join(self.vocabulary[int(token)] for token in tokens_T if 0 < token < _END)
        order = slice(None, None, -1 if self.reverse else 1)
        total = sum(int(operand[order]) for operand in symbols[: symbols.index("=")].split("+"))
        return (*(_FIRST_DIGIT + int(digit) for digit in str(total)[order]), _END)

    def _width(self, num: int) -> int:
        """Digits of the largest sum of `num` operands."""
        return len(str(num * (10**self.digits - 1)))

    def _problems(self, values_BN: np.ndarray) -> np.ndarray:
        """Tokens of `a+b+...=`, int64 `[B, N (digits + 1)]`."""
        size, num = values_BN.shape
        places = 10 ** np.arange(self.digits)[:: 1 if self.reverse else -1]
        tokens = np.full((size, num, self.digits + 1), _PLUS)
        tokens[:, :, :-1] = values_BN[..., None] // places % 10 + _FIRST_DIGIT
        tokens[:, -1, -1] = _EQUALS
        return tokens.reshape(size, num * (self.digits + 1))

    def _answers(self, sums_B: np.ndarray, width: int) -> np.ndarray:
        """Digits without leading zeros, the end, then padding, int64 `[B, width + 1]`."""
        number_B1 = np.maximum((sums_B[:, None] >= 10 ** np.arange(width)).sum(axis=1, keepdims=True), 1)
        place_A = np.arange(width + 1)
        power_BA = place_A if self.reverse else number_B1 - 1 - place_A
        digit_BA = sums_B[:, None] // 10 ** np.clip(power_BA, 0, width) % 10 + _FIRST_DIGIT
        return np.where(place_A < number_B1, digit_BA, np.where(place_A == number_B1, _END, 0))
