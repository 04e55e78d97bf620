"""The FLOPs that a run spends, and those that its final model would have spent on the same tokens.

Both are training FLOPs by `loopwise.measure.cost_of`. "Final" is the model and the plan of the last stage, at the loop
counts that this stage would draw in the same step. A plain run for as many FLOPs as a growing one is the fair
comparison; `equal_flop_steps` says how long it is.
"""

from __future__ import annotations

from typing import Any

from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.measure import cost_of
from loopwise.models.attach import plan_of
from loopwise.plan import Plan
from loopwise.train.config import RunConfig
from loopwise.train.estimate import estimate_run

Count = LoopCount | LoopCounts | None


class Ledger:
    """FLOPs per token of the steps of a run.

    Args:
        config: the run.
        final: the model of the last stage with its plan, which may be on the meta device.
    """

    def __init__(self, config: RunConfig, final: Any):
        self.config = config
        self.final = final
        self._known: dict[tuple[Any, ...], float] = {}

    def per_token(self, model: Any, stage: int, step: int, rows: int, context: int) -> tuple[float, float]:
        """FLOPs per token of a step, and those of the final model.

        Args:
            model: of the run.
            stage: in which the step is.
            step: its 0-based number.
            rows: of the step.
            context: tokens of a row.
        """
        spent = self._mean(model, _plan(model), stage, self.count(stage, step, rows), context)
        last = len(self.config.all_stages) - 1
        if stage == last:
            return spent, spent
        final = self.final or model
        plan = _plan(final) if self.final else self._final_plan(model)
        return spent, self._mean(final, plan, last, self.count(last, step, rows), context)

    def count(self, stage: int, step: int, rows: int) -> Count:
        """The loop counts that a stage draws in a step; None where it runs its plan as it is."""
        depth = self.config.all_stages[stage].depth or self.config.depth
        return None if depth is None else depth.sample(step, seed=self.config.seed, batch=rows)

    def _final_plan(self, model: Any) -> Plan:
        texts = [stage.plan for stage in self.config.all_stages if stage.plan is not None]
        return Plan.parse(texts[-1]) if texts else _plan(model)

    def _mean(self, model: Any, plan: Plan, stage: int, count: Count, context: int) -> float:
        if isinstance(count, LoopCounts):
            pairs = list(zip(count.total_B.tolist(), count.grad_B.tolist(), strict=True))
            return sum(self._flops(model, plan, stage, *pair, context) for pair in pairs) / len(pairs)
        total, grad = (None, None) if count is None else (count.total, count.grad)
        return self._flops(model, plan, stage, total, grad, context)

    def _flops(self, model: Any, plan: Plan, stage: int, total: int | None, grad: int | None, context: int) -> float:
        plan = plan if total is None else plan.with_loops(total)
        known = (stage, str(plan), grad, context)
        if known not in self._known:
            recompute = "loop" if self.config.checkpoint_loops and plan.loops else False
            grad = None if total is None or grad == total else grad
            cost = cost_of(model, plan, context=context, grad_iterations=grad, recompute=recompute)
            self._known[known] = cost.training_flops_per_token
        return self._known[known]


def equal_flop_steps(plain: RunConfig, other: RunConfig) -> int:
    """After how many steps a run of one stage has spent the training FLOPs of another run, to the nearest step.

    Raises:
        ValueError: `plain` has several stages; or what the runs themselves would refuse.
    """
    if len(plain.all_stages) > 1:
        raise ValueError(f"{plain.name} has {len(plain.stages)} stages: equal FLOPs need a run of one stage")
    spent = estimate_run(other, flops_per_second=1.0).flops
    return max(1, round(spent / estimate_run(plain, flops_per_second=1.0).flops_per_step))


def _plan(model: Any) -> Plan:
    plan = plan_of(model)
    assert plan is not None
    return plan
