"""When a model grows: the published rules to their printed digits, and boundaries that lose no step."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.edit.schedule import (
    GrowthSchedule,
    at_fractions,
    at_steps,
    at_tokens,
    gstack,
    gstack_tokens,
    prop_alpha,
)


@pytest.mark.parametrize(
    ("total", "stages", "alpha", "steps"),
    [
        (1000, 4, 1, (100, 200, 300, 400)),
        (1000, 4, 0, (250, 250, 250, 250)),
        (1400, 3, 2, (100, 400, 900)),
        (7, 3, 1, (1, 3, 3)),  # edges at 1.17, 3.5 and 7, to the even number
        (10, 1, 2, (10,)),
    ],
)
def test_prop_alpha(total: int, stages: int, alpha: float, steps: tuple[int, ...]) -> None:
    assert prop_alpha(total, stages, alpha).steps == steps


@given(st.integers(1, 12), st.floats(0, 3), st.integers(0, 5000))
def test_prop_alpha_loses_no_step_and_is_right_to_half_a_step(stages: int, alpha: float, more: int) -> None:
    total = round(stages ** (alpha + 1)) + more  # so that the first stage has a step
    schedule = prop_alpha(total, stages, alpha)
    assert schedule.total == total and len(schedule.steps) == stages
    weights = [stage**alpha for stage in range(1, stages + 1)]
    for index, boundary in enumerate(schedule.boundaries, start=1):
        assert abs(boundary - total * sum(weights[:index]) / sum(weights)) <= 0.5 + 1e-6


def test_depths_weighted_by_steps_give_the_published_speed_up() -> None:
    """PROP-1, six stages: full depth from the start costs 1.385 times as much (2409.19044 says "up to 40 %")."""
    schedule = prop_alpha(2_100_000, 6, 1)
    spent = sum(depth * steps for depth, steps in enumerate(schedule.steps, start=1))
    assert 6 * schedule.total / spent == pytest.approx(1.385, abs=5e-4)


@pytest.mark.parametrize(
    ("parameters", "tokens", "billions"),
    [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84), (70e9, 2e12, 42.48)],
)
def test_gstack_rule_gives_the_printed_numbers(parameters: float, tokens: float, billions: float) -> None:
    assert gstack_tokens(parameters, 6 * parameters * tokens) / 1e9 == pytest.approx(billions, abs=5e-3)
    schedule = gstack(parameters, tokens, 4_000_000)
    assert schedule.steps[0] * 4_000_000 / 1e9 == pytest.approx(billions, abs=1e-2)
    assert schedule.total == round(tokens / 4_000_000)


def test_steps_fractions_and_tokens_say_the_same() -> None:
    by_steps = at_steps(100, [20, 50])
    assert by_steps.steps == (20, 30, 50) and by_steps.boundaries == (20, 50)
    assert at_fractions(100, [0.2, 0.5]) == by_steps
    assert at_tokens(6400, [1280, 3200], 64) == by_steps


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: prop_alpha(3, 4, 1), "stage 0 of 4 has 0 of the 3 steps"),
        (lambda: prop_alpha(10, 0, 1), "stages=0"),
        (lambda: prop_alpha(10, 2, -1), "alpha=-1"),
        (lambda: at_steps(10, [5, 5]), r"growth at steps \[5, 5\] of 10"),
        (lambda: at_steps(10, [0]), r"growth at steps \[0\]"),
        (lambda: at_steps(10, [10]), r"growth at steps \[10\]"),
        (lambda: at_tokens(10, [5], 0), "tokens_per_step=0"),
        (lambda: GrowthSchedule(steps=()), "at least one stage"),
        (lambda: gstack_tokens(0, 1e20), "parameters=0"),
        (lambda: gstack(8e9, 1e9, 1000), "growth at steps"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_no_torch_is_loaded() -> None:
    code = "import sys, loopwise.edit.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
