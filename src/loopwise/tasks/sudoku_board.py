"""Sudoku boards: a generator of puzzles with one solution, a solver that measures hardness, and the symmetries.

A board is 0 for blank and 1..S for digits, row by row.

Shapes: B boards, S side, N = S * S cells, V = S + 1.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box for each side."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What `solve_board` found.

    Attributes:
        board: the completed board.
        dead_ends: how often the search came to a blank that no digit fits, up to this solution.
    """

    board: tuple[int, ...]
    dead_ends: int


def solve_board(board: Sequence[int]) -> Solved:
    """The first completion that a backtracking search finds, and how hard that was.

    The search fills the blank with the fewest candidates, tries them in rising order, and knows no other rule; its dead
    ends are the measure of hardness of `Sudoku`.

    Raises:
        ValueError: no board of 4x4, 6x6 or 9x9, clues that contradict each other, or no completion.
    """
    search = _Search.of(board)
    if not search.run(_blanks(board)):
        raise ValueError("the board has no completion")
    return Solved(board=tuple(search.found[0]), dead_ends=search.dead_ends)


def count_solutions(board: Sequence[int], limit: int = 2) -> int:
    """How many completions a board has, counted up to `limit`.

    Raises:
        ValueError: no board of 4x4, 6x6 or 9x9, clues that contradict each other, or a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    search = _Search.of(board)
    search.wanted = limit
    search.run(_blanks(board))
    return len(search.found)


def generate(rng: random.Random, size: int, blanks: int) -> tuple[list[int], list[int]]:
    """A puzzle with exactly one completion, and that completion.

    A random full board loses cells in random order, each if no other digit could stand there then. Where no cell can
    be lost any more the puzzle has fewer blanks than asked for.

    Args:
        rng: random numbers.
        size: S.
        blanks: cells to lose.
    """
    search = _Search(size, rng=rng)
    search.run(_blanks([0] * size**2))
    solution = search.found[0]
    digging = _Search(size, full=True)
    lost: list[_Cell] = []
    cells = list(_cells(size))
    rng.shuffle(cells)
    for cell in cells:
        if len(lost) == blanks:
            break
        bit = 1 << solution[cell[0]] - 1
        digging.flip(cell, bit)
        if any(digging.allows(cell, other, lost) for other in digging.candidates(cell, without=bit)):
            digging.flip(cell, bit)
        else:
            lost.append(cell)
    puzzle = solution.copy()
    for cell in lost:
        puzzle[cell[0]] = 0
    return puzzle, solution


_Cell = tuple[int, int, int, int]
"""Number of a cell, its row, column and box."""


@functools.lru_cache
def _cells(size: int) -> tuple[_Cell, ...]:
    high, wide = BOXES[size]
    return tuple(
        (row * size + column, row, column, row // high * (size // wide) + column // wide)
        for row in range(size)
        for column in range(size)
    )


@functools.lru_cache
def units(size: int) -> tuple[list[int], ...]:
    """The cells of every row, column and box."""
    return tuple(
        [cell[0] for cell in _cells(size) if cell[part] == number] for part in (1, 2, 3) for number in range(size)
    )


def _side(num_cells: int) -> int:
    for size in BOXES:
        if num_cells == size**2:
            return size
    raise ValueError(f"a board of {num_cells} cells is none of {', '.join(f'{size}x{size}' for size in BOXES)}")


def _blanks(board: Sequence[int]) -> list[_Cell]:
    return [cell for cell, digit in zip(_cells(_side(len(board))), board, strict=True) if not digit]


class _Search:
    """Depth-first search with the digits that are free in each row, column and box as bit masks."""

    __slots__ = ("board", "boxes", "columns", "dead_ends", "found", "rng", "rows", "wanted")

    def __init__(self, size: int, *, rng: random.Random | None = None, full: bool = False) -> None:
        """Begin with a blank board, or with a full one on which nothing is free; `rng` shuffles what is tried."""
        free = 0 if full else (1 << size) - 1
        self.rows, self.columns, self.boxes = [free] * size, [free] * size, [free] * size
        self.board = [0] * size**2
        self.rng = rng
        self.dead_ends = 0
        self.wanted = 1
        self.found: list[list[int]] = []

    @classmethod
    def of(cls, board: Sequence[int]) -> _Search:
        """Begin with the clues of a board."""
        size = _side(len(board))
        search = cls(size)
        for cell, digit in zip(_cells(size), board, strict=True):
            if digit:
                bit = 1 << int(digit) - 1 if 0 < digit <= size else 0
                if not bit & search.rows[cell[1]] & search.columns[cell[2]] & search.boxes[cell[3]]:
                    raise ValueError(f"clue {digit} in row {cell[1] + 1}, column {cell[2] + 1} breaks the rules")
                search.flip(cell, bit)
                search.board[cell[0]] = int(digit)
        return search

    def flip(self, cell: _Cell, bit: int) -> None:
        """Use a digit at a cell, or free it again."""
        _, row, column, box = cell
        self.rows[row] ^= bit
        self.columns[column] ^= bit
        self.boxes[box] ^= bit

    def candidates(self, cell: _Cell, without: int = 0) -> list[int]:
        """The bits of the digits that fit a cell, rising."""
        mask = self.rows[cell[1]] & self.columns[cell[2]] & self.boxes[cell[3]] & ~without
        return [1 << digit for digit in range(mask.bit_length()) if mask >> digit & 1]

    def allows(self, cell: _Cell, bit: int, blanks: list[_Cell]) -> bool:
        """Whether the blanks can be filled with this digit at the cell."""
        self.flip(cell, bit)
        solved = self.run(blanks.copy())
        self.flip(cell, bit)
        self.found.clear()
        self.wanted = 1
        return solved

    def run(self, blanks: list[_Cell]) -> bool:
        """Fill the blanks (the list is used up) until `wanted` solutions are found; whether so many were."""
        rows, columns, boxes = self.rows, self.columns, self.boxes
        fewest, place, mask = 99, -1, 0
        for number, (_, row, column, box) in enumerate(blanks):
            free = rows[row] & columns[column] & boxes[box]
            count = free.bit_count()
            if count < fewest:
                fewest, place, mask = count, number, free
                if count < 2:
                    break
        if place < 0:
            self.found.append(self.board.copy())
            self.wanted -= 1
            return not self.wanted
        if not mask:
            self.dead_ends += 1
            return False
        cell = blanks[place]
        blanks[place] = blanks[-1]
        blanks.pop()
        bits = self.candidates(cell)
        if self.rng is not None:
            self.rng.shuffle(bits)
        for bit in bits:
            self.flip(cell, bit)
            self.board[cell[0]] = bit.bit_length()
            done = self.run(blanks)
            self.flip(cell, bit)
            if done:
                return True
        self.board[cell[0]] = 0
        blanks.append(cell)
        blanks[place], blanks[-1] = blanks[-1], blanks[place]
        return False


def permute_digits(boards_BN: np.ndarray, digits_BV: np.ndarray) -> np.ndarray:
    """Boards with digit d replaced by `digits_BV[:, d]`; `digits_BV[:, 0]` is 0."""
    return np.take_along_axis(digits_BV, boards_BN, axis=1)


def permute_lines(boards_BN: np.ndarray, rows_BS: np.ndarray, columns_BS: np.ndarray) -> np.ndarray:
    """Boards whose row i is row `rows_BS[:, i]` of the given ones, and whose columns move alike.

    A sudoku stays one if bands (and stacks) move as a whole and lines stay within their band; see `line_orders`.
    """
    cells_BSS = rows_BS[:, :, None] * rows_BS.shape[1] + columns_BS[:, None, :]
    return np.take_along_axis(boards_BN, cells_BSS.reshape(len(boards_BN), -1), axis=1)


def line_orders(rng: np.random.Generator, num: int, size: int, thick: int) -> np.ndarray:
    """Random orders of `size` lines that keep bands of `thick` lines together, int64 `[num, size]`."""
    band = rng.random((num, size // thick)).argsort(axis=1)
    within = rng.random((num, size // thick, thick)).argsort(axis=2)
    return (band[:, :, None] * thick + within).reshape(num, size)


def transpose(boards_BN: np.ndarray) -> np.ndarray:
    """Boards with rows and columns exchanged; only boards with square boxes stay sudokus."""
    size = _side(boards_BN.shape[1])
    return boards_BN.reshape(-1, size, size).swapaxes(1, 2).reshape(boards_BN.shape)


def shuffle(rng: np.random.Generator, *boards_BN: np.ndarray) -> tuple[np.ndarray, ...]:
    """Boards under a random symmetry for each row, the same for all arguments (a puzzle and its solution).

    Digits are relabelled, bands, stacks and the lines within them change places, and where boxes are square half of the
    boards are transposed: every symmetry is equally likely.
    """
    num, size = len(boards_BN[0]), _side(boards_BN[0].shape[1])
    high, wide = BOXES[size]
    digits_BV = np.zeros((num, size + 1), np.int64)
    digits_BV[:, 1:] = 1 + rng.random((num, size)).argsort(axis=1)
    rows_BS, columns_BS = line_orders(rng, num, size, high), line_orders(rng, num, size, wide)
    turned_B1 = (rng.random((num, 1)) < 0.5) & (high == wide)
    moved = (permute_digits(permute_lines(item, rows_BS, columns_BS), digits_BV) for item in boards_BN)
    return tuple(np.where(turned_B1, transpose(item), item) for item in moved)


def fingerprint(boards_BN: np.ndarray, rounds: int = 4) -> np.ndarray:
    """A number for each board that is the same for all its symmetric forms, int64 `[B]`.

    Cells are coloured by what stands in their row, column, box and among the cells of their digit, several rounds
    over (Weisfeiler-Leman). Boards that are not symmetric forms of each other can get the same number, though rarely.
    """
    size = _side(boards_BN.shape[1])
    lines = np.array(units(size)).reshape(3, size, size)
    row_N, column_N, box_N = (np.argsort(part.ravel()) // size for part in lines)
    clue_BN = boards_BN > 0
    colour_BN = _mix(clue_BN.astype(np.uint64) + np.uint64(1))
    for _ in range(rounds):
        row_BS, column_BS, box_BS = (_mix(colour_BN[:, part].sum(axis=2, dtype=np.uint64)) for part in lines)
        digit_BV = np.stack(
            [(colour_BN * (boards_BN == digit)).sum(axis=1, dtype=np.uint64) for digit in range(size + 1)], axis=1
        )
        # Transposing exchanges rows and columns, so their colours may only be added.
        line_BN = row_BS[:, row_N] + column_BS[:, column_N]
        digit_BN = np.where(clue_BN, _mix(np.take_along_axis(digit_BV, boards_BN, axis=1)), np.uint64(0))
        colour_BN = _mix(_mix(_mix(_mix(colour_BN) + line_BN) + box_BS[:, box_N]) + digit_BN)
    return _mix(colour_BN.sum(axis=1, dtype=np.uint64)).astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
