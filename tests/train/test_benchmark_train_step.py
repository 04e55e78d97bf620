"""The benchmark of a training step: both sides do the same work, bytes are counted right, verdicts are."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_step  # noqa: E402
from train_step import HandWritten, Point  # noqa: E402

from loopwise.train.models import DecoderModel  # noqa: E402


def small():
    return train_step.sizes("cpu")["small"][0]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_hand_written_loop_trains_as_a_run_does(tied, scale):
    model = DecoderModel(layers=3, width=16, heads=2, plan="0 core:(1)x3 2", tie_embeddings=tied)
    config = train_step.training("tiny", model, small().data, 4, scale)
    hand = HandWritten(config)
    with train_step.endless(config) as (run, step):
        ours, theirs = [step()["loss"] for _ in range(8)], [hand.step() for _ in range(8)]
    train_step.check_losses("tiny", ours, theirs, tolerance=1e-4 if scale == "cpu" else 1e-2)
    assert len(set(theirs)) == 8
    if scale == "gpu":
        return  # in bfloat16, which rounds
    for mine, other in zip(run.model.parameters(), hand.parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_other_losses_end_the_benchmark():
    with pytest.raises(SystemExit, match="not the same work"):
        train_step.check_losses("tiny", [1.0, 2.0], [1.0, 2.1], tolerance=1e-2)


def test_a_run_over_itself_is_measured():
    entries = train_step.overhead_entries("small", replace(small(), batch_size=2), 1, 20, 1e12)
    names = ["step over a hand-written loop", "tokens/s", "model FLOPs utilisation", "loss after 29 steps"]
    assert [entry["name"] for entry in entries] == [f"small: {name}" for name in names]
    assert entries[1]["ci95"][0] <= entries[1]["value"] <= entries[1]["ci95"][1]
    assert not entries[2]["holds"] and entries[2]["target"] == 0.45


def test_saved_storages_are_counted_once():
    weight = torch.ones(3, 5, requires_grad=True)
    inputs = torch.ones(7, 3, requires_grad=True)
    with train_step.saved_tensors() as found:
        hidden = inputs @ weight  # saves both
        (hidden.exp() * hidden).sum()  # saves what exp gives, and hidden
    assert sorted(found.values()) == sorted(4 * size for size in (15, 21, 35, 35))


@pytest.fixture
def tiny_points(monkeypatch):
    config = Point.config

    def tiny(point: Point):
        made = config(point)
        return replace(made, model=replace(made.model, width=16, heads=2), data=small().data, batch_size=2)

    monkeypatch.setattr(Point, "config", tiny)


def test_what_is_saved_over_iterations(tiny_points):
    def saved(loops: int, variant: str) -> int:
        return train_step.measure_memory(Point(loops=loops, variant=variant))["saved"]

    assert saved(16, "window") == saved(4, "window") == saved(4, "full")
    one = saved(5, "full") - saved(4, "full")
    assert saved(16, "full") - saved(4, "full") == 12 * one
    state = 4 * 2 * 17 * 16  # float32 of two rows
    assert saved(16, "recomputed") - saved(4, "recomputed") == 12 * state < 6 * one


def test_verdicts_on_memory(tiny_points):
    def measure(point: Point) -> dict[str, int]:
        return {"saved": 100, "peak": 100 + (point.loops if point.variant == "window" else 0)}

    entries = {entry["name"]: entry for entry in train_step.memory_entries("cpu", measure)}
    assert entries["window of 4: saved bytes, r = 16 over 4"]["holds"]
    assert not entries["window of 4: peak bytes, r = 16 over 4"]["holds"]  # 116 / 104
    assert entries["full gradient: peak bytes at r = 8"]["value"] == 100
    assert entries["full gradient: peak bytes, r = 16 over 4"]["target"] is None


def test_every_point_is_timed(tiny_points):
    entries = train_step.time_entries("cpu", 2)
    assert len(entries) == len(train_step.VARIANTS) * len(train_step.LOOPS)
    assert all(entry["value"] > 0 and entry["holds"] for entry in entries)


def test_a_point_in_a_process_of_its_own():
    found = train_step.in_new_process(Point(loops=1, variant="full"))
    assert 0 < found["saved"] < found["peak"]


def test_the_peak_of_a_device():
    assert train_step.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert train_step.peak_of("NVIDIA H100 PCIe") == 756e12
    with pytest.raises(SystemExit, match="--peak"):
        train_step.peak_of("Abacus 9000")
