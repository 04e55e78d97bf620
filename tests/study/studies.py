"""Runs that take a second, for tests of studies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loopwise.study.pool import Job, config_hash
from loopwise.study.worker import perform
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import Evaluation, RunConfig, Saving
from loopwise.train.data.generated import TaskData
from loopwise.train.models import DecoderModel
from loopwise.train.optim import AdamWConfig


def small(**values: Any) -> RunConfig:
    """A looped model of one layer for a few steps."""
    config = RunConfig(
        name="small",
        model=DecoderModel(layers=1, width=16, heads=2, plan="core:(0)x2"),
        data=TaskData(task=PHop(context=12, alphabet=3, hops=(1, 2))),
        steps=6,
        batch_size=4,
        optimizer=AdamWConfig(lr=3e-3),
        evaluation=Evaluation(every=2, rows=16, loops=(1, 3), samples=0),
        saving=Saving(every=2),
        log_every=2,
    )
    return replace(config, **values)


def do_here(jobs: Iterable[Job], folder: Path) -> None:
    """Do the runs in this process, so that a study finds them finished and starts no others."""
    for job in jobs:
        perform(job.config, folder / config_hash(job.config), rows=job.rows, loops=job.scored_loops)
