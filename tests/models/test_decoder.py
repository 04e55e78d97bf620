"""First values of our own decoder."""

from __future__ import annotations

import pytest
import torch

from loopwise.loop.update import ConcatConfig
from loopwise.train.models import DecoderModel, Loop


@pytest.mark.parametrize("init", ["pass_state", "pass_input"])
def test_an_adapter_starts_as_its_config_says(init: str) -> None:
    loop = Loop(update=ConcatConfig(init=init))  # type: ignore[arg-type]
    model, _ = DecoderModel(layers=1, width=8, heads=2, plan="core:(0)x2", loop=loop).build(11, seed=0)
    weight = model.model.loops["core"].update.adapter.weight
    state, entered = weight.chunk(2, dim=1)
    passed, other = (state, entered) if init == "pass_state" else (entered, state)
    assert torch.equal(passed, torch.eye(8)) and not other.any()
