"""Slice the recorded arguments of a layer to the rows and positions of a partial visit.

Which axes of which argument are rows and which are tokens is *learned*, not guessed from names: the model is run twice
on inputs of different shapes, and an axis that grew from 2 to 3 counts rows, one that grew from 5 to 7 counts tokens
(both axes of a mask do), and one that grew from 2h to 3h counts rows times h heads (ALiBi biases). So any
architecture's masks, rotary tables and position ids are understood.

Shapes: B rows, T tokens, b selected rows, t selected positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from loopwise.loop.execute import Visit, take
from loopwise.models.hub import probe_inputs

ArgumentPath: TypeAlias = tuple[Any, ...]
Axes: TypeAlias = list[dict[ArgumentPath, tuple[str | None, ...]]]
_PROBES = ((2, 5), (3, 7))


def learn_axes(model: nn.Module, layers: nn.ModuleList) -> Axes:
    """For every layer, the meaning of each axis of each tensor argument: "rows", "tokens", "rows*h" or None.

    Runs the model twice on a few tokens, in its current mode, without gradient and without a cache.
    """
    shapes: list[list[dict[ArgumentPath, tuple[int, ...]]]] = []
    for num_rows, num_tokens in _PROBES:
        seen: list[dict] = [{} for _ in layers]
        handles = [
            layer.register_forward_pre_hook(_shape_recorder(seen[i]), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]
        inputs = probe_inputs(model, num_rows, num_tokens)
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, 0] = 0
        try:
            with torch.no_grad():
                model(**inputs, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        shapes.append(seen)
    return [
        {path: _roles(shape, second[path]) for path, shape in first.items() if path in second}
        for first, second in zip(*shapes, strict=True)
    ]


def slice_call(
    axes: dict[ArgumentPath, tuple[str | None, ...]], hidden_BTD: torch.Tensor, visit: Visit, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The recorded arguments of a layer, restricted to a visit's rows and positions.

    Raises:
        ValueError: an argument's axes are not known, or it is a mask of flex attention.
    """
    if any(type(value).__name__ == "BlockMask" for value in (*args, *kwargs.values())):
        raise ValueError("flex_attention masks cannot be sliced to rows and tokens: use attention 'sdpa' or 'eager'")

    def cut(path: ArgumentPath, tensor: torch.Tensor) -> torch.Tensor:
        if tensor is hidden_BTD or tensor.ndim == 0:
            return tensor
        if path not in axes or len(axes[path]) != tensor.ndim or "unknown" in axes[path]:
            raise ValueError(
                f"argument {'.'.join(map(str, path))} of layer {visit.slot.layer} cannot be sliced to rows and tokens"
            )
        return _cut(tensor, axes[path], visit, hidden_BTD.shape[0])

    args = tuple(_map_tensors(value, (i,), cut) for i, value in enumerate(args))
    return args, {name: _map_tensors(value, (name,), cut) for name, value in kwargs.items()}


def _cut(tensor: torch.Tensor, roles: tuple[str | None, ...], visit: Visit, num_rows: int) -> torch.Tensor:
    batch = next((axis for axis, role in enumerate(roles) if role and role.startswith("rows")), None)
    if visit.rows is not None and batch is not None and tensor.shape[batch] > 1:
        heads = tensor.shape[batch] // num_rows
        split = tensor.unflatten(batch, (num_rows, heads)).index_select(batch, visit.rows)
        tensor = split.flatten(batch, batch + 1)
    if visit.positions is None:
        return tensor
    tokens = [axis for axis, role in enumerate(roles) if role == "tokens" and tensor.shape[axis] > 1]
    if visit.positions.ndim == 1 or not tokens:
        for axis in tokens:
            tensor = tensor.index_select(axis, visit.positions)
        return tensor
    if batch is None:  # the same for all rows: an axis of size 1, or none at all
        batch = next((axis for axis in range(tokens[0]) if tensor.shape[axis] == 1), None)
    if batch is None:
        tensor, batch, tokens = tensor.unsqueeze(0), 0, [axis + 1 for axis in tokens]
    tensor = tensor.movedim(batch, 0)
    moved = [axis if axis > batch else axis + 1 for axis in tokens]
    rows = visit.positions.shape[0]
    heads = max(1, tensor.shape[0] // rows)
    index = visit.positions if heads == 1 or tensor.shape[0] == 1 else visit.positions.repeat_interleave(heads, dim=0)
    for axis in moved:
        tensor = take(tensor, axis, index)
    return tensor.movedim(0, batch)


def _roles(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[str | None, ...]:
    (rows_a, tokens_a), (rows_b, tokens_b) = _PROBES
    roles: list[str | None] = []
    for a, b in zip(first, second, strict=True):
        if (a, b) == (tokens_a, tokens_b):
            roles.append("tokens")
        elif a != b and a * rows_b == b * rows_a:
            roles.append("rows" if a == rows_a else "rows*h")
        else:
            roles.append(None if a == b else "unknown")
    return tuple(roles)


def _shape_recorder(seen: dict[ArgumentPath, tuple[int, ...]]) -> Callable[..., None]:
    def note(path: ArgumentPath, tensor: torch.Tensor) -> torch.Tensor:
        seen[path] = tuple(tensor.shape)
        return tensor

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        for i, value in enumerate(args):
            _map_tensors(value, (i,), note)
        for name, value in kwargs.items():
            _map_tensors(value, (name,), note)

    return hook


def _map_tensors(value: Any, path: ArgumentPath, change: Callable[[ArgumentPath, torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to the tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return change(path, value)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_map_tensors(item, (*path, i), change) for i, item in enumerate(value))
    if type(value) is dict:
        return {key: _map_tensors(item, (*path, key), change) for key, item in value.items()}
    return value
