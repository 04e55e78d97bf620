"""The only gate to transformers' internals.

Everything here answers one question about a model of that library: where its decoder layers are, what a layer returns,
which argument is the cache, what its text configuration is. Nothing else in loopwise imports a submodule of
transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,  # noqa: F401 - for the modules of ours that may not reach in
    CausalLMOutputWithPast,  # noqa: F401 - for the modules of ours that may not reach in
)
from transformers.pytorch_utils import Conv1D  # noqa: F401 - for the modules of ours that may not reach in
from transformers.utils.generic import ModelOutput  # noqa: F401 - for the modules of ours that may not reach in
from transformers.utils.hub import cached_file

try:
    from transformers.utils.output_capturing import maybe_install_capturing_hooks
except ImportError:  # before the hooks were placed on first use
    maybe_install_capturing_hooks = None


@dataclass(frozen=True, kw_only=True)
class LayerList:
    """Where the decoder layers of a model live.

    Attributes:
        owner: the module whose forward iterates the layers.
        name: the attribute of `owner` that holds them.
        layers: the list itself, in order.
        path: dotted path of the list from the model, such as `model.layers`.
    """

    owner: nn.Module
    name: str
    layers: nn.ModuleList
    path: str


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also where an adapter library (PEFT) wraps it.

    Raises:
        ValueError: there is none inside.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a transformers causal language model, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} contains no transformers model")


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder (for multimodal models the nested one)."""
    return base_model(model).config.get_text_config(decoder=True)


def layer_lists(model: nn.Module) -> Iterator[LayerList]:
    """Candidates for the decoder's layer list, best first.

    A list of as many blocks as `num_hidden_layers` says comes before others; among those, one inside the decoder before
    one of another tower, and larger before smaller. Lists inside a block of another candidate are left out.
    """
    inner = base_model(model)
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    found = []
    for path, owner in model.named_modules():
        for name, layers in owner.named_children():
            full = f"{path}.{name}" if path else name
            nested = any(full.startswith(f"{other.path}.") for other in found)
            if isinstance(layers, nn.ModuleList) and len(layers) > 0 and not nested:
                found.append(LayerList(owner=owner, name=name, layers=layers, path=full))
    sizes = {item.path: sum(p.numel() for p in item.layers.parameters()) for item in found}
    found.sort(key=lambda item: (len(item.layers) != count, item.owner not in inside, -sizes[item.path]))
    yield from (item for item in found if sizes[item.path])


def layer_list(model: nn.Module) -> LayerList:
    """The decoder layers of a model: the one attached, or else the best candidate.

    Raises:
        ValueError: the model is an encoder-decoder, or has no recognisable layer list.
    """
    refuse_encoder_decoder(model)
    candidates = list(layer_lists(model))
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no recognisable list of decoder layers")
    return next((item for item in candidates if hasattr(item.owner, "loopwise")), candidates[0])


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raise `ValueError` for models with an encoder in front of the decoder."""
    if getattr(base_model(model).config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: only decoders can be looped")


def refuse_adapters(model: nn.Module) -> None:
    """Raise `ValueError` for a model with adapters of PEFT, whose tensors go by other names."""
    if hasattr(model, "peft_config") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("this model carries adapters: merge them first, with merge_and_unload()")


def place_output_hooks(owner: nn.Module, kwargs: dict[str, Any]) -> None:
    """Place the hooks with which transformers collects what a call asks for, such as hidden states.

    transformers places them once, inside the first forward that asks; by then the list shows recorders.
    """
    names = getattr(owner, "_can_record_outputs", None)
    if not names or maybe_install_capturing_hooks is None or not isinstance(owner, PreTrainedModel):
        return
    if owner.__dict__.get("_output_capturing_hooks_installed"):
        return
    keys = {"output_attentions", *(f"output_{name}" for name in names)}
    if any(kwargs.get(key, getattr(owner.config, key, False)) for key in keys):
        maybe_install_capturing_hooks(owner)


def cache_indices(layers: nn.ModuleList) -> tuple[tuple[int, ...], ...]:
    """For every layer, the cache entries that it addresses (most layers one, LongCat's two attentions two)."""
    groups = []
    for i, layer in enumerate(layers):
        numbers = (m.__dict__.get("layer_idx") for m in layer.modules())
        found = {number for number in numbers if isinstance(number, int)}
        groups.append(tuple(sorted(found)) or (i,))
    return tuple(groups)


def find_cache(values: Any) -> Cache | None:
    """The cache of the decoder's own tokens among some arguments, or None."""
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


def refuse_foreign_cache(cache: Cache) -> None:
    """Raise `ValueError` for a cache class of a single model, which keeps state outside the entries per layer."""
    kind = type(cache)
    if kind.__module__ != Cache.__module__ and any(
        hasattr(Cache, name) for name in vars(kind) if not name.startswith("__") or name == "__len__"
    ):
        raise ValueError(f"its cache class {kind.__name__} keeps state outside the entries of its layers")


def with_view(value: Any, cache: Cache, view: Cache) -> Any:
    """An argument with `view` in the place of `cache`; anything else unchanged."""
    if value is cache:
        return view
    if isinstance(value, EncoderDecoderCache) and value.self_attention_cache is cache:
        twin = copy.copy(value)
        twin.self_attention_cache = view
        return twin
    return value


def new_cache(model: nn.Module) -> Cache:
    """An empty growing cache for a model."""
    return DynamicCache(config=text_config(model))


def input_entry() -> Any:
    """A cache entry that holds the inputs of a decoder in the place of keys and values."""
    return DynamicLayer()


def past_length(cache: Cache) -> int:
    """Number of tokens in a cache that has not been laid out by loopwise, 0 when it is unused."""
    lengths = [0]
    for entry in cache.layers:
        if isinstance(entry, CacheLayerMixin) and entry.keys is not None:
            lengths.append(int(entry.get_seq_length()))
        elif any(getattr(entry, "has_previous_state", {}).values()):
            lengths.append(1)
    return max(lengths)


def probe_inputs(model: nn.Module, num_rows: int = 2, num_tokens: int = 5) -> dict[str, torch.Tensor]:
    """A few tokens to try a model on: `input_ids` int64 `[num_rows, num_tokens]`, on its device.

    The rows differ in their last token only: one forward then also shows whether a later token reaches earlier logits.
    """
    config = text_config(model)
    limit = max(2, min(getattr(config, "vocab_size", 64), 64))
    device = next(model.parameters()).device
    ids = ((torch.arange(num_tokens, device=device) * 7 + 3) % limit).repeat(num_rows, 1)
    ids[:, -1] = (ids[:, -1] + torch.arange(num_rows, device=device) * 5) % limit
    return {"input_ids": ids}


def leak(logits: torch.Tensor) -> float:
    """How far the last token of `probe_inputs` changes earlier logits `[rows, tokens, V]`, over the largest."""
    earlier = logits[:, :-1].float()
    return ((earlier - earlier[:1]).abs().max() / earlier.abs().max().clamp(min=1e-30)).item()


def build_model(like: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model of the same class, attention, dtype and device as `like`, from another configuration."""
    config._attn_implementation = like.config._attn_implementation
    text = config.get_text_config(decoder=True)
    text._attn_implementation = like.config.get_text_config(decoder=True)._attn_implementation
    parameter = next(like.parameters())
    twin: Any = type(like)._from_config(config, dtype=parameter.dtype)
    twin.to(parameter.device)
    if getattr(like, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(like.generation_config)
    return twin


def align(model: nn.Module) -> None:
    """Move tensors that a file maps to odd addresses.

    Matrix kernels choose their path by alignment, and a loaded model must equal the saved one bit for bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def find_file(source: Any, name: str, **place: Any) -> str | None:
    """The path of a file of a checkpoint, a folder or a hub name; None when it has no such file."""
    return cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **place)


def forget_quantization(model: PreTrainedModel) -> None:
    """Let a model whose weights were dequantised on loading (GGUF) be saved and trained like any other."""
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.__dict__["is_quantized"] = False
    model.config.__dict__.pop("quantization_config", None)


def decoder_mask(
    kind: str,
    config: Any,
    hidden_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None,
    cache: Cache | None,
    position_ids_BT: torch.Tensor | None = None,
    *,
    prefix_BT: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> Any:
    """The attention mask of a decoder of our own, in the form that `config._attn_implementation` wants.

    Args:
        kind: "causal", "bidirectional", or "prefix" (causal, and tokens of the prefix also see each other).
        config: a transformers configuration.
        hidden_BTD: the embeddings; only shape, dtype and device are read.
        mask_BT: 1 for tokens, 0 for padding, over all tokens so far; or a mask of 4 axes, which is returned as it is.
        cache: what earlier calls left, or None.
        position_ids_BT: positions; where they start again inside a row, a new text starts (packing).
        prefix_BT: true for tokens of the prefix. Read in the first call only, as in HRM-Text: tokens in a cache have
            been computed without those that come later.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.

    Returns:
        A mask, or None when the attention function needs none.

    Raises:
        ValueError: prefix tokens for another kind of mask, or with a flash attention (which has no such mask).
    """
    if prefix_BT is not None and kind != "prefix":
        raise ValueError(f"prefix tokens were given but the mask is {kind!r}: use mask 'prefix' or leave them out")
    if kind == "bidirectional":
        return create_bidirectional_mask(config, hidden_BTD, mask_BT)
    blocks = None
    if prefix_BT is not None and (cache is None or int(cache.get_seq_length()) == 0):
        if "flash" in str(config._attn_implementation):
            raise ValueError("mask 'prefix' is not available with flash attention: use sdpa, eager or flex_attention")
        blocks = torch.where(prefix_BT.bool(), 0, -1)
    make = create_causal_mask
    if sliding_window is not None:
        make = create_sliding_window_causal_mask
        if getattr(config, "sliding_window", None) != sliding_window:
            config = copy.copy(config)
            config.sliding_window = sliding_window
    return make(config, hidden_BTD, mask_BT, cache, position_ids_BT, block_sequence_ids=blocks)
