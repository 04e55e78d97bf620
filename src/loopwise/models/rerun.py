"""Calls of a decoder that need further calls first.

Shared stores are filled position by position, and tokens of a shallower plan are caught up with.

Shapes: B batch rows, T new tokens, P tokens already in the cache, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from loopwise.cache.policy import CachePolicy
from loopwise.models.hub import find_cache, input_entry, new_cache
from loopwise.plan.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """Outputs of earlier positions of the same call, and whether the caller asked for the cache."""

    outputs: list
    keep_cache: bool

    def finish(self, output: Any) -> Any:
        """Join the positions along the token axis."""
        if not self.outputs:
            joined = output
        elif isinstance(output, tuple):
            joined = (torch.cat([part[0] for part in [*self.outputs, output]], dim=1), *output[1:])
        else:
            joined: Any = output
            for key in ("attentions", "cross_attentions", "router_logits"):
                if output.get(key) is not None:
                    raise ValueError(
                        f"output {key} is not available under a cache policy that goes token by token: use own"
                    )
            joined["last_hidden_state"] = torch.cat([part.last_hidden_state for part in [*self.outputs, output]], dim=1)
            for key in getattr(output, "by_token", ()):
                if output.get(key) is not None:
                    joined[key] = _join([part[key] for part in [*self.outputs, output]])
            if output.get("hidden_states") is not None:
                parts = zip(*[part.hidden_states for part in [*self.outputs, output]], strict=True)
                joined["hidden_states"] = tuple(torch.cat(states, dim=1) for states in parts)
        if not self.keep_cache and hasattr(joined, "keys") and "past_key_values" in joined:
            joined["past_key_values"] = None
        return joined


def plan_rerun(
    policy: CachePolicy, plan: Plan, owner: nn.Module, args: tuple, kwargs: dict
) -> tuple[Rerun | None, tuple, dict]:
    """Make the calls that must come before this one; returns how to finish, and the arguments of what is left to do."""
    cache = find_cache((*args, *kwargs.values()))
    depth = getattr(cache, "depth", None)
    policy = policy if depth is None else depth.policy  # a cache in use keeps the policy that it started with
    if policy.is_exact and policy.on_deeper == "refuse":
        return None, args, kwargs
    named = _named(owner, args, kwargs)
    num_tokens = _first_input(named)[1].shape[1]
    if depth is not None:
        depth.clear_if_emptied(cache, decoding=num_tokens == 1)
    if depth is not None and depth.goes_deeper(plan.slots, decoding=num_tokens == 1) and depth.inputs is not None:
        _catch_up(owner, cache, named)
    sharing = policy.prefill if depth is None or depth.complete is None else depth.sharing
    keep_cache = True
    if sharing.is_shared and any(m.training and getattr(m, "gradient_checkpointing", False) for m in owner.modules()):
        raise ValueError(
            "gradient checkpointing keeps layers from their cache, which policies last, first and ring need: train "
            "with policy own, or without checkpointing"
        )
    if sharing.is_shared and cache is None:
        cache_name = next(
            (name for name in ("past_key_values", "cache_params") if name in parameter_names(type(owner))), None
        )
        if cache_name is None:
            raise ValueError(
                f"{type(owner).__name__} takes no cache, which policies last, first and ring need: use policy own"
            )
        keep_cache = bool(named.get("use_cache"))
        named |= {cache_name: new_cache(owner), "use_cache": True}
    outputs = []
    if sharing.is_sequential and num_tokens > 1:
        past = _past(named, num_tokens)
        outputs = [owner(**_slice_tokens(named, t, num_tokens, past)) for t in range(num_tokens - 1)]
        named = _slice_tokens(named, num_tokens - 1, num_tokens, past)
    return Rerun(outputs=outputs, keep_cache=keep_cache), (), named


def _join(parts: list) -> Any:
    """Tensors `[B, 1, ...]`, or tuples of them, joined along the token axis."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1)
    return tuple(torch.cat(items, dim=1) for items in zip(*parts, strict=True))


def without_cache(policy: CachePolicy, owner: nn.Module, kwargs: dict) -> dict:
    """The arguments of a call whose visits will be run again in the backward pass: it makes no cache to fill twice.

    Raises:
        ValueError: the policy needs a cache.
    """
    if policy.prefill.is_shared:
        raise ValueError(
            f"checkpointed loops run layers again, which cache policy {policy} does not provide for: train with policy "
            "own, or without checkpoint_loops"
        )
    if find_cache(kwargs.values()) is None and "use_cache" in parameter_names(type(owner)):
        return kwargs | {"use_cache": False}
    return kwargs


def remember_inputs(owner: nn.Module, cache: Any, args: tuple, kwargs: dict) -> None:
    """Append the inputs of this call to an entry of the cache, so that beam search and crop keep them in step."""
    named = _named(owner, args, kwargs)
    name, tensor = _first_input(named)
    positions = named.get("position_ids")
    if name == "hidden_states" or (positions is not None and positions.ndim != 2):
        raise ValueError(f"on_deeper='catch_up' is not available for {type(owner).__name__}: use 'refuse'")
    depth = cache.depth
    if depth.inputs is None:
        depth.inputs = input_entry()
    if not any(entry is depth.inputs for entry in cache.layers):
        depth.inputs.reset()
        cache.layers.append(depth.inputs)
    kept_B1TD = tensor.detach()[:, None] if tensor.ndim == 3 else tensor[:, None, :, None]
    where = torch.full_like(kept_B1TD[..., :1], -1, dtype=torch.long)
    if positions is not None:
        where = positions.expand(tensor.shape[0], -1)[:, None, :, None]
    depth.inputs.update(kept_B1TD, where)


def _catch_up(owner: nn.Module, cache: Any, named: dict) -> None:
    """Recompute the tokens already in the cache under the present plan, from their remembered inputs."""
    inputs_B1PD, where_B1P1 = cache.depth.inputs.keys, cache.depth.inputs.values
    prefix: dict[str, Any] = {"use_cache": True}
    if inputs_B1PD.dtype.is_floating_point:
        prefix["inputs_embeds"] = inputs_B1PD[:, 0]
    else:
        prefix["input_ids"] = inputs_B1PD[:, 0, :, 0]
    if (where_B1P1 >= 0).all():
        prefix["position_ids"] = where_B1P1[:, 0, :, 0]
    mask = named.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            raise ValueError("catching up to a deeper plan is not available here: it needs a 2-D attention mask")
        prefix["attention_mask"] = mask[:, : inputs_B1PD.shape[2]]
    if named.get("loop_options"):
        state = named["loop_options"].get("initial_state")
        if state is not None and state.ndim == 3 and state.shape[1] > 1:
            raise ValueError("catching up to a deeper plan is not available with an initial_state per token")
        prefix["loop_options"] = named["loop_options"]
    prefix[next(name for name, value in named.items() if value is cache)] = cache
    cache.depth.clear(cache)
    owner(**prefix)


def _slice_tokens(named: dict, t: int, num_tokens: int, past: int) -> dict:
    """The arguments of a call for token `t` alone."""
    part = dict(named)
    for key, value in named.items():
        if key == "loop_options":
            part[key] = {name: _of_token(option, t, num_tokens) for name, option in value.items()}
        if not isinstance(value, torch.Tensor):
            continue
        if key == "attention_mask":
            if value.ndim != 2:
                raise ValueError("cache policies last and ring need a 2-D attention mask [batch, past + new tokens]")
            part[key] = value[:, : past + t + 1]
        elif key in ("input_ids", "inputs_embeds", "token_type_ids", "hidden_states"):
            part[key] = value[:, t : t + 1]
        elif value.ndim and value.shape[-1] == num_tokens:
            part[key] = value[..., t : t + 1]
    return part


def _of_token(option: Any, t: int, num_tokens: int) -> Any:
    """A loop option such as a first state `[B, T, D]` or `[T, D]`, for token `t` alone."""
    if isinstance(option, torch.Tensor) and option.ndim > 1 and option.shape[-2] == num_tokens:
        return option[..., t : t + 1, :]
    return option


def _past(named: dict, num_tokens: int) -> int:
    mask = named.get("attention_mask")
    return mask.shape[1] - num_tokens if isinstance(mask, torch.Tensor) and mask.ndim == 2 else 0


def _first_input(named: dict) -> tuple[str, torch.Tensor]:
    for name in ("inputs_embeds", "input_ids", "hidden_states"):
        if isinstance(named.get(name), torch.Tensor):
            return name, named[name]
    raise ValueError("found neither input_ids nor inputs_embeds in the call of the decoder")


def _named(owner: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of the owner's forward by name."""
    return {**dict(zip(parameter_names(type(owner)), args, strict=False)), **kwargs}


@lru_cache(maxsize=256)
def parameter_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
