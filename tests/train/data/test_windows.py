"""Rows from shards: pure functions of (seed, number), every token once an epoch, packing never crosses."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.train.batch import IGNORE, Batch
from loopwise.train.data.shards import Shards
from loopwise.train.data.source import check_fingerprint
from loopwise.train.data.text import ShardsData
from loopwise.train.data.windows import WindowSource, pack, split_spans
from tests.train.data.corpora import law, numbered, of_bytes

MODES = st.sampled_from(["joined", "packed"])
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def corpus(lengths: list[int]) -> Shards:
    return numbered(Path(tempfile.mkdtemp()) / "out", lengths)


def opened(
    shards: Shards, *, seed: int = 0, length: int = 8, mode: str = "joined", held_out: float = 0.0
) -> WindowSource:
    return WindowSource(shards, seed=seed, length=length, mode=mode, held_out=held_out)


def same(one: Batch, other: Batch) -> bool:
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def stacked(batches: list[Batch]) -> Batch:
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
    values: dict[str, Any] = {}
    for name in names:
        parts = [getattr(batch, name) for batch in batches]
        values[name] = None if parts[0] is None else torch.cat(parts)
    return Batch(**values)


def transitions(batch: Batch) -> Counter[tuple[int, int]]:
    """(token read, token to predict) of every scored position; in a numbered corpus each pair occurs once."""
    assert batch.tokens_BT is not None and batch.targets_BT is not None
    scored = batch.targets_BT != IGNORE
    return Counter(zip(batch.tokens_BT[scored].tolist(), batch.targets_BT[scored].tolist(), strict=True))


@law
@given(lengths=LENGTHS, mode=MODES, length=st.integers(1, 20), seed=st.integers(0, 2**32), data=st.data())
def test_a_batch_is_its_rows_and_ranks_read_slices(
    lengths: list[int], mode: str, length: int, seed: int, data: st.DataObject
) -> None:
    lengths = [*lengths, length + 2]
    source = opened(corpus(lengths), seed=seed, length=length, mode=mode)
    first, per_rank = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 5))
    ranks = data.draw(st.integers(1, 4))
    whole = source.batch(first, ranks * per_rank)
    assert same(whole, stacked([source.batch(first + row, 1) for row in range(ranks * per_rank)]))
    parts = [source.batch(first + rank * per_rank, per_rank) for rank in range(ranks)]
    assert same(whole, stacked(parts))
    again = opened(source.shards, seed=seed, length=length, mode=mode)
    assert same(whole, again.batch(first, ranks * per_rank)), "nothing is remembered"


@law
@given(lengths=LENGTHS, mode=MODES, length=st.integers(1, 20), epoch=st.integers(0, 3))
def test_every_token_is_used_once_an_epoch(lengths: list[int], mode: str, length: int, epoch: int) -> None:
    lengths = [*lengths, length + 2]
    shards = corpus(lengths)
    source = opened(shards, length=length, mode=mode)
    found = transitions(source.batch(epoch * source.num_rows(), source.num_rows()))
    stream = shards.read(0, shards.num_tokens).tolist()
    starts = set(shards.documents.tolist())
    wanted = Counter(
        (stream[place], stream[place + 1])
        for place in range(len(stream) - 1)
        if mode == "joined" or place + 1 not in starts
    )
    assert found == wanted


@law
@given(lengths=LENGTHS, mode=MODES, seed=st.integers(0, 2**32))
def test_epochs_are_permutations_of_the_same_rows(lengths: list[int], mode: str, seed: int) -> None:
    source = opened(corpus([*lengths, 60]), seed=seed, mode=mode)
    count = source.num_rows()
    epochs = [source.batch(epoch * count, count).tokens_BT for epoch in range(3)]
    assert all(rows is not None for rows in epochs)
    first, *others = (sorted(map(tuple, rows.tolist())) for rows in epochs if rows is not None)
    assert all(rows == first for rows in others)


def test_the_order_changes_with_the_seed_and_the_epoch() -> None:
    shards = corpus([500])
    rows = [opened(shards, seed=seed).batch(epoch * 63, 63).tokens_BT for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(tokens.tolist()) for tokens in rows if tokens is not None}) == 4


@law
@given(lengths=LENGTHS, length=st.integers(2, 20))
def test_packing_never_crosses(lengths: list[int], length: int) -> None:
    """Against a naive reading: inside a segment tokens are neighbours in one document, and positions count from 0."""
    shards = corpus([*lengths, length + 2])
    source = opened(shards, length=length, mode="packed")
    batch = source.batch(0, source.num_rows())
    columns = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.segments_BT)
    assert all(column is not None and column.dtype == torch.int64 for column in columns)
    document_of = np.repeat(np.arange(shards.num_documents), np.diff(shards.documents))
    for tokens, targets, positions, segments in zip(*(c.tolist() for c in columns if c is not None), strict=True):
        assert segments[0] == 0 and set(np.diff(segments)) <= {0, 1}
        for number in range(segments[-1] + 1):
            places = [t for t in range(length) if segments[t] == number]
            assert [positions[t] for t in places] == list(range(len(places)))
            scored = [t for t in places if targets[t] != IGNORE]
            assert scored in ([], places), "padding is a segment of its own"
            if not scored:
                assert number == segments[-1] and all(tokens[t] == shards.pad for t in places)
                continue
            stream = [tokens[t] - 3 for t in scored]
            assert stream == list(range(stream[0], stream[0] + len(scored)))
            assert len({document_of[place] for place in (*stream, stream[-1] + 1)}) == 1


def test_short_documents_stay_whole() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 65, size=200).tolist()
    source = opened(corpus(lengths), length=64, mode="packed")
    batch = source.batch(0, source.num_rows())
    assert batch.segments_BT is not None and batch.targets_BT is not None
    pieces = sum(
        len(set(row[target != IGNORE].tolist()))
        for row, target in zip(batch.segments_BT, batch.targets_BT, strict=True)
    )
    assert pieces == len(lengths)
    assert batch.num_items / batch.num_tokens > 0.94, "little is padding"


@law
@given(st.lists(st.integers(1, 30), max_size=60))
def test_packing_fits_and_is_best_fit_decreasing(counts: list[int]) -> None:
    length = 30
    row_P, num_rows = pack(np.array(counts, np.int64), length)
    loads = [0] * num_rows
    for row, count in zip(row_P.tolist(), counts, strict=True):
        loads[row] += count
    assert all(0 < load <= length for load in loads)
    naive: list[int] = []
    for count in sorted(counts, reverse=True):
        rooms = [(length - load, row) for row, load in enumerate(naive) if load + count <= length]
        if rooms:
            naive[min(rooms)[1]] += count
        else:
            naive.append(count)
    assert sorted(loads) == sorted(naive)


@law
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    held_out=st.sampled_from([0.01, 0.1, 0.25, 0.49]),
    shortest=st.integers(2, 20),
)
def test_splits_share_no_token_and_lose_none(lengths: list[int], held_out: float, shortest: int) -> None:
    documents = np.r_[0, np.cumsum(lengths)]
    if documents[-1] < 3 * shortest:
        with pytest.raises(ValueError, match="one row in each of train, valid and test"):
            split_spans(documents, held_out, shortest)
        return
    splits = split_spans(documents, held_out, shortest)
    assert list(splits) == ["train", "valid", "test"] or set(splits) == {"train", "valid", "test"}
    places = np.concatenate([np.arange(*span) for spans in splits.values() for span in spans])
    assert np.array_equal(np.sort(places), np.arange(documents[-1]))
    for spans in splits.values():
        assert (spans[:, 1] - spans[:, 0]).sum() >= shortest
        # No span reaches across the start of a document.
        numbers = np.searchsorted(documents, spans, side="right")
        assert all(start == stop or spans[i, 1] in documents for i, (start, stop) in enumerate(numbers))


def test_whole_documents_are_held_out_where_there_are_enough() -> None:
    documents = np.r_[0, np.cumsum(np.full(1000, 50))]
    splits = split_spans(documents, 0.02, 100)
    assert {split: len(spans) for split, spans in splits.items()} == {"train": 960, "valid": 20, "test": 20}
    assert set(map(tuple, splits["valid"])) <= set(zip(documents[:-1], documents[1:], strict=True))
    # Spread over the corpus, not its end.
    assert splits["valid"][:, 0].min() < 10_000 and splits["valid"][:, 1].max() > 40_000


@law
@given(mode=MODES, lengths=st.sampled_from([[900], [30] * 60]))
def test_held_out_rows_never_occur_in_training(mode: str, lengths: list[int]) -> None:
    shards = corpus(lengths)
    sources = [opened(shards, seed=seed, mode=mode, held_out=0.1) for seed in (0, 1)]
    seen = {}
    for split in ("train", "valid", "test"):
        count = sources[0].num_rows(split)
        assert count > 0
        rows = [source.batch(0, count) if split == "train" else source.held_out(0, count, split) for source in sources]
        assert split == "train" or same(*rows), "the seed has no say in what is held out"
        seen[split] = set(transitions(rows[0]))
    assert not seen["train"] & seen["valid"] and not seen["train"] & seen["test"] and not seen["valid"] & seen["test"]


def test_held_out_rows_repeat_and_are_not_in_corpus_order() -> None:
    source = opened(corpus([2000]), held_out=0.2)
    count = source.num_rows("valid")
    assert same(source.held_out(0, 3), source.held_out(count, 3))
    tokens = source.held_out(0, count).tokens_BT
    assert tokens is not None and tokens[:, 0].tolist() != sorted(tokens[:, 0].tolist())


def test_bad_requests() -> None:
    shards = corpus([100])
    source = opened(shards)
    with pytest.raises(ValueError, match="nothing is held out with held_out=0"):
        source.held_out(0, 1)
    with pytest.raises(ValueError, match="split 'train' is unknown: use valid or test"):
        source.held_out(0, 1, "train")
    with pytest.raises(ValueError, match="row numbers start at 0"):
        source.batch(-1, 1)
    with pytest.raises(ValueError, match="at least 1 row"):
        source.batch(0, 0)
    with pytest.raises(ValueError, match=r"the corpus has 100 tokens, rows of length 100 need 101 \(one row\)"):
        opened(shards, length=100)
    with pytest.raises(ValueError, match="no document has two tokens"):
        opened(corpus([1] * 20), mode="packed")


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    texts = ["some text that is long enough for rows"] * 9
    folders = [of_bytes(tmp_path / "a", texts).folder, of_bytes(tmp_path / "b", [*texts[:-1], "other"]).folder]
    one, other = (ShardsData(folder=str(folder), length=8).open(seed=0) for folder in folders)
    check_fingerprint(one, one.fingerprint)
    check_fingerprint(ShardsData(folder=str(folders[0]), length=8).open(seed=1), one.fingerprint)
    with pytest.raises(ValueError) as caught:
        check_fingerprint(other, one.fingerprint)
    assert one.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)
    others = (
        ShardsData(folder=str(folders[0]), length=9),
        ShardsData(folder=str(folders[0]), length=8, mode="packed"),
        ShardsData(folder=str(folders[0]), length=8, held_out=0.1),
    )
    assert len({one.fingerprint, *(config.open(seed=0).fingerprint for config in others)}) == 4


def test_text_comes_back(tmp_path: Path) -> None:
    texts = [f"document {number} says hello. " * 3 for number in range(20)]
    source = ShardsData(folder=str(of_bytes(tmp_path / "a", texts).folder), length=32, held_out=0.0).open(seed=3)
    tokens = source.batch(0, 1).tokens_BT
    assert tokens is not None
    stream = "<|eos|>".join(texts) + "<|eos|>"
    assert source.tokenizer.decode(tokens[0]) in stream
    assert source.save_tokenizer(tmp_path / "tokenizer") and (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert "rows of 32 an epoch" in source.describe()
