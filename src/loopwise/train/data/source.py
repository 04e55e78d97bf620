"""What every kind of training data is: an endless stream of rows that any reader can enter anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopwise.loop.config import Component
from loopwise.train.batch import Batch

SPLITS = ("train", "valid", "test")


class Source:
    """An endless stream of training rows, and held-out rows that never occur in it.

    Row numbers are global: a step that reads `batch` rows starts at row `step * batch`, and rank r of n reads its
    n-th part of them, so that the order does not depend on how many ranks there are. A row is a pure function of the
    data, the seed and its number; nothing is remembered between calls.

    Attributes:
        fingerprint: sha256 in hexadecimal of what the rows are made from (data, tokenizer, length, splits); the seed
            is not part of it.
        vocab_size: number of token ids; 0 for points.
        vocabulary_id: equal for two sources whose token ids mean the same.
        length: T, tokens in a row, or points in a prompt.
    """

    fingerprint: str
    vocab_size: int
    vocabulary_id: str
    length: int

    def batch(self, first: int, size: int) -> Batch:
        """Rows first to first + size - 1 of the training stream."""
        raise NotImplementedError

    def held_out(self, first: int, size: int, split: str = "valid") -> Batch:
        """Rows of "valid" or "test", in an order that does not depend on the seed; they repeat past `num_rows`.

        Raises:
            ValueError: an unknown split, or nothing is held out.
        """
        raise NotImplementedError

    def num_rows(self, split: str = "train") -> int | None:
        """How many different rows a split has, one epoch; None without end."""
        return None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the rows, or None."""
        return None

    def save_tokenizer(self, folder: Path | str) -> bool:
        """Write the tokenizer beside a model, so that its folder can generate; False when there is none."""
        if self.tokenizer is None:
            return False
        self.tokenizer.save_pretrained(folder)
        return True

    def describe(self) -> str:
        """One line for people."""
        return f"rows of {self.length}"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Component):
    """Base of the kinds of training data."""

    def open(self, *, seed: int) -> Source:
        """The stream of rows in the order of this seed.

        Raises:
            ValueError: the data is missing, damaged, empty or shorter than one row.
        """
        raise NotImplementedError


def check_fingerprint(source: Source, expected: str) -> None:
    """Refuse to go on with other data than a run started with.

    Raises:
        ValueError: one line with both fingerprints.
    """
    if source.fingerprint != expected:
        raise ValueError(
            f"this run was started on data with fingerprint {expected}, the data now has {source.fingerprint}: "
            "give it the same files, tokenizer and row length, or start a new run"
        )


def check_rows(first: int, size: int) -> None:
    """ValueError unless row numbers are natural and there is at least one row."""
    if first < 0 or size < 1:
        raise ValueError(f"rows {first} to {first + size - 1}: row numbers start at 0 and a batch has at least 1 row")


def check_split(split: str, known: Sequence[str] = SPLITS[1:]) -> None:
    """ValueError unless the split is known."""
    if split not in known:
        raise ValueError(f"split {split!r} is unknown: use {' or '.join(known)}")


def digest(value: Any) -> str:
    """The sha256 of a JSON value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
