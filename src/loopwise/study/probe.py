"""What a finished run holds besides its scores: how it does under other plans, and its weights along the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from loopwise.io.atomic import write_text
from loopwise.plan import Plan
from loopwise.study.scoring import RunResult, score_under
from loopwise.train import checkpoints
from loopwise.train.run import CHECKPOINTS, Run
from loopwise.train.stages import set_plan

PLANS = "plans.json"
_MODEL = "model/"


def scored_under(result: RunResult, plans: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Score a finished run with its layers in other orders, such as with extra passes of its middle.

    Test rows are those of its own score. What was found is kept in the run folder, so that a second study reads it.

    Args:
        result: of the run.
        plans: plan texts, for the layers that the trained model has.

    Returns:
        For each plan what `scores.json` holds for a loop count: "loss", "accuracy", "token_accuracy", "token_by" and
        more.

    Raises:
        ValueError: the run has diverged, or a plan does not fit the model.
    """
    if result.has_diverged:
        raise ValueError(f"{result.name}, seed {result.seed} has diverged: it has no scores under other plans")
    path, rows = result.folder / PLANS, result.scores["rows"]
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = known.get(str(rows), {})
    missing = [plan for plan in plans if plan not in found]
    if missing:
        run = Run.open(result.folder)
        try:
            with run.averaged():
                for plan in missing:
                    set_plan(run.model, Plan.parse(plan))
                    found[plan] = score_under(run, rows)
        finally:
            run.close()
        write_text(path, json.dumps(known | {str(rows): found}, separators=(",", ":")) + "\n")
    return {plan: found[plan] for plan in plans}


def weights_at(result: RunResult, step: int) -> dict[str, torch.Tensor]:
    """The tensors of the model after a step whose checkpoint was kept, by name.

    Raises:
        ValueError: that checkpoint is not there; the message names those that are.
    """
    kept = checkpoints.steps(result.folder / CHECKPOINTS)
    if step not in kept:
        raise ValueError(
            f"{result.name}, seed {result.seed}: no checkpoint of step {step}, only of {', '.join(map(str, kept))}: "
            f"set saving.keep_every"
        )
    tensors = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in checkpoints.shapes(kept[step]).items()
        if name.startswith(_MODEL)
    }
    checkpoints.load(kept[step], tensors, partial=True)
    return {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items()}
