"""Scores on held-out rows: loss, perplexity, exact accuracy, squared error; at the plan's loop counts and at others.

Shapes: B rows, T tokens, V vocabulary, R iterations, N points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.loop.state import RowSeeds
from loopwise.models.attach import plan_of
from loopwise.models.loop_parts import needs_generator
from loopwise.models.regression import LoopwiseForRegression
from loopwise.tasks.base import Rows, Score, score
from loopwise.train.batch import IGNORE, Batch

Loops = int | Mapping[str, int] | None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predict(model: Any, batch: Batch, loops: Loops = None, *, seed: int = 0, first_row: int = 0) -> torch.Tensor:
    """Logits `[B, T, V]` of one forward, or predictions at points `[B, N]` after the last iteration.

    Args:
        model: a model of a run.
        batch: on the model's device.
        loops: iteration counts; None are those of the plan.
        seed: of random first states, where the loop has them; with the number of the row what they are a function of.
        first_row: number of the batch's first row.
    """
    if batch.points is not None:
        assert isinstance(model, LoopwiseForRegression)
        plan = model.model.loopwise.plan
        count = (plan if loops is None else plan.with_loops(loops)).counts["core"]
        return model(batch.points.xs_BNI, batch.points.ys_BN, loops=loops, loop_start=count - 1)[0]
    options: dict[str, Any] = {} if loops is None else {"loops": loops}
    is_ours = hasattr(model, "causal_options")
    if is_ours or needs_generator(model):
        rows = RowSeeds(seed=seed, step=0, rows=tuple(range(first_row, first_row + batch.num_rows)))
        options |= (model.causal_options if is_ours else {}) | {"generator": rows}
    if batch.positions_BT is not None:
        options["position_ids"] = batch.positions_BT
    return model(batch.tokens_BT, use_cache=False, **options).logits


def evaluate(
    model: Any, batches: Iterator[Batch], loops: Loops = None, *, precision: str = "float32", seed: int = 0
) -> tuple[dict[str, float], Score | None]:
    """Scores over some batches.

    Args:
        model: a model of a run, with its weights in place.
        batches: held-out rows.
        loops: iteration counts; None are those of the plan.
        precision: "bfloat16" runs under autocast.
        seed: of random first states.

    Returns:
        "loss" (mean over what is scored: nats, or squared error), for tokens "accuracy" (exact: share of rows with
        every scored position right) and "token_accuracy"; and for tokens the score by groups of rows.
    """
    device = next(model.parameters()).device
    total, items, parts, predictions = 0.0, 0, [], []
    with evaluating(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        first_row = 0
        for batch in batches:
            moved = batch.to(device)
            output = predict(model, moved, loops, seed=seed, first_row=first_row).float()
            first_row += batch.num_rows
            items += batch.num_items
            if moved.points is not None:
                total += float((output - moved.points.ys_BN).square().sum())
                continue
            assert moved.targets_BT is not None and batch.targets_BT is not None and batch.tokens_BT is not None
            total += float(
                F.cross_entropy(output.flatten(0, 1), moved.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
            )
            parts.append(
                Rows(
                    tokens_BT=batch.tokens_BT.numpy(),
                    targets_BT=batch.targets_BT.numpy(),
                    keys={name: key.numpy() for name, key in batch.keys.items()},
                )
            )
            predictions.append(output.argmax(-1).cpu())
    values = {"loss": total / max(items, 1)}
    if not parts:
        return values, None
    found = score(Rows.join(parts), torch.cat(predictions).numpy())
    return values | {"accuracy": found.exact, "token_accuracy": found.token}, found


def loop_label(model: nn.Module, loops: Loops) -> str:
    """What a loop count is called in metrics: the count of the main loop."""
    plan = plan_of(model)
    assert plan is not None
    counts = (plan if loops is None else plan.with_loops(loops)).counts
    return str(counts.get("core") or next(iter(counts.values()), 1))
