from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loopwise.train import checkpoints
from loopwise.train.metrics import read_metrics
from loopwise.train.run import CHECKPOINTS, METRICS, Run, TrainingError
from tests.train.runs import assert_same_state, steps_of, timeless, tiny_config, two_stages


@pytest.mark.parametrize("make", [tiny_config, two_stages])
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(make, tmp_path: Path) -> None:
    whole = Run(make(), tmp_path / "whole")
    expected = steps_of(whole)
    for stop_at in random.Random(0).sample(range(1, 6), 3):
        folder = tmp_path / f"stopped-{stop_at}"
        first = steps_of(Run(make(), folder), stop_at)
        torch.manual_seed(stop_at)  # nothing may hang on global generators
        resumed = Run.open(folder)
        assert resumed.carry.step == stop_at
        assert first + steps_of(resumed) == expected
        assert_same_state(resumed.tensors(), whole.tensors())
        lines, other = (read_metrics(path / METRICS) for path in (folder, tmp_path / "whole"))
        assert list(map(timeless, lines)) == list(map(timeless, other))


def test_a_run_goes_on_from_a_checkpoint_before_its_last_line(tmp_path: Path) -> None:
    config = tiny_config(saving=replace(tiny_config().saving, every=2))
    run = Run(config, tmp_path / "run")
    expected = steps_of(run)
    for step in (5, 6):  # as if the process had died after step 5 was logged and before it was saved
        path = checkpoints.steps(tmp_path / "run" / CHECKPOINTS).get(step)
        if path is not None:
            checkpoints.drop_after(tmp_path / "run" / CHECKPOINTS, 4)
    resumed = Run.open(tmp_path / "run")
    assert resumed.carry.step == 4
    assert steps_of(resumed) == expected[4:]
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / METRICS) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_micro_batches_do_not_change_the_loss() -> None:
    config = tiny_config(model=replace(tiny_config().model, dropout=0.0, loop=None), depth=None)
    whole = steps_of(Run(replace(config, micro_batch=None), None))
    parts = steps_of(Run(replace(config, micro_batch=1), None))
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path: Path) -> None:
    run = Run(tiny_config(), tmp_path / "run")
    steps_of(run, 2)
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 3: .*batch [0-9a-f]{16}.*step-00000002"):
        steps_of(run)
    assert Run.open(tmp_path / "run").carry.step == 2


def test_other_data_is_refused(tmp_path: Path) -> None:
    steps_of(Run(tiny_config(), tmp_path / "run"), 2)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["task"]["alphabet"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fingerprint"):
        Run.open(tmp_path / "run")


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    Run(tiny_config(), tmp_path / "run")
    with pytest.raises(ValueError, match="another run"):
        Run(tiny_config(seed=1), tmp_path / "run")


def test_the_model_learns_and_its_final_folder_loads(tmp_path: Path) -> None:
    import loopwise

    run = Run(tiny_config(steps=30, depth=None, ema=None), tmp_path / "run")
    values = steps_of(run)
    assert values[-1]["loss"] < values[0]["loss"]
    model = loopwise.load(tmp_path / "run" / "model")
    state = {name: tensor for name, tensor in run.model.state_dict().items()}
    assert_same_state(dict(model.state_dict()), state)


def test_averaged_weights_are_what_is_saved_and_scored(tmp_path: Path) -> None:
    import loopwise

    run = Run(tiny_config(), tmp_path / "run")
    steps_of(run)
    saved = dict(loopwise.load(tmp_path / "run" / "model").named_parameters())
    live = dict(run.model.named_parameters())
    assert any(not torch.equal(saved[name], live[name]) for name in live)
    with run.averaged():
        assert all(torch.equal(saved[name], parameter) for name, parameter in run.model.named_parameters())
