"""The loss of a batch: a readout of the iterations plus weighted terms.

    loss = objective(losses of every scored position and iteration) + sum_k weight_k term_k

Sums over positions are divided by the number of predictions in the *whole* step, so that micro-batches and ranks add up
to what one batch would give.

Shapes: B rows, T tokens, D width, V vocabulary, N scored positions, R iterations, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loopwise.loop import readout
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.objective import Objective, ShortcutObjective, Terms
from loopwise.loop.window import main_loop
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.hub import base_model
from loopwise.models.playing import looping_of
from loopwise.models.readouts import loop_terms
from loopwise.models.regression import LoopwiseForRegression
from loopwise.train.batch import Batch
from loopwise.train.objectives.forward import forward_at
from loopwise.train.objectives.terms import LossTerm, Seen, Term, build_terms

Count = LoopCount | LoopCounts | None
Stats = dict[str, torch.Tensor | float]


def compute_loss(
    model: Any,
    batch: Batch,
    *,
    objective: Objective,
    terms: Sequence[LossTerm | Term] = (),
    count: Count = None,
    num_items: float | None = None,
    seed: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> tuple[torch.Tensor, Stats]:
    """The loss of a (micro-)batch and what is worth plotting of it.

    Args:
        model: a model of a run, in training mode, on the device of the batch.
        batch: tokens with aligned targets, or points for a regressor.
        objective: what is read from the iterations.
        terms: what is added: built once for a run by `build_terms`, or configs, which are built in every call.
        count: iterations, and how many carry a gradient; for each row with `LoopCounts`. None is the plan's own.
        num_items: predictions in the whole step, over all micro-batches and ranks; those of this batch if None.
        seed: of the random draws: first states, short schedules.
        step: index of the optimizer step, which they are a function of too.
        first_row: number of the batch's first row among all rows of the step.

    Returns:
        The loss, a scalar with a gradient, and detached scalars by name: "loss"; "task_loss", the last iteration's
        cross-entropy (nats) or squared error; "loss@<i>", that of iteration i from 1, where the objective reads every
        one; "<term>", its part of the loss; "iterations", their mean over what is scored. Each is a *part* of the
        step's: added over micro-batches and ranks they give the step's value.

    Raises:
        ValueError: the model lacks what the objective or a term reads.
    """
    num_items = batch.num_items if num_items is None else num_items
    built = build_terms(model, terms)
    check_objective(model, objective, count)
    draws: dict[str, Any] = {"seed": seed, "step": step, "first_row": first_row}
    if batch.points is not None:
        found, output = _regression_terms(model, batch, count, num_items, draws), None
        loss = objective.loss(found)
    else:
        options = {"output_loops": True} if objective.every_iteration else {}
        options |= _state_options(model) if isinstance(objective, ShortcutObjective) else {}
        output = forward_at(model, batch, count, **draws, **options)
        found = _token_terms(output, batch, objective, num_items)
        loss = objective.loss(found)
        if isinstance(objective, ShortcutObjective):
            loss = _with_shortcut(model, batch, objective, count, (output, found, loss), draws)
    seen = Seen(batch=batch, logits_NV=getattr(output, "logits", None), num_items=num_items, **draws)
    stats = _stats(model, output, found, objective, count)
    route_loss = getattr(output, "route_loss", None)
    parts = {} if route_loss is None else {"route_loss": seen.share * route_loss}
    for term in built:
        parts[term.name] = term.value(seen)
    loss = sum(parts.values(), loss)
    stats |= {name: part.detach() for name, part in parts.items()}
    return loss, stats | {"loss": loss.detach()}


def check_objective(model: Any, objective: Objective, count: Count = None) -> None:
    """Refuse, by name, an objective that reads what a model does not give.

    Raises:
        ValueError: every iteration is to be read of a model that does not offer them, or whose rows differ in depth;
            or a second, shorter schedule of a model without a loop.
    """
    inner, kind = base_model(model), objective.kind
    is_ours = isinstance(inner, (LoopwiseForCausalLM, LoopwiseForRegression))
    if isinstance(objective, ShortcutObjective):
        if isinstance(inner, LoopwiseForRegression):
            raise ValueError(f"{kind} compares predictions of tokens: use readout.last_mean for points")
        main_loop(_plan(model))
    if isinstance(count, LoopCounts) and (objective.every_iteration or isinstance(objective, ShortcutObjective)):
        raise ValueError(f"{kind} needs one depth for all rows: use depth per='batch', or readout.final")
    if not objective.every_iteration:
        return
    if not is_ours:
        raise ValueError(
            f"{kind} reads every iteration, which {type(inner).__name__} does not offer: use readout.final, or a "
            "model.decoder"
        )
    if isinstance(inner, LoopwiseForCausalLM):
        plan = _plan(model)
        last = plan.loops.get("core") or next(iter(plan.loops.values()), None)
        if last is None or plan.nodes[-1] != last:
            reason = "has no named loop" if last is None else f"has layers after the loop {last.name}"
            raise ValueError(
                f"{kind} reads the head after every iteration, the plan {plan} {reason}: use readout.final"
            )
        name = last.name or ""
        gate = getattr(inner.model.loops[name], "gate", None) if name in inner.model.loops else None
        if objective.needs_gate and gate is None:
            raise ValueError(f"{kind} needs an exit gate: give the loop {name} gate=true, or use readout.final")


def _plan(model: Any) -> Any:
    looping = looping_of(model)
    if looping is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    return looping.plan


def _token_terms(output: Any, batch: Batch, objective: Objective, num_items: float) -> Terms:
    assert batch.targets_BT is not None
    return loop_terms(output, batch.targets_BT, objective, num_items=num_items or 1)


def _regression_terms(model: Any, batch: Batch, count: Count, num_items: float, draws: dict[str, Any]) -> Terms:
    """Squared errors in the place of cross-entropies: `[R, B, P]`, of the iterations with a gradient."""
    assert batch.points is not None
    errors_RBP = (forward_at(model, batch, count, **draws) - batch.points.ys_BN).square()
    mask_BP = torch.ones_like(batch.points.ys_BN, dtype=torch.bool)
    return Terms(losses_RBT=errors_RBP, mask_BT=mask_BP, num_items=num_items or 1)


def _state_options(model: Any) -> dict[str, Any]:
    """What makes a forward return the state that the head reads."""
    return {} if isinstance(base_model(model), LoopwiseForCausalLM) else {"output_hidden_states": True}


def _last_state(output: Any) -> torch.Tensor:
    state = getattr(output, "last_hidden_state", None)
    return output.hidden_states[-1] if state is None else state


def _with_shortcut(
    model: Any,
    batch: Batch,
    objective: ShortcutObjective,
    count: Count,
    long: tuple[Any, Terms, torch.Tensor],
    draws: dict[str, Any],
) -> torch.Tensor:
    """The loss of a long schedule joined by that of a shorter one, a scalar."""
    output, found, loss = long
    total = count.total if isinstance(count, LoopCount) else main_loop(_plan(model))[1].count
    short = objective.short(total, seed=draws["seed"], step=draws["step"])
    if short is None:
        return loss
    window = count.grad if isinstance(count, LoopCount) else None
    again = forward_at(model, batch, LoopCount.split(short, window), **draws, **_state_options(model))
    assert batch.targets_BT is not None
    shorter = loop_terms(again, batch.targets_BT, objective, num_items=found.num_items)
    return objective.join(found, shorter, _last_state(output), _last_state(again))


def _stats(model: Any, output: Any, found: Terms, objective: Objective, count: Count) -> Stats:
    """What is worth plotting, see `compute_loss`."""
    losses_R = readout.masked_mean(found.losses_RBT.detach(), found.mask_BT, found.num_items)
    stats: Stats = {"task_loss": losses_R[-1]}
    if objective.every_iteration:
        is_points = isinstance(base_model(model), LoopwiseForRegression)
        before = count.no_grad if is_points and isinstance(count, LoopCount) else 0
        stats |= {f"loss@{before + i}": loss for i, loss in enumerate(losses_R, start=1)}
    exits_BT = getattr(output, "exits", None)
    if exits_BT is not None:
        ran_BT = exits_BT + 1.0
    elif isinstance(count, LoopCounts):
        ran_BT = count.total_B.to(found.mask_BT.device)[:, None].expand(found.mask_BT.shape).float()
    else:
        ran_BT = torch.full(found.mask_BT.shape, float(_iterations(model, count)), device=found.mask_BT.device)
    return stats | {"iterations": readout.masked_mean(ran_BT, found.mask_BT, found.num_items)}


def _iterations(model: Any, count: LoopCount | None) -> int:
    if count is not None:
        return count.total
    loops = _plan(model).counts
    return loops.get("core") or next(iter(loops.values()), 1)
