"""Segments: restarts, halting, and first values of streams. Shapes: B rows, T tokens, D width."""

from __future__ import annotations

import pytest
import torch

from loopwise.loop import config as components
from loopwise.loop.carry import Carry, SegmentHalting
from loopwise.loop.streams import FirstValues, cut_normal_


def test_only_the_named_rows_restart() -> None:
    value = torch.arange(24.0).view(3, 2, 4)
    carry = Carry(streams={"z": value}, steps=torch.tensor([4, 5, 6]), halted=torch.tensor([True, False, True]))
    rows, first = torch.tensor([True, False, False]), {"z": torch.full([4], -1.0)}
    again = carry.restart(rows, first)
    assert (again.streams["z"][0] == -1).all() and torch.equal(again.streams["z"][1:], value[1:])
    assert again.steps.tolist() == [0, 5, 6] and again.halted.tolist() == [False, False, True]
    assert torch.equal(carry.streams["z"], value) and carry.steps.tolist() == [4, 5, 6]


def test_evaluation_stops_at_the_last_segment_only() -> None:
    rule = SegmentHalting(max_steps=3, exploration=0.5)
    steps, high, low = torch.tensor([1, 2, 3, 4]), torch.full([4], 9.0), torch.full([4], -9.0)
    assert rule.halts(steps, high, low).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("rule", "expected"), [("greater", [True, False, False, True]), ("positive", [True, True, False, False])]
)
def test_rules_in_training(rule: str, expected: list[bool]) -> None:
    halt, go = torch.tensor([1.0, 1.0, -2.0, -1.0]), torch.tensor([0.5, 2.0, -1.0, -2.0])
    found = SegmentHalting(max_steps=8, rule=rule).halts(torch.ones(4, dtype=torch.int64), halt, go, training=True)
    assert found.tolist() == expected


def test_one_segment_reads_no_logits() -> None:
    rule = SegmentHalting(max_steps=1, exploration=1.0)
    nan = torch.full([2], torch.nan)
    assert rule.halts(torch.ones(2, dtype=torch.int64), nan, nan, training=True).all()


def test_exploration_draws_a_minimum_from_two_to_the_most() -> None:
    rule, rows = SegmentHalting(max_steps=5, exploration=0.25), 40_000
    wants, never = torch.ones(rows), torch.zeros(rows)
    shares = []
    for step in range(1, 6):
        generator = torch.Generator().manual_seed(1)  # the same minima at every step
        steps = torch.full([rows], step)
        shares.append(rule.halts(steps, wants, never, training=True, generator=generator).float().mean().item())
    assert shares == pytest.approx([0.75, 0.8125, 0.875, 0.9375, 1.0], abs=0.01)


def test_exploration_needs_a_generator() -> None:
    steps = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="generator"):
        SegmentHalting(exploration=0.1).halts(steps, torch.zeros(1), torch.zeros(1), training=True)


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"exploration": 1.5}, {"rule": "largest"}, {"max_steps": 2.0}])
def test_bad_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SegmentHalting(**wrong)


def test_json_form() -> None:
    rule = SegmentHalting(max_steps=7, rule="positive", exploration=0.5)
    assert components.from_dict(components.to_dict(rule)) == rule
    assert components.from_dict({"kind": "segments"}, axis="halting") == SegmentHalting()


def test_first_values() -> None:
    first = FirstValues(6, learned=["a"], fixed=["b", "c"])
    assert first["a"].tolist() == [0.0] * 6 and not torch.equal(first["b"], first["c"])
    assert [name for name, _ in first.named_parameters()] == ["a"]
    assert set(first.state_dict()) == {"a", "b", "c"}


def test_cut_normal_has_the_wanted_deviation() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = cut_normal_(torch.empty(400_000), 0.5)
    assert draw.std().item() == pytest.approx(0.5, rel=0.01)
    assert draw.abs().max() <= 2 * 0.5 / 0.8796 + 1e-4
