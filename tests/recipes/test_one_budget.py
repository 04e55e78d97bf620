from __future__ import annotations

import math

import pytest

from loopwise.edit.operators import GradStack, Lidas, Midas
from loopwise.recipes import one_budget as lives
from loopwise.train.config import RunConfig
from loopwise.train.estimate import estimate_run

RUNS = {
    "full depth": lives.plain,
    "half depth": lambda: lives.plain(4),
    "midas": lambda: lives.grown(Midas(b=2)),
    "grad_stack": lambda: lives.grown(GradStack(b=2)),
    "lidas": lambda: lives.grown(Lidas(b=2)),
    "looped": lives.looped,
    "switched on": lambda: lives.switched_on(0.35),
    "grow, loop": lives.grow_then_loop,
    "loop, untie, grow": lives.loop_untie_grow,
    "cooldown": lives.looped_cooldown,
    "midas, cooldown": lambda: lives.looped_cooldown(Midas(b=2)),
    "offsets": lives.offsets,
    "cosine tie": lambda: lives.cosine_tie(10.0),
    "stacked": lambda: lives.stacked(0.35),
}


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    return {name: make() for name, make in RUNS.items()}


def test_all_lives_spend_the_same_flops(configs: dict[str, RunConfig]) -> None:
    spent = {name: estimate_run(config, flops_per_second=1.0).flops for name, config in configs.items()}
    for name, flops in spent.items():
        assert math.isclose(flops, spent["full depth"], rel_tol=0.005), name


def test_what_does_not_grow_has_the_same_data_and_optimizer(configs: dict[str, RunConfig]) -> None:
    first = configs["full depth"]
    for config in configs.values():
        assert (config.data, config.optimizer, config.schedule) == (first.data, first.optimizer, first.schedule)
        assert config.batch_size == first.batch_size


@pytest.mark.parametrize("name", ["midas", "grad_stack", "lidas"])
def test_every_stage_of_a_growing_run_ends_at_a_checkpoint_that_stays(name: str, configs: dict[str, RunConfig]) -> None:
    config, done = configs[name], 0
    for stage in config.stages:
        done += stage.steps
        assert done % (config.saving.keep_every or 0) == 0 and config.saving.every == config.saving.keep_every
