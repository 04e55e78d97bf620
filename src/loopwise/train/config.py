"""The config of a run: one frozen value that says everything, written to the run folder, which it replays.

A run is a list of stages. What a stage leaves open is as the run says.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from loopwise.edit import text as edits
from loopwise.io.atomic import write_text
from loopwise.loop import config as components
from loopwise.loop.config import Component
from loopwise.loop.depth import DepthSampler
from loopwise.loop.objective import FinalObjective, Objective
from loopwise.tasks import base as tasks
from loopwise.train.data.source import DataConfig
from loopwise.train.models import ModelConfig
from loopwise.train.objectives import LoraConfig, LossTerm
from loopwise.train.optim import AdamWConfig, OptimizerConfig, Schedule, WsdSchedule
from loopwise.train.optim.parametrisation import Parametrisation, StandardParametrisation
from loopwise.train.stage import Stage
from loopwise.train.trackers import Tracker


@dataclass(frozen=True, kw_only=True)
class Evaluation(Component):
    """When and how held-out rows are scored.

    Attributes:
        every: steps between evaluations; 0 only evaluates at the end.
        rows: how many held-out rows.
        loops: loop counts that are scored besides the plan's own.
        samples: rows or texts that are written to the samples folder each time.
    """

    kind: ClassVar[str | None] = "evaluation"
    every: int = 0
    rows: int = 256
    loops: tuple[int, ...] = ()
    samples: int = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.every >= 0, "every", "must be at least 0")
        self.require(self.rows >= 1, "rows", "must be at least 1")
        self.require(self.samples >= 0, "samples", "must be at least 0")
        self.require(all(count >= 1 for count in self.loops), "loops", "must be counts of at least 1")


@dataclass(frozen=True, kw_only=True)
class Saving(Component):
    """Which checkpoints are written and kept.

    Attributes:
        every: steps between checkpoints; 0 only saves at the end.
        keep: how many of the latest stay.
        keep_every: steps whose multiples stay for good; 0 keeps none for good.
    """

    kind: ClassVar[str | None] = "saving"
    every: int = 0
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0)):
            self.require(getattr(self, name) >= least, name, f"must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Component):
    """A run.

    Attributes:
        name: what the run is called in tables.
        model: where the model comes from.
        data: what it reads.
        steps: optimizer steps of a run of one stage; not read where `stages` are given.
        stages: the stages in order.
        seed: of the weights, the order of the data, loop counts, random states and dropout.
        batch_size: rows of a step, over all ranks and micro-batches.
        micro_batch: rows of one forward pass; None is all that a rank has. Gradients are accumulated, the loss is that
            of the batch.
        optimizer, schedule: how parameters move; the schedule is a factor on the learning rate.
        objective: what is read from the iterations and learned.
        terms: what is added to the loss.
        depth: sampler of loop counts and of the gradient window; None runs the plan as it is, with full gradients.
        parametrisation: how branches and learning rates depend on depth and width.
        adapters: train low-rank adapters (PEFT) instead of the weights.
        clip: largest global norm of the gradient; None does not clip.
        ema: decay of averaged weights, which evaluation and the saved model use; None has none.
        precision: "bfloat16" runs forward passes under autocast; weights stay as the model has them.
        compile: compile every layer.
        checkpoint_loops: recompute iterations in the backward pass instead of keeping their activations.
        parallel: under torchrun, "ddp" (a copy on every rank) or "fsdp" (sharded, the looped core as one unit).
        evaluation, saving: see there.
        log_every: steps between lines of metrics.
        trackers: where metrics go besides the run folder.
    """

    kind: ClassVar[str | None] = "run"
    name: str
    model: ModelConfig
    data: DataConfig
    steps: int = 1000
    stages: tuple[Stage, ...] = ()
    seed: int = 0
    batch_size: int = 32
    micro_batch: int | None = None
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    schedule: Schedule = field(default_factory=WsdSchedule)
    objective: Objective = field(default_factory=FinalObjective)
    terms: tuple[LossTerm, ...] = ()
    depth: DepthSampler | None = None
    parametrisation: Parametrisation = field(default_factory=StandardParametrisation)
    adapters: LoraConfig | None = None
    clip: float | None = 1.0
    ema: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    checkpoint_loops: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    evaluation: Evaluation = field(default_factory=Evaluation)
    saving: Saving = field(default_factory=Saving)
    log_every: int = 10
    trackers: tuple[Tracker, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(_is_plain(self.name), "name", "must be a name without '/'; --out names a folder")
        for name in ("steps", "batch_size", "log_every"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(self.micro_batch is None or self.micro_batch >= 1, "micro_batch", "must be at least 1")
        self.require(self.clip is None or self.clip > 0, "clip", "must be above 0, or null not to clip")
        self.require(self.ema is None or 0 < self.ema < 1, "ema", "must be between 0 and 1")
        depths = [self.depth, *(stage.depth for stage in self.stages)]
        rows_differ = any(depth is not None and depth.per == "sequence" for depth in depths)
        rule = "does not go with depths per sequence, whose windows differ from rank to rank: use 'ddp'"
        self.require(not rows_differ or self.parallel != "fsdp", "parallel", rule)
        rule = "do not go with stages that edit the model: merge adapters first, or edit in a run of its own"
        self.require(not self.grows or self.adapters is None, "adapters", rule)

    @cached_property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages, at least one."""
        return self.stages or (Stage(steps=self.steps),)

    @property
    def grows(self) -> bool:
        """Whether a stage edits the model."""
        return any(stage.edit for stage in self.stages)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.steps for stage in self.all_stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage, first step of it) of the 0-based step; the end of the run belongs to the last stage."""
        first = 0
        for index, stage in enumerate(self.all_stages):
            if step < first + stage.steps:
                return index, first
            first += stage.steps
        return len(self.all_stages) - 1, first - self.all_stages[-1].steps


def _is_plain(name: str) -> bool:
    return name.strip() not in ("", ".", "..") and not set(name) & set("/\\\0\n")


def read_config(path: Path) -> RunConfig:
    """The config in a JSON file.

    Raises:
        ValueError: no JSON, or no config of a run.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return parse(data, str(path))


def write_config(config: RunConfig, path: Path) -> None:
    """Write a config as JSON, whole or not at all."""
    write_text(path, json.dumps(components.to_dict(config), indent=2) + "\n")


def parse(data: Any, name: str = "the config") -> RunConfig:
    """The config that a JSON object describes; `name` stands for it in messages."""
    tasks.names()  # every kind of task and of edit is known from here on
    edits.operators()
    config = components.from_dict(data)
    if not isinstance(config, RunConfig):
        raise ValueError(f"{name} is not the config of a run: its kind is {config.kind!r}, not 'run'")
    return config


def override(config: RunConfig, words: Iterable[str]) -> RunConfig:
    """The config with some values replaced: words such as `steps=200`, `optimizer.lr=3e-4`, `stages.0.plan=core:(0)x4`.

    A value is read as JSON, and as text where it is none. A component given as a bare word is that choice of its axis
    with its defaults: `optimizer=muon`. Operators are also read as text: `stages.1.edit=midas(2)`, or a list of such.

    Raises:
        ValueError: a word without "=", or an unknown field (the nearest is suggested), or a value of the wrong type.
    """
    data = components.to_dict(config)
    edits.operators()
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ValueError(f"override {word!r}: write field=value, such as steps=200 or optimizer.lr=3e-4")
        _put(data, path.split("."), _value(text), path)
    return parse(data)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _put(data: Any, keys: list[str], value: Any, path: str) -> None:
    """Set a value deep inside the JSON form of a config."""
    key, *rest = keys
    place: Any = key
    owner = components.kinds().get(str(data.get("kind"))) if isinstance(data, dict) else None
    if isinstance(data, list):
        if not key.isdigit() or int(key) >= len(data):
            raise ValueError(f"override {path!r}: {key!r} is no index of a list of {len(data)}")
        place = int(key)
    elif owner is not None and key != "kind":
        known = [item.name for item in fields(owner)]
        if key not in known:
            raise ValueError(f"override {path!r}: {owner.kind} has no field {key!r}{components.suggest(key, known)}")
    inner = data[place] if isinstance(data, list) else data.get(key)
    axis = None if owner is None else _axis(owner, key)
    if rest:
        if inner is None:
            raise ValueError(f"override {path!r}: {key} is not set; choose one first, such as {_example(axis, key)}")
        if not isinstance(inner, dict | list):
            raise ValueError(f"override {path!r}: {key} is a single value, it has no field {rest[0]!r}")
        _put(inner, rest, value, path)
    elif axis == "edit" and not isinstance(value, Mapping):
        texts = value if isinstance(value, list) else [value]
        data[place] = [_operator(item) if isinstance(item, str) else item for item in texts]
    elif isinstance(value, str) and axis:
        chosen = _with_defaults(value if "." in value else f"{axis}.{value}")
        data[place] = [chosen] if isinstance(inner, list) else chosen
    elif isinstance(value, Mapping) and isinstance(inner, dict) and axis and "kind" not in value:
        data[place] = inner | dict(value)
    else:
        data[place] = value


def _operator(text: str) -> dict[str, Any]:
    """The JSON form of an operator given as text, such as `midas(2)`."""
    return components.to_dict(edits.parse(text))


def _with_defaults(kind: str) -> dict[str, Any]:
    """The JSON form of a component with its defaults; the kind alone where that is no component by itself."""
    try:
        return components.to_dict(components.from_dict({"kind": kind}))
    except ValueError:  # a field that must be given, perhaps by the next word
        return {"kind": kind}


def _axis(owner: type[Component], key: str) -> str | None:
    """The axis that a field takes its components from; None for a field of other values."""
    for hint in _inner_types(typing.get_type_hints(owner).get(key)):
        if hint is Component:  # such as the parts of a loop, whose fields are called like their axes
            return key
        if isinstance(hint, type) and issubclass(hint, Component):
            return next(kind for kind, known in components.kinds().items() if issubclass(known, hint)).split(".")[0]
    return None


def _inner_types(hint: Any) -> Iterator[Any]:
    parts = typing.get_args(hint)
    if not parts:
        yield hint
    for part in parts:
        yield from _inner_types(part)


def _example(axis: str | None, key: str) -> str:
    known = [kind.split(".")[1] for kind in components.kinds() if axis and kind.startswith(f"{axis}.")]
    return f"{key}={known[0]}" if known else f"{key}='{{...}}'"
