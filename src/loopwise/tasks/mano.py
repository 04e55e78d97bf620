"""Mano: arithmetic in prefix notation, modulo a prime (Physics of Language Models 4.1).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task, padded

_BOS, _ANSWER = 1, 2
_OPERATORS = ("+", "-", "*")
_FIRST_OPERATOR = 3
_FIRST_VALUE = _FIRST_OPERATOR + len(_OPERATORS)


@dataclass(frozen=True, kw_only=True)
class Mano(Task):
    """Evaluate an expression of + - * in prefix notation modulo 23, without writing anything down.

    The row is `<bos> <l> expression =`, with the number l of operations announced; only the value is scored. An
    expression of l operations splits the other l - 1 uniformly among its two sides. The published generator
    (`facebookresearch/PhysicsLM4`) draws l from 1 .. L in training and asks for l = L alone in tests, L = 10, 13 or 16;
    it also spells each operator in one of two ways at random, which is left out here.

    Attributes:
        operations: the values of l, one drawn for each row.
        modulus: numbers are 0 .. modulus - 1; at least 2.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.mano"

    operations: tuple[int, ...] = tuple(range(1, 11))
    modulus: int = 23

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require_counts("operations", least=1)
        self.require(self.modulus >= 2, "modulus", "must be at least 2")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, the start, "=", the operators, the numbers, then a token for each value of `operations`."""
        numbers = (str(value) for value in range(self.modulus))
        return ("<pad>", "<bos>", "=", *_OPERATORS, *numbers, *(f"<{count}>" for count in self.operations))

    @property
    def length(self) -> int:
        """Start, number of operations, "=", and l operators with l + 1 numbers."""
        return 2 * max(self.operations) + 4

    @property
    def chance(self) -> float:
        """One of the numbers; 0 is somewhat commoner, since products keep it."""
        return 1 / self.modulus

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random expressions, evaluated from their end."""
        which_B = rng.integers(len(self.operations), size=size)
        operations_B = np.array(self.operations)[which_B]
        most = max(self.operations)
        operator_BL = rng.integers(len(_OPERATORS), size=(size, most)).tolist()
        value_BL = rng.integers(self.modulus, size=(size, most + 1)).tolist()
        share_BL = rng.random((size, most)).tolist()
        tokens: list[list[int]] = []
        targets: list[list[int]] = []
        for row, count in enumerate(operations_B.tolist()):
            expression = _expression(count, operator_BL[row], value_BL[row], share_BL[row])
            tokens.append([_BOS, _FIRST_VALUE + self.modulus + int(which_B[row]), *expression, _ANSWER])
            targets.append([IGNORE] * (len(expression) + 2) + [self._value(expression)])
        return Rows(
            tokens_BT=padded(tokens, self.length),
            targets_BT=padded(targets, self.length, IGNORE),
            keys={"operations": operations_B},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Evaluate by recursion from the left."""
        return (_FIRST_VALUE + self._read(iter([int(token) for token in tokens_T[2:]])),)

    def _read(self, tokens: Iterator[int]) -> int:
        token = next(tokens)
        if token >= _FIRST_VALUE:
            return token - _FIRST_VALUE
        left = self._read(tokens)
        return _apply(token, left, self._read(tokens)) % self.modulus

    def _value(self, expression: list[int]) -> int:
        """The token of the value, by a stack from the right."""
        stack: list[int] = []
        for token in reversed(expression):
            if token >= _FIRST_VALUE:
                stack.append(token - _FIRST_VALUE)
            else:
                stack.append(_apply(token, stack.pop(), stack.pop()) % self.modulus)
        return _FIRST_VALUE + stack[0]


def _expression(count: int, operators: list[int], values: list[int], shares: list[float]) -> list[int]:
    """Tokens of an expression of `count` operations in prefix notation.

    Args:
        count: operations.
        operators: an operator for each operation, in the order in which they are written.
        values: the same for numbers.
        shares: for each operation, where in 0 .. 1 the others are divided.
    """
    expression: list[int] = []
    operation = value = 0
    waiting = [count]
    while waiting:
        inside = waiting.pop()
        if not inside:
            expression.append(_FIRST_VALUE + values[value])
            value += 1
            continue
        left = int(shares[operation] * inside)
        waiting += [inside - 1 - left, left]
        expression.append(_FIRST_OPERATOR + operators[operation])
        operation += 1
    return expression


def _apply(token: int, left: int, right: int) -> int:
    operator = _OPERATORS[token - _FIRST_OPERATOR]
    return left + right if operator == "+" else left - right if operator == "-" else left * right
