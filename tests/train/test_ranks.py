"""Runs on two ranks (gloo): the same as on one, stopped and gone on with, sharded, and started by torchrun.

One process runs the ranks' rows as micro-batches: two of them, so that sums of gradients have one order only.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.ranks import on_ranks
from tests.train.runs import assert_same_state, steps_of, timeless, tiny_config, two_stages
from torch.distributed.tensor import DTensor

from loopwise.train import checkpoints
from loopwise.train.config import RunConfig, write_config
from loopwise.train.metrics import read_metrics
from loopwise.train.parallel import count_collectives
from loopwise.train.run import CHECKPOINTS, CONFIG, METRICS, Run
from loopwise.train.world import World

CPU = torch.device("cpu")
CONFIGS = {
    "ddp": tiny_config(),
    "ddp over stages": two_stages(),
    "fsdp": tiny_config(parallel="fsdp"),
    "fsdp over stages": two_stages(parallel="fsdp", checkpoint_loops=True),
}


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a run, gathered."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in state.items()
    }


def open_run(rank: int, config: RunConfig, folder: Path | None) -> Run:
    return Run(config, folder, world=World(rank, 2, CPU))


def trained(run: Run, num_steps: int | None = None) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    values = steps_of(run, num_steps)
    run.close()
    return values, whole(run.tensors())


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(map(timeless, read_metrics(folder / METRICS)))


def uninterrupted_and_stopped(rank: int, folder: Path, stops: dict[str, int]) -> dict[str, Any]:
    """Every config trained to its end, and trained up to a step."""
    found = {}
    for name, config in CONFIGS.items():
        complete = trained(open_run(rank, config, folder / name / "whole"))
        found[name] = complete, trained(open_run(rank, config, folder / name / "stopped"), stops[name])
    return found


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(99 + rank)  # nothing may hang on global generators
    return {
        name: trained(Run.open(folder / name / "stopped", world=World(rank, 2, CPU)))
        for name in CONFIGS
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def stops() -> dict[str, int]:
    draw = random.Random(0)
    return {name: draw.randrange(1, config.num_steps) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def before(folder: Path, stops: dict[str, int]) -> list[dict[str, Any]]:
    return on_ranks(uninterrupted_and_stopped, folder, stops)


@pytest.fixture(scope="module")
def single(before) -> dict[str, Any]:
    """The same runs in one process."""
    return {name: trained(Run(config, None)) for name, config in CONFIGS.items() if "stages" not in name}


@pytest.fixture(scope="module")
def after(folder: Path, before, single) -> list[dict[str, Any]]:
    return on_ranks(resumed, folder)


def test_probe(before, after, stops):
    for name in CONFIGS:
        for rank in range(2):
            (values, state), (first, _) = before[rank][name]
            rest, end = after[rank][name]
            assert first + rest == values, name
            assert_same_state(end, state)
