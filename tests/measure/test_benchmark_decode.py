"""The line that the decoding benchmark fits, and its look at the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import decode  # noqa: E402


def test_an_exact_line_is_found():
    rounds = [{r: 0.5 + 0.25 * r for r in (1, 2, 8)}] * 3
    assert decode.fit(rounds) == pytest.approx({"a": 0.5, "b": 0.25, "r2": 1.0, "deviation": 0.0})
    holds = {entry["name"]: entry["holds"] for entry in decode.line_entries(rounds, resamples=50)}
    assert all(holds.values())


def test_a_curve_misses_both_targets():
    rounds = [{r: 0.01 * r**3 for r in (1, 2, 4, 8, 16)}] * 3
    line = decode.line_entries(rounds, resamples=50)
    assert [entry["holds"] for entry in line if entry["target"] is not None] == [False, False]


def test_medians_ignore_a_slow_round():
    rounds = [{r: 1.0 + r for r in (1, 2, 4)} for _ in range(5)] + [{1: 100.0, 2: 3.0, 4: 5.0}]
    assert decode.fit(rounds)["b"] == pytest.approx(1.0)


def test_every_count_is_measured_once_a_round_in_changing_order():
    calls: list[int] = []

    def work(count: int) -> float:
        calls.append(count)
        return float(count)

    rounds = decode.measure(work, (1, 2, 3, 4), 6)
    assert len(rounds) == 6 and all(sorted(each) == [1, 2, 3, 4] for each in rounds)
    orders = {tuple(calls[i : i + 4]) for i in range(4, len(calls), 4)}
    assert len(calls) == 28 and len(orders) > 1


def entry(keys: torch.Tensor, values: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(keys=keys, values=values)


def test_scattered_entries_are_counted():
    whole = [entry(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 3)) for _ in range(3)]
    assert decode.scattered(SimpleNamespace(layers=whole), 5) == 0
    turned = entry(torch.zeros(1, 5, 2, 3).transpose(1, 2), torch.zeros(1, 2, 5, 3))
    short = entry(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3))
    shared = entry(whole[0].keys, torch.zeros(1, 2, 5, 3))
    assert decode.scattered(SimpleNamespace(layers=[*whole, turned, short, shared]), 5) == 3


def test_the_cache_of_the_model_has_one_tensor_per_slot():
    entries = decode.cache_entries(decode.huginn_shaped(), 3, 2)
    assert [entry["value"] for entry in entries] == [2 + 4 * 3 + 2, 0]
    assert all(entry["holds"] for entry in entries)
