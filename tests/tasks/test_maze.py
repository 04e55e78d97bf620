"""Mazes against a search of their own and a count of all shortest paths."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from loopwise.tasks.base import IGNORE, rows, split_of, text
from loopwise.tasks.maze import Maze, turn


def lines(task: Maze, tokens_T: np.ndarray) -> list[str]:
    shown = text(task, tokens_T)
    return [shown[start : start + task.size] for start in range(0, task.size**2, task.size)]


def shortest_paths(maze: list[str]) -> list[list[tuple[int, int]]]:
    """Every shortest path from S to G, by a queue of whole paths."""
    start = next((y, line.index("S")) for y, line in enumerate(maze) if "S" in line)
    best: dict[tuple[int, int], int] = {start: 0}
    queue, found = deque([[start]]), []
    while queue:
        path = queue.popleft()
        y, x = path[-1]
        if found and len(path) >= len(found[0]):
            break
        for cell in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            symbol = maze[cell[0]][cell[1]]
            if symbol == "#" or best.get(cell, len(path)) < len(path):
                continue
            best[cell] = len(path)
            (found if symbol == "G" else queue).append([*path, cell])
    return found


TASKS = [
    Maze(),
    Maze(size=9, form="grid", min_path=14),
    Maze(size=12, openings=0.3),
    Maze(size=30, form="grid", min_path=110),
    Maze(size=7, openings=0.15, form="grid"),
]


@pytest.mark.parametrize("task", TASKS, ids=["default", "grid", "openings", "hard", "small"])
def test_the_marked_path_is_the_only_shortest(task: Maze) -> None:
    drawn = rows(task, seed=0, index=0, size=8)
    assert np.array_equal(drawn.tokens_BT, rows(task, seed=0, index=0, size=8).tokens_BT)
    least = 2 * task.size - 6 - 2 * (task.size % 2 == 0) if task.min_path is None else task.min_path
    for row in range(8):
        maze, answer = lines(task, drawn.tokens_BT[row]), drawn.answer(row)
        assert set("".join(maze)) == set("# SG") and sum(line.count("S") + line.count("G") for line in maze) == 2
        assert set(maze[0] + maze[-1]) == {"#"} == {line[0] for line in maze} | {line[-1] for line in maze}
        (path,) = shortest_paths(maze)
        assert len(path) - 1 >= least
        marked = [list(line) for line in maze]
        for y, x in path[1:-1]:
            marked[y][x] = "o"
        assert lines(task, answer) == ["".join(line) for line in marked]
        assert task.verify(drawn.tokens_BT[row], answer) and task.solve(drawn.tokens_BT[row]) == tuple(answer)
        assert drawn.keys["moves"][row] == 2 ** ((len(path) - 1).bit_length() - 1)
        if task.form == "row":
            assert np.array_equal(drawn.tokens_BT[row, task.size**2 + 1 :], answer)
            assert (drawn.targets_BT[row, : task.size**2] == IGNORE).all() and drawn.targets_BT[row, -1] == IGNORE


def test_without_openings_a_maze_is_a_tree_and_openings_add_ways() -> None:
    for openings, extra in ((0.0, 0), (0.5, 18), (1.0, 36)):
        task = Maze(size=15, form="grid", openings=openings, min_path=4)
        for tokens_T in task.draw(np.random.default_rng(0), 5).tokens_BT:
            maze = lines(task, tokens_T)
            cells = {(y, x) for y, line in enumerate(maze) for x, symbol in enumerate(line) if symbol != "#"}
            edges = sum(((y, x + 1) in cells) + ((y + 1, x) in cells) for y, x in cells)
            assert {(y, x) for y in range(1, 15, 2) for x in range(1, 15, 2)} <= cells
            # 7 x 7 rooms have 84 walls between two of them, of which the tree opens 48
            assert edges - len(cells) + 1 == extra


def small(*maze: str) -> np.ndarray:
    return np.array([["<pad>", *"# SGo"].index(symbol) for line in maze for symbol in line])


def test_verify_accepts_any_shortest_path_and_nothing_else() -> None:
    task = Maze(size=5, form="grid")
    maze = small("#####", "#S  #", "# # #", "#  G#", "#####")
    right = [("#####", "#Soo#", "# #o#", "#  G#", "#####"), ("#####", "#S  #", "#o# #", "#ooG#", "#####")]
    wrong = [
        ("#####", "#Soo#", "#o#o#", "#ooG#", "#####"),
        ("#####", "#So #", "# #o#", "# oG#", "#####"),
        ("#####", "#Soo#", "# # #", "#  G#", "#####"),
        ("#####", "#S  #", "# # #", "#  G#", "#####"),
        ("#####", "#Soo#", "# #o#", "#  S#", "#####"),
        ("#####", "#Soo#", "# #o#", "#   #", "#####"),
        ("#####", "#So #", "# o #", "# oG#", "#####"),
    ]
    assert all(task.verify(maze, small(*answer)) for answer in right)
    assert not any(task.verify(maze, small(*answer)) for answer in wrong)
    assert not task.verify(maze, small(*right[0])[:-1])
    around = small("#######", "#S    #", "# ### #", "# #   #", "# # ###", "#    G#", "#######")
    detour = small("#######", "#Soooo#", "# ###o#", "# #ooo#", "# #o###", "#  ooG#", "#######")
    direct = small("#######", "#S    #", "#o### #", "#o#   #", "#o# ###", "#ooooG#", "#######")
    assert task.__class__(size=7, form="grid").verify(around, direct)
    assert not task.__class__(size=7, form="grid").verify(around, detour), "a path, but not a shortest"


def test_turned_and_mirrored_mazes_share_a_split() -> None:
    task = Maze(size=7, form="grid")
    drawn = rows(task, seed=0, index=0, size=40, split="test")
    forms = {tuple(turn(drawn.tokens_BT[:1], which)[0]) for which in range(8)}
    assert len(forms) == 8
    for which in range(8):
        turned = type(drawn)(tokens_BT=turn(drawn.tokens_BT, which), targets_BT=drawn.targets_BT)
        assert np.array_equal(task.prompt(turned), task.prompt(drawn))
        assert (split_of(task.prompt(turned)) == 2).all()
        # what is marked turns with the maze
        for row in range(5):
            assert task.verify(turned.tokens_BT[row], turn(drawn.targets_BT, which)[row])


def test_the_vocabulary_is_that_of_the_field() -> None:
    assert Maze(form="grid").vocabulary == ("<pad>", "#", " ", "S", "G", "o") and len(Maze().vocabulary) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Maze(size=4), "size=4 must be from 5 to 99"),
        (lambda: Maze(size=7, min_path=17), "min_path=17 must be from 2 to 16"),
        (lambda: Maze(openings=1.5), "openings=1.5 must be from 0 to 1"),
        (
            lambda: Maze(size=9, openings=1.0, min_path=26).draw(np.random.default_rng(0), 1),
            "choose a smaller min_path",
        ),
        (lambda: turn(np.zeros((1, 8)), 0), "8 cells make no square board"),
        (lambda: turn(np.zeros((1, 9)), 8), "which=8 must be from 0 to 7"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
