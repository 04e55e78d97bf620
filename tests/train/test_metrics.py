"""Metrics: lines that survive kills, full disks and resumed runs."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.train.metrics import Metrics, read_metrics

FORK = multiprocessing.get_context("fork")


def test_lines_come_back_in_order_and_can_be_read_while_open(tmp_path):
    with Metrics(tmp_path / "new" / "metrics.jsonl") as metrics:
        metrics.append(step=1, loss=0.5, time={"step": 0.1}, loops=[1, 2], note="ä\u2028\n", none=None, on=True)
        assert len(read_metrics(metrics.path)) == 1
        metrics.append(step=1, loss=torch.tensor(0.25), rate=np.float32(0.5), count=np.int64(3))
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "time": {"step": 0.1}, "loops": [1, 2], "note": "ä\u2028\n", "none": None, "on": True},
        {"step": 1, "loss": 0.25, "rate": 0.5, "count": 3},
    ]
    metrics.close()


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    with Metrics(tmp_path / "m") as metrics:
        metrics.append(step=0, a=math.nan, b=[math.inf, {"c": -math.inf}], d=torch.tensor(math.nan))

    def refuse(constant):
        raise AssertionError(constant)

    raw = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert raw == {"step": 0, "a": "NaN", "b": ["Infinity", {"c": "-Infinity"}], "d": "NaN"}
    (line,) = read_metrics(tmp_path / "m")
    assert math.isnan(line["a"]) and math.isnan(line["d"])
    assert line["b"] == [math.inf, {"c": -math.inf}]


@given(st.lists(st.floats(), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_floats_come_back_bit_for_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("metrics") / "m"
    with Metrics(path) as metrics:
        metrics.append(step=0, values=values)
    (line,) = read_metrics(path)
    same = [a == b and math.copysign(1, a) == math.copysign(1, b) for a, b in zip(line["values"], values, strict=True)]
    assert all(ok or math.isnan(value) for ok, value in zip(same, values, strict=True))


def test_rewind_drops_the_lines_after_a_step_and_appending_goes_on(tmp_path):
    metrics = Metrics(tmp_path / "m")
    for step in (1, 2, 2, 3, 4):
        metrics.append(step=step)
    metrics.rewind(2)
    metrics.append(step=3, again=True)
    metrics.close()
    assert read_metrics(tmp_path / "m") == [{"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "again": True}]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_an_unfinished_last_line_is_left_out_and_cut_off_when_opened(tmp_path, cut):
    path = tmp_path / "m"
    with Metrics(path) as metrics:
        metrics.append(step=1, loss=1.0)
        metrics.append(step=2, loss="x" * 5000)
    path.write_bytes(path.read_bytes()[: -cut * 170])
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    with Metrics(path) as metrics:
        metrics.append(step=2)
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2}]


def test_a_file_that_is_one_unfinished_line_is_empty(tmp_path):
    (tmp_path / "m").write_text('{"step": 1')
    assert read_metrics(tmp_path / "m") == []
    Metrics(tmp_path / "m").close()
    assert (tmp_path / "m").read_bytes() == b""


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', ""])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "m").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"m:2 is no JSON object with an integer") as caught:
        read_metrics(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read metrics file .*absent: No such file"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot open metrics file .*Is a directory"):
        Metrics(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="no metrics file"):
        read_metrics(tmp_path / "binary")


def fill_the_disk(path: Path) -> None:
    metrics = Metrics(path)
    metrics.append(step=1)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, resource.RLIM_INFINITY))
    with pytest.raises(ValueError, match="cannot write metrics file .*File too large"):
        metrics.append(step=2, loss=0.5)
    assert path.stat().st_size == size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    metrics.append(step=2)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_full_disk_leaves_whole_lines_and_appending_may_go_on(tmp_path):
    child = FORK.Process(target=fill_the_disk, args=(tmp_path / "m",))
    child.start()
    child.join(30)
    assert child.exitcode == 0
