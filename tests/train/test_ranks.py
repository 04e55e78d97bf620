"""Runs on two ranks (gloo): the same as on one, stopped and gone on with, sharded, and started by torchrun.

One process runs the ranks' rows as micro-batches, two of them where bits are compared: sums then have one order only.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import loopwise
from loopwise.train import checkpoints
from loopwise.train.config import Evaluation, RunConfig, write_config
from loopwise.train.metrics import read_metrics
from loopwise.train.models import TransformersModel
from loopwise.train.parallel import count_collectives
from loopwise.train.run import CHECKPOINTS, METRICS, Run
from loopwise.train.world import World
from tests.train.ranks import on_ranks
from tests.train.runs import assert_same_state, steps_of, timeless, tiny_config, two_stages

OFTEN = Evaluation(every=2, rows=8, samples=1)  # in between, weights are gathered and averages take their place
CONFIGS = {
    "ddp": tiny_config(evaluation=OFTEN),
    "fsdp": tiny_config(evaluation=OFTEN, parallel="fsdp"),
    "stages": two_stages(evaluation=OFTEN, parallel="fsdp", checkpoint_loops=True),
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
ATTACHED = tiny_config(
    model=TransformersModel(type="llama", config=SIZES | {"num_key_value_heads": 2}, plan="0 core:(1-2)x2 3"),
    parallel="fsdp",
    depth=None,
    ema=None,
    steps=2,
)
TOLERANCE = 1e-5  # of float32 sums in another order, over six steps

State = dict[str, torch.Tensor]
Trained = tuple[list[dict[str, Any]], State]


def open_run(rank: int, config: RunConfig, folder: Path | None = None) -> Run:
    return Run(config, folder, world=World(rank, 2, torch.device("cpu")))


def trained(run: Run, num_steps: int | None = None) -> Trained:
    """The values of every step, and the state afterwards, gathered."""
    values = steps_of(run, num_steps)
    run.close()
    state = run.tensors().items()
    return values, {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in state
    }


@cache
def alone(name: str) -> Trained:
    """The same in one process."""
    return trained(Run(CONFIGS[name], None))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(map(timeless, read_metrics(folder / METRICS)))


def to_the_end_and_to_a_step(rank: int, folder: Path, stops: Mapping[str, int]) -> dict[str, tuple[Trained, Trained]]:
    return {
        name: (
            trained(open_run(rank, config, folder / name / "whole")),
            trained(open_run(rank, config, folder / name / "stopped"), stops[name]),
        )
        for name, config in CONFIGS.items()
    }


def gone_on_with(rank: int, folder: Path) -> dict[str, Trained]:
    torch.manual_seed(99 + rank)  # nothing may hang on global generators
    world = World(rank, 2, torch.device("cpu"))
    return {name: trained(Run.open(folder / name / "resumed", world=world)) for name in CONFIGS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def stops() -> dict[str, int]:
    draw = random.Random(0)
    return {name: draw.randrange(1, config.num_steps) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def on_two(folder: Path, stops: dict[str, int]) -> list[dict[str, tuple[Trained, Trained]]]:
    return on_ranks(to_the_end_and_to_a_step, folder, stops)


@pytest.mark.slow
def test_ranks_that_stop_anywhere_go_on_bit_for_bit(folder: Path, stops: dict[str, int], on_two) -> None:
    for name, stop in stops.items():
        assert [*checkpoints.steps(folder / name / "stopped" / CHECKPOINTS)] == [stop]
        shutil.copytree(folder / name / "stopped", folder / name / "resumed")
    for before, after in zip(on_two, on_ranks(gone_on_with, folder), strict=True):
        for name, ((values, state), (first, _)) in before.items():
            rest, end = after[name]
            assert first + rest == values, name
            assert_same_state(end, state)
    for name in CONFIGS:
        assert lines_of(folder / name / "resumed") == lines_of(folder / name / "whole"), name


def test_ranks_agree(on_two) -> None:
    for name in CONFIGS:
        (values, state), (others, other_state) = (found[name][0] for found in on_two)
        assert values == others, name
        assert_same_state(state, other_state)


def test_replicated_ranks_equal_one_process_bit_for_bit(on_two) -> None:
    values, state = alone("ddp")
    assert on_two[0]["ddp"][0][0] == values
    assert_same_state(on_two[0]["ddp"][0][1], state)


@pytest.mark.parametrize("name", ["fsdp", "stages"])
def test_sharded_ranks_equal_one_process(name: str, on_two) -> None:
    assert_close(on_two[0][name][0], alone(name))


def assert_close(found: Trained, expected: Trained) -> None:
    for got, want in zip(found[0], expected[0], strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert math.isclose(got[name], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (want["step"], name)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_two_ranks_saved_goes_on_in_one_process(
    name: str, folder: Path, tmp_path: Path, stops: dict[str, int], on_two
) -> None:
    shutil.copytree(folder / name / "stopped", tmp_path / "run")
    values, state = trained(Run.open(tmp_path / "run"))
    expected, end = alone(name)
    assert_close((values, state), (expected[stops[name] :], end))
    if name == "ddp":
        assert values == expected[stops[name] :]
        assert_same_state(state, end)


def test_what_one_process_saved_goes_on_on_two_ranks(tmp_path: Path) -> None:
    expected, end = alone("ddp")
    trained(Run(CONFIGS["ddp"], tmp_path), 3)
    for values, state in on_ranks(the_rest, tmp_path):
        assert values == expected[3:]
        assert_same_state(state, end)


def the_rest(rank: int, folder: Path) -> Trained:
    return trained(Run.open(folder, world=World(rank, 2, torch.device("cpu"))))


def collectives_of_steps(rank: int) -> dict[tuple[int, bool], list[tuple[int, int]]]:
    """(all-gathers, reduce-scatters) of two steps by iterations of the core and whether they are run again."""
    found = {}
    for loops in (2, 16):
        for again in (False, True):
            model = replace(tiny_config().model, plan=f"0 core:(1)x{loops} 2")
            config = tiny_config(model=model, parallel="fsdp", depth=None, checkpoint_loops=again, steps=9)
            steps = open_run(rank, config).train()
            found[loops, again] = []
            for _ in range(2):
                with count_collectives() as counted:
                    next(steps)
                found[loops, again].append((counted.all_gathers, counted.reduce_scatters))
    return found


def test_a_step_gathers_as_often_for_2_iterations_as_for_16() -> None:
    for found in on_ranks(collectives_of_steps):
        print(f"(all-gathers, reduce-scatters) of steps by (iterations, recomputed): {found}")
        assert found.keys() == {(loops, again) for loops in (2, 16) for again in (False, True)}
        # The units are the rest, prelude, core and coda.
        assert all(counts == [(4, 4)] * 2 for counts in found.values())


def refusal(rank: int) -> str:
    try:
        open_run(rank, tiny_config(batch_size=5))
    except ValueError as error:
        return str(error)
    raise AssertionError("three rows and two are no equal parts")


def test_a_batch_that_ranks_do_not_divide_is_refused_in_one_line(tmp_path: Path) -> None:
    for message in on_ranks(refusal):
        assert message == "batch_size=5 is not divisible by 2 ranks: use a multiple"


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    config = tiny_config(parallel="fsdp", steps=3)
    write_config(config, tmp_path / "config.json")
    done = torchrun("train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("tiny:") for line in lines) == 1, "only the first rank prints"
    assert "2 x cpu" in lines[0] and lines[-1].startswith("done:")
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    expected = [values["loss"] for values in steps_of(Run(config, None))]
    assert [line["loss"] for line in lines_of(tmp_path / "run") if "loss" in line] == pytest.approx(expected, rel=1e-5)
    assert Run.open(tmp_path / "run").is_done


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port"]
    command = [sys.executable, *start, str(port), "-m", "loopwise", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)


def attached_and_sharded(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    run = open_run(rank, ATTACHED, folder)
    steps_of(run)
    run.close()
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in run.model.state_dict().items()
    }


def test_a_sharded_attached_model_is_written_whole(tmp_path: Path) -> None:
    weights, _ = on_ranks(attached_and_sharded, tmp_path / "run")
    model = loopwise.load(tmp_path / "run" / "model")
    assert str(loopwise.plan_of(model)) == "0 core:(1-2)x2 3"
    assert_same_state(dict(model.state_dict()), weights)
