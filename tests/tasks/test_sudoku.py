"""Sudoku against a brute-force solver, the rules, and all symmetries."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, rows, split_of
from loopwise.tasks.sudoku import Sudoku
from loopwise.tasks.sudoku_board import (
    BOXES,
    count_solutions,
    fingerprint,
    generate,
    line_orders,
    permute_digits,
    permute_lines,
    shuffle,
    solve_board,
    transpose,
)

# The puzzle of the Wikipedia article on sudoku.
KNOWN = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def digits(text: str) -> list[int]:
    return [int(symbol) for symbol in text]


def fits(board: list[int], cell: int, digit: int) -> bool:
    size = round(len(board) ** 0.5)
    high, wide = BOXES[size]
    row, column = divmod(cell, size)
    return not any(
        board[other] == digit
        and (
            other // size == row
            or other % size == column
            or (other // size // high == row // high and other % size // wide == column // wide)
        )
        for other in range(size**2)
        if other != cell
    )


def every_solution(board: list[int]) -> list[tuple[int, ...]]:
    """Cell by cell, digit by digit."""
    if 0 not in board:
        return [tuple(board)]
    cell = board.index(0)
    found = []
    for digit in range(1, round(len(board) ** 0.5) + 1):
        if fits(board, cell, digit):
            found += every_solution([*board[:cell], digit, *board[cell + 1 :]])
    return found


def obeys(board: list[int]) -> bool:
    return 0 not in board and all(fits(board, cell, digit) for cell, digit in enumerate(board))


def test_a_known_puzzle() -> None:
    solved = solve_board(digits(KNOWN))
    assert list(solved.board) == digits(SOLVED)
    assert count_solutions(digits(KNOWN), limit=5) == 1


@pytest.mark.parametrize(("size", "blanks"), [(4, 10), (4, 12), (6, 20), (6, 26)])
def test_generated_puzzles_have_one_solution_by_brute_force(size: int, blanks: int) -> None:
    rng = random.Random(0)
    for _ in range(15):
        puzzle, solution = generate(rng, size, blanks)
        assert obeys(solution) and 0 < puzzle.count(0) <= blanks
        assert every_solution(puzzle) == [tuple(solution)] == [solve_board(puzzle).board]


def test_where_digging_stops_no_clue_can_go() -> None:
    rng = random.Random(0)
    for _ in range(10):
        puzzle, _ = generate(rng, 4, 16)
        assert puzzle.count(0) < 16
        for cell in np.flatnonzero(puzzle):
            assert len(every_solution([*puzzle[:cell], 0, *puzzle[cell + 1 :]])) > 1


def test_nine_by_nine_puzzles_have_one_solution() -> None:
    rng = random.Random(0)
    for blanks in (30, 45, 50, 53):
        puzzle, solution = generate(rng, 9, blanks)
        assert puzzle.count(0) == blanks and obeys(solution)
        assert count_solutions(puzzle) == 1 and list(solve_board(puzzle).board) == solution


def test_solutions_are_counted() -> None:
    rng = random.Random(1)
    for _ in range(10):
        _, solution = generate(rng, 4, 0)
        board = [digit if rng.random() < 0.3 else 0 for digit in solution]
        found = every_solution(board)
        assert count_solutions(board, limit=1000) == len(found)
        assert count_solutions(board, limit=2) == min(2, len(found))
        assert solve_board(board).board in found
    assert count_solutions([0] * 16, limit=1000) == 288


def naive_dead_ends(board: list[int]) -> int:
    """The rule of `solve_board` with everything copied: the first blank with at most one candidate, else the narrowest.

    Among equals the order of a list decides, in which the last blank takes the place of the one that is filled.
    """
    size, count = round(len(board) ** 0.5), 0

    def fill(board: list[int], blanks: list[int]) -> bool:
        nonlocal count
        if not blanks:
            return True
        choices = [[digit for digit in range(1, size + 1) if fits(board, cell, digit)] for cell in blanks]
        place = min(range(len(blanks)), key=lambda at: max(1, len(choices[at])))
        if not choices[place]:
            count += 1
            return False
        left = blanks.copy()
        left[place] = left[-1]
        cell = blanks[place]
        return any(fill([*board[:cell], digit, *board[cell + 1 :]], left[:-1]) for digit in choices[place])

    assert fill(board, [cell for cell, digit in enumerate(board) if not digit])
    return count


def test_dead_ends_are_counted_and_tell_hard_from_easy() -> None:
    rng = random.Random(2)
    easy, hard = ([generate(rng, 9, blanks)[0] for _ in range(5)] for blanks in (40, 55))
    assert [solve_board(puzzle).dead_ends for puzzle in easy] == [0] * 5
    counts = [solve_board(puzzle).dead_ends for puzzle in hard]
    assert counts == [naive_dead_ends(puzzle) for puzzle in hard] and np.mean(counts) > 2
    small = [generate(rng, 6, 26)[0] for _ in range(30)]
    assert [solve_board(puzzle).dead_ends for puzzle in small] == [naive_dead_ends(puzzle) for puzzle in small]


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_keep_the_rules_the_solution_and_the_fingerprint(size: int) -> None:
    made = [generate(random.Random(seed), size, size**2 // 2) for seed in range(6)]
    puzzle_BN, solution_BN = (np.repeat([item[part] for item in made], 10, axis=0) for part in (0, 1))
    moved_BN, moved_solution_BN = shuffle(np.random.default_rng(0), puzzle_BN, solution_BN)
    assert (moved_BN != puzzle_BN).any(axis=1).all()
    for puzzle, solution in zip(moved_BN.tolist(), moved_solution_BN.tolist(), strict=True):
        assert obeys(solution) and list(solve_board(puzzle).board) == solution and count_solutions(puzzle) == 1
    of_each = fingerprint(moved_BN).reshape(6, 10)
    assert (of_each == fingerprint(puzzle_BN).reshape(6, 10)).all() and len(np.unique(of_each)) == 6


def test_shuffle_reaches_every_symmetry_of_the_small_board() -> None:
    # 4! relabellings of 2 * 2^2 * 2 * 2^2 * 2 moves of cells: 3072 boards from one without symmetry of its own
    puzzle = digits("1200000000300004")
    forms = {
        tuple(
            permute_digits(
                permute_lines(
                    transpose(np.array([puzzle])) if turned else np.array([puzzle]), np.array([up]), np.array([across])
                ),
                np.array([[0, *names]]),
            )[0]
        )
        for turned in (False, True)
        for up in _orders()
        for across in _orders()
        for names in itertools.permutations(range(1, 5))
    }
    seen_BN = shuffle(np.random.default_rng(0), np.repeat([puzzle], 40000, axis=0))[0]
    assert {tuple(board) for board in seen_BN} == forms
    assert len(np.unique(fingerprint(np.array(sorted(forms))))) == 1


def _orders() -> list[tuple[int, ...]]:
    return [order for order in itertools.permutations(range(4)) if order[0] // 2 == order[1] // 2]


def test_line_orders_keep_bands() -> None:
    orders = line_orders(np.random.default_rng(0), 3000, 6, 2)
    assert (np.sort(orders, axis=1) == np.arange(6)).all()
    assert (orders[:, ::2] // 2 == orders[:, 1::2] // 2).all()
    assert len({tuple(order) for order in orders}) == 6 * 8


def test_another_board_has_another_fingerprint() -> None:
    rng = random.Random(0)
    boards = np.array([generate(rng, 9, 45)[0] for _ in range(60)])
    changed = boards.copy()
    for row in range(60):
        changed[row, rng.choice(np.flatnonzero(changed[row]).tolist())] = 0
    other_digit = np.where(boards == 1, 2, boards)  # the same cells are blank
    parts = [fingerprint(some) for some in (boards, changed, other_digit)]
    assert len(np.unique(np.concatenate(parts))) == 180


TASKS = [
    Sudoku(size=4),
    Sudoku(size=6, form="grid", min_blanks=20),
    Sudoku(min_blanks=45, max_blanks=50),
    Sudoku(form="grid", pool=5),
]


@pytest.mark.parametrize("task", TASKS, ids=["4", "6 grid", "9", "9 pool"])
def test_rows(task: Sudoku) -> None:
    drawn = rows(task, seed=0, index=0, size=12)
    assert np.array_equal(drawn.tokens_BT, rows(task, seed=0, index=0, size=12).tokens_BT)
    num = task.size**2
    assert drawn.tokens_BT.shape == (12, task.length) and drawn.tokens_BT.max() < len(task.vocabulary)
    for row in range(12):
        puzzle, answer = drawn.tokens_BT[row, :num] - 1, drawn.answer(row)
        solution = (answer - 1).tolist()
        assert obeys(solution) and ((puzzle == 0) | (puzzle == solution)).all()
        assert task.blanks[0] <= (puzzle == 0).sum() == drawn.keys["blanks"][row] <= task.blanks[1]
        assert task.solve(drawn.tokens_BT[row]) == tuple(answer) and task.verify(drawn.tokens_BT[row], answer)
        if task.form == "row":
            assert drawn.tokens_BT[row, num] == len(task.vocabulary) - 1
            assert np.array_equal(drawn.tokens_BT[row, num + 1 :], answer)
            assert np.flatnonzero(drawn.targets_BT[row] != IGNORE).tolist() == list(range(num, 2 * num))


def test_verify_goes_by_the_rules() -> None:
    task = Sudoku(size=4, form="grid")
    # clues in the first row only: several completions are right
    tokens_T = np.array(digits("1234" + 12 * "0")) + 1
    for solution in every_solution((tokens_T - 1).tolist()):
        assert task.verify(tokens_T, np.array(solution) + 1)
        assert not task.verify(tokens_T, solution), "tokens are one more than digits"
        assert not task.verify(tokens_T, [*solution[1:], solution[0]])
        assert not task.verify(tokens_T, (np.array(solution) + 1)[:15])
        renamed = 5 - np.array(solution)
        assert obeys(renamed.tolist()) and not task.verify(tokens_T, renamed + 1), "the clues have to stay"


def test_hardness_is_what_was_asked_for() -> None:
    task = Sudoku(min_blanks=52, max_blanks=55, min_dead_ends=4, max_dead_ends=30)
    drawn = task.draw(np.random.default_rng(0), 6)
    for row in range(6):
        dead_ends = solve_board((drawn.tokens_BT[row, :81] - 1).tolist()).dead_ends
        assert 4 <= dead_ends <= 30
        assert drawn.keys["dead_ends"][row] == 2 ** (dead_ends.bit_length() - 1)


def test_symmetric_puzzles_share_a_split() -> None:
    task = Sudoku(size=4, form="grid", min_blanks=8)
    drawn = rows(task, seed=0, index=0, size=40, split="valid")
    for _ in range(5):
        moved_BN = shuffle(np.random.default_rng(1), drawn.tokens_BT - 1)[0]
        moved = type(drawn)(tokens_BT=moved_BN + 1, targets_BT=drawn.targets_BT)
        assert (split_of(task.prompt(moved)) == 1).all()
    assert task.kind == "task.sudoku" and len(task.vocabulary) == 6 and len(Sudoku(form="grid").vocabulary) == 11


def test_a_pool_holds_so_many_puzzles() -> None:
    task = Sudoku(size=6, form="grid", pool=4)
    drawn = task.draw(np.random.default_rng(0), 80)
    assert len(np.unique(task.prompt(drawn))) == 4 and len(np.unique(drawn.tokens_BT, axis=0)) > 70


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sudoku(size=5), "size=5 must be one of 4, 6, 9"),  # pyright: ignore[reportArgumentType]
        (lambda: Sudoku(form="both"), "form='both' must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Sudoku(min_blanks=65), "min_blanks=65 must be from 1 to 64"),
        (lambda: Sudoku(min_blanks=30, max_blanks=20), "max_blanks=20 must be from 30"),
        (lambda: Sudoku(min_dead_ends=-1), "min_dead_ends=-1 must be at least 0"),
        (lambda: Sudoku(min_dead_ends=3, max_dead_ends=2), "max_dead_ends=2 must be at least min_dead_ends"),
        (lambda: Sudoku(pool=-1), "pool=-1 must be at least 0"),
        (lambda: Sudoku(size=4, min_dead_ends=9).draw(np.random.default_rng(0), 1), "widen min_blanks or min_dead"),
        (lambda: solve_board([0] * 25), "a board of 25 cells is none of 4x4, 6x6, 9x9"),
        (lambda: solve_board([1, 1, *14 * [0]]), "clue 1 in row 1, column 2 breaks the rules"),
        (lambda: solve_board([7, *15 * [0]]), "clue 7 in row 1, column 1 breaks the rules"),
        (lambda: solve_board([1, 2, 3, 0, 0, 0, 0, 4, *8 * [0]]), "the board has no completion"),
        (lambda: count_solutions([0] * 16, limit=0), "limit=0 must be at least 1"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
