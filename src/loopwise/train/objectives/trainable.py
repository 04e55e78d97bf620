"""Training a part of a model: the second stage of Ouro trains the gate alone, fine-tuning a few layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

from torch import nn


@contextmanager
def trainable(model: nn.Module, patterns: Sequence[str]) -> Iterator[list[str]]:
    """Within a block only parameters whose names match a pattern (`fnmatch`, such as `*.gate.*`) are trained.

    Afterwards every parameter is as it was before.

    Yields:
        The names that are trained.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in before):
            raise ValueError(f"trainable: {pattern!r} matches no parameter, such as {next(iter(before))}")
    names = [name for name in before if any(fnmatch(name, pattern) for pattern in patterns)]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield names
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
