"""Pre-school maths: sums and differences of one or two variables (2409.19044).

Shapes: B rows, V variables, K operands, T tokens.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

_EQUALS, _COMMA, _ASK, _PLUS, _MINUS = 1, 2, 3, 4, 5
_FIRST_LETTER = 6
_ZERO = _FIRST_LETTER + 26


@dataclass(frozen=True, kw_only=True)
class Maths(Task):
    """Read the values of a few variables, then evaluate: `z = 6 , b = 5 , i = - z + b , i = ?`.

    Names are different letters, values are drawn uniformly and alone, operands are different variables and every one
    has a sign. The answer is one token, negative numbers included.

    Attributes:
        operands: the numbers of operands, one drawn for each row.
        variables: variables with a value, at least the most operands, at most 25.
        limit: values are 0 .. limit - 1; at least 2.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.maths"

    operands: tuple[int, ...] = (1, 2)
    variables: int = 3
    limit: int = 10

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(1 <= self.variables <= 25, "variables", "must be 1 to 25")
        self.require_counts("operands", least=1, most=self.variables)
        self.require(self.limit >= 2, "limit", "must be at least 2")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, "=", ",", "?", the signs, letters, and every number that can occur: 0, 1, .., then -1, -2, ..."""
        largest = self._largest
        numbers = (*range(largest + 1), *range(-1, -largest - 1, -1))
        return ("<pad>", "=", ",", "?", "+", "-", *string.ascii_lowercase, *map(str, numbers))

    @property
    def length(self) -> int:
        """Four tokens for each variable, the longest expression, three of the question."""
        return 4 * self.variables + 2 * max(self.operands) + 6

    @property
    def chance(self) -> float:
        """Share of 0, the commonest answer with one operand; with two it is about half of that."""
        return 1 / self.limit

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random names, values and expressions."""
        operands_B = rng.choice(np.array(self.operands), size=size)
        names_BV = rng.permuted(np.tile(np.arange(26), (size, 1)), axis=1)[:, : self.variables + 1] + _FIRST_LETTER
        values_BV = rng.integers(self.limit, size=(size, self.variables))
        chosen_BV = rng.permuted(np.tile(np.arange(self.variables), (size, 1)), axis=1)
        minus_BV = rng.integers(2, size=(size, self.variables))
        tokens_BT = np.zeros((size, self.length), dtype=np.int64)
        targets_BT = np.full((size, self.length), IGNORE, dtype=np.int64)
        start = 4 * self.variables
        tokens_BT[:, 0:start:4] = names_BV[:, :-1]
        tokens_BT[:, 1:start:4] = _EQUALS
        tokens_BT[:, 2:start:4] = values_BV + _ZERO
        tokens_BT[:, 3:start:4] = _COMMA
        tokens_BT[:, start] = names_BV[:, -1]
        tokens_BT[:, start + 1] = _EQUALS
        for num in sorted(self.operands):
            (of_num,) = np.nonzero(operands_B == num)
            chosen_BK, minus_BK = chosen_BV[of_num, :num], minus_BV[of_num, :num]
            end = start + 2 + 2 * num
            tokens_BT[of_num, start + 2 : end : 2] = np.where(minus_BK, _MINUS, _PLUS)
            tokens_BT[of_num, start + 3 : end : 2] = np.take_along_axis(names_BV[of_num], chosen_BK, axis=1)
            for offset, token in enumerate((_COMMA, names_BV[of_num, -1], _EQUALS, _ASK)):
                tokens_BT[of_num, end + offset] = token
            operand_BK = np.take_along_axis(values_BV[of_num], chosen_BK, axis=1)
            result_B = np.where(minus_BK, -operand_BK, operand_BK).sum(axis=1)
            targets_BT[of_num, end + 3] = np.where(result_B < 0, self._largest - result_B, result_B) + _ZERO
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"operands": operands_B})

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Read the statements one after another and evaluate the last expression."""
        vocabulary = self.vocabulary
        words = [vocabulary[int(token)] for token in tokens_T if token]
        *statements, (_asked, _, _) = _split(words)
        values: dict[str, int] = {}
        for name, _, *expression in statements:
            if len(expression) == 1:
                values[name] = int(expression[0])
            else:
                signs, operands = expression[::2], expression[1::2]
                values[name] = sum(
                    values[operand] * (-1 if sign == "-" else 1) for sign, operand in zip(signs, operands, strict=True)
                )
        return (vocabulary.index(str(values[_asked]), _ZERO),)

    @property
    def _largest(self) -> int:
        return max(self.operands) * (self.limit - 1)


def _split(words: list[str]) -> list[list[str]]:
    """The words between commas."""
    statements: list[list[str]] = [[]]
    for word in words:
        if word == ",":
            statements.append([])
        else:
            statements[-1].append(word)
    return statements
