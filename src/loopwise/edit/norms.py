"""What the norms of a model do, found by trying them: names and classes differ between architectures."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loopwise.models.attach import eval_mode
from loopwise.models.hub import layer_list, probe_inputs
from loopwise.models.realise import LayerNames, has_own_plan

# Norms on what a branch adds to the stream. In types without the second name the first is a norm before the MLP.
_ON_BRANCHES = ("post_attention_layernorm", "post_feedforward_layernorm")
_ALWAYS_ON_BRANCHES = ("post_self_attn_layernorm", "post_mlp_layernorm")
_OWN_ON_BRANCHES = ("mixer_norm_out", "mlp_norm_out")


@dataclass(frozen=True, kw_only=True)
class NormForm:
    """A norm: whether it takes the mean away (layer norm), and what it adds to its weight before use."""

    is_centred: bool
    offset: float


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class's name."""
    return "norm" in type(module).__name__.lower()


def norm_form(module: nn.Module) -> NormForm | None:
    """What a norm over one axis does, or None for something else."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    size = weight.numel()
    gain = weight.detach().float()
    sign = torch.ones(size, device=weight.device)
    sign[1::2] = -1
    sign[size - size % 2 :] = 0  # the mean is zero for odd sizes too
    try:
        with eval_mode(module):
            plain = module(sign.to(weight.dtype)[None])[0].float()
            moved = module((sign + 8).to(weight.dtype)[None])[0].float()
    except Exception:  # a norm that wants more than its input
        return None
    bias = getattr(module, "bias", None)
    if bias is not None:
        plain, moved = plain - bias.detach().float(), moved - bias.detach().float()
    centred = bool((moved - plain).abs().max() <= 0.05 * plain.abs().max())
    effective = plain[sign != 0] * sign[sign != 0]
    gain = gain[sign != 0]
    for offset in (0.0, 1.0):
        if (effective - (gain + offset)).abs().max() <= 0.05 * effective.abs().max():
            return NormForm(is_centred=centred, offset=offset)
    return None


def final_norm(base: Any) -> tuple[str, nn.Module]:
    """Name and module of the norm whose output the head reads.

    Raises:
        ValueError: the head reads something else.
    """
    layers = LayerNames(base)
    seen: dict[str, torch.Tensor] = {}
    read: list[torch.Tensor] = []
    handles = [base.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))]
    for name, module in base.named_modules():
        if is_norm(module) and layers.split(f"{name}.") is None:

            def note(_: nn.Module, __: tuple, output: Any, name: str = name) -> None:
                seen[name] = output

            handles.append(module.register_forward_hook(note))
    try:
        with eval_mode(base):
            base(**probe_inputs(base))
    finally:
        for handle in handles:
            handle.remove()
    for name, output in seen.items():
        if read and isinstance(output, torch.Tensor) and torch.equal(output, read[0]):
            return name, base.get_submodule(name)
    raise ValueError(f"edit.widen: the head of {type(base).__name__} is tied and reads no norm: untie the head first")


def branch_norms(base: Any, names: Collection[str]) -> frozenset[str]:
    """Which of these norms stand between a branch and the stream that it is added to."""
    last = {name.rpartition(".")[2] for name, _ in layer_list(base).layers.named_modules()}
    if has_own_plan(base):
        placements = {block.placement for block in base.config.block_configs()}
        ends = _OWN_ON_BRANCHES if placements <= {"branch", "branch_out", "pre"} else ()
    else:
        ends = _ALWAYS_ON_BRANCHES + (_ON_BRANCHES if _ON_BRANCHES[1] in last else ())
    return frozenset(name for name in names if name.rpartition(".")[2] in ends)
