"""Sudoku with one solution, 4x4 to 9x9, as a task; boards are made and solved in `sudoku_board`.

Tokens are one more than what stands on the board, as in the field: 0 padding, 1 blank, then the digits.

Shapes: B rows, S side, N = S * S cells.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task
from loopwise.tasks.sudoku_board import fingerprint, generate, shuffle, solve_board, units

# The fewest clues that determine a board, and how many cells a puzzle has blank unless told.
_FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
_BLANKS = {4: (6, 10), 6: (14, 22), 9: (40, 54)}
_MAX_TRIES = 2000


@dataclass(frozen=True, kw_only=True)
class Sudoku(Task):
    """Complete a Sudoku of 4x4, 6x6 or 9x9, as a row `puzzle = solution` or as a grid, cell by cell.

    The grid form is that of HRM (2506.21734) and TRM (2510.04871): the target of a cell is its digit. Two puzzles that
    a symmetry turns into each other are always in the same split.

    Attributes:
        size: S, 4, 6 (boxes of 2 x 3) or 9.
        form: "row" for causal models, "grid" for models that read all cells at once.
        min_blanks: fewest blank cells; None chooses by size.
        max_blanks: most blank cells; None chooses by size.
        min_dead_ends: fewest dead ends of `solve_board` on the puzzle.
        max_dead_ends: most dead ends; None for no limit.
        pool: 0 makes a new puzzle for each row; else every row is a random symmetry of one of so many puzzles (the
            published set-ups have 1000), which are made once, and its dead ends are counted on that puzzle.
    """

    kind: ClassVar[str | None] = "task.sudoku"
    size: Literal[4, 6, 9] = 9
    form: Literal["row", "grid"] = "row"
    min_blanks: int | None = None
    max_blanks: int | None = None
    min_dead_ends: int = 0
    max_dead_ends: int | None = None
    pool: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        most = self.size**2 - _FEWEST_CLUES[self.size]
        low, high = self.blanks
        self.require(1 <= low <= most, "min_blanks", f"must be from 1 to {most}")
        self.require(low <= high <= most, "max_blanks", f"must be from {low} (the fewest) to {most}")
        self.require(self.min_dead_ends >= 0, "min_dead_ends", "must be at least 0")
        limit = self.max_dead_ends
        self.require(limit is None or limit >= self.min_dead_ends, "max_dead_ends", "must be at least min_dead_ends")
        self.require(self.pool >= 0, "pool", "must be at least 0")

    @property
    def blanks(self) -> tuple[int, int]:
        """The fewest and the most blank cells."""
        low, high = _BLANKS[self.size]
        if self.min_blanks is not None:
            low, high = self.min_blanks, max(high, self.min_blanks)
        if self.max_blanks is not None:
            low, high = low if self.min_blanks is not None else min(low, self.max_blanks), self.max_blanks
        return low, high

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding, blank, digits, and for rows "=": 11 symbols for the 9x9 grid, as published."""
        return ("<pad>", ".", *map(str, range(1, self.size + 1)), *("=" if self.form == "row" else ""))

    @property
    def length(self) -> int:
        """N for a grid, 2 N + 1 for a row."""
        return self.size**2 * (2 if self.form == "row" else 1) + (self.form == "row")

    @property
    def chance(self) -> float:
        """A random digit in every blank of the easiest puzzle."""
        return self.size ** -float(self.blanks[0])

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Puzzles with one solution; `keys` are the blanks and the dead ends, these as the power of two from below."""
        if self.pool:
            boards_N2N, dead_ends_N = _pool(self)
            which_B = rng.integers(self.pool, size=size)
            puzzle_BN, solution_BN = shuffle(rng, boards_N2N[which_B, 0], boards_N2N[which_B, 1])
            dead_ends_B = dead_ends_N[which_B]
        else:
            quick = random.Random(int(rng.integers(2**63)))
            made = [self._puzzle(quick) for _ in range(size)]
            puzzle_BN, solution_BN = (np.array([item[part] for item in made]) for part in (0, 1))
            dead_ends_B = np.array([item[2] for item in made])
        keys = {"blanks": (puzzle_BN == 0).sum(axis=1), "dead_ends": _power_of_two(dead_ends_B)}
        if self.form == "grid":
            return Rows(tokens_BT=puzzle_BN + 1, targets_BT=solution_BN + 1, keys=keys)
        equals_B1 = np.full((size, 1), self.size + 2)
        tokens_BT = np.concatenate([puzzle_BN + 1, equals_B1, solution_BN + 1], axis=1)
        targets_BT = np.full(tokens_BT.shape, IGNORE)
        targets_BT[:, self.size**2 : -1] = solution_BN + 1
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys=keys)

    def _puzzle(self, rng: random.Random) -> tuple[list[int], list[int], int]:
        """A puzzle as the fields ask for, its solution and its dead ends."""
        high = float("inf") if self.max_dead_ends is None else self.max_dead_ends
        for _ in range(_MAX_TRIES):
            puzzle, solution = generate(rng, self.size, rng.randint(*self.blanks))
            if puzzle.count(0) >= self.blanks[0]:
                dead_ends = solve_board(puzzle).dead_ends
                if self.min_dead_ends <= dead_ends <= high:
                    return puzzle, solution, dead_ends
        raise ValueError(
            f"task.sudoku: none of {_MAX_TRIES} {self.size}x{self.size} puzzles has {self.blanks[0]} to "
            f"{self.blanks[1]} blanks and {self.min_dead_ends} to {high} dead ends; widen min_blanks or min_dead_ends"
        )

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The completed board by `solve_board`."""
        return tuple(digit + 1 for digit in solve_board(self._clues(tokens_T)).board)

    def verify(self, tokens_T: np.ndarray, answer: Sequence[int] | np.ndarray) -> bool:
        """Whether the answer keeps the clues and has every digit once in each row, column and box."""
        board = np.asarray(answer, np.int64) - 1
        clues = np.array(self._clues(tokens_T))
        if board.shape != clues.shape or (board != clues)[clues > 0].any():
            return False
        every = np.arange(1, self.size + 1)
        return all(np.array_equal(np.sort(board[unit]), every) for unit in units(self.size))

    def prompt(self, rows: Rows) -> np.ndarray:
        """A number per puzzle that no symmetry changes."""
        return fingerprint(rows.tokens_BT[:, : self.size**2] - 1)[:, None]

    def _clues(self, tokens_T: np.ndarray) -> list[int]:
        return [int(token) - 1 for token in tokens_T[: self.size**2]]


@functools.lru_cache(maxsize=8)
def _pool(task: Sudoku) -> tuple[np.ndarray, np.ndarray]:
    """The puzzles of a pool with their solutions, `[pool, 2, N]`, and their dead ends, `[pool]`."""
    made = [task._puzzle(random.Random(number)) for number in range(task.pool)]
    return np.array([item[:2] for item in made]), np.array([item[2] for item in made])


def _power_of_two(count_B: np.ndarray) -> np.ndarray:
    """The largest power of two that is not above each count; 0 stays."""
    return np.where(count_B > 0, 2 ** np.log2(np.maximum(count_B, 1)).astype(np.int64), 0)
