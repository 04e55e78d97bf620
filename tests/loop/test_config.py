"""Configs of loop components: written, read back, and refused with a line that says what to do."""

from __future__ import annotations

import dataclasses
import json

import pytest

from loopwise.loop.config import Component, from_dict, kinds, to_dict
from loopwise.loop.depth import CurriculumDepth, FixedDepth, PoissonLogNormalDepth
from loopwise.loop.route import ExpertChoice
from loopwise.loop.state import NormalState
from loopwise.loop.update import AddConfig, ChainConfig, ConcatConfig, DampedConfig, HighwayConfig

# fields without a default, by kind
NEEDED = {
    "state.normal": {"std": 0.1},
    "update.chain": {"parts": [{"kind": "update.add"}, {"kind": "update.damped", "dt": 0.25}]},
    "depth.fixed": {"total": 3},
    "depth.uniform": {"high": 7},
    "depth.poisson": {"mean": 8},
    "depth.poisson_lognormal": {"mean": 32.0, "max_grad": 8},
    "depth.curriculum": {"sampler": {"kind": "depth.fixed", "total": 4}, "steps": 10},
    "readout.last_mean": {"window": 3},
    "signal.positions": {"num_positions": 4},
    "delta.lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
}

# Other rooms have components too, which are known once they are imported.
HERE = [kind for kind, component in kinds().items() if component.__module__.startswith("loopwise.loop.")]


@pytest.mark.parametrize("kind", HERE)
def test_every_component_survives_json(kind):
    config = from_dict({"kind": kind} | NEEDED.get(kind, {}))
    assert type(config) is kinds()[kind]
    written = json.loads(json.dumps(to_dict(config)))
    assert written["kind"] == kind and from_dict(written) == config
    assert set(written) - {"kind"} == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("kind", HERE)
def test_components_are_frozen_and_need_names(kind):
    config = from_dict({"kind": kind} | NEEDED.get(kind, {}))
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
    with pytest.raises(TypeError):
        type(config)(1)


def test_the_axes_of_the_design_are_there():
    own = {kind: component for kind, component in kinds().items() if component.__module__.startswith("loopwise.loop.")}
    axes = {kind.split(".")[0] for kind in own}
    assert axes == {"state", "update", "depth", "halting", "readout", "delta", "route", "conditioner", "signal"}


def test_nested_components_and_tuples_come_back():
    chain = ChainConfig(parts=(ConcatConfig(init="pass_input"), DampedConfig(dt=0.25, learned="channel")))
    assert from_dict(to_dict(chain)) == chain
    ramp = CurriculumDepth(sampler=PoissonLogNormalDepth(mean=32, max_grad=8), steps=100, shape="one_minus_sqrt")
    assert from_dict(to_dict(ramp)) == ramp
    assert to_dict(HighwayConfig(reads=("state", "input")))["reads"] == ["state", "input"]


def test_an_axis_completes_a_short_kind_and_keeps_others_out():
    assert from_dict({"kind": "concat"}, axis="update") == ConcatConfig()
    assert from_dict({"kind": "update.concat"}, axis="update") == ConcatConfig()
    with pytest.raises(ValueError, match="unknown component 'state.zeros'"):
        from_dict({"kind": "state.zeros"}, axis="update")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"kind": "update.concatt"}, "unknown component 'update.concatt'; did you mean 'update.concat'?"),
        ({"kind": "state.normal", "sdt": 1.0}, "state.normal: unknown field 'sdt'; did you mean 'std'?"),
        ({"kind": "update.add", "bias": True}, "update.add: unknown field 'bias'; known: none"),
        ({"kind": "depth.fixed"}, "depth.fixed: field 'total' is missing and has no default"),
        ({"kind": "depth.fixed", "total": "3"}, "depth.fixed: total='3' must be an integer"),
        ({"kind": "depth.fixed", "total": True}, "depth.fixed: total=True must be an integer"),
        ({"kind": "state.normal", "std": float("nan")}, "state.normal: std=nan must be a finite number"),
        ({"kind": "update.concat", "bias": 1}, "update.concat: bias=1 must be true or false"),
        ({"kind": "update.concat", "init": "zero"}, "init='zero' must be one of 'uniform', 'normal', 'pass_state'"),
        ({"kind": "update.highway", "reads": ["block", "e"]}, "must be a tuple of items, each one of 'state'"),
        ({"kind": "depth.curriculum", "sampler": {"kind": "update.add"}, "steps": 3}, "component of type DepthSampler"),
        ({"kind": "depth.fixed", "total": 2, "max_grad": 1.5}, "max_grad=1.5 must be an integer or None"),
        ({"total": 2}, 'a component needs a mapping with a "kind"'),
        ({"kind": 3}, 'a component needs a mapping with a "kind"'),
    ],
)
def test_bad_data_is_refused_in_one_line(data, line):
    with pytest.raises(ValueError) as error:
        from_dict(data)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: NormalState(std=-1), "state.normal: std=-1 must be above 0"),
        (lambda: NormalState(std=1, scale=-1.0), "state.normal: scale=-1.0 must be at least 0"),
        (lambda: DampedConfig(dt=0), "update.damped: dt=0 must be in (0, 1]"),
        (lambda: DampedConfig(dt=1.0, learned="scalar"), "must be below 1 when it is learned"),
        (lambda: HighwayConfig(reads=()), "must name one to three tensors"),
        (lambda: FixedDepth(total=0), "total=0 must be at least 1"),
        (lambda: FixedDepth(total=2, max_grad=0), "max_grad=0 must be at least 1"),
        (lambda: PoissonLogNormalDepth(mean=0.5), "mean=0.5 must be at least 1"),
        (lambda: CurriculumDepth(sampler=FixedDepth(total=2), steps=3, start=3), "start=3 must be from 1"),
        (lambda: CurriculumDepth(sampler=FixedDepth(total=2), steps=3, max_grad=2), "set on the sampler inside"),
        (lambda: ExpertChoice(capacities=(0.5, 0.7)), "must be in (0, 1] and not increase"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, line):
    with pytest.raises(ValueError) as error:
        make()
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_base_class_cannot_be_written():
    with pytest.raises(ValueError, match="has no kind"):
        to_dict(Component())
    assert to_dict(AddConfig()) == {"kind": "update.add"}
