"""Rows that tasks draw, and mixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.loop import config
from loopwise.tasks.base import IGNORE, rows
from loopwise.tasks.induction import Induction
from loopwise.tasks.regression import LinearRegression, points
from loopwise.train.batch import Batch, Points
from loopwise.train.data.batches import join, take
from loopwise.train.data.generated import BLOCK, RegressionData, TaskData
from loopwise.train.data.mix import STRETCH, MixData
from loopwise.train.data.source import DataConfig
from loopwise.train.data.vocabulary import vocabulary_tokenizer
from tests.train.data.corpora import law


def echo(size: int = 6) -> Induction:
    """Write a word of ten letters a second time."""
    return Induction(symbols=10, sizes=(size,))


TASK = TaskData(task=echo())
PROMPTS = RegressionData(task=LinearRegression(inputs=3, num_points=5))
MIXED = MixData(sources=(TASK, TaskData(task=echo(4))), weights=(3.0, 1.0))
CONFIGS = st.sampled_from(
    [TASK, TaskData(task=echo(), rows=100), PROMPTS, RegressionData(task=PROMPTS.task, rows=70), MIXED]
)


def columns(batch: Batch) -> dict[str, torch.Tensor]:
    if batch.points is not None:
        return {"xs": batch.points.xs_BNI, "ys": batch.points.ys_BN}
    assert batch.tokens_BT is not None and batch.targets_BT is not None
    return {"tokens": batch.tokens_BT, "targets": batch.targets_BT} | batch.keys


def same(one: Batch, other: Batch) -> bool:
    first, second = columns(one), columns(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@law
@given(data_config=CONFIGS, seed=st.integers(0, 2**40), data=st.data())
def test_a_batch_is_its_rows_and_ranks_read_slices(data_config: DataConfig, seed: int, data: st.DataObject) -> None:
    source = data_config.open(seed=seed)
    first = data.draw(st.integers(0, 2500))
    ranks, per_rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    parts = [data_config.open(seed=seed).batch(first + rank * per_rank, per_rank) for rank in range(ranks)]
    alone = [source.batch(first + row, 1) for row in range(ranks * per_rank)]
    whole = source.batch(first, ranks * per_rank)
    assert same(whole, join(parts)) and same(whole, join(alone))
    held = source.held_out(first, per_rank)
    assert same(held, data_config.open(seed=seed + 1).held_out(first, per_rank)), "the seed has no say"


def test_rows_are_those_of_the_task() -> None:
    source = TASK.open(seed=5)
    drawn = rows(echo(), seed=5, index=2, size=BLOCK)
    batch = source.batch(2 * BLOCK, BLOCK)
    found = columns(batch)
    assert np.array_equal(found["tokens"].numpy(), drawn.tokens_BT)
    assert np.array_equal(found["targets"].numpy(), drawn.targets_BT)
    assert np.array_equal(found["size"].numpy(), drawn.keys["size"])
    assert found["tokens"].dtype == found["targets"].dtype == torch.int64
    assert source.num_rows() is None
    for split in ("valid", "test"):
        wanted = rows(echo(), seed=0, index=0, size=BLOCK, split=split)
        assert np.array_equal(columns(source.held_out(0, BLOCK, split))["tokens"].numpy(), wanted.tokens_BT)
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        source.held_out(0, 1, "dev")


def test_prompts_are_those_of_the_task() -> None:
    drawn = points(LinearRegression(inputs=3, num_points=5), seed=5, index=1, size=BLOCK)
    found = PROMPTS.open(seed=5).batch(BLOCK, BLOCK).points
    assert found is not None and np.array_equal(found.xs_BNI.numpy(), drawn.xs_BNI)
    assert np.array_equal(found.ys_BN.numpy(), drawn.ys_BN)
    other = PROMPTS.open(seed=5).held_out(BLOCK, BLOCK).points
    assert other is not None and not torch.equal(other.ys_BN, found.ys_BN)


def test_a_limited_set_repeats_every_row_once_an_epoch() -> None:
    source = TaskData(task=echo(), rows=100).open(seed=1)
    epochs = [columns(source.batch(100 * epoch, 100))["tokens"].tolist() for epoch in range(3)]
    endless = columns(TASK.open(seed=1).batch(0, 100))["tokens"].tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) == sorted(endless)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != endless
    assert source.num_rows() == 100
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        TaskData(task=echo(), rows=0)


def test_seeds_and_fingerprints() -> None:
    one, other = TASK.open(seed=0), TASK.open(seed=1)
    assert one.fingerprint == other.fingerprint and not same(one.batch(0, 4), other.batch(0, 4))
    configs = (TASK, TaskData(task=echo(5)), TaskData(task=echo(), rows=9), PROMPTS, MIXED)
    assert len({data_config.open(seed=0).fingerprint for data_config in configs}) == len(configs)


def test_a_generator_that_changed_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TASK.open(seed=0).fingerprint
    draw = Induction.draw
    monkeypatch.setattr(Induction, "draw", lambda self, rng, size: draw(self, np.random.default_rng(1), size))
    assert TASK.open(seed=0).fingerprint != before


def test_a_mix_has_its_shares_in_every_stretch_and_skips_no_row() -> None:
    assert MIXED.quotas == (750, 250)
    source = MIXED.open(seed=3)
    batch = source.batch(0, 2 * STRETCH)
    origin, tokens = batch.keys["source"], columns(batch)["tokens"]
    for stretch in range(2):
        counts = torch.bincount(origin[stretch * STRETCH : (stretch + 1) * STRETCH])
        assert counts.tolist() == [750, 250]
    assert tokens.shape[1] == source.length == 12
    for number, inner in enumerate(source.sources):
        of_one = tokens[origin == number][:, : inner.length]
        assert torch.equal(of_one, columns(inner.batch(0, len(of_one)))["tokens"]), "in order, without gaps"
        assert (tokens[origin == number][:, inner.length :] == 0).all()
    assert len(set(origin[:40].tolist())) == 2, "interleaved, not one after the other"
    assert not torch.equal(origin, MIXED.open(seed=4).batch(0, 2 * STRETCH).keys["source"])


@law
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
def test_quotas_are_the_nearest_shares(weights: list[float]) -> None:
    quotas = MixData(sources=(TASK,) * len(weights), weights=tuple(weights)).quotas
    assert sum(quotas) == STRETCH
    assert all(
        abs(quota / STRETCH - weight / sum(weights)) < 1 / STRETCH
        for quota, weight in zip(quotas, weights, strict=True)
    )


def test_a_mix_of_two_copies_reads_different_rows() -> None:
    source = MixData(sources=(TASK, TASK)).open(seed=0)
    batch = source.batch(0, 100)
    tokens, origin = columns(batch)["tokens"], batch.keys["source"]
    assert not {str(row) for row in tokens[origin == 0].tolist()} & {str(row) for row in tokens[origin == 1].tolist()}


def test_mixes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sources\[1\] has another vocabulary \(0 ids\) than sources\[0\] \(12 ids\)"):
        MixData(sources=(TASK, PROMPTS)).open(seed=0)
    with pytest.raises(ValueError, match="must hold at least one"):
        MixData(sources=())
    with pytest.raises(ValueError, match="must hold 2 numbers, one for each source"):
        MixData(sources=(TASK, TASK), weights=(1.0,))
    with pytest.raises(ValueError, match="must be above 0"):
        MixData(sources=(TASK, TASK), weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="must give every source at least 1 of 1000 rows"):
        MixData(sources=(TASK, TASK), weights=(1.0, 1e-6))


def test_configs_survive_json() -> None:
    for data_config in (TASK, TaskData(task=echo(3), rows=7), PROMPTS, MIXED):
        assert config.from_dict(config.to_dict(data_config)) == data_config
    assert {"data.task", "data.regression", "data.mix", "data.text", "data.shards"} <= set(config.kinds())


def test_joining_fills_up_positions_and_documents() -> None:
    ones = torch.ones(2, 3, dtype=torch.int64)
    plain = Batch(tokens_BT=ones, targets_BT=ones, keys={"a": torch.tensor([1, 2])})
    packed = Batch(
        tokens_BT=torch.full((1, 5), 7),
        targets_BT=torch.full((1, 5), 7),
        positions_BT=torch.tensor([[0, 1, 0, 1, 2]]),
        segments_BT=torch.tensor([[0, 0, 1, 1, 1]]),
    )
    both = join([plain, packed], pad=9)
    assert both.tokens_BT is not None and both.tokens_BT.tolist() == [[1, 1, 1, 9, 9]] * 2 + [[7] * 5]
    assert both.targets_BT is not None and both.targets_BT[0].tolist() == [1, 1, 1, IGNORE, IGNORE]
    assert both.positions_BT is not None and both.positions_BT.tolist() == [[0, 1, 2, 0, 1]] * 2 + [[0, 1, 0, 1, 2]]
    assert both.segments_BT is not None and both.segments_BT.tolist() == [[0, 0, 0, 1, 1]] * 2 + [[0, 0, 1, 1, 1]]
    assert both.keys["a"].tolist() == [1, 2, -1]
    picked = take(both, torch.tensor([2, 0]))
    assert picked.keys["a"].tolist() == [-1, 1] and picked.num_rows == 2
    prompts = Batch(points=Points(xs_BNI=torch.zeros(2, 3, 1), ys_BN=torch.tensor([[1.0] * 3, [2.0] * 3])))
    joined = join([prompts, take(prompts, torch.tensor([1]))]).points
    assert joined is not None and joined.ys_BN[:, 0].tolist() == [1, 2, 2]


def test_symbols_have_a_tokenizer() -> None:
    tokenizer = TASK.open(seed=0).tokenizer
    assert tokenizer("d h | d")["input_ids"] == [5, 9, 1, 5]
    assert tokenizer.decode([5, 9, 1]) == "d h |" and tokenizer.pad_token_id == 0
    letters = vocabulary_tokenizer(["<pad>", "a", "b", "\n"], "")
    assert letters("ab\nb")["input_ids"] == [1, 2, 3, 2] and letters.decode([1, 2, 3, 2]) == "ab\nb"
    assert vocabulary_tokenizer(["<pad>", "two words"], " ") is None
    assert vocabulary_tokenizer(["<pad>", "ab", "a"], "") is None
    assert vocabulary_tokenizer(["a", "a"], " ") is None
