"""Wider tensors: which old unit every new one copies, and what each new tensor, and its moments, are made of.

A unit is written by rows and read by columns. Its copies have the same rows, and columns that are a share of the old
ones; the shares of the copies of a unit add up to 1:

    W_new[i, :] = W_old[index[i], :]        along an axis that is written
    W_new[:, i] = share[i] W_old[:, index[i]]    along an axis that is read

Gradients go the other way round: that of a row is its share of the old one, that of a column is the old one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loopwise.edit.axes import Axis

FRESH = -1


@dataclass(frozen=True, kw_only=True)
class UnitMap:
    """The new units along one dimension.

    Attributes:
        index: the old unit that each copies, int64 `[N]`; `FRESH` copies none.
        share: the share of its unit's contribution that each makes, float64 `[N]`.
        gradient: the share of its unit's gradient that each is expected to have, float64 `[N]`.
    """

    index: torch.Tensor
    share: torch.Tensor
    gradient: torch.Tensor

    @property
    def is_uniform(self) -> bool:
        """Whether every old unit has as many copies, so that mean squares over the units stay."""
        counts = torch.bincount(self.index[self.index != FRESH])
        return bool((counts == counts[0]).all()) and FRESH not in self.index


@dataclass(frozen=True, kw_only=True)
class WidthSource:
    """What a new tensor is made of.

    Along axis n the new entry i copies the entry `index[n][i]` of the old tensor, times `value[n][i]`. None leaves an
    axis as it is. Moments of an optimizer move with the tensor: the first by the same index times `gradient`, the
    second times its square; entries that copy nothing have none.

    Attributes:
        names: old tensors, concatenated along their first axis; none for a tensor that is new.
        index: per axis int64 `[N]` or None.
        value, gradient: per axis float64 `[N]` or None.
        fill: per axis what entries without a source hold: "zero", "one", "mean" of the others, or "random" values of
            the same deviation.
        summed: per axis whether copies are shares of one old entry.
        offset: what the module adds to the tensor before use (1 in norms that compute `(1 + w) x`).
        stacked: the tensor has a new first axis, along which `index[0]` is all zeros.
        seed: of random entries.
        std: deviation of a tensor that is new; 0 is a tensor of zeros.
    """

    names: tuple[str, ...]
    index: tuple[torch.Tensor | None, ...]
    value: tuple[torch.Tensor | None, ...]
    gradient: tuple[torch.Tensor | None, ...]
    fill: tuple[str | None, ...] = ()
    summed: tuple[bool, ...] = ()
    offset: float = 0.0
    stacked: bool = False
    seed: int = 0
    std: float = 0.0

    def tensor(self, old: Mapping[str, torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The new tensor from the old model's ones."""
        if not self.names:
            return (torch.randn(tuple(shape), generator=generator(self.seed, "new")) * self.std).to(dtype)
        found = self._gathered(old)
        source = wide = found.to(torch.promote_types(found.dtype, torch.float32)) + self.offset
        fills: tuple[str | None, ...] = self.fill or (None,) * len(self.index)
        # Columns first: rows that start at zero, or at a mean, do so over new columns too.
        for axis in sorted(range(len(self.index)), key=lambda axis: fills[axis] != "random"):
            index, value = self.index[axis], self.value[axis]
            if index is not None:
                narrow, wide = wide, _along(wide, axis, index.clamp(min=0), value)
                if value is not None and self.summed and self.summed[axis] and FRESH not in index:
                    wide = _exact_sums(narrow, wide, axis, index, value, dtype)
                wide = self._filled(wide, axis, index, fills[axis], source)
        return (wide - self.offset).to(dtype)

    def moments(
        self, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`exp_avg` and `exp_avg_sq` of the new tensor from those of the old ones; None for a tensor that is new."""
        if not self.names:
            return None
        moved = []
        for moments, power in ((first, 1), (second, 2)):
            wide = self._gathered(moments)
            for axis, index in enumerate(self.index):
                if index is not None:
                    factor = self.gradient[axis]
                    factor = torch.ones(len(index), dtype=torch.float64) if factor is None else factor**power
                    wide = _along(wide, axis, index.clamp(min=0), factor * (index != FRESH))
            moved.append(wide)
        return moved[0], moved[1]

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found = tensors[self.names[0]]
        if len(self.names) > 1:
            found = torch.cat([tensors[name] for name in self.names])
        return found.detach()[None] if self.stacked else found.detach()

    def _filled(
        self, wide: torch.Tensor, axis: int, index: torch.Tensor, fill: str | None, source: torch.Tensor
    ) -> torch.Tensor:
        fresh = (index == FRESH).to(wide.device)
        if fill is None or not bool(fresh.any()):
            return wide
        where = [1] * wide.ndim
        where[axis] = -1
        if fill == "mean":
            copied = wide.index_select(axis, (~fresh).nonzero()[:, 0])
            new = copied.mean(axis, keepdim=True).expand_as(wide)
        elif fill == "random":
            drawn = torch.randn(wide.shape, generator=generator(self.seed, "fresh"), dtype=torch.float32)
            new = drawn.to(wide) * source.std()
        else:
            new = torch.full_like(wide, 1.0 if fill == "one" else 0.0)
        return torch.where(fresh.view(where), new, wide)


@dataclass(frozen=True)
class WidthEdit:
    """A wider model, and where each of its tensors comes from.

    Attributes:
        model: the new model.
        sources: for every parameter and saved buffer, under all its names. Shares of gradients are exact for MLP
            units, for whole groups of heads, and for even shares of channels; for unequal shares of channels they
            leave out a part that goes through the norms, and for experts they are the mean over tokens.
        error: the largest difference of logits on a few tokens, over the largest logit.
    """

    model: Any
    sources: Mapping[str, WidthSource] = field(repr=False)
    error: float = 0.0


def replicate(old: int, new: int, *, split: str, key: str, seed: int, shuffle: bool = True) -> UnitMap:
    """A map to `new` units that starts with all old ones, then copies some.

    Args:
        old: number of units.
        new: number to come, at least as large.
        split: "even" or "unequal".
        key: what the map is for; other keys draw other numbers.
        seed: of the numbers.
        shuffle: copy in a random order, each unit as often as the others or once more; else in order.
    """
    random = generator(seed, key)
    index = [torch.arange(old)]
    while sum(map(len, index)) < new:
        index.append(torch.randperm(old, generator=random) if shuffle else torch.arange(old))
    chosen = torch.cat(index)[:new]
    share = shares(chosen, split, random)
    return UnitMap(index=chosen, share=share, gradient=share)


def shares(index: torch.Tensor, split: str, random: torch.Generator) -> torch.Tensor:
    """The shares of units that copy these old ones, float64; those of the copies of a unit add up to 1.

    Unequal shares keep a distance: the n copies of a unit have weights near 0.5 + k / n, k < n in a random order.
    """
    weight = torch.ones(len(index), dtype=torch.float64)
    if split == "unequal":
        jitter = torch.rand(len(index), generator=random, dtype=torch.float64)
        order = torch.randperm(len(index), generator=random)
        seen: dict[int, int] = {}
        rank = torch.zeros(len(index), dtype=torch.float64)
        for place in order.tolist():
            unit = int(index[place])
            rank[place] = seen.get(unit, 0)
            seen[unit] = seen.get(unit, 0) + 1
        counts = torch.bincount(index)[index]
        weight = 0.5 + (rank + 0.25 + 0.5 * jitter) / counts
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, weight)
    return weight / total[index]


def group_heads(
    heads: tuple[int, int], kv_heads: tuple[int, int], *, split: str, key: str, seed: int
) -> tuple[UnitMap, UnitMap]:
    """Maps of query heads and of kv heads, both (old, new) numbers, for query heads that stay with their kv head.

    New groups copy old ones; the query heads of a group are spread over its copies, then repeated where there is room.

    Raises:
        ValueError: fewer places for the query heads of a group than it has.
    """
    old_size, new_size = heads[0] // kv_heads[0], heads[1] // kv_heads[1]
    groups = replicate(kv_heads[0], kv_heads[1], split=split, key=f"{key} groups", seed=seed)
    random = generator(seed, f"{key} heads")
    index = torch.empty(kv_heads[1], new_size, dtype=torch.int64)
    for old in range(kv_heads[0]):
        copies = (groups.index == old).nonzero()[:, 0]
        if len(copies) * new_size < old_size:
            raise ValueError(
                f"{kv_heads[1]} kv heads with {new_size} query heads each have no room for the {old_size} of a group"
            )
        places = len(copies) * new_size
        order = [torch.arange(old_size)]
        while sum(map(len, order)) < places:
            order.append(torch.arange(old_size) if new_size >= old_size else torch.randperm(old_size, generator=random))
        # A copy that has room for its whole group holds it, so that its share of the gradient is one number.
        chosen = torch.cat(order)[:places].view(len(copies), new_size)
        if new_size >= old_size:
            row = torch.cat(order)[:new_size]
            chosen = row.expand(len(copies), -1)
        index[copies] = old * old_size + chosen
    flat = index.flatten()
    if new_size >= old_size:
        weight = torch.stack([shares(row, split, random) for row in index]) * groups.share[:, None]
    else:
        weight = shares(flat, split, random)
    total = torch.zeros(heads[0], dtype=torch.float64).index_add(0, flat, weight.flatten())
    share = weight.flatten() / total[flat]
    by_group = share.view_as(index).sum(1) / old_size
    return UnitMap(index=flat, share=share, gradient=share), UnitMap(
        index=groups.index, share=by_group, gradient=by_group
    )


def spread(axis: Axis, maps: Mapping[str, UnitMap], what: str) -> torch.Tensor:
    """`index`, `share` or `gradient` of the units of an axis, for every entry of it."""
    offset, found = 0, []
    for part in axis.parts:
        values = getattr(maps[part.dimension], what)
        if what == "index":
            inside = torch.arange(part.block)
            entries = offset + values[:, None] * part.block + inside
            values = torch.where(values[:, None] == FRESH, torch.full_like(entries, FRESH), entries).flatten()
        else:
            values = values.repeat_interleave(part.block)
        found.append(values)
        offset += part.units * part.block
    return torch.cat(found)


def generator(seed: int, key: str) -> torch.Generator:
    """Random numbers of their own for a seed and a purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))


def _along(tensor: torch.Tensor, axis: int, index: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    wide = tensor.index_select(axis, index.to(tensor.device))
    if factor is None:
        return wide
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return wide * factor.to(device=tensor.device, dtype=tensor.dtype).view(shape)


def _exact_sums(
    narrow: torch.Tensor,
    wide: torch.Tensor,
    axis: int,
    index: torch.Tensor,
    value: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Let the copies of a column add up to what their shares say after rounding too.

    The copy with the smallest share takes what the others lose: with two copies the rest is a number of that precision.
    """
    if dtype in (torch.float32, torch.float64):
        return wide
    index, places, units = index.cpu(), torch.arange(len(index)), narrow.shape[axis]
    wanted = torch.zeros(units, dtype=torch.float64).index_add(0, index, value)
    least = torch.full([units], float("inf"), dtype=torch.float64).scatter_reduce(0, index, value, "amin")
    is_least = torch.where(value == least[index], places, len(places))
    taker = torch.full([units], len(places)).scatter_reduce(0, index, is_least, "amin").to(wide.device)
    wide = wide.to(dtype).to(wide.dtype)
    total = torch.zeros_like(narrow).index_add_(axis, index.to(wide.device), wide)
    return wide.index_add(axis, taker, _along(narrow, axis, torch.arange(units), wanted) - total)
