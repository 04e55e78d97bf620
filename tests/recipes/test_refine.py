"""The recurrent-depth model of the decoding benchmark: what it must be for its decoders to make sense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loopwise.decode.freezing import WaveConfig
from loopwise.decode.runner import Runner
from loopwise.decode.sequential import decode_sequential
from loopwise.decode.wavefront import decode_wavefront
from loopwise.loop.depth import DepthSampler
from loopwise.loop.state import NormalState
from loopwise.models.attach import plan_of
from loopwise.recipes import find
from loopwise.recipes.refine import LOOPS, TASK, recurrent
from loopwise.tasks.base import IGNORE, rows
from loopwise.train.models import DecoderModel
from loopwise.train.run import Run


def test_it_is_a_recipe_with_random_depth_and_a_random_first_state() -> None:
    config = find("refine")
    assert isinstance(config.depth, DepthSampler) and config.depth.expected == (2 + LOOPS) / 2
    assert isinstance(config.model, DecoderModel)
    loop = config.model.loop
    assert loop is not None and isinstance(loop.state, NormalState) and loop.update is not None
    assert LOOPS >= 16 and str(LOOPS) in config.model.plan


def test_answers_are_long_and_follow_the_prompt() -> None:
    drawn = rows(TASK, seed=0, index=0, size=16)
    scored_BT = drawn.targets_BT != IGNORE
    assert (scored_BT.sum(axis=1) == 36).all()
    assert (scored_BT == scored_BT[0]).all(), "every row is decoded from the same position on"
    first = int(scored_BT[0].argmax())
    assert scored_BT[0, first : first + 36].all()
    assert (drawn.targets_BT[:, first:-1] == drawn.tokens_BT[:, first + 1 :]).all()


@pytest.fixture(scope="module")
def model():
    config = recurrent("tiny", TASK, width=16, most=4, steps=2, batch_size=4)
    run = Run(replace(config, evaluation=replace(config.evaluation, rows=4, samples=0, loops=())), None)
    for _ in run.train():
        pass
    return run.model.eval()


def test_a_run_of_it_can_be_taken_apart(model) -> None:
    plan = plan_of(model)
    assert plan is not None and plan.counts == {"core": 4}
    runner = Runner(model, num_rows=1, capacity=8)
    assert runner.mixes and runner.ladder.num_rungs == 4 and len(runner.ladder.head) == 1


def test_a_fixed_wave_gives_the_sequential_tokens(model) -> None:
    prompts = rows(TASK, seed=0, index=0, size=3).tokens_BT[:, :37].tolist()
    wave = WaveConfig(freeze="fixed", restart=True, inner=2)
    expected = decode_sequential(model, prompts, max_new_tokens=6).tokens
    assert decode_wavefront(model, prompts, max_new_tokens=6, wave=wave).tokens == expected
    assert torch.tensor(expected).shape == (3, 6)
