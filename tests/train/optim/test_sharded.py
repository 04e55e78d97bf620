"""Sharded parameters (FSDP2) on two processes against one process: the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loopwise.train.optim import (
    AdamATan2Config,
    AdamWConfig,
    Ema,
    MuonConfig,
    NamedOptimizer,
    OptimizerConfig,
    clip_gradients,
    trainable,
)
from tests.train.optim.naive import Small

CONFIGS = (AdamWConfig(), AdamATan2Config(), MuonConfig(lr=3e-3), MuonConfig(lr=3e-3, scale="original", nesterov=False))
STEPS, SPLIT, RANKS = 6, 3, 2


def run(model: Small, optimizer: NamedOptimizer, ema: Ema, first: int, stop: int) -> None:
    for step in range(first, stop):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step(1 / (1 + step))
        ema.update(step)


def everything(optimizer: NamedOptimizer, ema: Ema) -> dict[str, torch.Tensor]:
    """Parameters, moments and averages, whole."""
    found = {name: value.detach() for name, value in optimizer.parameters.items()} | optimizer.state() | ema.state()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value.clone() for key, value in found.items()}


def alone(config: OptimizerConfig) -> dict[str, torch.Tensor]:
    model = Small()
    optimizer, ema = config.build(trainable(model)), Ema(trainable(model))
    run(model, optimizer, ema, 0, STEPS)
    return everything(optimizer, ema)


def beside() -> nn.Parameter:
    """A parameter that is on every rank, with a gradient of norm 5."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    return parameter


def work(rank: int, folder: str, configs: Sequence[OptimizerConfig]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))

    def sharded(seed: int = 0) -> Small:
        model = Small(seed)
        # every rank reads the same batch, so the mean over the ranks is exactly the gradient of one process
        fully_shard(model, mesh=mesh)
        return model

    for number, config in enumerate(configs):
        model = sharded()
        optimizer, ema = config.build(trainable(model)), Ema(trainable(model))
        run(model, optimizer, ema, 0, SPLIT)
        # go on in a second model, from copies of what the first one holds
        later = sharded(seed=5)
        resumed, average = config.build(trainable(later)), Ema(trainable(later))
        with torch.no_grad():
            for name, value in optimizer.parameters.items():
                resumed.parameters[name].copy_(value)
        resumed.load_state({key: value.clone() for key, value in optimizer.state().items()})
        average.load_state({key: value.clone() for key, value in ema.state().items()})
        run(later, resumed, average, SPLIT, STEPS)
        before = everything(resumed, average)
        with average.swapped():
            inside = everything(resumed, average)
            assert torch.equal(inside["lm_head.weight"], before["lm_head.weight/average"])
        found = everything(resumed, average)
        assert all(torch.equal(found[key], value) for key, value in before.items())
        assert all(isinstance(value, DTensor) for value in resumed.parameters.values())
        if rank == 0:
            torch.save(found, f"{folder}/{number}.pt")

    model = sharded()
    model.loss(0).backward()
    norms = [clip_gradients(model, 0.01), clip_gradients(model)]
    norms += [clip_gradients([*model.parameters(), beside()]), clip_gradients(model)]
    torch.save(norms, f"{folder}/norms{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, args=(str(path), CONFIGS), nprocs=RANKS)
    return path


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_two_processes_are_one(folder: Path, number: int) -> None:
    found, wanted = torch.load(folder / f"{number}.pt"), alone(CONFIGS[number])
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_the_norm_is_that_of_the_whole_gradient(folder: Path) -> None:
    model = Small()
    model.loss(0).backward()
    wanted = [clip_gradients(model, 0.01), clip_gradients(model)]
    wanted += [clip_gradients([*model.parameters(), beside()]), clip_gradients(model)]
    first, second = (torch.load(folder / f"norms{rank}.pt") for rank in range(RANKS))
    assert first == second == pytest.approx(wanted, rel=1e-5)
    assert wanted[0] > 0.05
    assert wanted[1] <= 0.01
    assert wanted[2] == pytest.approx(5, rel=1e-4)
