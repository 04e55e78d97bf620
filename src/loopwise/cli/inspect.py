"""`loopwise inspect`: what a model is made of, in which order it runs, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

import loopwise
from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Inspect(common.Source):
    """Arguments of `loopwise inspect`."""

    plan: common.PlanText = None
    """order of visits, such as "0-9 (10-19)x2 20-29"; without it the source's own"""
    loops: common.LoopsText = None
    """loop counts: 4, or core=4, or outer=2,inner=3"""
    context: int = 1024
    """tokens in front of the token whose cost is counted"""
    as_json: Annotated[FlagCreatePairsOff[bool], arg(name="json")] = False
    """print JSON, with every slot"""
    png: common.FilePath = None
    """draw the plan here"""

    def run(self) -> None:
        """Load, print, and draw if asked to."""
        plan = common.planned(self.plan, self.loops)
        common.check_writable(self.png)
        if self.context < 1:
            raise ValueError(f"--context {self.context}: at least 1")
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)
        report = inspect_model(model, context=self.context)
        if self.png:
            draw_picture(report["plan"], self.png)
        print(json.dumps(report, indent=2, ensure_ascii=False) if self.as_json else report_text(report))


def inspect_model(model: Any, plan: str | Plan | None = None, *, context: int = 1024) -> dict[str, Any]:
    """Describe a model under a plan.

    Args:
        model: a transformers causal language model, attached or not.
        plan: the plan to cost; None takes the model's own, or every layer once.
        context: tokens in front of the token whose cost is counted.

    Returns:
        `class`, `model_type`, `layers_at` (dotted path), `layers` (each `layer`, `class`, `parameters`, `visits`),
        `plan` (text), `slots` (each `position`, `iterations`, `layer`), `num_slots`, `unique_layers` (their number),
        `parameters` (`unique`, `unrolled`), `context`, `flops_per_token` (`forward`, `training`),
        `cache_bytes_per_token`, `state_bytes`.

    Raises:
        ValueError: the plan does not fit the model, or the model has no recognisable layer list.
    """
    from loopwise.measure.cost import cost_of
    from loopwise.models.hub import layer_list
    from loopwise.plan import Plan

    where = layer_list(model)
    num_layers = len(where.layers)
    if plan is None:
        plan = loopwise.plan_of(model) or Plan.identity(num_layers)
    plan = Plan.parse(plan).validate(num_layers)
    cost = cost_of(model, plan, context=context)
    return {
        "class": type(model).__name__,
        "model_type": getattr(model.config, "model_type", None),
        "layers_at": where.path,
        "layers": [
            {
                "layer": index,
                "class": type(layer).__name__,
                "parameters": sum(parameter.numel() for parameter in layer.parameters()),
                "visits": plan.layers.count(index),
            }
            for index, layer in enumerate(where.layers)
        ],
        "plan": str(plan),
        "slots": [
            {"position": list(slot.position), "iterations": list(slot.iterations), "layer": slot.layer}
            for slot in plan.slots
        ],
        "num_slots": plan.num_slots,
        "unique_layers": len(plan.unique_layers),
        "parameters": {"unique": cost.parameters_unique, "unrolled": cost.parameters_unrolled},
        "context": context,
        "flops_per_token": {"forward": cost.forward_flops_per_token, "training": cost.training_flops_per_token},
        "cache_bytes_per_token": cost.cache_bytes_per_token,
        "state_bytes": cost.state_bytes,
    }


def report_text(report: dict[str, Any]) -> str:
    """What `inspect_model` found, as text for people."""
    return "\n".join(_report_lines(report))


def _report_lines(report: dict[str, Any]) -> Iterator[str]:
    from loopwise.plots import plan_text

    layers, parameters, flops = report["layers"], report["parameters"], report["flops_per_token"]
    yield f"{report['class']} ({report['model_type']}), {len(layers)} layers at {report['layers_at']}"
    yield ""
    yield "layers"
    for (kind, size, visits), group in groupby(
        layers, key=lambda row: (row["class"], row["parameters"], row["visits"])
    ):
        numbers = [row["layer"] for row in group]
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        each = " each" if len(numbers) > 1 else ""
        times = {0: "not visited", 1: "visited once"}.get(visits, f"visited {visits} times")
        yield f"  {span:<8} {kind}  {common.amount(size)} parameters{each}, {times}"
    yield ""
    yield f"plan  {report['plan']}"
    yield from (f"  {line}" for line in plan_text(report["plan"]).splitlines())
    yield ""
    yield f"slots         {report['num_slots']}, over {report['unique_layers']} of {len(layers)} layers"
    unique, unrolled = common.amount(parameters["unique"]), common.amount(parameters["unrolled"])
    yield f"parameters    {unique} unique, {unrolled} unrolled"
    forward, training = common.amount(flops["forward"], "FLOPs"), common.amount(flops["training"], "FLOPs")
    yield f"per token     {forward} forward, {training} training, at {report['context']} tokens of context"
    yield f"cache         {common.amount(report['cache_bytes_per_token'], 'B')} per token"
    if report["state_bytes"]:
        yield f"state         {common.amount(report['state_bytes'], 'B')} per sequence"


def draw_picture(plan: str | Plan, path: Any) -> None:
    """Write the picture of a plan, whole or not at all."""
    from loopwise.plots import plan_picture

    common.write_whole(path, lambda temporary: plan_picture(plan, temporary))
