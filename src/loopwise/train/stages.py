"""What happens between two stages: the plan, and with it the model, may change while the run goes on.

A stage change is a pure function of the config and of the model before it, so that a run that resumes inside a later
stage first walks through the changes of the earlier ones and then loads its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from torch import nn

from loopwise.models.attach import plan_of
from loopwise.models.playing import looping_of
from loopwise.plan import Plan
from loopwise.train.config import Stage


def enter(model: nn.Module, stage: Stage, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let a model be what this stage trains: its plan, and which of the run's parameters are trained. In place.

    Raises:
        ValueError: the plan does not fit the model, or a pattern matches no parameter.
    """
    if stage.plan is not None:
        set_plan(model, Plan.parse(stage.plan))
    set_trainable(parameters, stage.trainable)


def check_stages(model: nn.Module, stages: Sequence[Stage], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a stage that the model cannot enter before the first one begins.

    Raises:
        ValueError: as `enter`, naming the first such stage.
    """
    for index, stage in enumerate(stages):
        try:
            if stage.plan is not None:
                _checked(model, Plan.parse(stage.plan))
            _check_patterns(parameters, stage.trainable)
        except ValueError as error:
            raise ValueError(f"stages.{index}: {error}") from None


def set_plan(model: nn.Module, plan: Plan) -> None:
    """Let a model with a plan visit its layers in another order.

    Raises:
        ValueError: a layer that the model lacks, or a loop of our own decoder that the plan lacks.
    """
    checked = _checked(model, plan)
    looping = looping_of(model)
    assert looping is not None, "models of a run have a plan"
    looping.plan = checked


def _checked(model: nn.Module, plan: Plan) -> Plan:
    """The plan, which fits the model."""
    looping = looping_of(model)
    assert looping is not None, "models of a run have a plan"
    owner = next(module for module in model.modules() if module.__dict__.get("loopwise") is looping)
    missing = sorted(set(getattr(owner, "loops", {})) - set(plan.loops))
    if missing:
        raise ValueError(
            f"the model has components for the loop {missing[0]!r}, the plan {plan} has no such loop: name one so, "
            f"x1 if need be"
        )
    return plan.validate(len(looping.returns))


def set_trainable(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    """Train the parameters whose names match one of the patterns, all if there are none.

    Args:
        parameters: those that the run trains in some stage, by name.
        patterns: as for `fnmatch`.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    _check_patterns(parameters, patterns)
    for name, parameter in parameters.items():
        parameter.requires_grad_(not patterns or any(fnmatch(name, pattern) for pattern in patterns))


def _check_patterns(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in parameters):
            raise ValueError(f"trainable={pattern!r} matches no parameter, such as {next(iter(parameters))}")


def plan_text(model: nn.Module) -> str:
    """The plan of a model of a run."""
    plan = plan_of(model)
    assert plan is not None
    return str(plan)
