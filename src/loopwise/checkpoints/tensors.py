"""Maps between a foreign checkpoint's tensors and ours: renaming, fusing and splitting rows, tied and derived tensors.

A map is a list of rules. It is read in both directions: import makes our tensors from the foreign ones, export makes
the foreign ones again, under the same names and with the same values. Nothing is skipped in silence: a tensor that no
rule takes, that is missing or has another shape is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


class UntiedError(ValueError):
    """Tensors that a family shares differ."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One foreign tensor and the tensors of ours that it holds.

    Attributes:
        foreign: its name.
        ours: names of ours; with several, the foreign tensor is their concatenation along axis 0.
        reshape: reverse to a given shape: called as `reshape(ours) -> foreign`, with `restore` for the other way.
        tied_to: name of a foreign tensor that this one must equal; such a tensor is stored once on our side.
        derive: makes a foreign tensor that we do not keep (a rotary table), from nothing but the configuration.
        optional: the tensor may be absent; export then leaves it out too when `present` says so.
    """

    foreign: str
    ours: tuple[str, ...] = ()
    reshape: Callable[[torch.Tensor], torch.Tensor] | None = None
    restore: Callable[[torch.Tensor], torch.Tensor] | None = None
    tied_to: str | None = None
    derive: Callable[[], torch.Tensor] | None = None
    optional: bool = False


def import_tensors(
    rules: Iterable[Rule], foreign: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> Tensors:
    """Our tensors from foreign ones.

    Args:
        rules: the map.
        foreign: all tensors of the checkpoint.
        shapes: names and shapes of our model's parameters and persistent buffers.

    Raises:
        ValueError: names the first tensor that is missing, left over, misshapen, untied where it must be tied, or other
            than what the configuration derives.
    """
    ours: Tensors = {}
    used: set[str] = set()
    for rule in rules:
        tensor = foreign.get(rule.foreign)
        if tensor is None:
            if rule.optional or rule.tied_to is not None or rule.derive is not None:
                continue
            raise ValueError(f"the checkpoint lacks tensor {rule.foreign}")
        used.add(rule.foreign)
        if rule.tied_to is not None:
            _check_tied(rule, tensor, foreign)
        elif rule.derive is not None:
            _check_derived(rule, tensor, rule.derive())
        elif rule.ours:
            ours |= _split(rule, tensor, shapes)
    left = sorted(set(foreign) - used)
    if left:
        raise ValueError(f"the checkpoint has a tensor that this family does not know: {left[0]} ({len(left)} in all)")
    lacking = sorted(set(shapes) - set(ours))
    assert not lacking, f"no rule fills {lacking[0]}"
    return ours


def export_tensors(
    rules: Iterable[Rule], ours: Mapping[str, torch.Tensor], names: Iterable[str] | None = None
) -> Tensors:
    """Foreign tensors from ours; `names` are those that the checkpoint had (default: all but tied copies).

    Raises:
        ValueError: tensors of ours that one foreign tensor held are no longer equal.
    """
    wanted = None if names is None else set(names)
    foreign: Tensors = {}
    tied = []
    for rule in rules:
        if wanted is not None and rule.foreign not in wanted:
            continue
        if rule.tied_to is not None:
            tied.append(rule)
        elif rule.derive is not None:
            foreign[rule.foreign] = rule.derive()
        elif all(name in ours for name in rule.ours):
            parts = [ours[name] for name in rule.ours]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            joined = rule.reshape(joined) if rule.reshape else joined
            if rule.foreign in foreign and not torch.equal(foreign[rule.foreign], joined):
                raise ValueError(f"{rule.ours[0]} has become other than what it shares tensor {rule.foreign} with")
            foreign[rule.foreign] = joined
    if wanted is not None:
        foreign |= {rule.foreign: foreign[rule.tied_to].clone() for rule in tied if rule.tied_to}
    return {name: tensor.contiguous() for name, tensor in foreign.items()}


def _split(rule: Rule, tensor: torch.Tensor, shapes: Mapping[str, torch.Size]) -> Tensors:
    tensor = rule.restore(tensor) if rule.restore else tensor
    parts = [shapes[name] for name in rule.ours]
    rows = [shape[0] if len(shape) else 1 for shape in parts]
    want = (sum(rows), *parts[0][1:]) if len(parts[0]) else ()
    if tuple(tensor.shape) != tuple(want):
        raise ValueError(
            f"tensor {rule.foreign} has shape {list(tensor.shape)}, the configuration asks for {list(want)}"
        )
    pieces = tensor.split(rows) if len(rows) > 1 else (tensor,)
    return {name: piece.clone() for name, piece in zip(rule.ours, pieces, strict=True)}


def _check_derived(rule: Rule, tensor: torch.Tensor, derived: torch.Tensor) -> None:
    if tensor.shape != derived.shape:
        raise ValueError(
            f"tensor {rule.foreign} has shape {list(tensor.shape)}, the configuration asks for {list(derived.shape)}"
        )
    eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
    if (tensor.double() - derived.double()).abs().max() > 2 * eps + 1e-5:
        raise ValueError(f"tensor {rule.foreign} is not what the configuration makes of it")


def _check_tied(rule: Rule, tensor: torch.Tensor, foreign: Mapping[str, torch.Tensor]) -> None:
    source = foreign.get(rule.tied_to or "")
    if source is None:
        raise ValueError(f"the checkpoint lacks tensor {rule.tied_to}, to which {rule.foreign} is tied")
    if source.shape != tensor.shape or not torch.equal(source, tensor):
        raise UntiedError(f"tensor {rule.foreign} must be tied to {rule.tied_to} but differs from it")
