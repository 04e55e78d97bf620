"""Permutations that are computed, not stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.train.data import permute
from loopwise.train.data.permute import key_of, mix64, permuted
from tests.train.data.corpora import law

KEYS = st.integers(0, 2**64 - 1)


@law
@given(size=st.integers(1, 3000), key=KEYS)
def test_every_position_is_hit_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


@law
@given(size=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_a_position_does_not_depend_on_what_else_is_asked(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permuted(positions, size, key)
    alone = [int(permuted(np.array([position]), size, key)[0]) for position in positions]
    assert together.tolist() == alone
    assert 0 <= together.min() and together.max() < size
    assert len(set(together.tolist())) == len(set(positions.tolist()))


@pytest.mark.parametrize("size", [5, 17, 100])
@pytest.mark.parametrize("by_network", [False, True])
def test_over_many_keys_every_place_is_equally_likely(
    size: int, by_network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_network:
        monkeypatch.setattr(permute, "_SORTED", 0)
    num_keys = 800
    counts = np.zeros((size, size))
    for key in range(num_keys):
        counts[np.arange(size), permuted(np.arange(size), size, key_of(7, key))] += 1
    expected = num_keys / size
    statistic = (size - 1) / size * ((counts - expected) ** 2 / expected).sum()
    # chi-square with (size - 1)^2 degrees of freedom, five standard deviations
    freedom = (size - 1) ** 2
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_part() -> None:
    size = 10_000
    order = permuted(np.arange(size), size, key_of(0))
    distance = np.abs(np.diff(order)).mean()
    assert abs(distance / (size / 3) - 1) < 0.05  # of random places: a third of the length


def test_keys_tell_numbers_and_their_order_apart() -> None:
    keys = {key_of(a, b) for a in range(-3, 30) for b in range(30)}
    assert len(keys) == 33 * 30
    assert key_of(1) != key_of(1, 0) != key_of(0, 1)
    assert key_of(2**70) == key_of(0), "only 64 bits count"


def test_mixing_is_a_bijection_and_fixed() -> None:
    values = np.arange(20_000, dtype=np.uint64)
    assert len(np.unique(mix64(values))) == len(values)
    # The published first outputs of splitmix64 with seed 0: state k times the increment, finalised.
    increment = 0x9E3779B97F4A7C15
    states = np.array([(k * increment) % 2**64 for k in range(3)], np.uint64)
    assert [hex(int(value)) for value in mix64(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
