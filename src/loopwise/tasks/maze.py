"""Mazes with one shortest path, to be marked, as a row or as a grid.

A maze is written in the characters "# SGo": wall, floor, start, goal, and the cells of the path between these two.

Shapes: B rows, S side, N = S * S cells.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from loopwise.tasks.base import IGNORE, Rows, Task

WALL, FLOOR, START, GOAL, PATH = range(1, 6)
_EQUALS = 6
_MAX_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class Maze(Task):
    """Mark the shortest path through a maze, as a row `maze = marked maze` or as a grid, cell by cell.

    Tokens and form of Maze-Hard (HRM, 2506.21734; there 30 x 30). Rooms stand at odd coordinates, a random depth-first
    walk opens a spanning tree between them, and start and goal are two rooms far apart that one shortest path joins.
    Turned and mirrored mazes are always in the same split.

    Attributes:
        size: S, at least 5; with an even one the last row and column are wall as well.
        form: "row" for causal models, "grid" for models that read all cells at once.
        min_path: fewest moves from start to goal; None is 2 * size - 6, from one corner to the other in a straight way.
        openings: share of the walls between two rooms, of those that the tree left, that are opened too: 0 leaves one
            way only, more make the choice of the shortest matter.
    """

    kind: ClassVar[str | None] = "task.maze"
    separator: ClassVar[str] = ""
    size: int = 15
    form: Literal["row", "grid"] = "row"
    min_path: int | None = None
    openings: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(5 <= self.size <= 99, "size", "must be from 5 to 99")
        most = 2 * (((self.size - 1) // 2) ** 2 - 1)
        self.require(self.min_path is None or 2 <= self.min_path <= most, "min_path", f"must be from 2 to {most}")
        self.require(0 <= self.openings <= 1, "openings", "must be from 0 to 1")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Padding and the five characters, for rows also "="."""
        return ("<pad>", *"# SGo", *("=" if self.form == "row" else ""))

    @property
    def length(self) -> int:
        """N for a grid, 2 N + 1 for a row."""
        return self.size**2 * (2 if self.form == "row" else 1) + (self.form == "row")

    @property
    def chance(self) -> float:
        """Guessing which floor cells belong to the path, in the maze with the shortest path."""
        return 2.0 ** -float(self._min_path)

    @property
    def _min_path(self) -> int:
        return 2 * self.size - 6 - 2 * (self.size % 2 == 0) if self.min_path is None else self.min_path

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """Mazes; `keys` are the moves from start to goal, as the power of two from below."""
        quick = random.Random(int(rng.integers(2**63)))
        made = [self._maze(quick) for _ in range(size)]
        maze_BN, marked_BN = (np.array([item[part] for item in made]) for part in (0, 1))
        moves_B = (marked_BN == PATH).sum(axis=1) + 1
        keys = {"moves": 2 ** np.log2(moves_B).astype(np.int64)}
        if self.form == "grid":
            return Rows(tokens_BT=maze_BN, targets_BT=marked_BN, keys=keys)
        tokens_BT = np.concatenate([maze_BN, np.full((size, 1), _EQUALS), marked_BN], axis=1)
        targets_BT = np.full(tokens_BT.shape, IGNORE)
        targets_BT[:, self.size**2 : -1] = marked_BN
        return Rows(tokens_BT=tokens_BT, targets_BT=targets_BT, keys=keys)

    def _maze(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """A maze as the fields ask for, without and with its path."""
        rooms = [row * self.size + column for row in self._odd for column in self._odd]
        for _ in range(_MAX_TRIES):
            maze = self._walls(rng)
            start = rng.choice(rooms)
            for _ in range(2):
                moves, ways = _distances(maze, start, self.size)
                goals = [room for room in rooms if moves[room] >= self._min_path and ways[room] == 1]
                if goals:
                    return self._with_path(maze, start, rng.choice(goals), moves)
                start = max(rooms, key=lambda room: moves[room])
        raise ValueError(
            f"task.maze: in {_MAX_TRIES} mazes of size {self.size} no two rooms are {self._min_path} moves apart by a "
            f"single shortest path; choose a smaller min_path or openings"
        )

    @property
    def _odd(self) -> range:
        return range(1, self.size - 1, 2)

    def _walls(self, rng: random.Random) -> list[int]:
        """Walls and floor: a spanning tree of the rooms by a random depth-first walk, then the openings."""
        size, maze = self.size, [WALL] * self.size**2
        room = rng.choice(self._odd) * size + rng.choice(self._odd)
        maze[room], walk = FLOOR, [room]
        # Two cells further is a room, unless it lies beyond the border.
        inside = {row * size + column for row in self._odd for column in self._odd}
        ways = [-1, 1, -size, size]
        while walk:
            room = walk[-1]
            unseen = [way for way in ways if room + 2 * way in inside and maze[room + 2 * way] == WALL]
            if not unseen:
                walk.pop()
                continue
            way = rng.choice(unseen)
            maze[room + way] = maze[room + 2 * way] = FLOOR
            walk.append(room + 2 * way)
        if self.openings:
            between = [room + way for room in sorted(inside) for way in (1, size) if room + 2 * way in inside]
            closed = [cell for cell in between if maze[cell] == WALL]
            for cell in rng.sample(closed, round(self.openings * len(closed))):
                maze[cell] = FLOOR
        return maze

    def _with_path(self, maze: list[int], start: int, goal: int, moves: list[int]) -> tuple[list[int], list[int]]:
        maze[start], maze[goal] = START, GOAL
        marked = maze.copy()
        cell = goal
        while moves[cell] > 1:
            cell = next(near for near in _near(cell, self.size) if moves[near] == moves[cell] - 1)
            marked[cell] = PATH
        return maze, marked

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The marked maze, by breadth-first search from the start."""
        maze = [int(token) for token in tokens_T[: self.size**2]]
        start, goal = maze.index(START), maze.index(GOAL)
        return tuple(self._with_path(maze, start, goal, _distances(maze, start, self.size)[0])[1])

    def verify(self, tokens_T: np.ndarray, answer: Sequence[int] | np.ndarray) -> bool:
        """Whether the answer is the maze with a shortest path marked and nothing else changed."""
        maze, marked = [int(token) for token in tokens_T[: self.size**2]], [int(token) for token in answer]
        changed = [cell for cell, pair in enumerate(zip(maze, marked, strict=False)) if pair[0] != pair[1]]
        if len(marked) != len(maze) or any((maze[cell], marked[cell]) != (FLOOR, PATH) for cell in changed):
            return False
        start, goal = maze.index(START), maze.index(GOAL)
        only_path = [WALL if token == FLOOR else token for token in marked]
        shortest = _distances(maze, start, self.size)[0][goal]
        return len(changed) + 1 == shortest == _distances(only_path, start, self.size)[0][goal]

    def prompt(self, rows: Rows) -> np.ndarray:
        """The maze, turned and mirrored into the form that comes first in the order of tokens."""
        maze_BN = first_BN = rows.tokens_BT[:, : self.size**2]
        row_B = np.arange(len(maze_BN))
        for which in range(1, 8):
            other_BN = turn(maze_BN, which)
            place_B = (other_BN != first_BN).argmax(axis=1)
            smaller_B = other_BN[row_B, place_B] < first_BN[row_B, place_B]
            first_BN = np.where(smaller_B[:, None], other_BN, first_BN)
        return first_BN


def turn(boards_BN: np.ndarray, which: int) -> np.ndarray:
    """Square boards under one of the eight symmetries of the square: `which` % 4 quarter turns, from 4 on mirrored.

    Raises:
        ValueError: the boards are not square, or `which` is not from 0 to 7.
    """
    side = round(boards_BN.shape[1] ** 0.5)
    if side**2 != boards_BN.shape[1] or not 0 <= which < 8:
        raise ValueError(f"which={which} must be from 0 to 7, and {boards_BN.shape[1]} cells make no square board")
    boards_BSS = np.rot90(boards_BN.reshape(-1, side, side), which % 4, axes=(1, 2))
    return (boards_BSS[:, ::-1] if which >= 4 else boards_BSS).reshape(boards_BN.shape)


def _near(cell: int, size: int) -> tuple[int, int, int, int]:
    """The four neighbours of a cell inside; walls all around keep a search from leaving the board."""
    return cell - 1, cell + 1, cell - size, cell + size


def _distances(maze: list[int], start: int, size: int) -> tuple[list[int], list[int]]:
    """Moves from the start to every cell (-1: unreachable), and the number of shortest ways there."""
    moves, ways = [-1] * len(maze), [0] * len(maze)
    moves[start], ways[start] = 0, 1
    edge: Iterable[int] = [start]
    while edge:
        reached: dict[int, None] = {}
        for cell in edge:
            for near in _near(cell, size):
                if maze[near] == WALL:
                    continue
                if moves[near] < 0:
                    moves[near] = moves[cell] + 1
                    reached[near] = None
                if moves[near] == moves[cell] + 1:
                    ways[near] += ways[cell]
        edge = reached
    return moves, ways
