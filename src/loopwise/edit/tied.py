"""What a head tied to the embeddings, and embeddings with a factor of their own, need when the width grows.

Shapes: D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loopwise.edit.axes import first_line, saved_tensors
from loopwise.edit.expand import FRESH, UnitMap, WidthSource
from loopwise.edit.norms import final_norm, norm_form
from loopwise.models.attach import eval_mode
from loopwise.models.hub import layer_list, probe_inputs


def is_tied(base: Any) -> bool:
    """Whether the head's matrix is the table of embeddings."""
    head, table = base.get_output_embeddings(), base.get_input_embeddings()
    return head is not None and table is not None and getattr(head, "weight", None) is getattr(table, "weight", 0)


def divided(base: Any, sources: Mapping[str, WidthSource], hidden: UnitMap, scale: float) -> dict[str, WidthSource]:
    """The final norm of a model with tied embeddings: the head cannot split its columns, so the norm's gain is split.

    As in staged training (2203.06211), which halves it.
    """
    found: dict[str, WidthSource] = {}
    name, module = final_norm(base)
    form = norm_form(module)
    if form is None or getattr(module, "weight", None) is None:
        raise ValueError(f"edit.widen: the head is tied and {name} has no gain to divide: untie the head first")
    copied = hidden.index != FRESH
    for attribute in ("weight", "bias"):
        if getattr(module, attribute, None) is None:
            continue
        source = sources[f"{name}.{attribute}"]
        # The table is larger by the scale, and the gain smaller, as with any norm before a reader.
        factor = scale**2 if attribute == "weight" else scale
        share = torch.where(copied, hidden.share / factor, 1.0)
        gradient = torch.full_like(share, factor) * copied
        offset = form.offset if attribute == "weight" else 0.0
        found[f"{name}.{attribute}"] = replace(
            source, value=(share,), gradient=(gradient,), summed=(True,), offset=offset
        )
    return found


def rescaled(base: Any, sources: Mapping[str, WidthSource], scale: float) -> dict[str, WidthSource]:
    """Embeddings divided by a factor that the wider architecture puts on them; a tied head is given it back."""
    table = base.get_input_embeddings().weight
    names = [name for name, tensor in saved_tensors(base).items() if tensor is table]
    found = {name: _times(sources[name], 1, 1 / scale) for name in names}
    if is_tied(base):
        name, module = final_norm(base)
        for attribute in ("weight", "bias"):
            if getattr(module, attribute, None) is not None:
                found[f"{name}.{attribute}"] = _times(sources[f"{name}.{attribute}"], 0, scale)
    return found


def _times(source: WidthSource, axis: int, factor: float) -> WidthSource:
    value, gradient = list(source.value), list(source.gradient)
    size = len(source.index[axis])  # type: ignore[arg-type]
    ones = torch.ones(size, dtype=torch.float64)
    before, after = value[axis], gradient[axis]
    value[axis] = (ones if before is None else before) * factor
    gradient[axis] = (ones if after is None else after) / factor
    return replace(source, value=tuple(value), gradient=tuple(gradient))


def embedding_scale(base: Any, twin: Any, hidden: UnitMap, scale: float) -> float:
    """The factor that the wider architecture puts on its embeddings and the old one does not (sqrt(D) in Gemma)."""
    narrow, wide = _first_state(base), _first_state(twin)
    if wide.shape[-1] != len(hidden.index):
        return 1.0
    copied = hidden.index != FRESH
    wanted = narrow[..., hidden.index[copied].to(narrow.device)].double() * scale
    got = wide[..., copied.to(wide.device)].double()
    ratio = float((got * wanted).sum() / (wanted * wanted).sum().clamp(min=1e-300))
    root = math.sqrt(wide.shape[-1] / narrow.shape[-1])
    return root if abs(ratio / root - 1) < 1e-2 else 1.0


def _first_state(model: nn.Module) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layer_list(model).layers]
    try:
        with eval_mode(model):
            model(**probe_inputs(model))
    except Exception as error:  # whatever a model says to a few tokens
        raise ValueError(f"{type(model).__name__} cannot be tried: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(f"{type(model).__name__} cannot be widened in hidden: its layers are not called in turn")
    return seen[0]
