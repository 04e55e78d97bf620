"""Which tensors of a layer are zeroed so that the layer is the identity.

A layer adds the outputs of its branches (attention, recurrence, MLP, experts) to the stream. Where the last map of
every branch is zero, with its bias and the bias of a norm behind it, nothing is added. The rest of a branch keeps its
values, so that gradients reach the zeroed maps at the first step: zero in two places of one branch would stop them.

Which model types this holds for is a table, made by trying every type in memory and on disk
(`tests/conformance/zeroing.py`). Nothing here loads torch: edits on disk are carried out without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

# The last map of a branch, as families call it; a part of a name between dots.
_OUTPUTS = (
    r"o_proj|out_proj|down_proj|c_proj|fc_out|linear_out|output_linear|w_out|attention_out"  # both kinds of branch
    r"|dense_4h_to_h|fc2|w2|wo_b|[Ww]o"
)
_OUTPUT = re.compile(rf"(^|\.)({_OUTPUTS})(\.linear)?([._](weight|bias))?$")
# Names that mean something else in other families, with the part before them.
_OUTPUT_IN_PLACE = re.compile(
    r"(^|\.)(self_attention|self_attn|attention|multi_head_attention|attention\.output|output)\.dense[._](weight|bias)$"
    r"|^feed_forward\.output\.(weight|bias)$|^ffn\.2\.(weight|bias)$"
)
# What chooses (experts, tokens) or norms is no branch, whatever its own maps are called.
_NO_BRANCH = re.compile(r"(^|\.)(gate|router|router_mlp|indexer|compressor|[a-z_]*layernorm)\.")
# Biases behind an output projection that are not called like one.
_MORE = {"jetmoe": r"(mlp|self_attention\.experts)\.bias"}
# Norms behind a branch, of our own decoder.
_NORM_BIAS = re.compile(r"^(mixer|mlp)_norm_out\.bias$")
_OWN = ("loopwise_decoder", "loopwise_puzzle", "loopwise_regression", "loopwise_encoder")
_STREAM_PLACEMENTS = ("post", "stream")
# Settings under which a type is not what the table was made for: the value that is refused.
_STREAM_NORMS = (
    ("do_layer_norm_before", False),
    ("apply_residual_connection_post_layernorm", True),
)


def output_tensors(names: Iterable[str], model_type: str) -> set[str]:
    """Of the tensors of one layer, those that are zeroed to make it the identity.

    Args:
        names: names inside the layer, as in memory (`mlp.experts.down_proj`) or on disk (`mlp.experts.3.w2.weight`).
        model_type: of the configuration of the decoder.
    """
    more = re.compile(_MORE[model_type] + "$") if model_type in _MORE else None
    found = set()
    for name in names:
        if _NO_BRANCH.search(name):
            continue
        is_output = _OUTPUT.search(name) or _OUTPUT_IN_PLACE.search(name) or (more is not None and more.match(name))
        if is_output or (model_type in _OWN and _NORM_BIAS.match(name)):
            found.add(name)
    return found


def why_not_zero(model_type: str, values: Mapping[str, Any] | None = None) -> str | None:
    """Why a layer of this type cannot start as the identity; None where it was tried and can.

    Args:
        model_type: of the configuration of the decoder.
        values: that configuration, where there is one to look at: some types have settings that norm the stream.
    """
    if model_type in _OWN:
        placements = {block.get("placement", "pre") for block in (values or {}).get("blocks") or ()}
        stream = sorted(placements & set(_STREAM_PLACEMENTS))
        return f"placement {stream[0]!r} norms the stream itself" if stream else None
    row = table().get(model_type)
    if row is None:
        return f"model type {model_type!r} was not tried"
    if row["reason"]:
        return row["reason"]
    for key, value in _STREAM_NORMS:
        if values is not None and values.get(key) is value:
            return f"with {key}={value} a norm stands on the stream itself"
    return None


@cache
def table() -> dict[str, dict[str, Any]]:
    """Model type -> {"model_type", "reason"}; an empty reason says that every layer can be the identity."""
    text = files("loopwise").joinpath("edit", "zeroing.json").read_text(encoding="utf-8")
    return {row["model_type"]: row for row in json.loads(text)}
