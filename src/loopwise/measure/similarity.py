"""How alike the weights of layers are: cosines per weight group, with the level that chance gives.

Legend: L layers, n entries of a tensor.

    cos_ij = <a_i, a_j> / (|a_i| |a_j|)

A *group* is a tensor by its name inside the layer (`self_attn.q_proj.weight`); all experts of a layer are one group.
Chance is what is left when the entries of every tensor are put into a random order of their own:

    mean = n mean(a_i) mean(a_j) / (|a_i| |a_j|)
    std  = s_i s_j / (sqrt(n - 1) |a_i| |a_j|),  s^2 = sum (a - mean(a))^2

Both are exact. For a matrix around zero they are 0 and 1 / sqrt(n); for norms and biases, whose entries have a mean,
the chance level is far from 0. What every layer starts as (decay rates of state-space layers) is no chance: such groups
are near 1 before any training.

Block cosines (layers of a block concatenated) are what the heat-maps of growth papers show. R(k), the mean cosine of
layers i and i + k, is what the regulariser of 2502.17416 rewards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from loopwise.measure.arrays import as_lists
from loopwise.models.hub import layer_list

# Entries of all layers that are held in float64 at a time: 16 MB.
CHUNK = 2**21
_LAYER = re.compile(r"^(?P<path>.*?)\.?(?P<layer>\d+)\.(?P<rest>.+)$")
_EXPERT = re.compile(r"(?<=experts\.)\d+\.")
Shape = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cosines:
    """Cosines of M layers or blocks with each other, NaN where two cannot be compared.

    Attributes:
        cosine: float64 `[M, M]`.
        chance: mean of the cosine after shuffling, float64 `[M, M]`; on the diagonal too.
        chance_std: its standard deviation.
    """

    cosine: np.ndarray
    chance: np.ndarray
    chance_std: np.ndarray

    def lag(self, k: int) -> float:
        """R(k): the mean cosine of neighbours at distance k; NaN when there are none."""
        return _mean(np.diagonal(self.cosine, k))

    def chance_at(self, k: int) -> tuple[float, float]:
        """Mean and standard deviation of `lag(k)` after shuffling.

        The standard deviation takes the pairs as independent of each other.
        """
        mean, std = np.diagonal(self.chance, k), np.diagonal(self.chance_std, k)
        known = std[np.isfinite(std)]
        return _mean(mean), float(np.sqrt((known**2).sum()) / len(known)) if len(known) else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Lists and numbers; None for NaN."""
        lags = range(1, len(self.cosine))
        return {
            "cosine": as_lists(self.cosine),
            "chance": as_lists(self.chance),
            "chance_std": as_lists(self.chance_std),
            "lags": {
                str(k): {"cosine": as_lists(self.lag(k)), "chance": as_lists(self.chance_at(k))}
                for k in lags
                if not np.isnan(self.lag(k))
            },
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightGroup:
    """One weight group over L layers. Sums of two groups are those of their concatenation.

    Attributes:
        name: name inside the layer; `*` stands for the number of an expert.
        shapes: per layer the shapes of the group's tensors, empty where a layer has none.
        dots: float64 `[L, L]`, inner products; NaN where shapes differ or are missing.
        chance_dots: their means after shuffling.
        chance_vars: their variances.
    """

    name: str
    shapes: tuple[Shape, ...]
    dots: np.ndarray
    chance_dots: np.ndarray
    chance_vars: np.ndarray

    @property
    def is_matrix(self) -> bool:
        """Whether its tensors have two axes or more: no norm, no bias."""
        return all(len(shape) > 1 for shapes in self.shapes for shape in shapes)

    def compare(self, b: int = 1) -> Cosines:
        """Cosines of layers, or of blocks of `b` consecutive layers: `[L / b, L / b]`.

        Raises:
            ValueError: b does not divide the number of layers.
        """
        num_layers = len(self.dots)
        if b < 1 or num_layers % b:
            raise ValueError(f"blocks of b={b} layers do not divide {num_layers} layers: use a divisor")
        shape = (num_layers // b, b, num_layers // b, b)
        # Layer j of one block meets layer j of the other.
        dots, means, variances = (
            np.einsum("pjqj->pq", array.reshape(shape)) for array in (self.dots, self.chance_dots, self.chance_vars)
        )
        norms = np.sqrt(np.diagonal(dots))
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = norms[:, None] * norms[None, :]
            return Cosines(
                cosine=np.clip(dots / scale, -1, 1), chance=means / scale, chance_std=np.sqrt(variances) / scale
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightSimilarity:
    """All weight groups of L layers.

    Attributes:
        num_layers: L.
        groups: the groups that two layers or more have in one shape, in the order of the first layer that has them.
    """

    num_layers: int
    groups: tuple[WeightGroup, ...]

    def __getitem__(self, name: str) -> WeightGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no weight group {name!r}: there are {', '.join(group.name for group in self.groups)}")

    def mean(self, b: int = 1) -> Cosines:
        """Mean over the groups of matrices (all groups where there is none), each counting the same.

        Two layers are compared in the groups that both have; NaN where they share none. The deviation takes groups as
        independent of each other.
        """
        groups = [group for group in self.groups if group.is_matrix] or list(self.groups)
        if not groups:
            nothing = np.full((self.num_layers // b,) * 2, np.nan)
            return Cosines(cosine=nothing, chance=nothing, chance_std=nothing)
        found = [group.compare(b) for group in groups]
        cosine = np.stack([item.cosine for item in found])
        known = ~np.isnan(cosine)
        count = known.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            chance = np.where(known, [item.chance for item in found], 0).sum(0) / count
            variance = np.where(known, [item.chance_std**2 for item in found], 0).sum(0)
            return Cosines(
                cosine=np.where(known, cosine, 0).sum(0) / count, chance=chance, chance_std=np.sqrt(variance) / count
            )

    def lag(self, k: int) -> dict[str, float]:
        """R(k) of every group (2502.17416); NaN where a group has no two layers at that distance."""
        return {group.name: group.compare().lag(k) for group in self.groups}

    def to_json(self, b: int = 1) -> dict[str, Any]:
        """Layer cosines of every group, their mean over matrices, and block cosines where `b` is above 1."""
        done: dict[str, Any] = {
            "num_layers": self.num_layers,
            "mean": self.mean().to_json(),
            "groups": {
                group.name: {"shapes": [list(map(list, shapes)) for shapes in group.shapes]} | group.compare().to_json()
                for group in self.groups
            },
        }
        if b > 1:
            blocks = {group.name: group.compare(b).to_json() for group in self.groups}
            done["blocks"] = {"b": b, "mean": self.mean(b).to_json(), "groups": blocks}
        return done


@torch.no_grad()
def weight_similarity(
    source: nn.Module | Mapping[str, torch.Tensor] | Sequence[nn.Module],
    *,
    path: str | None = None,
    select: Callable[[str], bool] | None = None,
) -> WeightSimilarity:
    """Compare the weights of all layers, group by group.

    A group is read at a time, in pieces of 16 MB in float64, so that no copy of the model is made; tensors of a lazy
    mapping are asked for when their turn comes. Parameters of a sharded model are gathered group by group: call it on
    all ranks.

    Args:
        source: a model with decoder layers; the layers themselves; or tensors by name, such as a state dict.
        path: of a mapping, the part of the names before the layer number, such as `model.layers`; None takes the one
            with most names.
        select: keeps a group by its name; None keeps all.

    Returns:
        The groups; layers are numbered as in the model.

    Raises:
        ValueError: a model that has no decoder layers or is an encoder-decoder, names without layer numbers, tensors on
            the meta device, or whole numbers (quantised weights).
    """
    layers = _layers(source, path)
    names = list(dict.fromkeys(name for layer in layers for name in layer))
    groups = []
    for name in names:
        if select is not None and not select(name):
            continue
        tensors = [[load() for load in layer.get(name, ())] for layer in layers]
        shapes = tuple(tuple(tuple(tensor.shape) for tensor in of_layer) for of_layer in tensors)
        if any(shape and shapes.count(shape) > 1 for shape in shapes):
            groups.append(_group(name, tensors, shapes))
    return WeightSimilarity(num_layers=len(layers), groups=tuple(groups))


def _layers(source: Any, path: str | None) -> list[dict[str, list[Callable[[], torch.Tensor]]]]:
    """Per layer, what gives the tensors of every group."""
    if isinstance(source, Mapping):
        return _of_mapping(source, path)
    if path is not None:
        raise ValueError(f"path={path!r} is for tensors by name: a model knows where its layers are")
    modules = layer_list(source).layers if not isinstance(source, (nn.ModuleList, Sequence)) else source
    layers = []
    for module in modules:
        groups: dict[str, list[Callable[[], torch.Tensor]]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            groups.setdefault(_EXPERT.sub("*.", name), []).append(lambda parameter=parameter: parameter)
        layers.append(groups)
    return layers


def _of_mapping(tensors: Mapping[str, torch.Tensor], path: str | None) -> list[dict]:
    found: dict[str, dict[int, dict[str, list]]] = {}
    for name in tensors:
        match = _LAYER.match(name)
        if match and (path is None or match["path"] == path):
            groups = found.setdefault(match["path"], {}).setdefault(int(match["layer"]), {})
            group = groups.setdefault(_EXPERT.sub("*.", match["rest"]), [])
            group.append(lambda name=name: tensors[name])
    if not found:
        wanted = f"{path or 'PATH'}.NUMBER.NAME"
        raise ValueError(f"no tensor is named {wanted}: there are {', '.join(list(tensors)[:3]) or 'none'}")
    layers = max(found.values(), key=lambda layers: sum(len(groups) for groups in layers.values()))
    return [layers.get(number, {}) for number in range(max(layers) + 1)]


def _group(name: str, tensors: list[list[torch.Tensor]], shapes: tuple[Shape, ...]) -> WeightGroup:
    num_layers = len(tensors)
    sums = np.full((3, num_layers, num_layers), np.nan)
    for shape in dict.fromkeys(shape for shape in shapes if shape):
        members = [layer for layer, other in enumerate(shapes) if other == shape]
        for number in range(len(shape)):
            part = _sums(name, [tensors[layer][number] for layer in members])
            place = np.ix_(range(3), members, members)
            sums[place] = np.where(np.isnan(sums[place]), 0, sums[place]) + part
    return WeightGroup(name=name, shapes=shapes, dots=sums[0], chance_dots=sums[1], chance_vars=sums[2])


def _sums(name: str, tensors: list[torch.Tensor]) -> np.ndarray:
    """Inner products of equal tensors, and their mean and variance after shuffling: `[3, M, M]`."""
    tensors = [_plain(name, tensor) for tensor in tensors]
    flat, size = [tensor.reshape(-1) for tensor in tensors], tensors[0].numel()
    dots = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    totals = torch.zeros(len(flat), dtype=torch.float64)
    step = max(1, CHUNK // len(flat))
    for start in range(0, size, step):
        chunk_MN = torch.stack([tensor[start : start + step].to(torch.float64) for tensor in flat])
        dots += (chunk_MN @ chunk_MN.T).cpu()
        totals += chunk_MN.sum(1).cpu()
    means = torch.outer(totals, totals) / size
    spread = (dots.diagonal() - means.diagonal()).clamp(min=0)
    variances = torch.outer(spread, spread) / max(size - 1, 1)
    return torch.stack([dots, means, variances]).numpy()


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    whole = getattr(tensor, "full_tensor", None)
    tensor = (tensor if whole is None else whole()).detach()
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: load the weights to compare them")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: dequantise the weights to compare them")
    return tensor.cpu() if tensor.device.type == "mps" else tensor  # which has no float64


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
