"""Building a model of other sizes beside the old one, filling it, and holding it to the old one's function."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loopwise.edit.axes import first_line, saved_tensors
from loopwise.edit.expand import WidthSource
from loopwise.edit.operators import Operator
from loopwise.models.attach import attach, eval_mode
from loopwise.models.hub import base_model, build_model, probe_inputs, refuse_adapters, refuse_encoder_decoder
from loopwise.models.playing import Looping, looping_of
from loopwise.models.realise import has_own_plan

_NUM_TOKENS = 12
_EXACT, _COARSE = 1e-5, 2e-2  # float32; bfloat16 and float16
_MOST = 0.1  # a larger difference is not tried again


def refuse_unfit(model: nn.Module) -> None:
    """Raise `ValueError` for models that cannot be rebuilt wider.

    That is with adapters, packed or sharded weights, hooks, parts beside the plan, or an encoder.
    """
    refuse_adapters(model)
    refuse_encoder_decoder(model)
    base, looping = base_model(model), looping_of(model)
    packed = getattr(base.config, "quantization_config", None) is not None or getattr(base, "is_quantized", False)
    if packed or any(not parameter.is_floating_point() for parameter in base.parameters()):
        raise ValueError("the weights of this model are quantised: load them dequantised")
    if any(isinstance(parameter, DTensor) for parameter in base.parameters()):
        raise ValueError("this model is sharded: gather it, widen the whole model, and shard it again")
    if looping is not None and looping.hooks:
        raise ValueError("this model has hooks on its visits, which the new one would not have: set_hooks(model, [])")
    if looping is not None and not has_own_plan(base) and (looping.components or looping.relaxed):
        raise ValueError("this model has parts beside its plan (offsets, loop components): widen it before they come")


def build_twin(model: nn.Module, config: Any) -> Any:
    """A model of the same class from another configuration, its weights not yet set; no global number is drawn.

    Raises:
        ValueError: the class refuses the configuration.
    """
    base, looping = base_model(model), looping_of(model)
    if has_own_plan(base) and looping is not None:
        config.plan, config.cache = str(looping.plan), str(looping.policy)
    device = next(base.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return build_model(base, config)
    except Exception as error:  # whatever a model class says to sizes that it does not expect
        raise ValueError(f"{type(base).__name__} cannot be built so: {first_line(error)}") from error


def fill(base: nn.Module, twin: nn.Module, sources: Mapping[str, WidthSource]) -> None:
    """Set the saved tensors of a twin, their dtypes and whether they are trained; modes too.

    Raises:
        ValueError: a tensor without a source, or one of another shape.
    """
    old, new = saved_tensors(base), saved_tensors(twin)
    done: dict[int, str] = {}
    for name, tensor in new.items():
        if id(tensor) in done:
            if old.get(name) is not old.get(done[id(tensor)]):
                raise ValueError(
                    f"{name} is tied in the configuration, and here it is not: set its tie_word_embeddings"
                )
            continue
        done[id(tensor)] = name
        source = sources.get(name)
        if source is None:
            raise ValueError(f"{type(base).__name__} has no source for tensor {name} at another size")
        like = old[source.names[0]] if source.names else next(base.parameters())
        made = source.tensor(old, tensor.shape, like.dtype).to(tensor.device)
        if made.shape != tensor.shape:
            raise ValueError(
                f"{type(base).__name__}: tensor {name} would be {list(made.shape)}, it is {list(tensor.shape)}"
            )
        tensor.data = made.contiguous()
        if tensor.is_floating_point():
            tensor.requires_grad_(like.requires_grad)
    for name, tensor in old.items():
        first = next((other for other, item in old.items() if item is tensor), name)
        if first != name and name in new and first in new and new[first] is not new[name]:
            raise ValueError(f"{name} is tied by hand to {first}: say so in the configuration, tie_word_embeddings")
    modes = {name: module.training for name, module in base.named_modules()}
    for name, module in twin.named_modules():
        module.training = modes.get(name, base.training)


def keep_plan(model: nn.Module, twin: nn.Module) -> None:
    """Give a twin the plan, cache policy and recomputation of the old model."""
    looping = looping_of(model)
    if looping is None:
        return
    if not has_own_plan(twin):
        attach(twin, looping.plan, cache=str(looping.policy), on_deeper=looping.policy.on_deeper)
    new = cast(Looping, looping_of(twin))
    new.policy, new.recompute = looping.policy, looping.recompute


def prove(model: nn.Module, twin: nn.Module, operator: Operator) -> float:
    """Compare logits on a few tokens: the largest difference over the largest logit.

    More than the tolerance (1e-5 in float32, 2e-2 in bfloat16) is tried again in float64, or in float32, as rounding
    grows with the size of a model.

    Raises:
        ValueError: the twin computes something else.
    """
    is_coarse = next(base_model(model).parameters()).dtype not in (torch.float32, torch.float64)
    tolerance = _COARSE if is_coarse else _EXACT
    try:
        error = _difference(model, twin)
    except Exception as error:  # whatever a model says to a few tokens
        raise ValueError(f"{type(base_model(twin)).__name__} cannot be tried: {first_line(error)}") from error
    if tolerance < error <= _MOST:
        with contextlib.suppress(Exception):  # some architectures do not run in float64
            wide = [copy.deepcopy(one).to(torch.float32 if is_coarse else torch.float64) for one in (model, twin)]
            # Parts that stay in float32 keep its rounding: no more than ten times what the old model has by itself.
            own = 0.0 if is_coarse else 10 * min(_difference(model, wide[0]), _EXACT * 10)
            if _difference(*wide) <= (_COARSE if is_coarse else _EXACT / 10) or error <= own:
                tolerance = _MOST
    if not error <= tolerance:
        raise ValueError(
            f"{operator.kind}: {type(base_model(model)).__name__} cannot be widened so with its function kept: logits "
            f"differ by {error:.2g} of the largest"
        )
    return error


def _difference(model: nn.Module, twin: nn.Module) -> float:
    want, got = (_logits(one) for one in (model, twin))
    return (want - got).abs().max().item() / max(want.abs().max().item(), 1e-30)


def _logits(model: nn.Module) -> torch.Tensor:
    options: dict[str, Any] = {}
    loops = getattr(base_model(model).config, "loops", None) if has_own_plan(model) else None
    if any((spec.get("state") or {}).get("kind") == "state.normal" for spec in (loops or {}).values()):
        options["generator"] = torch.Generator().manual_seed(0)
    with eval_mode(model):
        return model(**probe_inputs(model, num_tokens=_NUM_TOKENS), **options).logits.double()
