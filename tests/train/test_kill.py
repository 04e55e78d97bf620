"""A process that is killed at any moment of a save leaves a complete last checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from loopwise.train.checkpoints import clean, latest, load, read_meta, save

NUM_KILLS = 100
FORK = multiprocessing.get_context("fork")


def tensors(step: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    many = {f"layers.{i}.weight": torch.randn(16, 16, generator=made) for i in range(6)}
    return many | {"step": torch.tensor(step), "half": torch.randn(33, generator=made).bfloat16()}


def train(folder: Path, done: Connection) -> None:
    """What a run does: clear up, go on after the latest checkpoint, save each step, and say so once it is saved."""
    clean(folder)
    path = latest(folder)
    step = 0 if path is None else read_meta(path)["step"]
    while True:
        step += 1
        save(folder, step, tensors(step), {"cursor": 10 * step}, keep_last=1, keep_every=50)
        done.send(step)


def killed_after(folder: Path, seconds: float) -> int:
    """Let a child train, kill it so long after its first save, and return the last step that it said was saved."""
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=train, args=(folder, there))
    child.start()
    there.close()
    assert here.poll(20), "the child saves nothing"
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode == -9
    said = 0
    try:
        while True:
            said = here.recv()
    except EOFError:
        return said


def test_a_hundred_kills_at_random_moments_leave_nothing_unloadable(tmp_path):
    began = time.perf_counter()
    for step in range(1, 6):
        save(tmp_path / "pilot", step, tensors(step), {}, keep_last=1)
    one_save = (time.perf_counter() - began) / 5
    chosen, before, torn = random.Random(0), 0, 0
    for _ in range(NUM_KILLS):
        said = killed_after(tmp_path / "run", chosen.uniform(0, 2 * one_save))
        torn += any(name.startswith((".tmp-", ".trash-")) for name in os.listdir(tmp_path / "run"))
        path = latest(tmp_path / "run")
        assert path is not None
        step = read_meta(path)["step"]
        assert step >= said > before, "a checkpoint that was saved is gone"
        given = {name: torch.empty_like(tensor) for name, tensor in tensors(step).items()}
        assert load(path, given)["cursor"] == 10 * step
        assert all(torch.equal(given[name], tensor) for name, tensor in tensors(step).items())
        before = step
    # most of the time of the child is spent inside a save, so that many kills must have met one
    assert torn > NUM_KILLS // 5
