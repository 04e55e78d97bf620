"""Experts in memory: a dense model becomes a mixture of experts, and a mixture gets more of them.

Shapes: D width, F units of an expert, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loopwise.edit.axes import Axis, find_axes, first_line, resized, saved_tensors, sizes_of
from loopwise.edit.expand import UnitMap, WidthEdit, WidthSource, generator, replicate, spread
from loopwise.edit.twin import build_twin, fill, keep_plan, prove, refuse_unfit
from loopwise.edit.width import Upcycle
from loopwise.models.hub import base_model, text_config
from loopwise.models.realise import has_own_plan


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How a dense type is said as a mixture.

    Attributes:
        to: its model type.
        units: the field for the units of an expert.
        refused: fields that the mixture lacks, which must be false or absent.
        values: further fields.
    """

    to: str
    units: str
    refused: tuple[str, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()


# Mixtral always lets the chosen experts weigh 1 together; Qwen3-MoE is told to.
_RECIPES = {
    "llama": _Recipe(
        to="mixtral",
        units="intermediate_size",
        refused=("attention_bias", "mlp_bias"),
        values=(("sliding_window", None),),
    ),
    "mistral": _Recipe(to="mixtral", units="intermediate_size"),
    "qwen3": _Recipe(
        to="qwen3_moe",
        units="moe_intermediate_size",
        refused=("use_sliding_window",),
        values=(("norm_topk_prob", True), ("mlp_only_layers", []), ("decoder_sparse_step", 1)),
    ),
}
_NOT_CARRIED_OVER = ("model_type", "architectures", "layer_types", "transformers_version", "max_window_layers")


def upcycle_edit(model: nn.Module, operator: Upcycle) -> WidthEdit:
    """`widen` for `Upcycle`, with what each tensor is made of; see `WidthEdit`."""
    refuse_unfit(model)
    base = base_model(model)
    sizes = sizes_of(base)
    if "experts" in sizes and sizes.get("top_k"):
        return _more_experts(model, operator, sizes["experts"], sizes["top_k"])
    if has_own_plan(base):
        raise ValueError("edit.upcycle: a decoder of our own has no MLP with experts: use a type of transformers")
    kind = text_config(base).model_type
    if kind not in _RECIPES:
        raise ValueError(
            f"edit.upcycle: {type(base).__name__} has no known type with experts beside it: use {', '.join(_RECIPES)}"
        )
    return _from_dense(model, operator, _RECIPES[kind])


def _from_dense(model: nn.Module, operator: Upcycle, recipe: _Recipe) -> WidthEdit:
    base = base_model(model)
    top_k = operator.top_k or min(2, operator.experts)
    values = {name: value for name, value in base.config.to_dict().items() if name not in _NOT_CARRIED_OVER}
    for name in recipe.refused:
        if values.get(name):
            raise ValueError(f"edit.upcycle: {name}={values[name]!r} is not available in {recipe.to}")
    values |= dict(recipe.values) | {recipe.units: values["intermediate_size"], "num_experts_per_tok": top_k}
    values["num_local_experts" if recipe.to == "mixtral" else "num_experts"] = operator.experts
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    parameter = next(base.parameters())
    try:
        with torch.random.fork_rng(devices=[parameter.device] if parameter.device.type == "cuda" else []):
            config = AutoConfig.for_model(recipe.to, **values)
            attention = base.config._attn_implementation
            twin: Any = AutoModelForCausalLM.from_config(config, dtype=parameter.dtype, attn_implementation=attention)
    except Exception as error:  # whatever the class says to the other's fields
        raise ValueError(f"edit.upcycle: {recipe.to} cannot be built so: {first_line(error)}") from error
    twin.to(parameter.device)
    twin.generation_config = base.generation_config
    sources = {name: _dense_source(name, operator, saved_tensors(base)) for name in saved_tensors(twin)}
    with torch.no_grad():
        fill(base, twin, sources)
    keep_plan(model, twin)
    return WidthEdit(twin, sources, prove(model, twin, operator))


def _dense_source(name: str, operator: Upcycle, old: Any) -> WidthSource:
    head, _, last = name.rpartition(".mlp.")
    if name in old:
        none = (None,) * old[name].ndim
        return WidthSource(names=(name,), index=none, value=none, gradient=none)
    if last == "gate.weight":
        std = 0.02 if operator.router == "random" else 0.0
        seed = generator(operator.seed, name).initial_seed()
        return WidthSource(names=(), index=(), value=(), gradient=(), std=std, seed=seed)
    parts = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}[last]
    even = torch.full((operator.experts,), 1 / operator.experts, dtype=torch.float64)
    return WidthSource(
        names=tuple(f"{head}.mlp.{part}.weight" for part in parts),
        index=(torch.zeros(operator.experts, dtype=torch.int64), None, None),
        value=(None,) * 3,
        gradient=(even, None, None),
        stacked=True,
    )


def _more_experts(model: nn.Module, operator: Upcycle, experts: int, chosen: int) -> WidthEdit:
    """Every expert as often as every other; all copies of a chosen one are chosen, each with a part of its weight."""
    base = base_model(model)
    times, rest = divmod(operator.experts, experts)
    operator.require(rest == 0 and times > 1, "experts", f"must be a multiple of the present {experts}")
    top_k = chosen * times
    operator.require(operator.top_k in (None, top_k), "top_k", f"must be {top_k}: the copies are chosen together")
    axes = find_axes(base, ["experts"])
    twin = build_twin(model, resized(base, {"experts": operator.experts, "top_k": top_k}))
    sources: dict[str, WidthSource] = {}
    for name, own in axes.items():
        key = name.partition("experts")[0]
        maps = {
            "experts": replicate(
                experts, operator.experts, split=operator.split, key=key, seed=operator.seed, shuffle=False
            )
        }
        sources[name] = _copies(name, own, maps, times)
    with torch.no_grad():
        fill(base, twin, sources)
    keep_plan(model, twin)
    return WidthEdit(twin, sources, prove(model, twin, operator))


def _copies(name: str, own: tuple[Axis | None, ...], maps: dict[str, UnitMap], times: int) -> WidthSource:
    """Copies of an expert share its output: the router weighs them alike, so unequal shares are in the last matrix."""
    index = tuple(None if axis is None else spread(axis, maps, "index") for axis in own)
    none: list[torch.Tensor | None] = [None] * len(own)
    value, gradient = list(none), list(none)
    for number, axis in enumerate(own):
        if axis is None:
            continue
        share = spread(axis, maps, "share")
        is_last = "down_proj" in name or "output_linear" in name
        value[number] = share * times if is_last else None
        gradient[number] = torch.full_like(share, 1 / times) if is_last else share
    return WidthSource(names=(name,), index=index, value=tuple(value), gradient=tuple(gradient))
