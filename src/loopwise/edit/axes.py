"""Which axes of which tensors count channels, MLP units, heads or experts.

Nothing is guessed from sizes that happen to be equal: the architecture is built again, without memory, with one size
doubled, and the axes that grew are the ones that count it. What they do follows from the module: a linear layer writes
along one axis of its weight and reads along the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loopwise.models.hub import base_model, text_config
from loopwise.models.realise import LayerNames, has_own_plan

# dimension -> names of the configuration's field for it; the first that a configuration has is it
_FIELDS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "expert_mlp": ("moe_intermediate_size",),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
}
# Beside the width itself, fields that must say the same.
_ALSO_HIDDEN = ("word_embed_proj_dim",)
# Fused projections whose parts alternate head by head, not one whole after the other.
_BY_HEAD = re.compile(r"\.query_key_value\.")
# Model types whose gate and up units alternate in one tensor.
_PAIRED_UNITS = ("gpt_oss",)
# Parameters of experts, in layouts of either order: what this one reads is the units.
_READS_UNITS = re.compile(r"(down_proj|\.w2|output_linear)[^.]*(\.weight)?$")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of an axis.

    Attributes:
        dimension: what it counts, see `_FIELDS`.
        units: how many of them.
        block: entries of a unit, such as the size of a head.
    """

    dimension: str
    units: int
    block: int = 1


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis that grows: its parts in order, and whether what arrives along it is summed (the columns of a matrix)."""

    parts: tuple[Part, ...]
    reads: bool


Axes = dict[str, tuple[Axis | None, ...]]


def sizes_of(model: nn.Module) -> dict[str, int]:
    """The sizes of a model by dimension, those that its configuration has.

    For our own decoder, the largest among its blocks. `kv_heads` is missing where the type has no such field.
    """
    base = base_model(model)
    if has_own_plan(base):
        return _own_sizes(base)
    values, names = _values(base)
    found: dict[str, int] = {}
    for dimension in _FIELDS:
        field = _field(values, names, dimension)
        if field is not None and type(values[field]) is int:
            found[dimension] = values[field]
    heads = found.get("heads")
    if heads and _is_none(values, names, "kv_heads"):
        found["kv_heads"] = heads
    if "hidden" in found and _is_none(values, names, "mlp"):
        found["mlp"] = 4 * found["hidden"]  # what such types take for None; another rule shows in the shapes
    if heads and "hidden" in found and "kv_lora_rank" not in values:
        found["head_dim"] = values.get("head_dim") or found["hidden"] // heads
    return found


def resized(model: nn.Module, sizes: Mapping[str, int]) -> Any:
    """The configuration of a model with other sizes; all that it derives from them is written out as it was.

    Raises:
        ValueError: a size that the configuration has no field for.
    """
    base = base_model(model)
    if has_own_plan(base):
        return _own_resized(base, sizes)
    old = sizes_of(base)
    values, names = _values(base)
    for dimension, size in ({"head_dim": old.get("head_dim")} | old | dict(sizes)).items():
        field = dimension if dimension == "head_dim" else _field(values, names, dimension)
        if field is None:
            raise ValueError(f"{type(base).__name__} has no size {dimension!r}")
        if size is not None:
            values[field] = size
    for field in _ALSO_HIDDEN:
        if values.get(field) == old["hidden"]:
            values[field] = values[_field(values, names, "hidden") or field]
    config, text = base.config, text_config(base)
    if isinstance(getattr(type(text), "head_dim", None), property):
        values.pop("head_dim", None)  # always the width over the heads
    if text is not config:
        whole = config.to_dict()
        whole[next(key for key in config.sub_configs if getattr(config, key, None) is text)] = values
        values = whole
    try:
        return type(config).from_dict(values)
    except Exception as error:  # whatever a configuration says to sizes that it does not expect
        raise ValueError(f"{type(base).__name__} cannot be built so: {first_line(error)}") from error


def derives_head_size(model: nn.Module) -> bool:
    """Whether the size of a head is the width over the heads, so that more heads alone make nothing larger."""
    base, sizes = base_model(model), sizes_of(model)
    if "heads" not in sizes:
        return False
    try:
        twice, once = tensor_shapes(base, resized(base, {"heads": 2 * sizes["heads"]})), _shapes(base)
    except ValueError:
        return True
    return not any(any(new > old for new, old in zip(twice[name], once[name], strict=True)) for name in once)


def fitting_heads(base: nn.Module, old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, int]:
    """Head counts that grow along with the channels; their maps are those of the channels."""
    if "hidden" not in new or not derives_head_size(base):
        return {}
    times = new["hidden"] // old["hidden"]
    return {name: times * old[name] for name in ("heads", "kv_heads") if name in old}


def find_axes(model: nn.Module, dimensions: Collection[str]) -> Axes:
    """The axes of all tensors that count any of these dimensions, by the name of the tensor.

    Raises:
        ValueError: the architecture cannot be built with another size, or an axis that has no known meaning.
    """
    base, old = base_model(model), sizes_of(model)
    before = _shapes(base)
    grown: dict[tuple[str, int], set[str]] = {}

    def note(dimension: str, shapes: Mapping[str, torch.Size], reference: Mapping[str, torch.Size]) -> None:
        for name, shape in shapes.items():
            if name not in before or len(shape) != len(before[name]):
                raise ValueError(f"{type(base).__name__} has other tensors at another size: {name}")
            for axis, size in enumerate(shape):
                if size != reference[name][axis]:
                    grown.setdefault((name, axis), set()).add(dimension)

    def twice(*names: str) -> dict[str, torch.Size]:
        return tensor_shapes(base, resized(base, {name: 2 * old[name] for name in names}))

    for dimension in dimensions:
        if dimension == "hidden" and derives_head_size(base):
            note(dimension, twice("hidden", *(name for name in ("heads", "kv_heads") if name in old)), before)
        elif dimension == "kv_heads":
            note(dimension, twice("heads", "kv_heads"), twice("heads"))
        else:
            note(dimension, twice(dimension), before)
        # Types with latent keys have a number of kv heads that counts nothing by itself.
        if dimension != "kv_heads" and not any(dimension in counted for counted in grown.values()):
            raise ValueError(f"{type(base).__name__}: no tensor grows with {dimension}")
    modules = dict(base.named_modules())
    layers, every = LayerNames(base), layer_sizes(base)
    is_paired = text_config(base).model_type in _PAIRED_UNITS
    axes: Axes = {}
    for name, shape in before.items():
        reads = _read_axis(modules[name.rpartition(".")[0]], name, len(shape))
        inside = layers.split(name)
        found: list[Axis | None] = []
        for axis, size in enumerate(shape):
            counted = grown.get((name, axis))
            if counted is None:
                found.append(None)
                continue
            units = old | every[inside[1]] if inside is not None and every else old
            parts = _parts(name, size, counted, units, is_paired)
            does_read = axis == reads if reads >= 0 else _expert_reads(name, counted)
            found.append(Axis(parts=parts, reads=does_read))
        axes[name] = tuple(found)
    return axes


def tensor_shapes(base: nn.Module, config: Any) -> dict[str, torch.Size]:
    """The shapes of parameters and saved buffers of a model of the same class with another configuration.

    Raises:
        ValueError: the class refuses the configuration.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin: Any = type(base)._from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # whatever a model class says to sizes that it does not expect
        raise ValueError(f"{type(base).__name__} cannot be built so: {first_line(error)}") from error
    return _shapes(twin)


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are saved, the tensors themselves, under all their names."""
    saved = set(model.state_dict())
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of a configuration's validation, what the validator says."""
    error = error.__cause__ if error.__cause__ is not None and "Validation" in type(error).__name__ else error
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in saved_tensors(model).items()}


def _parts(name: str, size: int, counted: set[str], units: Mapping[str, int], is_paired: bool) -> tuple[Part, ...]:
    if counted == {"heads", "kv_heads"}:
        heads, kv, dim = units["heads"], units["kv_heads"], units.get("head_dim", 0)
        if size == (heads + 2 * kv) * dim and not _BY_HEAD.search(name):
            fused = (("heads", heads), ("kv_heads", kv), ("kv_heads", kv))
            return tuple(Part(dimension=what, units=number, block=dim) for what, number in fused)
    if counted == {"hidden"} and size % units["hidden"]:
        # A type that derives the size of a head from the width, so that heads grow along, and has fewer kv heads.
        kv = units.get("kv_heads", 0) * units.get("head_dim", 0)
        last = Part(dimension="kv_heads", units=units.get("kv_heads", 0), block=units.get("head_dim", 0))
        if size == kv:
            return (last,)
        if size == units["hidden"] + 2 * kv and not _BY_HEAD.search(name):
            return (Part(dimension="hidden", units=units["hidden"]), last, last)
    elif len(counted) == 1:
        (dimension,) = counted
        number = units.get(dimension, 0)
        if number and size % number == 0:
            whole = dimension in ("heads", "kv_heads") or _BY_HEAD.search(name) or (dimension == "mlp" and is_paired)
            if whole:
                return (Part(dimension=dimension, units=number, block=size // number),)
            return (Part(dimension=dimension, units=number),) * (size // number)
    raise ValueError(
        f"tensor {name} counts {' and '.join(sorted(counted))} along an axis of {size} in an unknown order"
    )


def _read_axis(module: nn.Module, name: str, num_axes: int) -> int:
    """The axis that a tensor reads along, num_axes for none, -1 where it depends on what the axis counts."""
    if num_axes < 2 or isinstance(module, nn.Embedding) or name.endswith("bias"):
        return num_axes
    if isinstance(module, nn.Linear):
        return 1
    if type(module).__name__ == "Conv1D":
        return 0
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return num_axes
    return 1 if num_axes == 2 else -1


def _expert_reads(name: str, counted: set[str]) -> bool:
    """Of tensors `[experts, ., .]`: along units in the last matrix, along channels in the others."""
    return bool(counted & {"mlp", "expert_mlp"}) if _READS_UNITS.search(name) else "hidden" in counted


def _values(base: Any) -> tuple[dict[str, Any], Mapping[str, str]]:
    text = text_config(base)
    return text.to_dict(), getattr(type(text), "attribute_map", {})


def _field(values: Mapping[str, Any], names: Mapping[str, str], dimension: str) -> str | None:
    for name in _FIELDS[dimension]:
        if names.get(name, name) in values:
            return names.get(name, name)
    return None


def _is_none(values: Mapping[str, Any], names: Mapping[str, str], dimension: str) -> bool:
    field = _field(values, names, dimension)
    return field is not None and values[field] is None


def _own_sizes(base: Any) -> dict[str, int]:
    found = {"hidden": base.config.hidden_size}
    every = layer_sizes(base)
    return found | {
        name: max(sizes[name] for sizes in every) for name in every[0] if all(name in sizes for sizes in every)
    }


def layer_sizes(base: Any) -> list[dict[str, int]]:
    """The sizes of every block of our own decoder; empty for types of transformers, whose layers are alike."""
    found: list[dict[str, int]] = []
    for block in base.config.block_configs() if has_own_plan(base) else ():
        sizes = {"mlp": block.mlp.intermediate_size}
        if hasattr(block.mixer, "num_heads"):
            heads = block.mixer.num_heads
            sizes |= {"heads": heads, "kv_heads": block.mixer.num_kv_heads or heads}
            sizes["head_dim"] = block.mixer.head_dim or block.hidden_size // heads
        found.append(sizes)
    return found


def _own_resized(base: Any, sizes: Mapping[str, int]) -> Any:
    values = base.config.to_dict()
    hidden = sizes.get("hidden", base.config.hidden_size)
    values["hidden_size"] = hidden
    every, blocks = layer_sizes(base), []
    for block, old in zip(values["blocks"], every, strict=False):  # one block may stand for all
        missing = [name for name in sizes if name not in (*old, "hidden")]
        if missing:
            raise ValueError(f"{type(base).__name__} has no size {missing[0]!r}")
        new = old | dict(sizes)
        block = {**block, "hidden_size": hidden, "mlp": {**block["mlp"], "intermediate_size": new["mlp"]}}
        if "heads" in old:
            counts = {"num_heads": new["heads"], "num_kv_heads": new["kv_heads"], "head_dim": old["head_dim"]}
            block["mixer"] = {**block["mixer"], **counts}
        blocks.append(block)
    values["blocks"] = blocks
    for layer, width in (values.get("value_embeddings") or {}).items():
        own = every[int(layer)]
        values["value_embeddings"][layer] = width * (own | dict(sizes))["kv_heads"] // own["kv_heads"]
    return type(base.config).from_dict(values)
