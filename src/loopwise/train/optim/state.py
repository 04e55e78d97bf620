"""Copying named state, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loopwise.loop.config import suggest


@torch.no_grad()
def copy_state(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], owner: str) -> None:
    """Copy tensors into others of the same names, in place and bit for bit.

    Args:
        own: what is filled.
        state: what it is filled with.
        owner: whose state it is, for messages.

    Raises:
        ValueError: a missing or unknown key, or another shape or dtype; nothing was copied then.
    """
    for key in state:
        if key not in own:
            raise ValueError(f"{owner} state has {key!r}, which is not there to be filled{suggest(key, own)}")
    for key, tensor in own.items():
        if key not in state:
            raise ValueError(f"{owner} state lacks {key!r}: load one that was saved for the same parameters")
        if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
            got, wanted = ((tuple(item.shape), item.dtype) for item in (state[key], tensor))
            raise ValueError(f"{owner} state {key!r} has shape and dtype {got}, {wanted} is needed")
    for key, tensor in own.items():
        tensor.copy_(state[key])
