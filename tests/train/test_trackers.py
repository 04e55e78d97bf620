"""Trackers: each is an extra; those that are installed truly receive the numbers."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest

from loopwise.loop.config import from_dict, to_dict
from loopwise.train.trackers import Tracker, TrackioTracker, WandbTracker, numbers

PACKAGES = ("tensorboard", "trackio", "wandb")
STEP = {"loss": 0.5, "time": {"tokens_per_second": 3.0}, "eval/exact@8": 0.25, "note": "x", "on": True, "list": [1.0]}


def tracker(package: str) -> Tracker:
    found = from_dict({"kind": f"tracker.{package}"})
    assert isinstance(found, Tracker)
    return found


def installed(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.param(package, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


def test_numbers_are_flattened_and_the_rest_left_out():
    found = dict(numbers({"step": 3} | STEP | {"deep": {"er": {"step": 1}}}))
    assert found == {"loss": 0.5, "time/tokens_per_second": 3.0, "eval/exact@8": 0.25, "deep/er/step": 1.0}


@pytest.mark.parametrize("package", PACKAGES)
def test_configs_go_through_json(package):
    assert from_dict(to_dict(tracker(package))) == tracker(package)


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="mode='later' must be one of 'auto', 'online', 'offline'"):
        WandbTracker(mode="later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="project=3"):
        TrackioTracker(project=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself uses for "cannot be imported"
    with pytest.raises(ValueError, match=rf"tracker.{package} needs .*pip install 'loopwise\[{package}\]'") as caught:
        tracker(package).open(folder=tmp_path, name="run", config={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", [installed(package) for package in PACKAGES])
def test_an_installed_tracker_takes_steps_ends_and_goes_on(package, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = {"name": "run", "optimizer": {"lr": 0.001}, "stages": [{"steps": 3}]}
    for start in (0, 2):
        tracking = tracker(package).open(folder=tmp_path, name="run", config=config, step=start)
        for step in (start + 1, start + 2):
            tracking.log(step, STEP | {"loss": 1 / step})
        tracking.log(start + 3, {"loss": math.nan})
        tracking.close()
        tracking.close()
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_a_resumed_curve_without_the_steps_that_were_lost(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0, 4: 40.0})):
        tracking = tracker("tensorboard").open(folder=tmp_path, name="run", config={"a": {"b": 1}}, step=start)
        for step, loss in values.items():
            tracking.log(step, {"loss": loss, "time": {"step": 0.5}})
        tracking.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(item.step, item.value) for item in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "time/step"}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_stays_offline_in_the_run_folder_and_keeps_its_id(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for start in (0, 2):
        tracking = WandbTracker().open(folder=tmp_path, name="run", config={}, step=start)
        tracking.log(start + 1, {"loss": 1.0})
        tracking.close()
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert written == [f"run-{(tmp_path / 'wandb' / 'run-id').read_text()}.wandb"] * 2


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_one_run(tmp_path):
    """In a process of its own, as trackio reads its folder when imported."""
    code = (
        "from pathlib import Path; from loopwise.train.trackers import TrackioTracker; import trackio\n"
        "for start in (0, 2):\n"
        "    t = TrackioTracker().open(folder=Path('.'), name='run', config={'a': 1}, step=start)\n"
        "    t.log(start + 1, {'loss': 1.0}); t.close()\n"
        "print([run.name for run in trackio.Api().runs('loopwise')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "['run']" in done.stdout, done.stderr
