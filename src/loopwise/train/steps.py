"""Small parts of a training step: seeds, loop counts of rows, and what a batch and a step are called in messages."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.models.attach import plan_of
from loopwise.train.batch import Batch


def key(*parts: int) -> int:
    """A seed that is a hash of some numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generators that layers on this device draw from.

    `torch.manual_seed` seeds all devices, and formats the stack for each that is not in use: a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def fingerprint(batch: Batch) -> str:
    """16 hexadecimal digits that stand for the contents of a batch."""
    tensors = (batch.tokens_BT, batch.targets_BT) if batch.points is None else (batch.points.xs_BNI, batch.points.ys_BN)
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        assert tensor is not None
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def of_rows(count: LoopCount | LoopCounts | None, first: int, size: int) -> LoopCount | LoopCounts | None:
    """The loop counts of some rows of a step."""
    if not isinstance(count, LoopCounts):
        return count
    return LoopCounts(no_grad_B=count.no_grad_B[first : first + size], grad_B=count.grad_B[first : first + size])


def mean_iterations(count: LoopCount | LoopCounts | None, model: nn.Module) -> float:
    """Mean number of iterations of the main loop in a step; 1 where the plan has no loop."""
    if isinstance(count, LoopCounts):
        return float(count.total_B.double().mean())
    if count is not None:
        return float(count.total)
    plan = plan_of(model)
    assert plan is not None
    return float(plan.counts.get("core") or next(iter(plan.counts.values()), 1))
