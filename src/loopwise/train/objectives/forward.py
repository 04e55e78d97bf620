"""One training forward of any model of a run: at a loop count with its gradient window, logits only where they count.

Shapes: B rows, T tokens, V vocabulary, N scored positions, R iterations, P points.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.passes import LoopModule
from loopwise.loop.state import RowSeeds
from loopwise.models.attach import eval_mode, learn_rows
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.hub import base_model, probe_inputs
from loopwise.models.loop_parts import needs_generator
from loopwise.models.regression import LoopwiseForRegression
from loopwise.train.batch import IGNORE, Batch


def forward_at(
    model: Any,
    batch: Batch,
    count: LoopCount | LoopCounts | None = None,
    *,
    scored: bool = True,
    seed: int = 0,
    step: int = 0,
    first_row: int = 0,
    **options: Any,
) -> Any:
    """What a model makes of a batch.

    Args:
        model: one with a plan, also inside DDP, FSDP, `torch.compile` or PEFT.
        batch: on the model's device.
        count: how many iterations the main loop runs, and how many of the last ones carry a gradient; `LoopCounts` say
            so for each row. None runs the plan as it is.
        scored: compute logits only where a target is scored: `logits` (and `loop_logits`) are `[N, V]`, in the order of
            `batch.targets_BT[batch.targets_BT != -100]`. False gives `[B, T, V]`.
        seed: of random first states.
        step: index of the optimizer step; with the seed and the number of a row it gives that row's first state.
        first_row: number of the batch's first row among all rows of the step.
        **options: further arguments of the model's forward, such as `output_loops`.

    Returns:
        The model's output; for a batch of points the predictions `[R, B, P]` of the iterations with a gradient.

    Raises:
        ValueError: points for a model of tokens or the reverse, a count without a loop, depths per row where the loop's
            components have no such thing, or packed documents for a model that would mix them.
    """
    inner = base_model(model)
    is_regression = isinstance(inner, LoopwiseForRegression)
    if (batch.points is not None) != is_regression:
        read, given = ("points", "tokens") if is_regression else ("tokens", "points")
        raise ValueError(f"{type(inner).__name__} reads {read}, the batch holds {given}: choose data that fits")
    if count is not None:
        options["loops"] = count
    if isinstance(count, LoopCounts):
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(
                "depths per sequence differ from rank to rank, and the gradients of a sharded model are summed per "
                "iteration: use parallel='ddp', or per='batch'"
            )
        learn_rows(unwrapped(model))
    if is_regression or isinstance(inner, LoopwiseForCausalLM) or needs_generator(inner):
        rows = tuple(range(first_row, first_row + batch.num_rows))
        options.setdefault("generator", RowSeeds(seed=seed, step=step, rows=rows))
    if batch.points is not None:
        return model(batch.points.xs_BNI, batch.points.ys_BN, **options)
    positions_BT = document_positions(batch)
    if positions_BT is not None:
        refuse_packing(model)
        options["position_ids"] = positions_BT
    if isinstance(inner, LoopwiseForCausalLM):
        if any(isinstance(loop, LoopModule) and loop.gate is not None for loop in inner.model.loops.values()):
            options.setdefault("on_exit", "select")  # gates are learned from every iteration
        if scored:
            options["logits_to_keep"] = _is_scored(batch)
        return model(input_ids=batch.tokens_BT, use_cache=False, **options)
    if hasattr(inner.config, "use_cache"):
        options.setdefault("use_cache", False)
    return _forward_attached(model, inner, batch, options) if scored else model(input_ids=batch.tokens_BT, **options)


def unwrapped(model: Any) -> Any:
    """The model inside DDP and `torch.compile`; adapters stay."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def document_positions(batch: Batch) -> torch.Tensor | None:
    """Positions that start again with every document of a packed row, int64 `[B, T]`; None where rows are not packed.

    Attention does not cross where they start again, neither in our decoder nor in transformers models that make their
    masks with the library's own functions.
    """
    if batch.positions_BT is not None or batch.segments_BT is None:
        return batch.positions_BT
    segments_BT = batch.segments_BT
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return index_T - torch.where(starts_BT, index_T, 0).cummax(1).values


def refuse_packing(model: Any) -> None:
    """Try, once per model, whether a document sees the one before it in its row.

    Raises:
        ValueError: it does, as in recurrent layers, whose state goes on.
    """
    inner = base_model(model)
    if inner not in _MIXES:
        _MIXES[inner] = _mixes_documents(unwrapped(model))
    if _MIXES[inner]:
        raise ValueError(
            f"{type(inner).__name__} does not keep packed documents apart: use data without packing, or full attention"
        )


# By model, whether a document reaches the next one in its row.
_MIXES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _mixes_documents(model: nn.Module) -> bool:
    ids_BT = probe_inputs(model, 2, 6)["input_ids"].flip(1)  # the rows differ in the first token
    positions_BT = torch.tensor([0, 1, 2, 0, 1, 2], device=ids_BT.device).expand(2, -1)
    options: dict[str, Any] = {"use_cache": False} if hasattr(base_model(model).config, "use_cache") else {}
    if isinstance(base_model(model), LoopwiseForCausalLM) or needs_generator(model):
        options["generator"] = RowSeeds(seed=0, step=0, rows=(0, 0))
    with eval_mode(model):
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, **options).logits[:, 3:].float()
    return bool((logits_BTV[0] - logits_BTV[1]).abs().max() > 1e-4 * logits_BTV.abs().max())


def _is_scored(batch: Batch) -> torch.Tensor:
    assert batch.targets_BT is not None, "a batch of tokens has targets"
    return batch.targets_BT != IGNORE


@cache
def _selects_columns(kind: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def _forward_attached(model: Any, inner: nn.Module, batch: Batch, options: dict[str, Any]) -> Any:
    """Logits of scored positions from a model that selects whole columns, or that computes all of them."""
    scored_BT = _is_scored(batch)
    if _selects_columns(type(inner)):
        columns_C = scored_BT.any(0).nonzero()[:, 0]
        if 0 < len(columns_C) < scored_BT.shape[1]:
            options, scored_BT = options | {"logits_to_keep": columns_C}, scored_BT[:, columns_C]
    output = model(input_ids=batch.tokens_BT, **options)
    output.logits = output.logits[scored_BT]
    return output
