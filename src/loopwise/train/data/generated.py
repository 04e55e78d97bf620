"""Rows that a task draws: `data.task` for reasoning tasks, `data.regression` for prompts of points."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from loopwise.loop.config import to_dict
from loopwise.tasks import regression
from loopwise.tasks.base import Task, rows
from loopwise.tasks.regression import RegressionTask
from loopwise.train.batch import Batch, Points
from loopwise.train.data.batches import join, take
from loopwise.train.data.permute import key_of, permuted
from loopwise.train.data.source import SPLITS, DataConfig, Source, check_rows, check_split, digest
from loopwise.train.data.vocabulary import vocabulary_tokenizer

# Rows are drawn in blocks of this many, since drawing one at a time wastes the vectorised generators. A part of the
# order of rows: another number is another stream.
BLOCK = 64
_KEPT_BLOCKS = 16
# Held-out rows do not depend on the seed of the run, so that runs are scored on the same rows.
_HELD_OUT_SEED = 0
_PROBE_ROWS = 4


class GeneratedSource(Source):
    """Rows drawn block by block; row r is row r % 64 of block r // 64 of the seed's stream.

    With `num_train` rows the stream repeats the first that many rows, each once an epoch in a new random order.
    """

    num_train: int | None
    seed: int

    def draw(self, seed: int, index: int, size: int, split: str) -> Batch:
        """Block `index` of a split, with `size` rows."""
        raise NotImplementedError

    def batch(self, first: int, size: int) -> Batch:
        """Rows first to first + size - 1 of the training stream."""
        check_rows(first, size)
        numbers = np.arange(first, first + size)
        if self.num_train is not None:
            epochs, places = np.divmod(numbers, self.num_train)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                numbers[here] = permuted(places[here], self.num_train, key_of(self.seed, int(epoch)))
        return self._rows(numbers, self.seed, "train")

    def held_out(self, first: int, size: int, split: str = "valid") -> Batch:
        """Rows of a split whose prompts never occur in training; the same for every seed."""
        check_rows(first, size)
        check_split(split)
        return self._rows(np.arange(first, first + size), _HELD_OUT_SEED, split)

    def num_rows(self, split: str = "train") -> int | None:
        """None without end, or the number of training rows."""
        check_split(split, SPLITS)
        return self.num_train if split == "train" else None

    def probe(self) -> str:
        """The sha256 of a few rows, so that a generator whose code changed has another fingerprint."""
        drawn = self.draw(0, 0, _PROBE_ROWS, "train")
        points = drawn.points
        parts = (drawn.tokens_BT, drawn.targets_BT) if points is None else (points.xs_BNI, points.ys_BN)
        sha256 = hashlib.sha256()
        for part in parts:
            assert part is not None
            sha256.update(part.numpy().tobytes())
        return sha256.hexdigest()

    def _rows(self, numbers: np.ndarray, seed: int, split: str) -> Batch:
        blocks, places = np.divmod(numbers, BLOCK)
        parts, found = [], []
        for block in np.unique(blocks):
            here = np.flatnonzero(blocks == block)
            parts.append(take(self._block(seed, int(block), split), torch.from_numpy(places[here])))
            found.append(here)
        return take(join(parts), torch.from_numpy(np.argsort(np.concatenate(found))))

    @functools.cached_property
    def _block(self) -> Any:
        # A repeated set is drawn once; of an endless stream the latest blocks are enough.
        kept = _KEPT_BLOCKS if self.num_train is None else None
        return functools.lru_cache(kept)(lambda seed, index, split: self.draw(seed, index, BLOCK, split))


class TaskSource(GeneratedSource):
    """Rows of a reasoning task."""

    def __init__(self, task: Task, *, seed: int, num_train: int | None = None) -> None:
        """Rows of this seed; ValueError when the task has too few prompts for its splits."""
        self.task, self.seed, self.num_train = task, seed, num_train
        self.length, self.vocab_size = task.length, len(task.vocabulary)
        self.vocabulary_id = digest(list(task.vocabulary))
        self.fingerprint = digest({"task": to_dict(task), "num_train": num_train, "rows": self.probe(), "version": 1})

    def draw(self, seed: int, index: int, size: int, split: str) -> Batch:
        """Block `index` of a split."""
        drawn = rows(self.task, seed=seed, index=index, size=size, split=split)
        return Batch(
            tokens_BT=torch.from_numpy(drawn.tokens_BT.astype(np.int64)),
            targets_BT=torch.from_numpy(drawn.targets_BT.astype(np.int64)),
            keys={name: torch.from_numpy(key_B.astype(np.int64)) for name, key_B in drawn.keys.items()},
        )

    @functools.cached_property
    def tokenizer(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A tokenizer of the task's symbols; None where their text is ambiguous."""
        return vocabulary_tokenizer(self.task.vocabulary, self.task.separator)

    def describe(self) -> str:
        """One line for people."""
        count = "endless" if self.num_train is None else f"{self.num_train:,}"
        return f"{self.task.kind}: {count} rows of {self.length}, {self.vocab_size} symbols"


class RegressionSource(GeneratedSource):
    """Prompts of in-context regression."""

    vocab_size = 0

    def __init__(self, task: RegressionTask, *, seed: int, num_train: int | None = None) -> None:
        """Prompts of this seed."""
        self.task, self.seed, self.num_train = task, seed, num_train
        self.length = task.num_points
        self.vocabulary_id = digest({"points": task.num_points, "inputs": task.inputs})
        self.fingerprint = digest({"task": to_dict(task), "num_train": num_train, "rows": self.probe(), "version": 1})

    def draw(self, seed: int, index: int, size: int, split: str) -> Batch:
        """Block `index` of a split."""
        drawn = regression.points(self.task, seed=seed, index=index, size=size, split=split)
        return Batch(points=Points(xs_BNI=torch.from_numpy(drawn.xs_BNI), ys_BN=torch.from_numpy(drawn.ys_BN)))

    def describe(self) -> str:
        """One line for people."""
        return f"{self.task.kind}: prompts of {self.length} points of {self.task.inputs} numbers"


@dataclass(frozen=True, kw_only=True)
class TaskData(DataConfig):
    """Rows of a reasoning task.

    Attributes:
        task: the task with its sizes.
        rows: how many different training rows there are; None never repeats a block.
    """

    kind: ClassVar[str | None] = "data.task"
    task: Task
    rows: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.rows is None or self.rows >= 1, "rows", "must be at least 1, or null for no end")

    def open(self, *, seed: int) -> TaskSource:
        """The rows in the order of this seed."""
        return TaskSource(self.task, seed=seed, num_train=self.rows)


@dataclass(frozen=True, kw_only=True)
class RegressionData(DataConfig):
    """Prompts of in-context regression.

    Attributes:
        task: the family of functions with its sizes.
        rows: how many different training prompts there are; None never repeats a block.
    """

    kind: ClassVar[str | None] = "data.regression"
    task: RegressionTask
    rows: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.rows is None or self.rows >= 1, "rows", "must be at least 1, or null for no end")

    def open(self, *, seed: int) -> RegressionSource:
        """The prompts in the order of this seed."""
        return RegressionSource(self.task, seed=seed, num_train=self.rows)
