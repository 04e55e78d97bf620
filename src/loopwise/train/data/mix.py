"""Several kinds of data in fixed proportions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from loopwise.train.batch import Batch
from loopwise.train.data.batches import join, take
from loopwise.train.data.permute import key_of, permuted
from loopwise.train.data.source import DataConfig, Source, check_rows, check_split, digest

# In every stretch of this many rows each source has its exact share, in a random order.
STRETCH = 1000
_HELD_OUT_SEED = 0


class MixSource(Source):
    """Rows of several sources, interleaved.

    Each stretch of 1000 rows holds a fixed number of rows of each source (weights rounded by largest remainders) in an
    order that the seed and the number of the stretch decide; every source is read from its first row on without gaps.
    The key "source" says which one a row is from.
    """

    def __init__(self, sources: list[Source], quotas: tuple[int, ...], *, seed: int) -> None:
        """Interleave; `quotas` are the rows of each source in a stretch.

        Raises:
            ValueError: the token ids of the sources mean different things.
        """
        for number, source in enumerate(sources):
            if source.vocabulary_id != sources[0].vocabulary_id:
                raise ValueError(
                    f"data.mix: sources[{number}] has another vocabulary ({source.vocab_size} ids) than sources[0] "
                    f"({sources[0].vocab_size} ids): give them one tokenizer, or one task with other sizes"
                )
        self.sources, self.quotas, self.seed = sources, quotas, seed
        self.vocab_size, self.vocabulary_id = sources[0].vocab_size, sources[0].vocabulary_id
        self.length = max(source.length for source in sources)
        self.fingerprint = digest({"sources": [source.fingerprint for source in sources], "quotas": quotas})

    def batch(self, first: int, size: int) -> Batch:
        """Rows first to first + size - 1 of the training stream."""
        check_rows(first, size)
        return self._rows(first, size, self.seed, lambda source, start, count: source.batch(start, count))

    def held_out(self, first: int, size: int, split: str = "valid") -> Batch:
        """Held-out rows of all sources in the same proportions."""
        check_rows(first, size)
        check_split(split)
        return self._rows(
            first, size, _HELD_OUT_SEED, lambda source, start, count: source.held_out(start, count, split)
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the first source."""
        return self.sources[0].tokenizer

    def describe(self) -> str:
        """One line for people."""
        shares = [
            f"{quota / STRETCH:.1%} {source.describe()}"
            for quota, source in zip(self.quotas, self.sources, strict=True)
        ]
        return " + ".join(shares)

    def _rows(self, first: int, size: int, seed: int, read: Any) -> Batch:
        parts = []
        while size:
            stretch, place = divmod(first, STRETCH)
            count = min(size, STRETCH - place)
            parts.append(self._part(stretch, place, count, seed, read))
            first, size = first + count, size - count
        # Every batch has one width, whichever sources its rows are from.
        return join(parts, length=self.length)

    def _part(self, stretch: int, place: int, count: int, seed: int, read: Any) -> Batch:
        """Rows of one stretch; those of a source are neighbours in its own stream."""
        source_K, rank_K = self._pattern(seed, stretch)
        chosen, ranks = source_K[place : place + count], rank_K[place : place + count]
        found, parts = [], []
        for number in np.unique(chosen):
            here = np.flatnonzero(chosen == number)
            start = stretch * self.quotas[number] + int(ranks[here[0]])
            part = read(self.sources[number], start, len(here))
            part.keys["source"] = torch.full((len(here),), int(number))
            parts.append(part)
            found.append(here)
        return take(join(parts), torch.from_numpy(np.argsort(np.concatenate(found))))

    @functools.cached_property
    def _pattern(self) -> Any:
        return functools.lru_cache(8)(self._make_pattern)

    def _make_pattern(self, seed: int, stretch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which source each row of a stretch is from, and how many rows of it the stretch had before."""
        owner_K = np.repeat(np.arange(len(self.quotas)), self.quotas)
        source_K = owner_K[permuted(np.arange(STRETCH), STRETCH, key_of(seed, stretch))]
        rank_K = np.empty(STRETCH, np.int64)
        for number, quota in enumerate(self.quotas):
            rank_K[source_K == number] = np.arange(quota)
        return source_K, rank_K


@dataclass(frozen=True, kw_only=True)
class MixData(DataConfig):
    """Several kinds of data in fixed proportions.

    Attributes:
        sources: what to mix; all with one vocabulary.
        weights: how often each is read, relative to the others; empty reads all equally often.
    """

    kind: ClassVar[str | None] = "data.mix"
    sources: tuple[DataConfig, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that every source has a share."""
        super().__post_init__()
        self.require(len(self.sources) >= 1, "sources", "must hold at least one")
        count = len(self.sources)
        self.require(len(self.weights) in (0, count), "weights", f"must hold {count} numbers, one for each source")
        self.require(all(weight > 0 for weight in self.weights), "weights", "must be above 0")
        self.require(all(self.quotas), "weights", f"must give every source at least 1 of {STRETCH} rows")

    @property
    def quotas(self) -> tuple[int, ...]:
        """Rows of each source in a stretch of 1000, by largest remainders."""
        weights = np.asarray(self.weights or (1.0,) * len(self.sources), np.float64)
        exact = weights / weights.sum() * STRETCH
        quotas = np.floor(exact).astype(np.int64)
        missing = STRETCH - int(quotas.sum())
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
        return tuple(quotas.tolist())

    def open(self, *, seed: int) -> MixSource:
        """The rows in the order of this seed; each source has a seed of its own that follows from it."""
        sources = [source.open(seed=key_of(seed, number) >> 1) for number, source in enumerate(self.sources)]
        return MixSource(sources, self.quotas, seed=seed)
