"""The loss of two ranks is that of one process: every part of it, replicated and sharded, at depths per row too."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

import loopwise
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.objective import FinalObjective, PonderObjective, ShortcutObjective
from loopwise.loop.state import NormalState
from loopwise.loop.update import ConcatConfig
from loopwise.train.batch import IGNORE, Batch
from loopwise.train.models import DecoderModel, Loop
from loopwise.train.objectives import CosineTie, Distillation, ZLoss, build_terms, compute_loss
from loopwise.train.parallel import finish_backward, replicate, shard, without_sync
from tests.train.ranks import on_ranks

COUNT = LoopCount(no_grad=1, grad=3)
COUNTS = LoopCounts(no_grad_B=torch.tensor([0, 2, 1, 0]), grad_B=torch.tensor([1, 1, 2, 3]))
CASES = ((FinalObjective(), COUNTS), (PonderObjective(), COUNT), (ShortcutObjective(), COUNT))


def build():
    loop = Loop(gate=True, state=NormalState(std=0.5), update=ConcatConfig())
    sizes = {"layers": 3, "width": 16, "heads": 2, "plan": "0 core:(1-2)x2", "init_std": 0.3}
    return DecoderModel(**sizes, loop=loop).build(13, seed=0)[0]


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens_BT, targets_BT = (torch.randint(0, 13, (4, 6), generator=generator) for _ in range(2))
    targets_BT[torch.rand(targets_BT.shape, generator=generator) < 0.5] = IGNORE
    return Batch(tokens_BT=tokens_BT, targets_BT=targets_BT)


def gradients_of(model, terms, rows, case):
    """Two micro-batches of one row for each of some rows; returns the gradients of the step and its statistics."""
    objective, counts = CASES[case]
    whole, totals = batch(), {}
    for row in rows:
        loss, stats = compute_loss(
            model,
            whole.rows(row, row + 1),
            objective=objective,
            terms=terms,
            count=counts.rows(row, row + 1) if isinstance(counts, LoopCounts) else counts,
            num_items=whole.num_items,
            seed=3,
            step=5,
            first_row=row,
        )
        if row != rows[-1]:
            with without_sync(model):
                loss.backward()
        else:
            loss.backward()
        totals = {name: totals.get(name, 0.0) + value.item() for name, value in stats.items()}
    finish_backward(model)
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in named.items()}, totals


def terms_of(model, folder):
    return build_terms(model, [CosineTie(block=1, weight=3.0), ZLoss(weight=0.1), Distillation(teacher=folder)])


def on_rank(rank, how, folder, case):
    model = build()
    terms = terms_of(model, folder)
    (replicate if how == "ddp" else shard)(model)
    return gradients_of(model, terms, [2 * rank, 2 * rank + 1], case)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    loopwise.save(DecoderModel(layers=1, width=16, heads=2).build(13, seed=1)[0], folder)
    return str(folder)


@pytest.mark.parametrize(("how", "case"), [("ddp", 0), ("ddp", 1), ("fsdp", 1), ("fsdp", 2)])
def test_two_ranks_are_one_process(how, case, teacher):
    model = build()
    want, stats = gradients_of(model, terms_of(model, teacher), range(4), case)
    answers = on_ranks(on_rank, how, teacher, case)
    for got, _ in answers:
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert (got[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name
    for name, value in stats.items():
        assert sum(found[name] for _, found in answers) == pytest.approx(value, rel=1e-4), name


def test_depths_per_row_are_refused_for_a_sharded_model(teacher):
    with pytest.raises(AssertionError, match="ValueError: depths per sequence differ from rank to rank"):
        on_ranks(on_rank, "fsdp", teacher, 0)
