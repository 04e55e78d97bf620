"""What a finished run is worth: held-out scores per loop count and group of rows, its cost, and a score for every item.

`scores.json` of a run folder holds them. Items are what paired tests need: held-out rows do not depend on the seed of a
run, so that item i of two runs on the same data is the same row.

Shapes: B rows, N points, S seeds, I items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwise.io.atomic import write_text
from loopwise.measure.cost import cost_of
from loopwise.models.attach import plan_of
from loopwise.train.batch import Batch
from loopwise.train.config import RunConfig
from loopwise.train.evaluate import evaluate, evaluating, loop_label, predict
from loopwise.train.metrics import read_metrics
from loopwise.train.run import METRICS, Run

SCORES = "scores.json"
SPLIT = "test"
_METRICS = ("loss", "accuracy", "token_accuracy")
_ROW = "row"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run that has ended, by itself or by diverging.

    Attributes:
        name: of the arm that it belongs to.
        config: what it did.
        folder: its run folder; `folder / "model"` is the trained model.
        scores: what `scores.json` holds.
    """

    name: str
    config: RunConfig
    folder: Path
    scores: dict[str, Any]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.seed

    @property
    def has_diverged(self) -> bool:
        """Whether it stopped at a loss or a gradient that is no finite number."""
        return self.scores["diverged"] is not None

    @property
    def params(self) -> int:
        """Elements of all distinct parameters under the plan."""
        return self.scores["parameters"]["unique"]

    @property
    def flops(self) -> float:
        """FLOPs that the training spent."""
        return self.scores["flops"]

    @property
    def loops(self) -> tuple[int, ...]:
        """Loop counts at which it was scored, ascending."""
        return tuple(sorted(map(int, self.scores["loops"])))

    def score(self, metric: str = "accuracy", *, loops: int | None = None, by: tuple[str, int] | None = None) -> float:
        """A score on test rows; not a number where the run has diverged.

        Args:
            metric: "accuracy" (exact), "token_accuracy" or "loss"; groups have one of the first two, points the loss.
            loops: loop count; None is the plan's own.
            by: (key, value) of the group of rows that is scored, such as ("hops", 4), or ("point", 1) for the first
                point of every prompt; None scores all rows.

        Raises:
            ValueError: the run was not scored at that loop count, on that group or with that metric.
        """
        if self.has_diverged:
            return math.nan
        found = self._at(loops)
        if by is None:
            where, name = found, metric
        else:
            groups = {"accuracy": "by", "token_accuracy": "token_by", "loss": "by" if by[0] == "point" else ""}
            where, name = found.get(groups.get(metric, ""), {}).get(by[0], {}), str(by[1])
        if not isinstance(where.get(name), int | float):
            known = ", ".join(key for key in where if by is not None or key in _METRICS) or "none"
            raise ValueError(f"{self.name}: no {metric!r} of {by or 'all rows'}; there is {known}")
        return float(where[name])

    def items(self, metric: str = "accuracy", *, loops: int | None = None) -> list[float]:
        """For every test row 1 (all right) or 0, or its "token_accuracy"; for prompts of points their "loss".

        Raises:
            ValueError: the run has diverged, or its items have no such score.
        """
        if self.has_diverged:
            raise ValueError(f"{self.name}, seed {self.seed} has diverged: it has no items")
        found = self._at(loops)
        name = "token_items" if metric == "token_accuracy" else "items"
        if metric not in found or name not in found or (metric == "loss") != ("accuracy" not in found):
            raise ValueError(f"{self.name}: items have no {metric!r}")
        return [float(item) for item in found[name]]

    def curve(self, name: str) -> list[tuple[int, float, float]]:
        """(step, FLOPs, value) of everything in the metrics that has a value of that name, such as "eval/loss"."""
        lines = read_metrics(self.folder / METRICS)
        known = [(0, 0.0)] + [(line["step"], line["flops"]) for line in lines if "flops" in line]
        return [
            (line["step"], _between(known, line["step"]), float(line[name]))
            for line in lines
            if isinstance(line.get(name), int | float)
        ]

    def _at(self, loops: int | None) -> dict[str, Any]:
        label = self.scores["plan_loops"] if loops is None else str(loops)
        if label not in self.scores["loops"]:
            raise ValueError(
                f"{self.name}: not scored at {label} iterations, only at {', '.join(self.scores['loops'])}"
            )
        return self.scores["loops"][label]


def scores_of(
    results: Sequence[RunResult],
    metric: str = "accuracy",
    *,
    loops: int | None = None,
    by: tuple[str, int] | None = None,
    diverged: float = math.nan,
) -> list[float]:
    """One score per run, see `RunResult.score`; `diverged` stands for runs that diverged, such as what chance gives."""
    return [diverged if item.has_diverged else item.score(metric, loops=loops, by=by) for item in results]


def items_of(results: Sequence[RunResult], metric: str = "accuracy", *, loops: int | None = None) -> np.ndarray:
    """Score of every test row of every run, `[S, I]`; ValueError where one has diverged."""
    return np.array([item.items(metric, loops=loops) for item in results])


def read_scores(folder: Path, rows: int, loops: Sequence[int]) -> dict[str, Any] | None:
    """The scores in a run folder, if they are there for so many rows and for all these loop counts."""
    path = folder / SCORES
    if not path.is_file():
        return None
    scores = json.loads(path.read_text(encoding="utf-8"))
    if scores["diverged"] is None and (
        scores["asked_rows"] != rows or not {str(count) for count in loops} <= set(scores["loops"])
    ):
        return None
    return scores


def write_scores(folder: Path, scores: dict[str, Any]) -> None:
    """Write `scores.json`, whole or not at all."""
    write_text(folder / SCORES, json.dumps(scores, separators=(",", ":")) + "\n")


def score_run(run: Run, *, rows: int, loops: Sequence[int] = ()) -> dict[str, Any]:
    """Score a run that is done on test rows, with its averaged weights where it has them.

    Args:
        run: all of its steps are done.
        rows: how many rows; at most those that there are.
        loops: loop counts besides the plan's own.
    """
    there = run.source.num_rows(SPLIT)
    number = rows if there is None else min(rows, there)
    found: dict[str, Any] = {}
    with run.averaged():
        for count in (None, *loops):
            label = loop_label(run.model, count)
            if label not in found:
                found[label] = score_under(run, number, count)
    return about(run) | {
        "diverged": None,
        "split": SPLIT,
        "rows": number,
        "asked_rows": rows,
        "plan_loops": loop_label(run.model, None),
        "loops": found,
    }


def about(run: Run) -> dict[str, Any]:
    """What a run cost and what it ran on."""
    cost = cost_of(run.model, context=_context(run))
    return {
        "fingerprint": run.source.fingerprint,
        "steps": run.carry.step,
        "tokens": run.carry.tokens,
        "flops": run.carry.flops,
        "parameters": {"unique": cost.parameters_unique, "unrolled": cost.parameters_unrolled},
    }


def score_under(run: Run, rows: int, loops: int | None = None) -> dict[str, Any]:
    """Scores on test rows of a run as it stands, under the plan that its model has."""
    plan = plan_of(run.model)
    assert plan is not None
    cost = cost_of(run.model, plan if loops is None else plan.with_loops(loops), context=_context(run))
    visits = {"forward_flops_per_token": cost.forward_flops_per_token, "slots": cost.num_slots}
    if run.source.held_out(0, 1, SPLIT).points is not None:
        return visits | _score_points(run, rows, loops)
    values, score = evaluate(run.model, _numbered(run, rows), loops, precision=run.config.precision)
    assert score is not None
    by, token_by = (
        {name: {str(value): share for value, share in groups.items()} for name, groups in found.items()}
        for found in (score.by, score.token_by)
    )
    items, token_items = by.pop(_ROW), token_by.pop(_ROW)
    groups = {
        "by": by,
        "token_by": token_by,
        "num_by": {name: {str(value): num for value, num in score.num_by[name].items()} for name in by},
        "items": "".join(str(int(items[str(row)])) for row in range(rows)),
        "token_items": [round(token_items[str(row)], 4) for row in range(rows)],
    }
    return visits | values | groups


def _numbered(run: Run, rows: int) -> Iterator[Batch]:
    """Test rows that are each a group of their own, besides the groups they are in."""
    first = 0
    for batch in run.held_out(rows, SPLIT):
        numbers = torch.arange(first, first + batch.num_rows)
        yield replace(batch, keys=batch.keys | {_ROW: numbers})
        first += batch.num_rows


def _score_points(run: Run, rows: int, loops: int | None) -> dict[str, Any]:
    """Squared error of all points, of every place in the prompt, and of every prompt."""
    errors = []
    device = next(run.model.parameters()).device
    with evaluating(run.model):
        for number, batch in enumerate(run.held_out(rows, SPLIT)):
            assert batch.points is not None
            output_BN = predict(run.model, batch.to(device), loops, seed=number).float().cpu()
            errors.append((output_BN - batch.points.ys_BN).square())
    error_BN = torch.cat(errors).double()
    return {
        "loss": float(error_BN.mean()),
        "by": {"point": {str(place + 1): float(error) for place, error in enumerate(error_BN.mean(0))}},
        "items": [float(f"{error:.6g}") for error in error_BN.mean(1)],
    }


def _context(run: Run) -> int:
    batch = run.source.batch(0, 1)
    return batch.num_tokens


def _between(known: Sequence[tuple[int, float]], step: int) -> float:
    """FLOPs after a step, which grow evenly between the lines that say them."""
    before = max((pair for pair in known if pair[0] <= step), key=lambda pair: pair[0])
    after = min((pair for pair in known if pair[0] >= step), key=lambda pair: pair[0], default=before)
    if after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])
