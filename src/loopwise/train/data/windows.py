"""Rows of a fixed length from token shards: windows of the joined stream, or packed documents.

Shapes: B rows, T tokens, S spans, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loopwise.train.batch import IGNORE, Batch
from loopwise.train.data.permute import key_of, mix64, permuted
from loopwise.train.data.shards import Shards
from loopwise.train.data.source import SPLITS, Source, check_rows, check_split, digest

JOINED, PACKED = "joined", "packed"
# Held-out rows come in one order, whatever the seed, so that the first few are a fair sample for every run.
_HELD_OUT_KEY = key_of(2, 71828)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row before it becomes part of a batch; all int64 `[T]`, see `Batch`."""

    tokens_T: np.ndarray
    targets_T: np.ndarray
    positions_T: np.ndarray | None = None
    segments_T: np.ndarray | None = None


class WindowSource(Source):
    """Rows of T tokens from shards, every training token once an epoch, in a new random order every epoch.

    "joined": window w reads tokens wT to wT + T - 1 of the training documents laid end to end, and predicts each next
    one; the last window is filled up with padding. "packed": documents are kept whole where they fit, see `pack`;
    longer ones are cut into pieces of T. Positions begin at 0 in every document or piece, `segments_BT` numbers them
    within the row (padding has a number of its own), and no target lies in another document.
    """

    def __init__(self, shards: Shards, *, seed: int, length: int, mode: str, held_out: float) -> None:
        """Lay out the rows; reads the starts of documents, no token.

        Args:
            shards: the corpus.
            seed: of the order.
            length: T.
            mode: "joined" or "packed".
            held_out: share of the documents that is "valid", and again "test"; see `split_spans`.

        Raises:
            ValueError: the corpus is too short for a row in every split.
        """
        assert mode in (JOINED, PACKED)
        self.shards, self.seed, self.length, self.mode = shards, seed, length, mode
        self.vocab_size = shards.vocab_size
        self.vocabulary_id = shards.index["tokenizer"]["sha256"]
        self.fingerprint = digest(
            {"shards": shards.fingerprint, "length": length, "mode": mode, "held_out": held_out, "version": 1}
        )
        layout = _Joined if mode == JOINED else _Packed
        spans = split_spans(shards.documents, held_out, length + 1)
        self._splits = {split: layout(shards, spans_S2, length) for split, spans_S2 in spans.items()}

    def batch(self, first: int, size: int) -> Batch:
        """Rows first to first + size - 1 of the training stream."""
        check_rows(first, size)
        rows = self._splits["train"]
        epochs, places = np.divmod(np.arange(first, first + size), rows.num_rows)
        windows = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permuted(places[here], rows.num_rows, key_of(self.seed, int(epoch)))
        return collate([rows.row(int(window)) for window in windows])

    def held_out(self, first: int, size: int, split: str = "valid") -> Batch:
        """Held-out rows in a fixed order."""
        check_rows(first, size)
        check_split(split)
        if split not in self._splits:
            raise ValueError(f"split {split!r} is empty: nothing is held out with held_out=0")
        rows = self._splits[split]
        windows = permuted(np.arange(first, first + size) % rows.num_rows, rows.num_rows, _HELD_OUT_KEY)
        return collate([rows.row(int(window)) for window in windows])

    def num_rows(self, split: str = "train") -> int:
        """Rows of one epoch, or of a held-out split."""
        check_split(split, SPLITS)
        return self._splits[split].num_rows if split in self._splits else 0

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the shards."""
        return self.shards.tokenizer

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.shards.num_documents:,} documents, {self.shards.num_tokens:,} tokens of {self.vocab_size:,} kinds; "
            f"{self.num_rows():,} {self.mode} rows of {self.length} an epoch"
        )


def collate(rows: list[Row]) -> Batch:
    """Rows of one length as a batch."""
    stacked = {}
    for name in ("tokens", "targets", "positions", "segments"):
        values = [getattr(row, f"{name}_T") for row in rows]
        if values[0] is not None:
            stacked[f"{name}_BT"] = torch.from_numpy(np.stack(values))
    return Batch(**stacked)


def split_spans(documents: np.ndarray, held_out: float, shortest: int) -> dict[str, np.ndarray]:
    """Which tokens belong to which split, as spans in the order of the stream.

    The documents with the smallest hashes of their number are held out, a share `held_out` for "valid" and as many
    for "test". Where those are shorter than one row (a corpus of a few long texts), the end of the stream is held out
    instead, the same share of the tokens and at least one row each. The seed has no say: all runs on a corpus hold out
    the same tokens.

    Args:
        documents: where documents start, and where the last ends, int64 `[num_documents + 1]`.
        held_out: 0 to below 0.5; 0 gives all to "train", which is then the only split.
        shortest: tokens that every split needs at least.

    Returns:
        split -> int64 `[S, 2]`, (start, stop) of a document or of the part of it that is in the split.

    Raises:
        ValueError: there are too few tokens.
    """
    spans_S2 = np.stack([documents[:-1], documents[1:]], axis=1).astype(np.int64)
    num_tokens = int(documents[-1])
    needed = shortest if held_out == 0 else 3 * shortest
    if num_tokens < needed:
        raise ValueError(
            f"the corpus has {num_tokens} tokens, rows of length {shortest - 1} need {needed} "
            f"({'one row' if held_out == 0 else 'one row in each of train, valid and test'}): "
            "choose a smaller length or add text"
        )
    if held_out == 0:
        return {"train": spans_S2}
    count = round(held_out * len(spans_S2))
    by_hash = np.argsort(mix64(np.arange(len(spans_S2))), kind="stable")
    numbers = {"valid": by_hash[:count], "test": by_hash[count : 2 * count], "train": by_hash[2 * count :]}
    splits = {split: spans_S2[np.sort(numbers[split])] for split in SPLITS}
    if all(int((part[:, 1] - part[:, 0]).sum()) >= shortest for part in splits.values()):
        return splits
    share = max(round(held_out * num_tokens), shortest)
    share = min(share, (num_tokens - shortest) // 2)
    cuts = {"train": (0, num_tokens - 2 * share), "valid": (num_tokens - 2 * share, num_tokens - share)}
    cuts["test"] = (num_tokens - share, num_tokens)
    return {split: _clip(spans_S2, *cut) for split, cut in cuts.items()}


def pack(counts_P: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Put pieces into as few rows as best-fit decreasing finds (2404.10830): a piece goes where least room is left.

    Args:
        counts_P: size of each piece, integers from 1 to `length`, int64 `[P]`.
        length: room in a row.

    Returns:
        (row of each piece int64 `[P]`, number of rows).
    """
    row_P = np.empty(len(counts_P), np.int64)
    full_P = counts_P == length
    num_rows = int(full_P.sum())
    row_P[full_P] = np.arange(num_rows)
    open_rows: list[list[int]] = [[] for _ in range(length)]
    # Bit r is set when some row has exactly r free places: the lowest bit that is high enough is the best fit.
    rooms = 0
    rest = np.flatnonzero(~full_P)
    for piece in rest[np.argsort(-counts_P[rest], kind="stable")].tolist():
        count = int(counts_P[piece])
        fitting = rooms >> count
        if fitting:
            room = count + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, num_rows
            num_rows += 1
        row_P[piece] = row
        if room > count:
            open_rows[room - count].append(row)
            rooms |= 1 << (room - count)
    return row_P, num_rows


class _Joined:
    """Windows of the spans laid end to end."""

    def __init__(self, shards: Shards, spans_S2: np.ndarray, length: int) -> None:
        self.shards, self.length = shards, length
        # Neighbours become one span: a handful remain, however many documents there are.
        begins = np.flatnonzero(np.r_[True, spans_S2[1:, 0] != spans_S2[:-1, 1]])
        ends = np.r_[begins[1:], len(spans_S2)] - 1
        self.starts_S = spans_S2[begins, 0]
        self.before_S = np.r_[0, np.cumsum(spans_S2[ends, 1] - self.starts_S)]
        self.num_rows = -(-(int(self.before_S[-1]) - 1) // length)

    def row(self, window: int) -> Row:
        start = window * self.length
        read = self._read(start, min(start + self.length + 1, int(self.before_S[-1])))
        tokens_T = np.full(self.length, self.shards.pad)
        targets_T = np.full(self.length, IGNORE)
        tokens_T[: len(read) - 1], targets_T[: len(read) - 1] = read[:-1], read[1:]
        return Row(tokens_T=tokens_T, targets_T=targets_T)

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = []
        span = int(np.searchsorted(self.before_S, start, side="right")) - 1
        while start < stop:
            until = min(stop, int(self.before_S[span + 1]))
            shift = int(self.starts_S[span] - self.before_S[span])
            parts.append(self.shards.read(start + shift, until + shift))
            start, span = until, span + 1
        return np.concatenate(parts)


class _Packed:
    """Documents, or pieces of T of longer ones, put into rows."""

    def __init__(self, shards: Shards, spans_S2: np.ndarray, length: int) -> None:
        self.shards, self.length = shards, length
        # The last token of a span is only predicted, never read.
        counts_S = np.maximum(spans_S2[:, 1] - spans_S2[:, 0] - 1, 0)
        pieces_S = -(-counts_S // length)
        span_P = np.repeat(np.arange(len(spans_S2)), pieces_S)
        offset_P = (np.arange(len(span_P)) - np.repeat(np.cumsum(pieces_S) - pieces_S, pieces_S)) * length
        start_P = spans_S2[span_P, 0] + offset_P
        count_P = np.minimum(counts_S[span_P] - offset_P, length)
        row_P, self.num_rows = pack(count_P, length)
        if not self.num_rows:
            raise ValueError("no document has two tokens, so that there is nothing to predict: use longer documents")
        order = np.argsort(row_P, kind="stable")
        self.start_P, self.count_P = start_P[order], count_P[order]
        self.first_R = np.searchsorted(row_P[order], np.arange(self.num_rows + 1))

    def row(self, window: int) -> Row:
        tokens_T, targets_T = np.full(self.length, self.shards.pad), np.full(self.length, IGNORE)
        positions_T, segments_T = np.zeros(self.length, np.int64), np.zeros(self.length, np.int64)
        at = number = 0
        for piece in range(self.first_R[window], self.first_R[window + 1]):
            start, count = int(self.start_P[piece]), int(self.count_P[piece])
            read = self.shards.read(start, start + count + 1)
            stop = at + count
            tokens_T[at:stop], targets_T[at:stop] = read[:-1], read[1:]
            positions_T[at:stop], segments_T[at:stop] = np.arange(count), number
            at, number = stop, number + 1
        positions_T[at:], segments_T[at:] = np.arange(self.length - at), number
        return Row(tokens_T=tokens_T, targets_T=targets_T, positions_T=positions_T, segments_T=segments_T)


def _clip(spans_S2: np.ndarray, start: int, stop: int) -> np.ndarray:
    clipped_S2 = np.clip(spans_S2, start, stop)
    return clipped_S2[clipped_S2[:, 0] < clipped_S2[:, 1]]
