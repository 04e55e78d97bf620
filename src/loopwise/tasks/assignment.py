"""Variable assignment: what does a name stand for, behind 0, 1 or 2 other names (2409.19044, 2502.17416).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task, padded

_EQUALS, _COMMA, _SEMICOLON, _ASK, _PRINT, _CLOSE, _BREAK = range(1, 8)
_FIRST_LETTER = 8
_FIRST_VALUE = _FIRST_LETTER + 26
_QUESTION = 3


@dataclass(frozen=True, kw_only=True)
class Assignment(Task):
    """Look up a variable through a chain of names: `a = 1 , b = 2 , c = a , d = b , d = ?`.

    Depth 0 asks for one of several variables with different numbers. Each further depth adds as many variables again,
    each of which is assigned one of the depth before at random, and asks for one of the last. Examples with their
    answers may go before ("shots"); only the last answer is scored. The surface "code" writes `a = 1 ; .. print( d )`.

    Attributes:
        depths: how many names a lookup goes through, 0 to 2; one drawn for each row.
        variables: variables for each depth, one drawn for each example.
        values: numbers are 0 .. values - 1.
        shots: examples before the question.
        surface: "maths" or "code".

    Raises:
        ValueError: a size is out of range, or there are more variables than letters or numbers.
    """

    kind = "task.assignment"

    depths: tuple[int, ...] = (0, 1, 2)
    variables: tuple[int, ...] = (4, 5, 6, 7)
    values: int = 25
    shots: int = 0
    surface: Literal["maths", "code"] = "maths"

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require_counts("depths", least=0, most=2)
        self.require_counts("variables", least=2, most=26 // (max(self.depths) + 1))
        self.require(self.values >= max(self.variables), "values", "must be at least the most variables")
        self.require(self.shots >= 0, "shots", "must be at least 0")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, punctuation, letters, then numbers."""
        marks = ("=", ",", ";", "?", "print(", ")", "|")
        return ("<pad>", *marks, *string.ascii_lowercase, *(str(value) for value in range(self.values)))

    @property
    def length(self) -> int:
        """The longest example for each shot, with its answer and "|", and the longest question."""
        question = 4 * max(self.variables) * (max(self.depths) + 1) + _QUESTION
        return self.shots * (question + 2) + question

    @property
    def chance(self) -> float:
        """One of the numbers on display."""
        return sum(1 / count for count in self.variables) / len(self.variables)

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random examples and questions of one depth a row."""
        depth_B = rng.choice(np.array(self.depths), size=size)
        variables_BS = rng.choice(np.array(self.variables), size=(size, self.shots + 1))
        # Python's generator is several times faster than numpy's at single numbers.
        scalar = random.Random(int(rng.integers(2**62)))
        tokens: list[list[int]] = []
        targets: list[list[int]] = []
        for depth, variables_S in zip(depth_B.tolist(), variables_BS.tolist(), strict=True):
            row: list[int] = []
            for variables in variables_S[:-1]:
                example, answer = self._example(scalar, depth, variables)
                row += [*example, answer, _BREAK]
            example, answer = self._example(scalar, depth, variables_S[-1])
            row += example
            tokens.append(row)
            targets.append([IGNORE] * (len(row) - 1) + [answer])
        return Rows(
            tokens_BT=padded(tokens, self.length),
            targets_BT=padded(targets, self.length, IGNORE),
            keys={"depth": depth_B, "variables": variables_BS[:, -1]},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Execute the assignments of the last example in order."""
        tokens = [int(token) for token in tokens_T if token]
        last = max((place + 1 for place, token in enumerate(tokens) if token == _BREAK), default=0)
        statements, question = tokens[last:-_QUESTION], tokens[-_QUESTION:]
        memory: dict[int, int] = {}
        for name, given in zip(statements[::4], statements[2::4], strict=True):
            memory[name] = memory.get(given, given)
        return (memory[question[1] if self.surface == "code" else question[0]],)

    def _example(self, scalar: random.Random, depth: int, variables: int) -> tuple[list[int], int]:
        """Tokens up to the question, and the token of the answer."""
        names = scalar.sample(range(_FIRST_LETTER, _FIRST_VALUE), variables * (depth + 1))
        given = scalar.sample(range(_FIRST_VALUE, _FIRST_VALUE + self.values), variables)
        meaning = dict(zip(names, given, strict=False))
        for place in range(variables, len(names)):
            first = place // variables * variables - variables
            given.append(names[first + scalar.randrange(variables)])
            meaning[names[place]] = meaning[given[place]]
        asked = names[-1 - scalar.randrange(variables)]
        end = _SEMICOLON if self.surface == "code" else _COMMA
        question = [_PRINT, asked, _CLOSE] if self.surface == "code" else [asked, _EQUALS, _ASK]
        statements = zip(names, given, strict=True)
        return [token for name, value in statements for token in (name, _EQUALS, value, end)] + question, meaning[asked]
