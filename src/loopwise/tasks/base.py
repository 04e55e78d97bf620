"""What a reasoning task is: rows of tokens drawn from a seed, checked by the definition, scored by exact match.

Shapes: B rows, T tokens.

A task is a `Component`, so a run's config can hold it. This room needs numpy only.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np

from loopwise.loop.config import Component, suggest

IGNORE = -100
PAD = 0
"""Token 0 of every vocabulary is padding; it stands to the right of a row and does not count in the row's split."""

SPLITS = ("train", "valid", "test")
# Eighths of all prompts: 0-5 train, 6 valid, 7 test. Held-out rows are found by drawing, so smaller shares cost more.
_NUM_SHARES = 8
_MAX_DRAWS = 1000

HOMES = (
    "addition",
    "p_hop",
    "pointer",
    "cycle_walk",
    "igsm",
    "assignment",
    "induction",
    "maths",
    "mano",
    "depo",
    "state_tracking",
    "recall",
    "reachability",
    "sudoku",
    "maze",
    "regression",
    "gym",
)
"""Modules of this room that define tasks; imported on the first look-up of a name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of one task, ready to train on.

    Attributes:
        tokens_BT: what the model reads, int64 `[B, T]`. An answer of several tokens is part of it (teacher forcing).
        targets_BT: what the logits *at* a position should predict, int64 `[B, T]`; -100 is not scored. Not shifted
            again by whoever trains on it.
        keys: per row an int64 array `[B]` by which scores are grouped, such as "hops" or "operands".

    Raises:
        ValueError: the shapes do not agree.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    keys: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shapes."""
        shape = self.tokens_BT.shape
        if len(shape) != 2 or self.targets_BT.shape != shape:
            raise ValueError(f"tokens_BT and targets_BT must share a shape [B, T]: {shape}, {self.targets_BT.shape}")
        for name, key_B in self.keys.items():
            if key_B.shape != shape[:1]:
                raise ValueError(f"keys[{name!r}] must have the shape {shape[:1]}, one value a row, got {key_B.shape}")

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, which: slice | np.ndarray) -> Rows:
        """Some of the rows: a slice, a boolean mask or an array of indices."""
        return Rows(
            tokens_BT=self.tokens_BT[which],
            targets_BT=self.targets_BT[which],
            keys={name: key_B[which] for name, key_B in self.keys.items()},
        )

    def answer(self, row: int) -> np.ndarray:
        """The tokens that are right at the scored positions of one row, in order, int64 `[number of positions]`."""
        targets_T = self.targets_BT[row]
        return targets_T[targets_T != IGNORE]

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """The rows of several draws of one task, in order."""
        return Rows(
            tokens_BT=np.concatenate([part.tokens_BT for part in parts]),
            targets_BT=np.concatenate([part.targets_BT for part in parts]),
            keys={name: np.concatenate([part.keys[name] for part in parts]) for name in parts[0].keys},
        )


@dataclass(frozen=True, kw_only=True)
class Task(Component):
    """Base of every task; a subclass sets `kind = "task.name"`, has its sizes as fields, and fills in the rest.

    The first line of a subclass's docstring is what `loopwise tasks` prints.

    Attributes:
        separator: what stands between two symbols where a row is shown as text.
    """

    separator: ClassVar[str] = " "

    def require_counts(self, name: str, *, least: int, most: int | None = None) -> None:
        """Refuse a tuple field that is empty, repeats a number, or leaves the range `least` to `most`."""
        counts = getattr(self, name)
        within = all(least <= count and (most is None or count <= most) for count in counts)
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        self.require(bool(counts) and within and len(set(counts)) == len(counts), name, f"must be different, {bounds}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Symbol of each token id; the first is padding."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens per row, the same for every row; shorter ones are padded on the right."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """Exact accuracy of guessing among the possible answers, or of the best constant answer where that is known."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, size: int) -> Rows:
        """`size` rows; nothing random but `rng`. Labels follow from the tokens by the definition of the task."""
        raise NotImplementedError

    def solve(self, tokens_T: np.ndarray) -> tuple[int, ...]:
        """The right tokens at the scored positions of one row, in order, by the definition, one step at a time."""
        raise NotImplementedError

    def verify(self, tokens_T: np.ndarray, answer: Sequence[int] | np.ndarray) -> bool:
        """Whether an answer to one row is right.

        Args:
            tokens_T: the row as drawn, int64 `[T]`; what stands in the place of the answer is not looked at.
            answer: predicted tokens at the scored positions, in order.
        """
        return tuple(int(token) for token in answer) == self.solve(tokens_T)

    def prompt(self, rows: Rows) -> np.ndarray:
        """What makes two rows the same problem, int64 `[B, N]`: equal rows always fall into the same split.

        By default the tokens with every token that an earlier position has to predict (the answer) blanked. A task
        whose rows can look different and still be one problem returns a canonical form.
        """
        prompt_BT = rows.tokens_BT.copy()
        told_BT = (rows.targets_BT[:, :-1] != IGNORE) & (rows.targets_BT[:, :-1] == rows.tokens_BT[:, 1:])
        prompt_BT[:, 1:][told_BT] = PAD
        return prompt_BT


def rows(
    task: Task, *, seed: int, index: int, size: int, split: Literal["train", "valid", "test"] | str = "train"
) -> Rows:
    """Rows of one split: a pure function of the arguments.

    A hash of each row's prompt alone decides whether the row belongs to train (3/4), valid (1/8) or test (1/8), so no
    prompt is in two splits, whatever the seeds. Rows of other splits are drawn again.

    Args:
        task: the task.
        seed: seed of the stream, at least 0.
        index: number of the block of rows within the stream, at least 0.
        size: rows, at least 1.
        split: "train", "valid" or "test".

    Raises:
        ValueError: an argument is out of range, or the split has (nearly) no prompts since the task is too small.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}{suggest(split, SPLITS)}")
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("size", size, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])
    share = (_NUM_SHARES - len(SPLITS) + 1 if split == "train" else 1) / _NUM_SHARES
    found: list[Rows] = []
    missing = size
    for _ in range(_MAX_DRAWS):
        drawn = task.draw(rng, max(1, math.ceil(1.1 * missing / share)))
        kept = drawn[split_of(task.prompt(drawn)) == SPLITS.index(split)][:missing]
        found.append(kept)
        missing -= len(kept)
        if not missing:
            return Rows.join(found)
    raise ValueError(
        f"{task.kind}: split {split!r} has {size - missing} of {size} rows after {_MAX_DRAWS} draws; "
        f"the task has too few different prompts, choose larger sizes"
    )


def padded(sequences: Sequence[Sequence[int]], length: int, value: int = PAD) -> np.ndarray:
    """Sequences of different lengths as rows, filled on the right, int64 `[number of sequences, length]`."""
    rows_BT = np.full((len(sequences), length), value, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        rows_BT[row, : len(sequence)] = sequence
    return rows_BT


def split_of(prompt_BN: np.ndarray) -> np.ndarray:
    """The index into `SPLITS` of every prompt, int64 `[B]`; padding does not count, so longer rows split alike."""
    with np.errstate(over="ignore"):
        token_BN = prompt_BN.astype(np.uint64)
        place_N = np.arange(prompt_BN.shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        hashed_BN = np.where(prompt_BN == PAD, np.uint64(0), _mix(_mix(token_BN) + place_N))
        share_B = (_mix(hashed_BN.sum(axis=1, dtype=np.uint64)) >> np.uint64(32)) % np.uint64(_NUM_SHARES)
    return np.maximum(share_B.astype(np.int64) - (_NUM_SHARES - len(SPLITS)), 0)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well predictions match rows.

    Attributes:
        exact: share of rows with every scored position right: for a row with its answer at the end this is the
            exact match of greedy generation.
        token: share of scored positions that are right.
        num: number of rows.
        by: key -> value -> `exact` among the rows with that value.
        token_by: key -> value -> `token` among the rows with that value.
        num_by: key -> value -> number of rows with that value.
    """

    exact: float
    token: float
    num: int
    by: dict[str, dict[int, float]]
    token_by: dict[str, dict[int, float]]
    num_by: dict[str, dict[int, int]]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `exact`."""
        return wilson(round(self.exact * self.num), self.num)


def score(rows: Rows, predicted_BT: np.ndarray) -> Score:
    """Compare predictions with what is right.

    Args:
        rows: B rows, at least one.
        predicted_BT: argmax of the logits at every position, integers `[B, T]`; unscored positions are not looked at.

    Raises:
        ValueError: another shape, no rows, or a row without a scored position.
    """
    predicted_BT = np.asarray(predicted_BT)
    if predicted_BT.shape != rows.targets_BT.shape:
        raise ValueError(f"predicted_BT must have the shape {rows.targets_BT.shape}, got {predicted_BT.shape}")
    scored_BT = rows.targets_BT != IGNORE
    if not len(rows) or not scored_BT.any(axis=1).all():
        raise ValueError(f"rows: all of {len(rows)} rows need a scored position, and there must be one row at least")
    right_BT = predicted_BT == rows.targets_BT
    exact_B = (right_BT | ~scored_BT).all(axis=1)
    by: dict[str, dict[int, float]] = {}
    token_by: dict[str, dict[int, float]] = {}
    num_by: dict[str, dict[int, int]] = {}
    for name, key_B in rows.keys.items():
        groups = {int(value): key_B == value for value in np.unique(key_B)}
        by[name] = {value: float(exact_B[group_B].mean()) for value, group_B in groups.items()}
        token_by[name] = {
            value: float((right_BT & scored_BT)[group_B].sum() / scored_BT[group_B].sum())
            for value, group_B in groups.items()
        }
        num_by[name] = {value: int(group_B.sum()) for value, group_B in groups.items()}
    token = float((right_BT & scored_BT).sum() / scored_BT.sum())
    return Score(exact=float(exact_B.mean()), token=token, num=len(rows), by=by, token_by=token_by, num_by=num_by)


def wilson(successes: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of Wilson (1927) for a share; 95 % by default.

    Args:
        successes: how many of the trials, 0 to `num`.
        num: trials, at least 1.
        z: quantile of the normal distribution.

    Raises:
        ValueError: not 0 <= successes <= num, or num < 1.
    """
    if num < 1 or not 0 <= successes <= num:
        raise ValueError(f"successes={successes}, num={num}: need 0 <= successes <= num and num >= 1")
    share, spread = successes / num, z * z / num
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    # At the ends the bound is exact, and rounding must not leave the share outside.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == num else middle + half)


def text(task: Task, ids: Sequence[int] | np.ndarray) -> str:
    """Tokens (or targets, unscored positions as "_") of one row as text, padding on the right left out.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    vocabulary = task.vocabulary
    tokens = [int(token) for token in ids]
    while tokens and tokens[-1] == PAD:
        tokens.pop()
    for token in tokens:
        if token != IGNORE and not 0 <= token < len(vocabulary):
            raise ValueError(f"{task.kind}: token {token} is not among the {len(vocabulary)} of the vocabulary")
    return task.separator.join("_" if token == IGNORE else vocabulary[token] for token in tokens)


def names() -> tuple[str, ...]:
    """Every task by name, sorted: "p_hop" for kind "task.p_hop"."""
    return tuple(sorted(_known()))


def named(name: str, /, **values: Any) -> Task:
    """The task of that name with these fields; lists become tuples, "task." before the name may be left out.

    Raises:
        ValueError: an unknown name or field (the nearest is suggested), a missing field, or a refused value.
    """
    known = _known()
    short = name.removeprefix("task.")
    if short not in known:
        raise ValueError(f"unknown task {name!r}{suggest(short, known)}")
    declared = [item.name for item in fields(known[short])]
    for key in values:
        if key not in declared:
            raise ValueError(f"task.{short}: unknown field {key!r}{suggest(key, declared)}")
    try:
        return known[short](**{key: tuple(item) if isinstance(item, list) else item for key, item in values.items()})
    except TypeError as error:
        raise ValueError(f"task.{short}: {error}") from error


def _known() -> dict[str, type[Task]]:
    for home in HOMES:
        importlib.import_module(f"loopwise.tasks.{home}")
    return {task.kind.removeprefix("task."): task for task in _descendants(Task) if task.kind is not None}


def _descendants(task: type[Task]) -> Iterator[type[Task]]:
    for child in task.__subclasses__():
        if child.__dict__.get("kind") is not None:
            yield child
        yield from _descendants(child)
