"""Trying an edited model on a few tokens before it is given back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loopwise.models.attach import attach, detach, eval_mode
from loopwise.models.hub import base_model, layer_list, probe_inputs
from loopwise.models.playing import looping_of
from loopwise.plan import Plan


@contextmanager
def under(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """A model of transformers that runs a plan for the length of a block, whether it has one already or not.

    Raises:
        ValueError: what `attach` refuses.
    """
    looping = looping_of(model)
    if looping is not None:
        with looping.scoped(plan):
            yield model
        return
    attach(model, plan)
    try:
        yield model
    finally:
        detach(model)


def probe_logits(model: nn.Module) -> torch.Tensor:
    """Logits for a few tokens, `[B, T, V]`; the model's modes are put back."""
    with eval_mode(model):
        return model(**probe_inputs(model)).logits


def refuse_other_function(want: torch.Tensor, model: nn.Module, reason: str) -> None:
    """Raise `ValueError` for a rebuilt model with other logits `[B, T, V]` than wanted, with the reason for that."""
    name = type(base_model(model)).__name__
    try:
        got = probe_logits(model)
    except Exception as error:  # whatever a model of that depth says
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{name} cannot be edited into new layers: {line}") from error
    error = (want.float() - got.float()).abs().max().item()
    tolerance = 1e-5 if want.dtype == torch.float32 else 2e-2
    if not error <= tolerance * want.float().abs().max().item():
        raise ValueError(f"{name} cannot be edited into new layers: {reason} (logits differ by {error:.2g})")


def refuse_unless_identity(model: nn.Module, layers: Sequence[int], reason: str | None = None) -> None:
    """Raise `ValueError` unless these layers hand the state on as it is, bit for bit, at all their visits.

    Args:
        model: a model of transformers, with a plan or without.
        layers: numbers of layers whose output projections are zero.
        reason: why not, where that is known of the architecture.
    """
    seen: dict[int, float] = {}

    def note(number: int) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, torch.Tensor) else output[0]
            error = (after.float() - before.float()).abs().max().item()
            seen[number] = max(seen.get(number, 0.0), error)

        return hook

    modules = layer_list(model).layers
    handles = [modules[number].register_forward_hook(note(number), with_kwargs=True) for number in layers]
    try:
        probe_logits(model)
    finally:
        for handle in handles:
            handle.remove()
    for number in layers:
        error = seen.get(number, float("nan"))
        if error != 0:
            why = reason or f"with zeroed outputs layer {number} still changes the state by {error:.2g}"
            raise ValueError(f"a layer of {type(base_model(model)).__name__} cannot start as the identity: {why}")
