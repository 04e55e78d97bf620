"""Passthrough merges of mergekit (0.1.5) as orders of layers, and orders written as such merges.

mergekit's `layer_range` has an exclusive end. A slice has one source. Of `parameters` passthrough reads `scale` alone:
a number, a list of numbers (spread over the layers of the slice), or rules of `filter` (a part of the tensor's name)
and `value`, of which the first that fits counts; where none fits, the `parameters` of the slice and then those of the
file are asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.edit.operators import DepthOperator
from loopwise.edit.surgery import Order, Prune
from loopwise.loop.config import suggest

# How most families call the output projections of attention and MLP; times zero, they make a layer the identity.
OUTPUTS = ("o_proj", "down_proj")
# mergekit gives the first and the last slice's scale to these too.
_OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_TOP = ("slices", "models", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "parameters")
_NOT_DONE = {
    "modules": "merges of several modules are not imported",
    "tokenizer": "edits of depth keep the tokenizer: remove it",
    "chat_template": "edits of depth keep the chat template: remove it",
}
Rules = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Passthrough:
    """What a passthrough file asks for.

    Attributes:
        operator: the order of layers, with their scales.
        model: the model that all slices name, as written.
        dtype: type of the tensors that it wants written, None for that of the model.
    """

    operator: DepthOperator
    model: str
    dtype: str | None = None


def read_mergekit(path: Path | str) -> Passthrough:
    """Read a passthrough merge of one model.

    The LLaMA-Pro idiom, `o_proj` and `down_proj` times zero and the rest times one, becomes zeroed layers: an edit that
    keeps the function, whatever the output projections of the family are called.

    Raises:
        ValueError: no such file, no YAML, another merge method, several models, unknown keys, an empty range, or
            something that the edits of this library do not do.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'is no UTF-8 text'}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    try:
        return from_mergekit(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_mergekit(data: Any) -> Passthrough:
    """`read_mergekit` for YAML that has been parsed."""
    if not isinstance(data, Mapping):
        raise ValueError("a merge is a mapping with 'merge_method' and 'slices'")
    for key, reason in _NOT_DONE.items():
        if data.get(key) is not None:
            raise ValueError(f"{key}: {reason}")
    _only(data, _TOP, "the file")
    if data.get("merge_method") != "passthrough":
        raise ValueError(f"merge_method {data.get('merge_method')!r} mixes models, only 'passthrough' is imported")
    if (data.get("slices") is None) == (data.get("models") is None):
        raise ValueError("needs exactly one of 'slices' and 'models'")
    shared = _rules_of(data, "the file")
    slices = _mappings(data["slices"] if data.get("models") is None else [{"sources": data["models"]}], "slices")
    parts = [_slice(item, number, shared, whole=data.get("models") is not None) for number, item in enumerate(slices)]
    model = _one_model(data, [name for name, _, _ in parts])
    dtype = data.get("out_dtype") or data.get("dtype")
    if dtype is not None and not isinstance(dtype, str):
        raise ValueError(f"dtype {dtype!r} must be a name such as bfloat16")
    if data.get("models") is not None:
        return Passthrough(operator=Prune(layers=()), model=model, dtype=dtype)
    for name, (rules, t) in (("first", (parts[0][2][0], 0.0)), ("last", (parts[-1][2][-1], 1.0))):
        _check_outer(name, rules, t)
    layers = [layer for _, numbers, _ in parts for layer in numbers]
    factors = [rules for _, _, many in parts for rules in many]
    return Passthrough(operator=_order(layers, factors), model=model, dtype=dtype)


def to_mergekit(edit: DepthEdit, model: str, *, dtype: str | None = None, outputs: Sequence[str] = OUTPUTS) -> str:
    """An edit of copied, zeroed and scaled layers as the YAML of a passthrough merge.

    Args:
        edit: the edit; visits of shared layers become layers of their own.
        model: name or folder of the old model.
        dtype: type to write, None for that of the model.
        outputs: parts of the names of the output projections, which mergekit has to be told for zeroed layers.

    Raises:
        ValueError: means of layers, offsets or loop components, which a passthrough merge has not.
    """
    import yaml

    if edit.relaxation is not None:
        raise ValueError("a passthrough merge has no offsets: edit with rank=None")
    slices: list[dict[str, Any]] = []
    for layer in edit.unrolled().layers:
        if len(layer.sources) != 1:
            raise ValueError(f"a passthrough merge has no means of layers, and this edit averages {layer.sources}")
        rules = _rules_for(layer, outputs)
        start = layer.sources[0]
        last = slices[-1]["sources"][0] if slices else {}
        if last and not rules and "parameters" not in last and last["layer_range"][1] == start:
            last["layer_range"][1] = start + 1
            continue
        source: dict[str, Any] = {"model": model, "layer_range": [start, start + 1]}
        if rules:
            source["parameters"] = {"scale": rules}
        slices.append({"sources": [source]})
    data: dict[str, Any] = {"merge_method": "passthrough"} | ({"dtype": dtype} if dtype else {}) | {"slices": slices}
    from_mergekit(data)
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)


def _rules_for(layer: NewLayer, outputs: Sequence[str]) -> list[dict[str, Any]]:
    if layer.zero:
        return [*({"filter": name, "value": 0} for name in outputs), {"value": 1}]
    if layer.is_copy:
        return []
    rules = [{"value": value} if not name else {"filter": name, "value": value} for name, value in layer.scale]
    return rules if "filter" not in rules[-1] else [*rules, {"value": 1}]


def _slice(item: Mapping[str, Any], number: int, shared: list[Any], *, whole: bool) -> tuple[str, range, list[Rules]]:
    """Model, layers and, layer by layer, the factors of one slice."""
    where = f"slice {number}"
    _only(item, ("sources", "parameters", "base_model"), where)
    sources = _mappings(item.get("sources"), f"{where}: sources")
    if len(sources) != 1:
        raise ValueError(f"{where} has {len(sources)} sources, passthrough takes one: give each a slice of its own")
    source = sources[0]
    _only(source, ("model",) if whole else ("model", "layer_range", "parameters"), where)
    model = source.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError(f"{where}: model must be a name or folder, got {model!r}")
    if "+" in model:
        raise ValueError(f"{where}: model {model!r} adds an adapter: merge it into the model first")
    if whole:
        return model, range(0), []
    ends = source.get("layer_range")
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int for end in ends):
        raise ValueError(f"{where}: layer_range must be [first, end], got {ends!r}")
    if not 0 <= ends[0] < ends[1]:
        raise ValueError(f"{where}: layer_range {ends} is empty, its end is exclusive")
    settings = [*_rules_of(source, where), *_rules_of(item, where), *shared]
    layers = range(*ends)
    spread = [index / (len(layers) - 1) if len(layers) > 1 else 1.0 for index in range(len(layers))]
    return model, layers, [tuple(_rules(settings, where, t)) for t in spread]


def _rules_of(item: Mapping[str, Any], where: str) -> list[Any]:
    """The scale of one level, as a list of one setting, or of none."""
    parameters = item.get("parameters")
    if parameters is None:
        return []
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{where}: parameters must be a mapping")
    _only(parameters, ("scale",), f"{where}: parameters of passthrough")
    return [parameters["scale"]] if "scale" in parameters else []


def _rules(settings: list[Any], where: str, t: float) -> Iterator[tuple[str, float]]:
    """(filter, factor) of a layer at `t` in its slice, up to the first that is for all tensors."""
    for setting in settings:
        rules = [setting] if isinstance(setting, Mapping) else setting
        if not (isinstance(rules, list) and rules and all(isinstance(rule, Mapping) for rule in rules)):
            yield "", _value(setting, where, t)
            return
        for rule in rules:
            _only(rule, ("filter", "value"), f"{where}: scale")
            name = rule.get("filter")
            if name is not None and (not isinstance(name, str) or not name or name.split() != [name]):
                raise ValueError(f"{where}: filter {name!r} must be a part of a tensor's name")
            is_last = name in (None, "*")
            yield "" if is_last else str(name), _value(rule.get("value"), where, t)
            if is_last:
                return


def _value(value: Any, where: str, t: float) -> float:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in numbers):
        raise ValueError(f"{where}: scale {value!r} must be a number or a list of numbers")
    place = t * (len(numbers) - 1)
    low = int(place)
    high = min(len(numbers) - 1, low + 1)
    return (1 - (place - low)) * numbers[low] + (place - low) * numbers[high]


def _check_outer(name: str, rules: Rules, t: float) -> None:
    """Refuse scales that mergekit would give to embedding, final norm or head as well."""
    tensors = _OUTER[:1] if t == 0.0 else _OUTER[1:]
    for tensor in tensors:
        factor = next((value for part, value in rules if part in tensor), 1.0)
        if factor != 1:
            raise ValueError(
                f"the scale {factor:g} of the {name} slice also holds for {tensor} in mergekit, edits of depth keep "
                f"that: filter it, or give the {name} layer a slice without scale"
            )


def _one_model(data: Mapping[str, Any], models: list[str]) -> str:
    for first, other in pairwise(models):
        if first != other:
            raise ValueError(f"merges layers of {first!r} and {other!r}, an edit has one model: use mergekit for this")
    for key, others in (("base_model", ()), ("tokenizer_source", ("base", "union"))):
        if data.get(key) not in (None, models[0], *others):
            raise ValueError(f"{key} {data[key]!r} is another model than {models[0]!r}: remove it")
    return models[0]


def _order(layers: list[int], factors: list[Rules]) -> Order:
    zero, scale = [], []
    for number, rules in enumerate(factors):
        named = {part for part, value in rules if part and value == 0}
        if named == set(OUTPUTS) and all(value == 1 for part, value in rules if part not in OUTPUTS):
            zero.append(number)
        elif any(value != 1 for _, value in rules):
            scale += [f"{number} {part or '*'} {value!r}" for part, value in rules]
    return Order(layers=tuple(layers), zero=tuple(zero), scale=tuple(scale))


def _only(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}{suggest(str(key), known)}")


def _mappings(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{where} must be a list of mappings")
    return value
