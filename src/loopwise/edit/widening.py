"""Width growth in memory: build the wider twin, fill it, and prove on a few tokens that it computes the same.

Shapes: D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loopwise.edit.axes import (
    Axes,
    derives_head_size,
    find_axes,
    fitting_heads,
    layer_sizes,
    resized,
    saved_tensors,
    sizes_of,
    tensor_shapes,
)
from loopwise.edit.expand import FRESH, UnitMap, WidthEdit, WidthSource, group_heads, replicate, shares, spread
from loopwise.edit.expand import generator as numbers
from loopwise.edit.norms import NormForm, branch_norms, is_norm, norm_form
from loopwise.edit.tied import divided, embedding_scale, is_tied, rescaled
from loopwise.edit.twin import build_twin, fill, keep_plan, prove, refuse_unfit
from loopwise.edit.width import Widen, WidthOperator
from loopwise.models.hub import base_model
from loopwise.models.realise import LayerNames, has_own_plan


def widen(model: nn.Module, operator: WidthOperator) -> nn.Module:
    """A wider model that computes what `model` does; `model` is not changed.

    Its plan, modes, dtypes and tied tensors are kept. No global random number is drawn.

    Raises:
        ValueError: a size that shrinks or does not fit, an architecture in which the function could not be kept, a
            quantised model, adapters, or hooks on the plan.
    """
    return operator.edit(model).model


def widen_edit(model: nn.Module, operator: Widen) -> WidthEdit:
    """`widen`, with what each tensor is made of; see `WidthEdit`."""
    refuse_unfit(model)
    base = base_model(model)
    old = sizes_of(base)
    new = _new_sizes(base, operator, old)
    axes = find_axes(base, list(new))
    maps = _Maps(base, operator, old, new)
    config = resized(base, new | fitting_heads(base, old, new))
    twin = build_twin(model, config)
    if tensor_shapes(base, base.config) == tensor_shapes(base, config):
        raise ValueError(f"edit.widen: no tensor of {type(base).__name__} grows with {' and '.join(operator.sizes())}")
    with torch.no_grad():
        sources = _sources(base, axes, maps)
        fill(base, twin, sources)
        scale = 1.0
        if maps.hidden is not None and not has_own_plan(base):
            scale = embedding_scale(base, twin, maps.hidden, maps.stream_scale)
        if scale != 1:
            sources |= rescaled(base, sources, scale)
            fill(base, twin, sources)
    keep_plan(model, twin)
    return WidthEdit(twin, sources, prove(model, twin, operator))


class _Maps:
    """The unit maps of every layer, drawn once."""

    def __init__(self, base: nn.Module, operator: Widen, old: Mapping[str, int], new: Mapping[str, int]):
        self.operator, self.old, self.new = operator, old, new
        self._layers = layer_sizes(base)
        self._found: dict[int | None, dict[str, UnitMap]] = {}
        self.hidden: UnitMap | None = None
        self.stream_scale = 1.0
        if "hidden" in new:
            self.hidden, self.stream_scale = _channels(old["hidden"], new["hidden"], operator)

    def of(self, layer: int | None) -> dict[str, UnitMap]:
        """The maps of a layer, None for what is outside."""
        if layer not in self._found:
            self._found[layer] = self._draw(layer)
        return self._found[layer]

    def _draw(self, layer: int | None) -> dict[str, UnitMap]:
        units = dict(self.old) | (self._layers[layer] if layer is not None and self._layers else {})
        options: dict[str, Any] = {"split": self.operator.split, "seed": self.operator.seed}
        found = {} if self.hidden is None else {"hidden": self.hidden}
        if self.hidden is not None and "kv_heads" in units:  # where they grow along with the channels, as they do
            times = self.new["hidden"] // self.old["hidden"]
            found["kv_heads"] = replicate(
                units["kv_heads"], times * units["kv_heads"], key="", shuffle=False, **options
            )
        for name in ("mlp", "expert_mlp"):
            if name in self.new:
                found[name] = replicate(units[name], self.new[name], key=f"{name} {layer}", **options)
        if "kv_heads" in self.new:
            pairs = [(units[name], self.new[name]) for name in ("heads", "kv_heads")]
            maps = group_heads(*pairs, key=f"{layer}", **options)
            found["heads"], found["kv_heads"] = maps
        elif "heads" in self.new:
            found["heads"] = replicate(units["heads"], self.new["heads"], key=f"heads {layer}", **options)
        return found


def _new_sizes(base: nn.Module, operator: Widen, old: Mapping[str, int]) -> dict[str, int]:
    """The sizes that change; both head counts where one of them does."""
    kind, new = type(base).__name__, operator.sizes()
    for name, size in new.items():
        if name not in old:
            raise ValueError(f"{kind} has no size {name!r}: it has {', '.join(n for n in old if n != 'head_dim')}")
        operator.require(size >= old[name], name, f"is below the present {old[name]}: width can only grow")
    new = {name: size for name, size in new.items() if size != old[name]}
    if not new:
        raise ValueError(f"edit.widen: these are the sizes that {kind} has already")
    if new.keys() & {"hidden", "heads", "kv_heads"} and derives_head_size(base):
        return _coupled(kind, operator, old, new)
    if new.keys() & {"heads", "kv_heads"} and "kv_heads" in old:
        for name in ("heads", "kv_heads"):
            new.setdefault(name, old[name])
        rule = f"is not a multiple of {new['kv_heads']} kv heads"
        if new["heads"] % new["kv_heads"]:
            raise ValueError(f"edit.widen: heads={new['heads']} {rule}")
    return new


def _coupled(kind: str, operator: Widen, old: Mapping[str, int], new: dict[str, int]) -> dict[str, int]:
    """Sizes of a type whose size of a head is D / H: heads and channels grow together, as copies of the whole."""
    why = f"{kind} derives the size of a head from hidden and heads, and it stays"
    hidden = new.get("hidden", old["hidden"])
    if hidden % old["hidden"]:
        raise ValueError(f"edit.widen: hidden={hidden} is not a multiple of {old['hidden']}: {why}")
    for name in ("heads", "kv_heads"):
        if name not in old:
            continue
        fit = old[name] * (hidden // old["hidden"])
        given = new.pop(name, fit)
        operator.require(given == fit, name, f"must be {fit} at hidden={hidden}: {why}")
    return new


def _channels(old: int, new: int, operator: Widen) -> tuple[UnitMap, float]:
    """Copies of all channels, as many as fit, then fresh ones; and the factor on what is written to the stream.

    Fresh channels are zero (or the mean, under layer norms), and so lower the mean square by `times * old / new`. What
    is written is scaled against that, so that the norms see what they saw, their epsilon included.
    """
    times = new // old
    index = torch.arange(old).repeat(times)
    share = shares(index, operator.split, numbers(operator.seed, "hidden"))
    fresh = torch.full((new - times * old,), FRESH)
    ones = torch.ones(len(fresh), dtype=torch.float64)
    whole = UnitMap(
        index=torch.cat([index, fresh]), share=torch.cat([share, ones]), gradient=torch.cat([share, 0 * ones])
    )
    return whole, math.sqrt(new / (times * old))


@dataclass(frozen=True)
class _Norms:
    """What the norms over the width of a model do, by the name of the module."""

    forms: Mapping[str, NormForm]
    on_branches: frozenset[str]
    in_layers: frozenset[str]

    @property
    def reads_stream(self) -> bool:
        """Whether branches read the stream itself, as all norms of the layers stand behind them (OLMo-2)."""
        return self.in_layers <= self.on_branches

    @property
    def fill(self) -> str:
        """What fresh channels of the stream hold."""
        centred = {form.is_centred for form in self.forms.values()}
        if len(centred) > 1:
            raise ValueError("edit.widen: hidden must be a multiple, as the model has both layer norms and RMS norms")
        return "mean" if centred == {True} else "zero"


def _sources(base: Any, axes: Axes, maps: _Maps) -> dict[str, WidthSource]:
    layers, modules = LayerNames(base), dict(base.named_modules())
    has_fresh = maps.hidden is not None and FRESH in maps.hidden.index
    norms = _hidden_norms(base, axes, modules) if has_fresh else None
    found: dict[str, WidthSource] = {}
    for name, own in axes.items():
        inside = layers.split(name)
        source = _source(name, own, maps.of(inside[1] if inside else None), maps.operator.seed)
        module_name = name.rpartition(".")[0]
        _check_inner_norm(modules[module_name], name, own, maps.of(inside[1] if inside else None))
        if norms is not None:
            source = _with_fresh(source, name, own, norms, maps.stream_scale, inside is not None)
        found[name] = source
    if maps.hidden is not None and is_tied(base):
        found |= divided(base, found, maps.hidden, maps.stream_scale)
    first: dict[int, str] = {}  # a tensor with several names is what it is under the first
    for name, tensor in saved_tensors(base).items():
        found[name] = found[first.setdefault(id(tensor), name)]
    return found


def _source(name: str, own: tuple, maps: Mapping[str, UnitMap], seed: int) -> WidthSource:
    index, value, gradient = [], [], []
    for axis in own:
        index.append(None if axis is None else spread(axis, maps, "index"))
        value.append(spread(axis, maps, "share") if axis is not None and axis.reads else None)
        gradient.append(spread(axis, maps, "gradient") if axis is not None and not axis.reads else None)
    return WidthSource(
        names=(name,),
        index=tuple(index),
        value=tuple(value),
        gradient=tuple(gradient),
        summed=tuple(axis is not None and axis.reads for axis in own),
        seed=numbers(seed, name).initial_seed(),
    )


def _check_inner_norm(module: nn.Module, name: str, own: tuple, maps: Mapping[str, UnitMap]) -> None:
    """Refuse copies in unequal numbers under a norm over them, whose mean square they would change."""
    if not is_norm(module) or len(own) != 1 or own[0] is None:
        return
    for part in own[0].parts:
        if part.dimension != "hidden" and not maps[part.dimension].is_uniform:
            raise ValueError(
                f"edit.widen: {part.dimension} must grow to a multiple of {part.units}: {name} norms over all of them"
            )


def _hidden_norms(base: Any, axes: Axes, modules: Mapping[str, nn.Module]) -> _Norms:
    forms = {}
    for name, own in axes.items():
        module_name = name.rpartition(".")[0]
        over_width = len(own) == 1 and own[0] is not None and own[0].parts[0].dimension == "hidden"
        if is_norm(modules[module_name]) and over_width and module_name not in forms:
            form = norm_form(modules[module_name])
            if form is None:
                raise ValueError(f"edit.widen: hidden must be a multiple, as {module_name} is no known kind of norm")
            forms[module_name] = form
    split = LayerNames(base).split
    inside = frozenset(name for name in forms if split(name) is not None)
    return _Norms(forms, branch_norms(base, forms), inside)


def _with_fresh(
    source: WidthSource, name: str, own: tuple, norms: _Norms, scale: float, in_layers: bool
) -> WidthSource:
    """The same with fresh channels: nothing is written on them, random columns read them."""
    module, _, attribute = name.rpartition(".")
    form = norms.forms.get(module)
    on_branch = module in norms.on_branches
    value, gradient, fills = list(source.value), list(source.gradient), []
    for number, axis in enumerate(own):
        if axis is None or axis.parts[0].dimension != "hidden":
            fills.append(None)
            continue
        if axis.reads:
            fills.append("random")
            if in_layers and norms.reads_stream:
                value[number] = source.value[number] / scale  # type: ignore[operator]
                gradient[number] = torch.full_like(value[number], scale)  # type: ignore[arg-type]
        elif form is not None:
            fills.append("zero" if attribute == "bias" else "one")
        else:
            fills.append(norms.fill)
        # What a norm makes of a stream that is larger by a factor, with as large a mean square, is larger by it too:
        # right for what goes on to the stream, to be undone for what a branch reads.
        factor = scale if form is None else 1.0 if on_branch or attribute == "bias" else 1 / scale
        if not axis.reads and factor != 1:
            size = len(source.index[number])  # type: ignore[arg-type]
            value[number] = torch.full((size,), factor, dtype=torch.float64)
            gradient[number] = source.gradient[number] / factor  # type: ignore[operator]
    offset = form.offset if form is not None and attribute != "bias" else 0.0
    return replace(source, value=tuple(value), gradient=tuple(gradient), fill=tuple(fills), offset=offset)
