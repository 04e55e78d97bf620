"""Tracking a state through a sequence: words over a finite group, and arithmetic modulo a small number.

Group words as in Merrill et al. (2404.08819); arithmetic as in Deletang et al. (2207.02098).

Shapes: B rows, T tokens, G group elements.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loopwise.tasks.base import IGNORE, PAD, Rows, Task

# Sizes for which the elements fit into a vocabulary.
_SIZES = {"Z": (2, 1000), "S": (2, 5), "A": (3, 5)}
_LARGEST = 1000


@dataclass(frozen=True, kw_only=True)
class GroupWord(Task):
    """Say after each element of a group what the product is so far: parity (Z2), Zn, S3 to S5, A3 to A5, products.

    The product is taken in reading order: for permutations, the first one read acts first.

    Attributes:
        group: "Z2" (parity), any "Zn", "S3", "S4", "S5", "A3", "A4", "A5", or a product such as "A4xZ5".
        num_elements: elements per row.
        min_elements: rows have from so many elements up to `num_elements`; None: all have `num_elements`.
        final: score only the product of the whole word.
    """

    kind: ClassVar[str | None] = "task.group_word"
    group: str = "S5"
    num_elements: int = 16
    min_elements: int | None = None
    final: bool = False

    def __post_init__(self) -> None:
        """Check the group and the ranges."""
        super().__post_init__()
        elements(self.group)
        self.require(self.num_elements >= 1, "num_elements", "must be at least 1")
        low = self.min_elements
        self.require(low is None or 1 <= low <= self.num_elements, "min_elements", "must be from 1 to num_elements")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, then the group elements; a permutation is written as the images of 1, 2, ..."""
        return ("<pad>", *elements(self.group))

    @property
    def length(self) -> int:
        """One token per element."""
        return self.num_elements

    @property
    def chance(self) -> float:
        """Every element is equally likely at every position."""
        order = len(elements(self.group))
        return order ** -float(1 if self.final else self.num_elements)

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Elements uniformly at random; the running product by the multiplication table."""
        table_GG = multiplication(self.group)
        element_BT = rng.integers(len(table_GG), size=(size, self.num_elements))
        num_B = _row_lengths(rng, size, self.min_elements, self.num_elements)
        product_BT = np.empty_like(element_BT)
        product_BT[:, 0] = element_BT[:, 0]
        for place in range(1, self.num_elements):
            product_BT[:, place] = table_GG[product_BT[:, place - 1], element_BT[:, place]]
        place_T = np.arange(self.num_elements)
        read_BT = place_T < num_B[:, None]
        scored_BT = place_T == num_B[:, None] - 1 if self.final else read_BT
        return Rows(
            tokens_BT=np.where(read_BT, element_BT + 1, PAD),
            targets_BT=np.where(scored_BT, product_BT + 1, IGNORE),
            keys={"elements": num_B},
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The products, multiplied one after the other."""
        table_GG = multiplication(self.group)
        read = [int(token) - 1 for token in tokens_T if token != PAD]
        products = list(itertools.accumulate(read, lambda done, next_one: int(table_GG[done, next_one])))
        return tuple(product + 1 for product in (products[-1:] if self.final else products))

    def prompt(self, rows: Rows) -> np.ndarray:
        """The word; no answer stands in it."""
        return rows.tokens_BT


@functools.lru_cache
def elements(group: str) -> tuple[str, ...]:
    """The elements of a group as text, the identity first.

    Raises:
        ValueError: no such group, or one that is too large for a vocabulary.
    """
    return tuple("|".join(_name(part) for part in parts) for parts in _members(group))


@functools.lru_cache
def multiplication(group: str) -> np.ndarray:
    """int64 `[G, G]`: row a, column b holds the number of the element "a, then b".

    Raises:
        ValueError: see `elements`.
    """
    members = _members(group)
    number = {member: index for index, member in enumerate(members)}
    table_GG = np.array(
        [[number[tuple(_then(*pair) for pair in zip(a, b, strict=True))] for b in members] for a in members]
    )
    table_GG.flags.writeable = False
    return table_GG


_Part = tuple[str, int, tuple[int, ...]]
"""One factor of a group element: ("Z", n, (k,)), or ("S" or "A", n, the images of 0..n-1)."""


def _then(a: _Part, b: _Part) -> _Part:
    letter, size, first = a
    second = b[2]
    if letter == "Z":
        return letter, size, ((first[0] + second[0]) % size,)
    return letter, size, tuple(second[image] for image in first)


def _name(part: _Part) -> str:
    letter, _, value = part
    return str(value[0]) if letter == "Z" else "".join(str(image + 1) for image in value)


@functools.lru_cache
def _members(group: str) -> tuple[tuple[_Part, ...], ...]:
    factors: list[list[_Part]] = []
    order = 1
    for text in group.split("x"):
        found = re.fullmatch(r"([ZSA])([1-9]\d{0,3})", text)
        letter, size = (found[1], int(found[2])) if found else ("", 0)
        low, high = _SIZES.get(letter, (1, 0))
        if not low <= size <= high:
            known = " ".join(f"{letter}{low}-{letter}{high}" for letter, (low, high) in _SIZES.items())
            raise ValueError(f"group={group!r} is not known: use one of {known}, or a product such as A4xZ5")
        if letter == "Z":
            values = [(value,) for value in range(size)]
        else:
            values = [value for value in itertools.permutations(range(size)) if letter == "S" or _is_even(value)]
        order *= len(values)
        if order > _LARGEST:
            raise ValueError(f"group={group!r} has more than {_LARGEST} elements, use a smaller one")
        factors.append([(letter, size, value) for value in values])
    return tuple(itertools.product(*factors))


def _is_even(images: Sequence[int]) -> bool:
    return sum(a > b for a, b in itertools.combinations(images, 2)) % 2 == 0


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Task):
    """Evaluate an expression such as `2+3*4=` modulo a small number, * before + and -.

    Attributes:
        modulus: digits are 0 to modulus - 1; values are modulo it.
        num_operands: digits per row.
        min_operands: rows have from so many digits up to `num_operands`; None: all have `num_operands`.
        brackets: put brackets around every operation, which nest at random.
        final: score only the value at "="; else also, after every digit, the value of what stands before.
    """

    kind: ClassVar[str | None] = "task.modular_arithmetic"
    separator: ClassVar[str] = ""
    modulus: int = 5
    num_operands: int = 8
    min_operands: int | None = None
    brackets: bool = False
    final: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(2 <= self.modulus <= 100, "modulus", "must be from 2 to 100")
        self.require(self.num_operands >= 1, "num_operands", "must be at least 1")
        low = self.min_operands
        self.require(low is None or 1 <= low <= self.num_operands, "min_operands", "must be from 1 to num_operands")
        self.require(self.final or not self.brackets, "final", "must be true with brackets: a part has no value yet")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, digits, operators, "=", brackets where there are some: 10 or 12 symbols modulo 5."""
        return ("<pad>", *map(str, range(self.modulus)), *"+-*=", *("()" if self.brackets else ""))

    @property
    def length(self) -> int:
        """Digits, operators, brackets and "="."""
        return self.num_operands + (self.num_operands - 1) * (3 if self.brackets else 1) + 1

    @property
    def chance(self) -> float:
        """The share of the most frequent value (products often vanish); of uniform guesses where all is scored."""
        counts = range(self.min_operands or self.num_operands, self.num_operands + 1)
        if not self.final:
            return float(np.mean([self.modulus ** -float(count + 1) for count in counts]))
        values = _bracketed_values if self.brackets else _plain_values
        return float(np.mean([values(self.modulus, count) for count in counts], axis=0).max())

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Digits and operators uniformly at random; values by reading from the left, or from inside out."""
        num_B = _row_lengths(rng, size, self.min_operands, self.num_operands)
        digit_BN = rng.integers(self.modulus, size=(size, self.num_operands))
        operator_BN = rng.integers(3, size=(size, self.num_operands))
        if self.brackets:
            return self._draw_bracketed(rng, digit_BN, operator_BN, num_B)
        value_BN = np.empty_like(digit_BN)
        value_BN[:, 0] = term_B = digit_BN[:, 0]
        total_B = np.zeros(size, np.int64)
        for place in range(1, self.num_operands):
            digit_B, operator_B = digit_BN[:, place], operator_BN[:, place - 1]
            product_B = operator_B == 2
            total_B = np.where(product_B, total_B, total_B + term_B) % self.modulus
            term_B = np.where(product_B, term_B * digit_B, digit_B * np.where(operator_B == 1, -1, 1)) % self.modulus
            value_BN[:, place] = (total_B + term_B) % self.modulus
        both_BT = np.stack([digit_BN + 1, operator_BN + 1 + self.modulus], axis=2).reshape(size, -1)
        place_T = np.arange(self.length)
        end_B1 = 2 * num_B[:, None] - 1
        tokens_BT = np.where(place_T < end_B1, both_BT, np.where(place_T == end_B1, self.modulus + 4, PAD))
        scored_BT = (place_T == end_B1) | ((place_T < end_B1) & (place_T % 2 == 0) & (not self.final))
        targets_BT = np.where(scored_BT, np.repeat(value_BN + 1, 2, axis=1), IGNORE)
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"operands": num_B})

    def _draw_bracketed(
        self, rng: np.random.Generator, digit_BN: np.ndarray, operator_BN: np.ndarray, num_B: np.ndarray
    ) -> Rows:
        tokens_BT = np.full((len(num_B), self.length), PAD)
        targets_BT = np.full((len(num_B), self.length), IGNORE)
        first, opening = 1 + self.modulus, 5 + self.modulus

        def expression(row: int, start: int, count: int) -> tuple[list[int], int]:
            if count == 1:
                return [int(digit_BN[row, start]) + 1], int(digit_BN[row, start])
            left_count = int(rng.integers(1, count))
            left, a = expression(row, start, left_count)
            right, b = expression(row, start + left_count, count - left_count)
            operator = int(operator_BN[row, start + left_count - 1])
            value = (a + b, a - b, a * b)[operator] % self.modulus
            return [opening, *left, first + operator, *right, opening + 1], value

        for row, count in enumerate(num_B):
            tokens, value = expression(row, 0, int(count))
            tokens_BT[row, : len(tokens) + 1] = [*tokens, self.modulus + 4]
            targets_BT[row, len(tokens)] = value + 1
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys={"operands": num_B})

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The values by recursive descent through the symbols."""
        symbols = [self.vocabulary[token] for token in tokens_T if token != PAD][:-1]
        ends = [] if self.final else [end for end in range(1, len(symbols) + 1, 2)]
        return tuple(_evaluate(symbols[:end]) % self.modulus + 1 for end in (*ends, len(symbols)))

    def prompt(self, rows: Rows) -> np.ndarray:
        """The expression; no answer stands in it."""
        return rows.tokens_BT


def _evaluate(symbols: list[str]) -> int:
    """The value of an expression of digits, + - * and brackets, as an integer."""
    left = list(reversed(symbols))

    def atom() -> int:
        symbol = left.pop()
        if symbol != "(":
            return int(symbol)
        value = total()
        assert left.pop() == ")", "unbalanced brackets"
        return value

    def product() -> int:
        value = atom()
        while left and left[-1] == "*":
            left.pop()
            value *= atom()
        return value

    def total() -> int:
        value = product()
        while left and left[-1] in "+-":
            value += product() if left.pop() == "+" else -product()
        return value

    return total()


@functools.lru_cache
def _plain_values(modulus: int, count: int) -> np.ndarray:
    """The distribution of the value of a random expression without brackets, `[modulus]`."""
    numbers = np.arange(modulus)
    # Reading from the left the state is (sum of the finished terms, the product that may go on).
    state = np.zeros((modulus, modulus))
    state[0] = 1 / modulus
    for _ in range(count - 1):
        after = np.zeros_like(state)
        for digit in range(modulus):
            np.add.at(after, (numbers[:, None], numbers * digit % modulus), state / (3 * modulus))
            for term in (digit, -digit % modulus):
                np.add.at(after[:, term], (numbers[:, None] + numbers) % modulus, state / (3 * modulus))
        state = after
    values = np.zeros(modulus)
    np.add.at(values, (numbers[:, None] + numbers) % modulus, state)
    return values


@functools.lru_cache
def _bracketed_values(modulus: int, count: int) -> np.ndarray:
    """The distribution of the value of a random expression with all its brackets, `[modulus]`."""
    if count == 1:
        return np.full(modulus, 1 / modulus)
    numbers = np.arange(modulus)
    values = np.zeros(modulus)
    for left in range(1, count):
        both = np.outer(_bracketed_values(modulus, left), _bracketed_values(modulus, count - left))
        for value in (numbers[:, None] + numbers, numbers[:, None] - numbers, numbers[:, None] * numbers):
            np.add.at(values, value % modulus, both / (3 * (count - 1)))
    return values


def _row_lengths(rng: np.random.Generator, size: int, low: int | None, high: int) -> np.ndarray:
    """How many items each row has, int64 `[size]`, uniform from `low` (None: `high`) to `high`."""
    return np.full(size, high) if low is None else rng.integers(low, high + 1, size=size)
