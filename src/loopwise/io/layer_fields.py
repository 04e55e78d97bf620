"""What a configuration (the dictionary of a config.json) says layer by layer, and how it reads for other layers.

Loads neither torch nor transformers: folders are edited without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

# Fields that count layers; encoder-decoder families have one each, and size the decoder's cache by the encoder's.
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)
# Counts of layers that a file has behind the last one of the decoder: they predict further tokens.
EXTRA_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# Counts of leading layers of another kind: expressible as long as those visits still lead.
_LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_dense_layers_first")
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
# One letter per layer.
_PATTERNS = ("hybrid_override_pattern",)
# (period, offset) of the layers of another kind, read where no list says which they are.
_PERIODS = (
    ("attn_layer_period", "attn_layer_offset", ("layers_block_type", "layer_types")),
    ("expert_layer_period", "expert_layer_offset", ("mlp_layer_types",)),
)


def expand_values(
    values: Mapping[str, Any], sources: Sequence[int], num_layers: int, num_extra: int = 0
) -> dict[str, Any]:
    """A configuration for `len(sources)` layers in which layer n is what layer `sources[n]` is in `values`.

    Rewritten are the number of layers, every list with one item per layer (`layer_types`, `mlp_layer_types`, RoPE
    lists, ...), every list of layer numbers (`mlp_only_layers`, `hybrid_layer_ids`, ...) and counts of leading layers.

    Args:
        values: the configuration of the decoder; not changed.
        sources: numbers of old layers.
        num_layers: how many old layers there are.
        num_extra: layers behind the last one, which stay behind it; lists may have items for them too.

    Raises:
        ValueError: a field ties the kind of a layer to its number in a way that cannot express such layers.
    """
    expanded = dict(values)
    new_extra = range(num_layers, num_layers + num_extra)
    for key, value in values.items():
        if key in _PATTERNS and isinstance(value, str) and len(value) == num_layers:
            expanded[key] = "".join(value[old] for old in sources)
        if not isinstance(value, (list, tuple)) or key in _NOT_PER_LAYER:
            continue
        if _is_index_list(key, value, num_layers):
            expanded[key] = [new for new, old in enumerate(sources) if old in value]
        elif len(value) == num_layers:
            expanded[key] = [value[old] for old in sources]
        elif num_extra and len(value) == num_layers + num_extra:
            expanded[key] = [value[old] for old in (*sources, *new_extra)]
    for key in _LEADING_COUNTS:
        if type(values.get(key)) is int:
            leading = [old < values[key] for old in sources]
            expanded[key] = leading.index(False) if False in leading else len(leading)
    if isinstance(values.get("block_types"), (list, tuple)):  # RecurrentGemma repeats this pattern over its layers
        expanded["block_types"] = [values["block_types"][old % len(values["block_types"])] for old in sources]
    if values.get("moe_layer_end_index") == num_layers - 1:
        expanded["moe_layer_end_index"] = len(sources) - 1
    expanded |= {key: len(sources) for key in COUNTS if values.get(key) == num_layers}
    _refuse_other_kinds(values, expanded, sources, num_layers)
    return expanded


def layer_kinds(values: Mapping[str, Any], num_layers: int) -> list[dict[str, Any]]:
    """Per layer, field by field, what the configuration says about it in particular; layers of one kind are equal."""
    kinds: list[dict[str, Any]] = [{key: rule(layer) for key, rule in _rules(values)} for layer in range(num_layers)]
    for key, value in values.items():
        if key in _PATTERNS and isinstance(value, str) and len(value) == num_layers:
            items: Sequence[Any] = value
        elif key == "block_types" and isinstance(value, (list, tuple)) and value:
            items = [value[layer % len(value)] for layer in range(num_layers)]
        elif not isinstance(value, (list, tuple)) or key in _NOT_PER_LAYER:
            continue
        elif _is_index_list(key, value, num_layers):
            items = [layer in value for layer in range(num_layers)]
        elif len(value) == num_layers:
            items = value
        else:
            continue
        for kind, item in zip(kinds, items, strict=True):
            kind[key] = item
    return kinds


def missing_fields(values: Mapping[str, Any], model_type: str) -> list[str]:
    """Fields about single layers that a class of transformers works out by itself where a file leaves them out.

    What it works out goes by the number of a layer. So before layers move, such fields have to be written down.
    """
    wanted = known_fields().get(model_type, ())
    if values.get("use_sliding_window") is False:  # then all layers are of one kind, at any number
        wanted = [name for name in wanted if name != "layer_types"]
    return [name for name in wanted if values.get(name) is None]


@cache
def known_fields() -> dict[str, list[str]]:
    """Model type -> fields about single layers, for all types of transformers that have some beside the count."""
    return json.loads(files("loopwise").joinpath("io", "layer_fields.json").read_text(encoding="utf-8"))


def _is_index_list(key: str, value: Sequence[Any], num_layers: int) -> bool:
    numbers = all(type(item) is int and 0 <= item < num_layers for item in value) and len(set(value)) == len(value)
    return numbers and bool(_INDEX_LIST.search(key)) and list(value) == sorted(value)


def _rules(values: Mapping[str, Any]) -> list[tuple[str, Callable[[int], Any]]]:
    """(field, kind of a layer by its number) for everything that goes by the number alone."""

    def number(key: str, default: int = 0) -> int:
        return values[key] if type(values.get(key)) is int else default

    rules: list[tuple[str, Callable[[int], Any]]] = []
    listed = isinstance(values.get("mlp_layer_types"), (list, tuple))
    rules += [(key, _below(number(key))) for key in _LEADING_COUNTS if number(key) > 0 and not listed]
    if "moe_layer_start_index" in values and number("moe_layer_end_index", -1) >= 0:
        rules.append(("moe_layer_end_index", _below(number("moe_layer_end_index") + 1)))
    for key in ("moe_layer_interval", "decoder_sparse_step"):
        if number(key, 1) > 1 and not listed:
            rules.append((key, _every(number(key), number(key) - 1)))
    for key, offset, lists in _PERIODS:
        if number(key, 1) > 1 and not any(values.get(name) for name in lists):
            rules.append((key, _every(number(key), number(offset))))
    for key in ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers"):
        if values.get(key):
            rules.append((key, lambda n: n))
    return rules


def _below(count: int) -> Callable[[int], bool]:
    return lambda n: n < count


def _every(period: int, offset: int) -> Callable[[int], bool]:
    return lambda n: n % period == offset


def _refuse_other_kinds(
    old_values: Mapping[str, Any], new_values: Mapping[str, Any], sources: Sequence[int], num_layers: int
) -> None:
    new_rules = dict(_rules(new_values))
    for key, rule in _rules(old_values):
        # A count that has become 0 says the same of every layer.
        now = new_rules.get(key, lambda n: False)
        for new, old in enumerate(sources):
            if rule(old) != now(new):
                raise ValueError(
                    f"{key}={old_values[key]} says by its number what a layer is, and cannot say that layer {new} is "
                    f"what layer {old} was"
                )
        if key == "num_kv_shared_layers" and len(sources) != num_layers:
            raise ValueError(f"{key}={old_values[key]} shares keys and values between layers, which cannot be moved")
