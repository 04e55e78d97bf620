"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from loopwise.train.optim.state import copy_state


class Ema:
    """Averages `a <- d a + (1 - d) p` of parameters, by name.

    The decay of step t (0-based) is d, and with warm-up min(d, (1 + t) / (10 + t)), so that the first values fade fast.
    Averages are float32 at least: below, a change by 1 - d would be rounded away. Buffers are not averaged.

    Args:
        named_parameters: parameters by name; a tied one counts under its first name. Averages start as their values.
        decay: d, above 0 and below 1. TRM (2510.04871) has 0.999, HRM-Text (2605.20613) 0.9999.
        warmup: see above.

    Raises:
        ValueError: a decay out of range, or no parameter.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], *, decay: float = 0.999, warmup: bool = False):
        if not 0 < decay < 1:
            raise ValueError(f"ema: decay={decay!r} must be above 0 and below 1")
        first: dict[int, str] = {}
        for name, parameter in named_parameters.items():
            first.setdefault(id(parameter), name)
        self.parameters = {name: value for name, value in named_parameters.items() if first[id(value)] == name}
        if not self.parameters:
            raise ValueError("ema: there is no parameter to average")
        self.decay, self.warmup = decay, warmup
        self._is_swapped = False
        self._averages = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in after the 0-based optimizer step `step`.

        Raises:
            ValueError: called inside `swapped`.
        """
        if self._is_swapped:
            raise ValueError("ema: the averages are in the place of the weights; call update outside swapped()")
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for name, parameter in self.parameters.items():
            average = self._averages[name]
            average.lerp_(parameter.detach().to(average.dtype), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Averages in the place of the weights; afterwards, also after an error, these are back bit for bit.

        Raises:
            ValueError: called inside itself.
        """
        if self._is_swapped:
            raise ValueError("ema: swapped() was entered twice; leave the first one before")
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._is_swapped = True
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(weights)
            self._is_swapped = False

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, torch.Tensor]:
        """The averages as "<parameter name>/average"; the tensors themselves, no copies."""
        return {f"{name}/average": average for name, average in self._averages.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy averages that `state` gave into these, bit for bit.

        Raises:
            ValueError: a missing or unknown key, or another shape or dtype; nothing was copied then.
        """
        copy_state(self.state(), state, "ema")
