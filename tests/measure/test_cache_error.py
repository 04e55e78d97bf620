"""The measured error of approximate cache policies."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.measure.cache import cache_error


@pytest.fixture
def looped():
    return loopwise.attach(tiny_model("llama"), "0 core:(1-4)x3 5")


def test_the_exact_policy_has_no_error(looped):
    error = cache_error(looped, tiny_inputs(looped, batch=1), "own")
    assert error.max_abs == 0.0 and error.mean_kl == 0.0 and error.same_top1 == 1.0


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "own/last"])
def test_approximate_policies_have_one_and_the_models_own_is_put_back(looped, policy):
    ids_BT = tiny_inputs(looped, batch=1)
    want = looped(ids_BT).logits
    error = cache_error(looped, ids_BT, policy)
    assert error.max_abs > 1e-3 and error.mean_kl > 0
    assert policy in str(error) and "approximate" in str(error)
    assert torch.equal(looped(ids_BT).logits, want)


def test_a_ring_as_long_as_the_loop_is_exact(looped):
    assert cache_error(looped, tiny_inputs(looped, batch=1), "ring(3)").max_abs < 1e-5


def test_bad_arguments(looped):
    ids_BT = tiny_inputs(looped, batch=1)
    for ids, policy in ((ids_BT[:, :1], "last"), (ids_BT, "lats"), (tiny_inputs(looped, batch=2), "last")):
        with pytest.raises(ValueError):
            cache_error(looped, ids, policy)
    with pytest.raises(ValueError, match="no plan"):
        cache_error(tiny_model("llama"), ids_BT, "last")
