"""What one token costs in one module, read from the module tree (nothing is run, so meta-device models can be costed).

Two rules cover the architectures of the transformers library:

* *Matmul weights.* Each element of a weight that multiplies activations does one multiply-add per token, which is
  2 FLOPs: linear layers of any class, transformers' transposed `Conv1D`, routers, convolutions over time (depthwise or
  dense). Experts, batched `[E, a, b]` or a list of modules, do `top_k / E` of that. Embedding tables, norms, biases and
  the parameters of elementwise scans do none.
* *Attention.* A module with a query projection and a head size computes scores and values:
  `2 * keys * heads * (qk_dim + v_dim)` FLOPs per token (`Attention.flops`).

Heads and sizes are read from the attribute names that model files share; where a file keeps none, the shapes of its
projections decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from loopwise.models.offsets import MatrixOffset
from loopwise.models.relaxation import relaxation_of

# Decoders that can also read an encoder keep its attention as a child; without an encoder it is not run.
_CROSS_ATTENTION = re.compile(r"(^|\.)(encoder_attn|cross_?attn|cross_?attention)")
_NOT_FOR_TEXT = re.compile(
    r"encoder_attn|cross_?attn|cross_?attention|depth_decoder|pooler|multi_?modal|.*(vision|visual|image|audio|video|speech)"
)

_WEIGHT = re.compile(r"(^|_)(weight|proj|fn)$")
_QUERY = (
    "q_proj q_b_proj q_gate_proj query query_proj project_q Wq q_lin qkv_proj query_key_value c_attn Wqkv kv_proj"
).split()
_KEY = "k_proj key key_proj project_k Wk k_lin".split()
_OUTPUT = "o_proj out_proj dense c_proj Wo attention_out out_lin".split()
_HEADS = "num_heads num_attention_heads n_heads n_head num_attn_heads".split()
_HEAD_DIM = "head_dim head_size attention_head_size dim_head".split()
_KV_HEADS = "num_key_value_heads num_kv_heads kv_heads".split()
_TOP_K = "top_k num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts num_selected_experts".split()


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One softmax attention: `heads` query heads of `qk_dim`, values of `v_dim`, `cached` elements kept per token.

    `window` is the largest number of keys that a query sees, None for all.
    """

    heads: int
    qk_dim: int
    v_dim: int
    cached: int
    window: int | None = None

    def flops(self, context: int, causal: bool) -> float:
        """FLOPs per token of scores and values: `2 * keys * heads * (qk_dim + v_dim)`.

        `keys` is `min(context, window)`; with `causal` it is the mean number of keys visible over the positions
        1 .. context, which is `(context + 1) / 2` without a window.
        """
        span = context if self.window is None else min(context, self.window)
        # The first `span` queries see 1 .. span keys, the later ones span each.
        keys = span - span * (span - 1) / (2 * context) if causal else span
        return 2 * keys * self.heads * (self.qk_dim + self.v_dim)


def matmul_weights(module: nn.Module, config: Any, skip: Collection[nn.Module] = ()) -> tuple[float, tuple[str, ...]]:
    """Weight elements that multiply the activations of one text token, and the large parameters that do not.

    Args:
        module: a decoder layer, or any other module that every token passes once.
        config: the text config, asked for the number of experts per token where no module says it.
        skip: modules inside that are counted elsewhere. Cross-attention and towers for other modalities are skipped by
            their names: they are not run on text alone.

    Returns:
        The (possibly fractional) number of elements, and dotted names of parameters with two or more dimensions that
        are taken as elementwise (decay matrices, position tables).

    Raises:
        ValueError: nothing says how many experts a token visits.
    """
    total, left_out, seen = 0.0, [], {id(part) for part in skip}

    def walk(part: nn.Module, path: tuple[str, ...], share: float, holders: tuple[nn.Module, ...]) -> None:
        nonlocal total
        if id(part) in seen:
            return
        seen.add(id(part))
        holders = (part, *holders)
        table = isinstance(part, nn.Embedding) or type(part).__name__.endswith("Norm")
        routed = "Expert" in type(part).__name__ and not (path and "shared" in path[-1])
        for name, parameter in part.named_parameters(recurse=False):
            if table or parameter.dim() < 2 or name.endswith("bias"):
                continue
            if not _WEIGHT.search(name):
                left_out.append(".".join((*path, name)))
                continue
            batched = routed and parameter.dim() == 3
            total += share * parameter.numel() * (_routed_share(len(parameter), holders, config) if batched else 1)
        for name, child in part.named_children():
            if _NOT_FOR_TEXT.match(name):
                continue
            if name == "experts" and isinstance(child, nn.ModuleList) and len(child) > 0:
                walk(child, (*path, name), share * _routed_share(len(child), holders, config), holders)
            else:
                walk(child, (*path, name), share, holders)

    walk(module, (), 1.0, ())
    return total, tuple(left_out)


def offset_weights(layer: nn.Module, config: Any) -> float:
    """Elements of the low-rank offsets of a layer (`loopwise.models.relaxation`) that one token meets in one visit.

    Counted as factors everywhere. Where the sum of matrix and offset is formed first (experts, routers), that costs
    `2 * rank` FLOPs per element and visit, however many the tokens are, and is not counted.
    """
    relaxation = relaxation_of(layer)
    total = 0.0
    for name in () if relaxation is None else relaxation.names:
        offset = relaxation.of(name)  # type: ignore[union-attr]
        if not isinstance(offset, MatrixOffset):
            continue
        path, share = name.split("."), 1.0
        holders = [layer.get_submodule(".".join(path[:end])) for end in range(len(path))][::-1]
        if offset.A.ndim == 4:
            share = _routed_share(offset.A.shape[1], tuple(holders), config)
        for at, part in enumerate(path[:-1]):
            listed = layer.get_submodule(".".join(path[: at + 1]))
            if part == "experts" and isinstance(listed, nn.ModuleList):
                share = _routed_share(len(listed), tuple(holders[len(path) - 1 - at :]), config)
        total += share * offset.num_weights
    return total


def attentions(layer: nn.Module, index: int, config: Any) -> Iterator[Attention]:
    """Every softmax attention of a layer; linear attentions and state-space mixers are not among them.

    An indexer that selects keys for sparse attention is one more attention, without values; the attention that it
    serves then sees at most the selected keys.

    Args:
        layer: the decoder layer.
        index: its number, the index into per-layer lists of the config.
        config: the text config.
    """
    inside: set[nn.Module] = set()
    for name, module in layer.named_modules():
        if module in inside or _CROSS_ATTENTION.search(name) or _is_linear_mixer(module):
            continue
        attention = _attention(module, index, config)
        if attention is None:
            continue
        inside.update(module.modules())
        indexer = getattr(module, "indexer", None)
        if indexer is not None:
            yield from _indexer(indexer)
            selected = getattr(indexer, "index_topk", None)
            spans = [span for span in (attention.window, selected) if span is not None]
            attention = replace(attention, window=min(spans, default=None))
        yield attention


def state_elements(layer: nn.Module) -> int:
    """Elements that a layer keeps per sequence, whatever its length: 0 for attention.

    Tails of causal convolutions `[channels, kernel]` plus recurrent states: `[heads, k_dim, v_dim]` for linear
    attention, `[channels, state]` for state-space layers, `[channels]` for a gated linear recurrence.
    """
    total = 0
    for name, module in layer.named_modules():
        if _CROSS_ATTENTION.search(name):
            continue
        if isinstance(module, nn.Conv1d):
            total += module.out_channels * module.kernel_size[0]
        elif isinstance(decay := getattr(module, "recurrent_param", None), nn.Parameter):
            total += decay.numel()
        elif _is_linear_mixer(module):
            total += _recurrent_elements(module)
    return total


def _first(holder: Any, names: Iterable[str]) -> Any:
    """The first of the attributes of `holder` that is set, else None."""
    return next((value for name in names if (value := getattr(holder, name, None)) is not None), None)


def _routed_share(num_experts: int, holders: tuple[nn.Module, ...], config: Any) -> float:
    """Share of the experts that one token visits, `top_k / E`.

    Modules near the experts are asked first: a config may describe several kinds of experts.
    """
    near = [part for holder in holders for part in (holder, *holder.children())]
    for part in (*near, config):
        top_k = _first(part, _TOP_K)
        if isinstance(top_k, int):
            return min(1.0, top_k / num_experts)
    raise ValueError(
        f"cannot cost {type(holders[0]).__name__}: neither its modules nor the config say how many of the "
        f"{num_experts} experts a token visits (looked for {', '.join(_TOP_K)})"
    )


def _is_linear_mixer(module: nn.Module) -> bool:
    """Whether a module mixes tokens through a state of constant size."""
    return hasattr(module, "slope_rate") or isinstance(getattr(module, "conv1d", None), nn.Conv1d)


def _recurrent_elements(module: Any) -> int:
    if hasattr(module, "head_k_dim"):
        return module.num_v_heads * module.head_k_dim * module.head_v_dim
    if hasattr(module, "ssm_state_size"):
        return module.intermediate_size * module.ssm_state_size
    heads = _first(module, _HEADS)
    return heads * module.head_dim**2 if heads and hasattr(module, "head_dim") else 0


def _attention(module: Any, index: int, config: Any) -> Attention | None:
    """Shape of an attention module, None for other modules."""
    if _first(module, _QUERY) is None:
        return None
    qk_dim = _first(module, ["qk_head_dim", *_HEAD_DIM])
    v_dim = _first(module, ["v_head_dim", *_HEAD_DIM])
    heads = _first(module, _HEADS)
    # An adapter library may have wrapped the projections; the wrappers keep their sizes.
    in_features = getattr(_first(module, _OUTPUT), "in_features", None)
    if heads is None and v_dim and in_features:
        heads = in_features // v_dim
    if heads is None:
        heads = _first(config, _HEADS)
    if v_dim is None and heads and hasattr(module, "split_size"):
        qk_dim = v_dim = module.split_size // heads
    if not heads or not qk_dim or not v_dim:
        return None
    cached = _kv_heads(module, heads, qk_dim) * (qk_dim + v_dim)
    if getattr(module, "kv_lora_rank", None):
        # Latent attention keeps the compressed keys and values, and one rotary key for all heads.
        cached = module.kv_lora_rank + module.qk_rope_head_dim
    if getattr(module, "is_kv_shared_layer", False):
        cached = 0
    return Attention(heads=heads, qk_dim=qk_dim, v_dim=v_dim, cached=cached, window=_window(module, index, config))


def _indexer(module: Any) -> Iterator[Attention]:
    """The key selection of sparse attention: scores per head, then a weighted sum over heads where it has weights."""
    heads, size = _first(module, [*_HEADS, "index_n_heads"]), _first(module, [*_HEAD_DIM, "index_head_dim"])
    if heads and size:
        yield Attention(heads=heads, qk_dim=size, v_dim=int(hasattr(module, "weights_proj")), cached=size)


def _kv_heads(module: Any, heads: int, qk_dim: int) -> int:
    given = _first(module, _KV_HEADS)
    if given is not None:
        return given
    out_features = getattr(_first(module, _KEY), "out_features", None)
    if out_features:
        return out_features // qk_dim
    return heads // (getattr(module, "num_key_value_groups", None) or 1)


def _window(module: Any, index: int, config: Any) -> int | None:
    """Largest number of keys that a query of this attention sees, None for all."""
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[index] if index < len(kinds) else None
    if kind == "full_attention":
        return None
    if kind == "chunked_attention":
        return config.attention_chunk_size
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
