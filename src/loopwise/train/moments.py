"""What an optimizer knows of parameters, moved along with them when the model is edited.

A new parameter is a copy of an old one, the mean of several, or has no source. With c copies of an old parameter in the
new model, and n old ones in a mean, the optimizer's first moment m (`exp_avg`, Muon's momentum), second moment v
(`exp_avg_sq`) and count of steps t become

    copy    m = mean(m_i)       v = mean(v_i)          t = max(t_i)
    zero    the first copy of an old parameter carries it on (m, v, t as they were); others m = v = 0, t = max(t_i)
    halve   m = sum(m_i / c_i)  v = n sum(v_i / c_i^2)  t = max(t_i)
    reset   m = v = t = 0, of old parameters too

Untying splits a gradient: that of the looped parameter is the *sum* of those that its copies will have. "halve" (so
called after the usual two copies) gives each copy an equal share, which fits the gradients that come; "copy" leaves
each copy the moments of the sum, which are too large until they have faded (Adam's step, m / sqrt(v), is the same:
both are scaled alike). Tying sums gradients: "halve" sums the moments, and v = n sum(v_i) is exact where the gradients
agree, so that untying and tying again gives back what there was; "copy" has the mean, which is too small.

A copy that starts at zero steps keeps t: Adam's correction of the bias, which divides by 1 - b^t, does not start again,
and its first step has (1 - b1) / sqrt(1 - b2) times the usual size (0.45 for 0.9 and 0.95, but 3.2 for 0.9 and 0.999).

Layers whose outputs start at zero (LLaMA-Pro) take v and t of their source, and m = 0, whatever is chosen except
"reset": the gradient of a zeroed output projection has the form and the scale that it has in the source, but m is the
way the source was going, and what leads into a zeroed projection has no gradient at all at first. They take no share.

A parameter without a source starts anew. Published code has all of these: StackBERT drops the state, its own tool and
the reproductions of MIDAS copy it, MSG (2305.02869) has zeros and keeps t, staged training (2203.06211) halves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loopwise.train.stage import Moments

# How a moment scales with the gradient; 0 is a count of steps.
_POWERS = {"step": 0, "exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2}


@dataclass(frozen=True)
class Origin:
    """What a parameter of an edited model was made from.

    Attributes:
        sources: names in the old model: one is copied, several are averaged, none starts anew.
        zero: it belongs to a layer whose outputs start at zero.
    """

    sources: tuple[str, ...]
    zero: bool = False


Origins = Mapping[str, Origin]


def move_moments(state: Mapping[str, torch.Tensor], origins: Origins, moments: Moments) -> dict[str, torch.Tensor]:
    """What the optimizer of an edited model knows; keys as in `NamedOptimizer.state`, those that start anew left out.

    Args:
        state: of the old one, as `NamedOptimizer.state` gives it; whole tensors.
        origins: of every parameter of the new model, by name.
        moments: which row of the table above.

    Raises:
        ValueError: a moment that is not known here, unless all start anew.
    """
    if moments == "reset":
        return {}
    known: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, moment = key.rpartition("/")
        if moment not in _POWERS:
            raise ValueError(f"moments={moments!r}: the optimizer keeps {moment!r}, which cannot be moved: use 'reset'")
        known.setdefault(name, {})[moment] = tensor
    copies = Counter(source for origin in origins.values() if not origin.zero for source in origin.sources)
    heirs = _heirs(origins)
    moved = {}
    for name, origin in origins.items():
        if not origin.sources or any(source not in known for source in origin.sources):
            continue
        shares = [1 / copies[source] for source in origin.sources] if moments == "halve" and not origin.zero else None
        for moment in known[origin.sources[0]]:
            olds, power = [known[source][moment] for source in origin.sources], _POWERS[moment]
            if power == 0:
                value = torch.stack(olds).amax(0)
            elif (origin.zero and power == 1) or (moments == "zero" and name not in heirs and not origin.zero):
                value = torch.zeros_like(olds[0])
            else:
                value = _mean(olds) if shares is None else _shared(olds, shares, power)
            moved[f"{name}/{moment}"] = value
    return moved


def begin_with(moved: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole state of a new optimizer: what was moved, and zeros for the rest; `start` says names and shapes."""
    return {
        key: moved[key] if key in moved else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for key, tensor in start.items()
    }


def _heirs(origins: Origins) -> set[str]:
    """The first copy of every old parameter."""
    first: dict[str, str] = {}
    for name, origin in origins.items():
        if len(origin.sources) == 1 and not origin.zero:
            first.setdefault(origin.sources[0], name)
    return set(first.values())


def _mean(olds: list[torch.Tensor]) -> torch.Tensor:
    return olds[0].clone() if len(olds) == 1 else torch.stack(olds).mean(0)


def _shared(olds: list[torch.Tensor], shares: list[float], power: int) -> torch.Tensor:
    total = sum(old * share**power for old, share in zip(olds, shares, strict=True))
    assert isinstance(total, torch.Tensor)
    return total * len(olds) ** (power - 1)
