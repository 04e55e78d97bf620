"""Estimates before a run: FLOPs exactly as the run counts them, memory against what is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loopwise.loop.config import to_dict
from loopwise.loop.depth import FixedDepth, PoissonDepth, UniformDepth
from loopwise.measure.cost import cost_of
from loopwise.models.attach import plan_of
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import RunConfig
from loopwise.train.data.generated import TaskData
from loopwise.train.estimate import Estimate, estimate_run, matmul_flops, memory_of
from loopwise.train.memory import held_bytes, peak_bytes, reset_peak
from loopwise.train.models import DecoderModel
from loopwise.train.optim import AdamATan2Config, MuonConfig
from loopwise.train.run import Run
from tests.train.runs import tiny_config, two_stages

GIVEN = 1e9
ROOT = Path(__file__).parents[2]


def quick(config: RunConfig) -> Estimate:
    return estimate_run(config, device="cpu", flops_per_second=GIVEN)


CONFIGS = {
    "sampled depth, gradient window": tiny_config(),
    "a depth for each row": tiny_config(depth=UniformDepth(low=1, high=4, per="sequence")),
    "fixed depth": tiny_config(depth=FixedDepth(total=5, max_grad=1)),
    "as planned": tiny_config(depth=None),
    "recomputed": tiny_config(checkpoint_loops=True),
    "stages": two_stages(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_and_tokens_are_what_the_run_will_count(name):
    config = CONFIGS[name]
    run = Run(config, None)
    list(run.train())
    found = quick(config)
    assert found.flops == pytest.approx(run.carry.flops, rel=1e-12)
    assert (found.tokens, found.num_steps) == (run.carry.tokens, run.carry.step)
    assert found.flops_per_step == found.flops / config.num_steps


def test_long_runs_are_estimated_from_a_part_of_their_draws():
    config = tiny_config(depth=PoissonDepth(mean=6, max_grad=2))
    short, long = quick(replace(config, steps=200)), quick(replace(config, steps=100_000))
    assert long.flops_per_step == pytest.approx(short.flops_per_step, rel=0.1)


@pytest.mark.parametrize("optimizer", [None, MuonConfig(), AdamATan2Config()], ids=["adamw", "muon", "atan2"])
def test_what_is_held_between_steps_is_counted_exactly(optimizer):
    config = tiny_config() if optimizer is None else tiny_config(optimizer=optimizer)
    run, found = Run(config, None), quick(config)
    size = sum(item.numel() for item in run.model.parameters())
    assert found.parameters_unique == found.parameters_trained == size
    assert found.memory.weights == size * 4 + sum(item.nbytes for item in run.model.buffers())
    assert found.memory.gradients == found.memory.averages == size * 4
    assert found.memory.moments == sum(item.nbytes for item in run.optimizer.state().values())


def test_averages_and_frozen_parameters_cost_what_they_should():
    assert quick(tiny_config(ema=None)).memory.averages == 0
    config = two_stages()
    frozen = replace(config, stages=tuple(replace(stage, trainable=("*norm*",)) for stage in config.stages))
    found, whole = quick(frozen), quick(config)
    assert found.memory.gradients == 4 * found.parameters_trained < whole.memory.gradients
    assert found.parameters_unique == whole.parameters_unique


MODELS = {
    "gated": DecoderModel(layers=2, width=64, heads=4),
    "plain mlp": DecoderModel(layers=2, width=64, heads=4, activation="gelu", norm="layer", positions="learned"),
    "few kv heads": DecoderModel(layers=2, width=64, heads=8, kv_heads=2, qk_norm=True),
    "looped": DecoderModel(layers=3, width=64, heads=4, plan="0 core:(1)x5 2"),
    "sandwich": DecoderModel(layers=2, width=64, heads=4, placement="branch"),
}


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name):
    """The naive way: run it, and add up the memory of every tensor that autograd saves, each once."""
    rows, length, vocabulary = 2, 96, 11
    model, _ = MODELS[name].build(vocabulary, seed=0)
    own = {item.untyped_storage().data_ptr() for item in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.zeros(rows, length, dtype=torch.long)).logits
    assert logits.shape[-1] == vocabulary
    cost = cost_of(model, plan_of(model), context=length)
    found = memory_of(model, cost, rows=rows, length=length, moments=0, readings=0).activations
    once = memory_of(model, cost, rows=rows, length=length, moments=0, readings=0, recompute=True).activations
    working = found / (cost.num_slots + 1)  # the gradients of one visit, which the forward pass does not have
    assert (found - working) / sum(kept.values()) == pytest.approx(1.0, abs=0.3)
    assert (once < found) == (name == "looped")


MEASURE = """
import gc, json, sys
from loopwise.train.config import parse
from loopwise.train.estimate import estimate_run
from loopwise.train.memory import held_bytes, peak_bytes, reset_peak
from loopwise.train.run import Run
warm, *configs = (parse(item) for item in json.loads(sys.stdin.read()))
list(Run(warm, None).train(2))
found = []
for config in configs:
    gc.collect()
    held = held_bytes()
    assert reset_peak()
    list(Run(config, None).train(1))
    found.append([peak_bytes() - held, estimate_run(config, flops_per_second=1e9).memory.total])
print(json.dumps(found))
"""
LOOPED = DecoderModel(layers=3, width=192, heads=4, plan="0 core:(1)x4 2")
MEASURED = {
    "plain": {"model": DecoderModel(layers=3, width=192, heads=4, activation="gelu"), "depth": None},
    "windowed": {"model": LOOPED, "depth": FixedDepth(total=12, max_grad=2)},
    "recomputed": {"model": LOOPED, "depth": FixedDepth(total=6), "checkpoint_loops": True},
}


@pytest.mark.skipif(not reset_peak(), reason="this system does not let a process reset its peak memory")
def test_memory_is_within_a_factor_of_two_of_the_measured_peak():
    data = TaskData(task=PHop(context=256, alphabet=4, hops=(1, 2)))
    same = {"batch_size": 4, "micro_batch": None, "steps": 3, "data": data}
    configs = [tiny_config(), *(tiny_config(**same, **values) for values in MEASURED.values())]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps([to_dict(config) for config in configs]),
        # every array gets pages of its own, so that resident memory is what is alive and not the heap's holes
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, (measured, estimated) in zip(MEASURED, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert measured > 20e6, f"{name}: too small to rise above the noise of the process"
        assert 0.5 < estimated / measured < 2, (name, estimated, measured)


def test_a_large_model_is_estimated_without_its_memory():
    model = DecoderModel(layers=32, width=4096, heads=32, plan="0-3 core:(4-27)x4 28-31")
    before = peak_bytes()
    found = quick(tiny_config(model=model, depth=None, ema=None, batch_size=1, micro_batch=None))
    after = peak_bytes()
    assert 6e9 < found.parameters_unique < 7e9 < 2e10 < found.parameters_unrolled
    assert found.memory.total > 16 * 6e9
    if before is not None and after is not None:
        assert after - before < 500e6


def test_time_follows_the_throughput_and_small_models_their_visits():
    config = tiny_config(model=DecoderModel(layers=2, width=1024, heads=8), depth=None, batch_size=64)
    slow, fast = (estimate_run(config, device="cpu", flops_per_second=speed) for speed in (1e9, 2e9))
    assert slow.seconds / fast.seconds == pytest.approx(2, rel=0.1)
    assert (slow.device, fast.flops_per_second) == ("given", 2e9)
    shallow, deep = (
        estimate_run(tiny_config(depth=FixedDepth(total=total)), device="cpu", flops_per_second=1e15)
        for total in (1, 30)
    )
    assert deep.seconds > 3 * shallow.seconds


def test_the_machine_is_measured_when_no_throughput_is_given():
    assert matmul_flops("cpu", seconds=0.01) > 1e7
    found = estimate_run(tiny_config(), device="cpu")
    assert found.device == "cpu" and found.flops_per_second > 1e7


def test_lines_say_all_of_it():
    lines = quick(two_stages()).lines()
    names = ["plan", "parameters", "steps", "FLOPs", "memory", "time"]
    assert [line.split()[0] for line in lines] == names
    assert lines[0].endswith("0 core:(1) 2 -> 0 core:(1)x4 2")
    assert "unique" in lines[1] and "moments" in lines[4] and lines[5].endswith("at 1.00 GFLOP/s (given)")


def test_errors_of_the_config_come_through():
    with pytest.raises(ValueError, match="9"):
        quick(tiny_config(model=DecoderModel(layers=2, width=16, heads=2, plan="0-9")))


def test_bfloat16_keeps_less_and_holds_a_copy_of_the_weights():
    config = tiny_config(model=DecoderModel(layers=2, width=64, heads=4), depth=None, batch_size=32, micro_batch=None)
    half, full = quick(replace(config, precision="bfloat16")).memory, quick(config).memory
    assert 0.4 * full.activations < half.activations < full.activations
    assert half.weights == full.weights


def test_peak_memory_is_that_since_the_mark():
    if not reset_peak():
        pytest.skip("this system does not let a process reset its peak memory")
    before = held_bytes()
    block = torch.ones(40_000_000)
    del block
    peak, held = peak_bytes(), held_bytes()
    assert before is not None and peak is not None and held is not None
    assert peak - before > 100e6 > held - before
    assert reset_peak()
    later = peak_bytes()
    assert later is not None and later < peak - 100e6
