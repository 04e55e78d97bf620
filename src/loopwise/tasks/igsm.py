"""Symbolic i-GSM: a shuffled list of definitions modulo 7, one of which is asked for (2502.17416).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task, padded

_HASH, _DEFINE, _PLUS, _MINUS, _TIMES, _STOP, _ASK = range(1, 8)
_FIRST_NUMBER = 8
_MULTIPLE_SHARE = 1 / 3

Name = tuple[int, int]
Term = tuple[int, int, Name]
"""Sign, factor and variable."""


@dataclass(frozen=True, kw_only=True)
class Igsm(Task):
    """Evaluate one variable of a shuffled list of definitions modulo 7.

    A row reads `K#N := 2*E#I - J#O. E#I := 4. J#O := E#I. K#N?`. Entities are letters in `levels` levels, and a
    variable A#E joins entities of neighbouring levels. The variables of a row form a directed acyclic graph: the first
    is a number other than 0 (which would make all of them 0), each later one a sum and difference of 1 to `terms`
    earlier ones, in which the first term may carry a factor of 2 .. modulus - 1. The statements are shuffled and the
    last variable is asked for; only its value is scored. The paper prints an example and sizes, but no generator is
    public: the numbers of variables and the choice of earlier ones (uniform) are ours.

    Keys: "needed" is the number of variables that the answer depends on, itself included; "depth" the longest chain of
    definitions below it.

    Attributes:
        variables: numbers of variables, one drawn for each row.
        levels: levels of the hierarchy, at least 2.
        entities: entities in a level; `levels * entities` is at most 26.
        terms: most terms of a definition.
        modulus: values are 0 .. modulus - 1; at least 3.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "task.igsm"

    variables: tuple[int, ...] = (8, 9, 10, 11, 12)
    levels: int = 4
    entities: int = 4
    terms: int = 3
    modulus: int = 7

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        self.require(self.levels >= 2, "levels", "must be at least 2")
        self.require(1 <= self.entities <= 26 // self.levels, "entities", f"must be 1 to {26 // self.levels}")
        self.require_counts("variables", least=2, most=(self.levels - 1) * self.entities**2)
        self.require(self.terms >= 1, "terms", "must be at least 1")
        self.require(self.modulus >= 3, "modulus", "must be at least 3")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, punctuation, the numbers, then entities."""
        numbers = (str(value) for value in range(self.modulus))
        return ("<pad>", "#", ":=", "+", "-", "*", ".", "?", *numbers, *self._letters)

    @property
    def length(self) -> int:
        """Definitions in which every one has the most terms, and the question."""
        most = max(self.variables)
        terms = sum(min(self.terms, earlier) for earlier in range(1, most))
        # A#E := and . for each variable, the first number, 3 and a sign for a term but the first, and 2 for a factor
        return 5 * most + 1 + 4 * terms - (most - 1) + 2 * (most - 1) + 4

    @property
    def chance(self) -> float:
        """One of the numbers."""
        return 1 / self.modulus

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Random graphs, evaluated in the order in which they were made."""
        variables_B = rng.choice(np.array(self.variables), size=size)
        # Python's generator is several times faster than numpy's at single numbers.
        scalar = random.Random(int(rng.integers(2**62)))
        drawn = [self._row(scalar, variables) for variables in variables_B.tolist()]
        return Rows(
            tokens_BT=padded([tokens for tokens, *_ in drawn], self.length),
            targets_BT=padded(
                [[IGNORE] * (len(tokens) - 1) + [answer] for tokens, answer, *_ in drawn], self.length, IGNORE
            ),
            keys={
                "variables": variables_B,
                "needed": np.array([needed for _, _, needed, _ in drawn]),
                "depth": np.array([depth for *_, depth in drawn]),
            },
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """Read the definitions and evaluate by recursion from the one asked for."""
        words = "".join(self.vocabulary[int(token)] for token in tokens_T if token)
        *statements, question = words.split(".")
        definitions = dict(statement.split(":=") for statement in statements)
        return (_FIRST_NUMBER + self._evaluate(question.removesuffix("?"), definitions),)

    @property
    def _letters(self) -> str:
        return string.ascii_uppercase[: self.levels * self.entities]

    def _evaluate(self, name: str, definitions: dict[str, str]) -> int:
        total = 0
        for term in definitions[name].replace("-", "+-").split("+"):
            sign = -1 if term.startswith("-") else 1
            *factor, rest = term.removeprefix("-").split("*")
            value = self._evaluate(rest, definitions) if "#" in rest else int(rest)
            total += sign * int(factor[0] if factor else 1) * value
        return total % self.modulus

    def _row(self, scalar: random.Random, num: int) -> tuple[list[int], int, int, int]:
        """Tokens, the token of the answer, how many variables it needs, and the longest chain below it."""
        names = scalar.sample(self._names(), num)
        value = {names[0]: scalar.randrange(1, self.modulus)}
        needed, depth = {names[0]: {names[0]}}, {names[0]: 0}
        statements = [[*self._spell(names[0]), _DEFINE, _FIRST_NUMBER + value[names[0]], _STOP]]
        for place in range(1, num):
            name, terms = names[place], self._terms(scalar, names[:place])
            value[name] = sum(sign * factor * value[of] for sign, factor, of in terms) % self.modulus
            needed[name] = {name}.union(*(needed[of] for _, _, of in terms))
            depth[name] = 1 + max(depth[of] for _, _, of in terms)
            statements.append([*self._spell(name), _DEFINE, *self._spell_terms(terms), _STOP])
        scalar.shuffle(statements)
        asked = names[-1]
        tokens = [token for statement in statements for token in statement] + [*self._spell(asked), _ASK]
        return tokens, _FIRST_NUMBER + value[asked], len(needed[asked]), depth[asked]

    def _names(self) -> list[Name]:
        """Every variable: a pair of entities of neighbouring levels."""
        level = range(self.entities)
        return [
            (above * self.entities + upper, (above + 1) * self.entities + lower)
            for above in range(self.levels - 1)
            for upper in level
            for lower in level
        ]

    def _terms(self, scalar: random.Random, earlier: list[Name]) -> list[Term]:
        of = scalar.sample(earlier, scalar.randint(1, min(self.terms, len(earlier))))
        factor = scalar.randrange(2, self.modulus) if scalar.random() < _MULTIPLE_SHARE else 1
        return [(1, factor, of[0])] + [(scalar.choice((1, -1)), 1, name) for name in of[1:]]

    def _spell(self, name: Name) -> list[int]:
        first = _FIRST_NUMBER + self.modulus
        return [first + name[0], _HASH, first + name[1]]

    def _spell_terms(self, terms: list[Term]) -> list[int]:
        tokens: list[int] = []
        for place, (sign, factor, name) in enumerate(terms):
            if place:
                tokens.append(_PLUS if sign > 0 else _MINUS)
            if factor > 1:
                tokens += [_FIRST_NUMBER + factor, _TIMES]
            tokens += self._spell(name)
        return tokens
