"""Where the layers of a checkpoint folder are, by the names of its tensors, and what its config.json says of them.

Loads neither torch nor transformers, except to fill in fields about single layers that a file leaves to the class.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from loopwise.edit.operators import Operator
from loopwise.io.layer_fields import COUNTS, EXTRA_COUNTS, expand_values, layer_kinds, missing_fields
from loopwise.io.tensors import Checkpoint, Tensor, read_json
from loopwise.plan import Plan

WRAPPER = "loopwise"
OWN_TYPES = ("loopwise_decoder", "loopwise_encoder", "loopwise_puzzle", "loopwise_regression")
# Public looped models, whose plan is in their code.
_IMPORTED = ("albert", "ouro", "huginn_raven", "loopformer", "hrm_text")
# Layers share a block, of which the first that has it alone is saved.
_SHARED_BLOCKS = ("zamba", "zamba2")
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder")
# Parts of a path that say that a list of layers is not the decoder's.
_TOWERS = re.compile(r"vision|visual|image|audio|speech|encoder|vit|mtp|resampler|projector|perceiver|depth|codec")
_QUANTIZATION = ("quantization_config", "quantization", "compression_config")
# What no field of a configuration says in words, only in the class: position is read from the number of layers ahead.
_LEADING_ONLY = ("afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "lfm2_moe", "jamba")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the layers are among the names of a checkpoint.

    Attributes:
        prefix: path of the list of layers, such as `model.layers`.
        num_layers: its layers, without the extra ones.
        num_extra: layers behind them that predict further tokens.
        tables: paths of lists with an entry for some layers, beside the layers themselves.
    """

    prefix: str
    num_layers: int
    num_extra: int = 0
    tables: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[str, int, str] | None:
        """(path of the list, number, rest) of the name of a layer's tensor; None for all others."""
        for path in (self.prefix, *self.tables):
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                if number.isdecimal() and rest:
                    return path, int(number), rest
        return None


class Source:
    """The config.json of a folder that is edited: a plain model, a looped one, or a decoder of our own.

    Args:
        folder: the folder, for reading what a class of transformers fills in.
        values: the JSON object.

    Raises:
        ValueError: it is no decoder with layers that can be edited.
    """

    def __init__(self, folder: Path, values: dict[str, Any]):
        self.folder, self.values = folder, values
        self.is_wrapper = values.get("model_type") == WRAPPER
        self.is_own = values.get("model_type") in OWN_TYPES
        base = values.get("base_config") if self.is_wrapper else values
        if not isinstance(base, dict) or not isinstance(base.get("model_type"), str):
            raise ValueError(f"{folder / 'config.json'} names no model_type: import other formats with loopwise import")
        if base["model_type"] in _IMPORTED:
            raise ValueError(
                f"{folder} is of type {base['model_type']}, whose code runs layers several times: write it in our "
                f"format first, with loopwise import"
            )
        self.base: dict[str, Any] = base
        if base.get("is_encoder_decoder") is True:
            raise ValueError(
                f"{folder} is an encoder-decoder model ({base['model_type']}): only decoders can be edited"
            )

    def why_loaded(self, operators: Sequence[Operator]) -> str | None:
        """Why an edit needs the model in memory, None where its bytes can be copied."""
        if self.is_wrapper and self.values.get("components"):
            return f"the source has {' and '.join(self.values['components'])} beside its layers"
        if self.is_own and self.values.get("relaxation"):
            return "the source has offsets per visit"
        if self.base["model_type"] in _SHARED_BLOCKS:
            return f"{self.base['model_type']} shares blocks between its layers"
        if any(getattr(operator, "rank", None) is not None for operator in operators):
            return "offsets per visit are computed"
        if any(getattr(operator, "adapter", "none") != "none" for operator in operators):
            return "the loop gets components"
        return None

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Keys from the base configuration to the decoder's part: empty, or the text part of a model with towers."""
        if any(type(self.base.get(key)) is int for key in COUNTS) and not isinstance(
            self.base.get("text_config"), dict
        ):
            return ()
        found = [key for key in _TEXT_PARTS if isinstance(self.base.get(key), dict)]
        return (found[0],) if found else ()

    @property
    def text(self) -> dict[str, Any]:
        """The decoder's part of the configuration."""
        part = self.base
        for key in self.path:
            part = part[key]
        return part

    @property
    def model_type(self) -> str:
        """Type of the decoder; the base model's where the part names none."""
        found = self.text.get("model_type")
        return found if isinstance(found, str) else self.base["model_type"]

    @property
    def plan_text(self) -> str | None:
        """The plan that the folder carries."""
        return (self.values.get("plan") or None) if self.is_wrapper or self.is_own else None

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """What the folder says about packed weights, None for plain ones."""
        for values in (self.base, self.text):
            for key in _QUANTIZATION:
                if isinstance(values.get(key), dict):
                    return values[key]
        return None

    def layout(self, checkpoint: Checkpoint) -> Layout:
        """Where the layers are.

        Raises:
            ValueError: no list of layers fits the configuration, or layers are missing or too many.
        """
        counts = {key: self.text[key] for key in COUNTS if type(self.text.get(key)) is int}
        lists, sizes = _lists(checkpoint.tensors)
        extra = next((self.text[key] for key in EXTRA_COUNTS if type(self.text.get(key)) is int), 0)
        primary = next(iter(counts.values()), None)

        def rank(path: str) -> tuple[bool, bool, int]:
            return bool(_TOWERS.search(path)), len(lists[path]) not in (primary, (primary or 0) + extra), -sizes[path]

        paths = sorted((path for path in lists if self._has_layers(lists[path], counts, extra)), key=rank)
        if not paths:
            raise ValueError(_nothing_fits(self.folder, counts, lists, sizes))
        found = len(lists[paths[0]])
        num_layers = found if not counts or found in counts.values() else found - extra
        tables = tuple(path for path in lists if self.is_own and path.rpartition(".")[2] == "value_embeddings")
        return Layout(prefix=paths[0], num_layers=num_layers, num_extra=found - num_layers, tables=tables)

    def _has_layers(self, numbers: set[int], counts: Mapping[str, int], extra: int) -> bool:
        if numbers != set(range(len(numbers))):
            return False
        return not counts or any(len(numbers) in (count, count + extra) for count in counts.values())

    def plan(self, num_layers: int) -> Plan:
        """The plan of the folder, the identity where it names none."""
        text = self.plan_text
        return Plan.parse(text).validate(num_layers) if text else Plan.identity(num_layers)

    def completed(self) -> list[str]:
        """Fill in what a file leaves to its class, by asking transformers; names of the fields, mostly none."""
        missing = [] if self.is_own else missing_fields(self.text, self.model_type)
        if not missing:
            return []
        from transformers import AutoConfig

        import loopwise.models  # noqa: F401 - tells transformers about our types

        values = {key: value for key, value in self.base.items() if key != "model_type"}
        try:
            whole = AutoConfig.for_model(self.base["model_type"], **copy.deepcopy(values))
        except Exception as error:  # whatever a class says to values that do not fit
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.folder / 'config.json'} does not fit its model_type: {line[:200]}") from error
        full = whole.get_text_config(decoder=True).to_dict()
        filled = [name for name in missing if full.get(name) is not None]
        self.text.update({name: full[name] for name in filled})
        return filled

    def kinds(self, layout: Layout) -> list[dict[str, Any]]:
        """What the configuration says about each layer in particular."""
        kinds = layer_kinds(self.text, layout.num_layers)
        if self.is_own and isinstance(self.text.get("value_embeddings"), dict):
            for number, kind in enumerate(kinds):
                kind["value_embeddings"] = self.text["value_embeddings"].get(str(number))
        return kinds

    def edited(self, layout: Layout, sources: Sequence[int], plan: Plan) -> dict[str, Any]:
        """The JSON object of a folder in which layer n is what layer `sources[n]` is here, under a plan.

        Raises:
            ValueError: the configuration cannot express such layers, or a loop with components would be lost.
        """
        base = copy.deepcopy(self.base)
        part = base
        for key in self.path:
            part = part[key]
        part |= expand_values(part, sources, layout.num_layers, layout.num_extra)
        if not any(type(part.get(key)) is int for key in COUNTS) and "layers_block_type" not in part:
            part["num_hidden_layers"] = len(sources)
        for values in (base, part) if self.path else (base,):
            for key in _QUANTIZATION:
                if isinstance(values.get(key), dict):
                    values[key] = _renumbered(values[key], layout, sources)
        if self.is_own:
            _set_own_plan(part, plan, sources)
            return base
        if plan == Plan.identity(len(sources)):
            return base
        if self.is_wrapper:
            return {**self.values, "plan": str(plan), "base_config": base}
        return {
            "model_type": WRAPPER,
            "architectures": ["LoopedForCausalLM"],
            "plan": str(plan),
            "cache": "own",
            "on_deeper": "refuse",
            "components": {},
            "base_config": base,
            "transformers_version": base.get("transformers_version"),
        }

    def doubts(self, *, moves: bool) -> str | None:
        """Why this architecture is edited on disk only if the result is tried, or None.

        Args:
            moves: whether layers get other numbers; else only the plan changes.
        """
        if self.is_own:
            return None
        rows = {row["model_type"]: row for row in architectures()}
        row = rows.get(self.base["model_type"]) or rows.get(self.model_type)
        if row is None or (self.path and self.base["model_type"] not in rows):
            return f"model type {self.base['model_type']} has not been tried"
        if not moves:
            return None if row["status"] == "pass" else str(row["reason"])
        if row["materializes"] or row["model_type"] in _LEADING_ONLY:
            return None
        return str(row["reason"])


def read_source(folder: Path) -> Source:
    """The configuration of a folder; ValueError when it has none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json")
    return Source(folder, read_json(folder / "config.json"))


def architectures() -> list[dict[str, Any]]:
    """The committed results of the conformance suite: `model_type`, `status`, `materializes`, `reason`."""
    return json.loads(files("loopwise").joinpath("models", "architectures.json").read_text(encoding="utf-8"))


def _lists(names: Mapping[str, Tensor]) -> tuple[dict[str, set[int]], dict[str, int]]:
    """Numbers and bytes of every outermost list of modules, by its path. Lists inside a layer do not count."""
    numbers: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for name, tensor in names.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal() and i), None)
        if at is not None:
            path = ".".join(parts[:at])
            numbers.setdefault(path, set()).add(int(parts[at]))
            sizes[path] = sizes.get(path, 0) + tensor.num_bytes
    return numbers, sizes


def _nothing_fits(
    folder: Path, counts: Mapping[str, int], lists: Mapping[str, set[int]], sizes: Mapping[str, int]
) -> str:
    if not lists:
        return f"{folder} has no list of layers among its tensors"
    path = min(lists, key=lambda path: (bool(_TOWERS.search(path)), -sizes[path]))
    says = next((f"{key} is {count}" for key, count in counts.items()), "it names no number of layers")
    gap = sorted(set(range(max(lists[path]) + 1)) - lists[path])
    has = f"layer {gap[0]} is missing" if gap else f"there are {len(lists[path])}"
    return f"{folder} does not fit its config.json: {says}, and of {path} {has}"


def _renumbered(values: Any, layout: Layout, sources: Sequence[int]) -> Any:
    """Settings of packed weights with the numbers in the names of modules changed, where they name layers."""
    if isinstance(values, dict):
        items = ((new, item) for key, item in values.items() for new in _new_names(key, layout, sources))
        return {key: _renumbered(item, layout, sources) for key, item in items}
    if isinstance(values, list):
        renumbered: list[Any] = []
        for item in values:
            if isinstance(item, str):
                renumbered += _new_names(item, layout, sources)
            else:
                renumbered.append(_renumbered(item, layout, sources))
        return renumbered
    return values


def _new_names(name: str, layout: Layout, sources: Sequence[int]) -> Iterator[str]:
    # Tools write the whole path, or leave out what is in front of the list.
    stem = re.escape(layout.prefix.rpartition(".")[2])
    found = re.match(rf"^((?:[\w.]*\.)?{stem}\.)(\d+)(?=\.|$)(.*)$", name)
    if found is None:
        if re.search(rf"{stem}\W*\d|{stem}\W*\(\?|{stem}\W*\[", name):
            raise ValueError(f"the quantization settings name layers by a pattern ({name}), which cannot be renumbered")
        yield name
        return
    head, number, tail = found.groups()
    if not (f"{layout.prefix}.".endswith(head) or head.endswith(f".{layout.prefix}.")):
        yield name  # another tower's
        return
    extra = int(number) - layout.num_layers
    if extra >= 0:
        yield f"{head}{len(sources) + extra}{tail}"
        return
    yield from (f"{head}{new}{tail}" for new, old in enumerate(sources) if old == int(number))


def _set_own_plan(values: dict[str, Any], plan: Plan, sources: Sequence[int]) -> None:
    lost = sorted(name for name, spec in (values.get("loops") or {}).items() if spec and name not in plan.loops)
    if lost:
        raise ValueError(
            f"the loop {lost[0]!r} has components, and the new plan {plan} has no such loop: keep the loop"
        )
    values["plan"] = str(plan)
    values["loops"] = {name: spec for name, spec in (values.get("loops") or {}).items() if name in plan.loops} or None
    tables = values.get("value_embeddings")
    if tables:
        kept = {str(new): tables[str(old)] for new, old in enumerate(sources) if str(old) in tables}
        values["value_embeddings"] = kept or None
