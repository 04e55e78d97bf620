"""What can be read and learned from the iterations of a decoder with an exit gate, after one forward.

Call the model with `output_loops=True`; all functions take its output. The formulas are in `loopwise.loop.readout`.

Shapes: B batch, T tokens, V vocabulary, R iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loopwise.loop import config as components
from loopwise.loop import readout
from loopwise.loop.halting import cdf_exit, exit_log_pdf, take_exit
from loopwise.loop.objective import Objective, Terms
from loopwise.models.causal import LoopwiseOutput

EXPECTED_LOGITS = "expected_logits"


def exit_distribution(output: LoopwiseOutput) -> torch.Tensor:
    """The probability that a token stops after each iteration, `[B, T, R]`; sums to 1.

    Raises:
        ValueError: the model has no gate, its output was not asked for, or tokens were not visited.
    """
    return exit_log_pdf(_gate_logits(output)).exp().movedim(0, -1)


def expected_logits(output: LoopwiseOutput) -> torch.Tensor:
    """The mean of the logits of all iterations under the exit distribution, `[B, T, V]`.

    Raises:
        ValueError: as `exit_distribution`, or other layers come after the loop.
    """
    return readout.expected_logits(torch.stack(_loop_logits(output)), exit_log_pdf(_gate_logits(output)))


def selected_logits(output: LoopwiseOutput, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's logits at the first iteration where its cumulated exit probability reaches a threshold.

    Args:
        output: of a forward that ran every iteration.
        threshold: q in [0, 1]; 1 is the last iteration.

    Returns:
        Logits `[B, T, V]`, and the 0-based iterations, int64 `[B, T]`.

    Raises:
        ValueError: as `expected_logits`, or the threshold is out of range.
    """
    exit_BT = cdf_exit(_gate_logits(output).sigmoid(), threshold)
    return take_exit(torch.stack(_loop_logits(output)), exit_BT), exit_BT


def loop_loss(
    output: LoopwiseOutput,
    labels: torch.Tensor | None = None,
    *,
    targets: torch.Tensor | None = None,
    loss: str | Mapping[str, Any] | Objective = "expected",
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A training loss that reads more than the last iteration, a scalar.

    Args:
        output: of the model on `input_ids`, logits of all tokens kept.
        labels: int64 `[B, T]`, usually `input_ids`; they are shifted here, and -100 is ignored.
        targets: in the place of labels, what each position should predict, int64 `[B, T]`: already shifted.
        loss: an objective, its dictionary, or its name: "expected" is the first stage of Ouro's paper (expected loss
            and entropy), "gate" its second; "expected_logits" is what Ouro's published file computes from labels, the
            cross-entropy of the mean logits; "ponder" (PonderNet), "act", "deep_supervision", "final".
        num_items: number of tokens that the sums are divided by; the valid tokens of this batch if None.

    Raises:
        ValueError: an unknown objective, the output lacks what it reads, or neither or both of labels and targets.
    """
    if (labels is None) == (targets is None):
        raise ValueError("give either labels, which are shifted here, or targets, which are not")
    target_BT = targets if labels is None else readout.shift_labels(labels)
    assert target_BT is not None
    mask_BT = target_BT != readout.IGNORE
    if loss == EXPECTED_LOGITS:
        losses_BT = readout.token_losses(expected_logits(output), target_BT)
        return readout.masked_mean(losses_BT, mask_BT, num_items)
    if isinstance(loss, str):
        loss = {"kind": loss}
    objective = components.from_dict(loss, axis="readout") if isinstance(loss, Mapping) else loss
    assert isinstance(objective, Objective)
    return objective.loss(loop_terms(output, target_BT, objective, num_items=num_items))


def loop_terms(
    output: Any, targets: torch.Tensor, objective: Objective, *, num_items: float | torch.Tensor | None = None
) -> Terms:
    """What a forward offers to an objective.

    Args:
        output: of a causal model; logits `[B, T, V]`, or `[N, V]` of the N positions with a target only.
        targets: what each position should predict, int64 `[B, T]`, -100 where nothing is scored.
        objective: reads every iteration (of an output with `loop_logits`) or the last.
        num_items: see `loop_loss`.

    Raises:
        ValueError: the output lacks what the objective reads.
    """
    mask_BT = targets != readout.IGNORE
    read_all = objective.every_iteration
    losses = []
    for logits in _loop_logits(output) if read_all else (_last_logits(output),):  # stacked logits would fill the memory
        if logits.ndim == 2:
            losses_N = readout.token_losses(logits, targets[mask_BT])
            losses.append(losses_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, losses_N))
        else:
            losses.append(readout.token_losses(logits, targets))
    gates = _gate_logits(output) if read_all and output.gate_logits is not None else None
    return Terms(
        losses_RBT=torch.stack(losses),
        mask_BT=mask_BT,
        gate_logits_RBT=gates,
        ponder_BT=getattr(output, "ponder", None),
        num_items=num_items,
    )


def _gate_logits(output: LoopwiseOutput) -> torch.Tensor:
    logits = output.gate_logits
    if logits is None:
        raise ValueError("the output has no gate: call a model whose loop has one with output_loops=True")
    if bool(logits.isnan().any()):
        raise ValueError("tokens have left the loop and were not visited again: use on_exit='select'")
    return logits.movedim(-1, 0)


def _loop_logits(output: LoopwiseOutput) -> tuple[torch.Tensor, ...]:
    if output.loop_logits is None:
        raise ValueError(
            "the output has no logits of every iteration: call the model with output_loops=True; a loop with layers "
            "after it has none"
        )
    return output.loop_logits


def _last_logits(output: LoopwiseOutput) -> torch.Tensor:
    if output.logits is None:
        raise ValueError("the output has no logits")
    return output.logits
