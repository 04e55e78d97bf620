"""Schedules: exact values at the ends, continuity, and the written-out curves."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.loop.config import from_dict, to_dict
from loopwise.train.optim import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, WsdSchedule

floors = st.floats(0, 1)
warmups = st.one_of(st.floats(0, 0.4), st.integers(1, 8).map(float))
schedules = st.one_of(
    st.builds(ConstantSchedule, warmup=warmups),
    st.builds(LinearSchedule, warmup=warmups, floor=floors),
    st.builds(CosineSchedule, warmup=warmups, floor=floors),
    st.builds(
        WsdSchedule,
        warmup=warmups,
        floor=floors,
        decay=st.floats(0, 0.5),
        shape=st.sampled_from(["linear", "sqrt", "cosine"]),
    ),
)


@settings(max_examples=200)
@given(schedule=schedules, num_steps=st.integers(20, 400))
def test_the_ends_are_exact(schedule: Schedule, num_steps: int) -> None:
    warmup = round(schedule.warmup * num_steps if schedule.warmup < 1 else schedule.warmup)
    decays = not isinstance(schedule, WsdSchedule) or round(schedule.decay * num_steps) > 0
    end = getattr(schedule, "floor", 1.0) if decays else 1.0
    assert schedule.factor(num_steps, num_steps) == end
    assert schedule.factor(num_steps + 5, num_steps) == end
    if warmup:
        assert schedule.factor(0, num_steps) == 1 / warmup
        assert schedule.factor(warmup - 1, num_steps) == 1
    assert schedule.factor(warmup, num_steps) == 1
    values = [schedule.factor(step, num_steps) for step in range(num_steps + 1)]
    assert all(0 <= value <= 1 for value in values)
    assert values[: max(warmup, 1)] == sorted(values[: max(warmup, 1)])
    assert all(one >= other - 1e-12 for one, other in zip(values[warmup:], values[warmup + 1 :], strict=False))


@settings(max_examples=50)
@given(schedule=schedules, num_steps=st.integers(20, 60))
def test_no_jumps(schedule: Schedule, num_steps: int) -> None:
    width = 1e-6
    places = [step + shift for step in range(num_steps) for shift in (0, 0.37)]
    for place in places:
        one, other = schedule.factor(place, num_steps), schedule.factor(place + width, num_steps)
        # the steepest of all is a root where it starts
        assert abs(one - other) <= 2 * math.sqrt(width)


def test_curves_written_out() -> None:
    wsd = {shape: WsdSchedule(warmup=4.0, decay=8.0, shape=shape, floor=0.2) for shape in ("linear", "sqrt", "cosine")}
    for schedule in wsd.values():
        assert [schedule.factor(step, 20) for step in (0, 1, 2, 3, 4, 11, 12)] == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert wsd["linear"].factor(14, 20) == pytest.approx(0.2 + 0.8 * 0.75)
    assert wsd["sqrt"].factor(14, 20) == pytest.approx(0.2 + 0.8 * 0.5)
    assert wsd["cosine"].factor(14, 20) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert CosineSchedule(warmup=0.2, floor=0.1).factor(12, 20) == pytest.approx(0.55)
    assert LinearSchedule(warmup=0.2).factor(8, 20) == pytest.approx(0.75)
    assert [CosineSchedule(floor=1.0).factor(step, 9) for step in range(10)] == [1] * 10
    assert ConstantSchedule().factor(7, 9) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: WsdSchedule(warmup=10.0, decay=0.6).factor(0, 20),
            r"schedule.wsd: decay=0.6 does not fit into 20 steps",
        ),
        (
            lambda: CosineSchedule(warmup=30.0).factor(0, 20),
            r"schedule.cosine: warmup=30.0 is longer than the 20 steps",
        ),
        (lambda: ConstantSchedule(warmup=-1.0), "warmup=-1.0 must be at least 0"),
        (lambda: LinearSchedule(floor=1.5), "floor=1.5 must be between 0 and 1"),
        (lambda: WsdSchedule(decay=-0.1), "decay=-0.1 must be at least 0"),
        (lambda: WsdSchedule(shape="step"), "shape='step' must be one of"),
        (lambda: ConstantSchedule().factor(-1, 20), "step=-1 of num_steps=20"),
        (lambda: ConstantSchedule().factor(0, 0), "step=0 of num_steps=0"),
    ],
)
def test_refusals(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@settings(max_examples=20)
@given(schedule=schedules)
def test_json(schedule: Schedule) -> None:
    assert from_dict(to_dict(schedule)) == schedule
