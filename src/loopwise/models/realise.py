"""Materialise: the plain, unrolled model that a plan stands for.

An alias (what `attach` makes) visits one set of tensors many times. Its materialised twin is a model of the same class
with as many layers as the plan has slots, every visit with tensors of its own. The twin is *rebuilt from an expanded
configuration*, not patched: a patched copy keeps stale sizes in its modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loopwise.models.attach import eval_mode
from loopwise.models.hub import base_model, build_model, layer_list, probe_inputs, refuse_adapters
from loopwise.models.playing import looping_of
from loopwise.plan.plans import Plan

# Counts of leading layers of another kind: expressible as long as those visits still lead.
_LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_dense_layers_first")
# Fields that count layers; encoder-decoder families have one each, and size the decoder's cache by the encoder's.
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)
# Lists of a length of their own, which may happen to be the number of layers.
_NOT_PER_LAYER = (
    "architectures",
    "eos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "languages",
    "time_step_limit",
    "ssm_multipliers",
    "mlp_multipliers",
    "mtp_layers_block_type",
)
_INDEX_LIST = re.compile(r"(layers|layer_ids|layer_idx|indices|idxs|ids)$")


def materialize(model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """The plain model, of the same class, that has one layer of its own per visit of the plan.

    Args:
        model: a causal language model with a plan (see `attach`), or a plain one when `plan` is given. It is not
            changed.
        plan: the plan to unroll, default the model's own.

    Returns:
        A new model with new tensors, in the same mode, dtype and place. Its logits are those of the looped model.

    Raises:
        ValueError: no plan, adapters are present, or the architecture ties what a layer does to its number in a way
            that its configuration cannot
            express (such a model loops, but cannot be exported).
    """
    base = base_model(model)
    looping = looping_of(model)
    if plan is None:
        if looping is None:
            raise ValueError("this model has no plan: use loopwise.attach(model, plan) first, or pass plan=")
        plan = looping.plan
    refuse_adapters(model)
    found = layer_list(base)
    plan.validate(len(found.layers))
    if hasattr(found.owner, "make_passes"):
        raise ValueError(f"{_refusal(base)}: its loops have components of their own")
    try:
        twin = build_model(base, expand_config(base.config, plan.layers, len(found.layers)))
    except Exception as error:  # whatever a configuration or model class says to a depth it does not expect
        raise ValueError(f"{_refusal(base)}: {_first_line(error)}") from error
    _copy_tensors(base, twin, found.path, plan.layers)
    twin.train(base.training)
    if looping is not None and looping.plan == plan and not looping.hooks:
        _check(model, twin)
    return twin


def expand_config(config: Any, sources: Sequence[int], num_layers: int) -> Any:
    """A configuration for `len(sources)` layers in which layer n is what layer `sources[n]` is in `config`.

    Rewritten are the number of layers, every list with one item per layer (`layer_types`, `mlp_layer_types`, RoPE
    lists, ...) and every list of layer numbers (`mlp_only_layers`, `hybrid_layer_ids`, ...).
    """
    values = config.to_dict()
    text = config.get_text_config(decoder=True)
    if text is config:
        values = _expand_values(values, sources, num_layers)
    else:
        key = next(key for key in config.sub_configs if getattr(config, key, None) is text)
        values[key] = _expand_values(values[key], sources, num_layers)
    return type(config).from_dict(values)


def _expand_values(values: Mapping[str, Any], sources: Sequence[int], num_layers: int) -> dict[str, Any]:
    expanded = dict(values)
    for key, value in values.items():
        if not isinstance(value, (list, tuple)) or key in _NOT_PER_LAYER:
            continue
        is_index_list = all(type(item) is int and 0 <= item < num_layers for item in value) and len(set(value)) == len(
            value
        )
        if is_index_list and _INDEX_LIST.search(key) and list(value) == sorted(value):
            expanded[key] = [new for new, old in enumerate(sources) if old in value]
        elif len(value) == num_layers:
            expanded[key] = [value[old] for old in sources]
    for key in _LEADING_COUNTS:
        if type(values.get(key)) is int:
            leading = [old < values[key] for old in sources]
            expanded[key] = leading.index(False) if False in leading else len(leading)
    if isinstance(values.get("block_types"), (list, tuple)):  # RecurrentGemma repeats this pattern over its layers
        expanded["block_types"] = [values["block_types"][old % len(values["block_types"])] for old in sources]
    expanded |= {key: len(sources) for key in _COUNTS if values.get(key) == num_layers}
    return expanded


def _copy_tensors(base: nn.Module, twin: nn.Module, path: str, sources: Sequence[int]) -> None:
    prefix = f"{path}."

    def source_name(name: str) -> str:
        if not name.startswith(prefix):
            return name
        index, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{sources[int(index)]}.{rest}"

    old = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    new = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    wanted = {source_name(name) for name in new}
    for name in sorted(set(old) - wanted):
        layer = name.removeprefix(prefix).partition(".")[0]
        if not name.startswith(prefix) or int(layer) in sources:
            raise ValueError(f"{_refusal(base)}: nothing there takes tensor {name}")
    with torch.no_grad():
        for name, tensor in new.items():
            source = old.get(source_name(name))
            if source is None or source.shape != tensor.shape:
                raise ValueError(f"{_refusal(base)}: no source for tensor {name}")
            tensor.copy_(source)


def _check(model: nn.Module, twin: nn.Module) -> None:
    """Refuse a twin that computes something else, because its layers depend on their number."""
    with eval_mode(model), eval_mode(twin):
        looped = model(**probe_inputs(model)).logits
        try:
            plain = twin(**probe_inputs(twin)).logits
        except Exception as error:  # whatever a model of that depth says
            raise ValueError(f"{_refusal(twin)}: {_first_line(error)}") from error
    error = (looped.float() - plain.float()).abs().max().item()
    scale = looped.float().abs().max().item()
    tolerance = 1e-5 if looped.dtype == torch.float32 else 2e-2
    if not error <= tolerance * scale:
        raise ValueError(f"{_refusal(twin)}: its layers depend on their number (logits differ by {error:.2g})")


def _refusal(model: nn.Module) -> str:
    return f"{type(model).__name__} loops but cannot be unrolled into a plain model"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
