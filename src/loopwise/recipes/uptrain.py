"""Healing an edited checkpoint: which parameters are trained, how, and on what; the config behind `loopwise uptrain`.

What the edit was is read from the folder that `loopwise edit` wrote: offsets per visit and components of loops from its
config.json, layers that start as the identity from its loopwise_edit.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from loopwise.edit import provenance
from loopwise.edit.layout import Source, read_source
from loopwise.io.tensors import read_checkpoint
from loopwise.loop.depth import CurriculumDepth, PoissonLogNormalDepth
from loopwise.plan import Plan
from loopwise.train.config import Evaluation, RunConfig, Saving, Stage
from loopwise.train.data.corpus import STDLIB
from loopwise.train.data.encoding import BYTES
from loopwise.train.data.text import TextData
from loopwise.train.models import CheckpointModel
from loopwise.train.objectives import Distillation, LoraConfig
from loopwise.train.optim import AdamWConfig, WsdSchedule

Method = Literal["full", "offsets", "new_layers", "retrofit", "lora"]
METHODS: tuple[str, ...] = get_args(Method)
# What the sources train with; for "full" and "offsets", what healed SmolLM2 faster than three times as much.
LEARNING_RATES: Mapping[str, float] = {
    "full": 3e-4,
    "offsets": 3e-4,
    "new_layers": 2e-4,
    "retrofit": 5e-5,
    "lora": 2e-4,
}
# Iterations with a gradient, and the part of the run over which the number of iterations grows (2511.07384).
WINDOW, RAMP = 8, 0.25
OFFSETS = "*.relaxation.*"


@dataclass(frozen=True, kw_only=True)
class Edited:
    """What a checkpoint says of the edit that made it.

    Attributes:
        plan: its plan, None where it visits every layer once.
        has_offsets: whether visits of shared layers differ by offsets.
        loops: names of the loops that have components.
        zeroed: layers that started as the identity.
        operators: the edit as text; empty for a checkpoint that was not edited.
        prefix: path of the list of layers, such as `model.layers`; None where there is no config.json.
    """

    plan: Plan | None = None
    has_offsets: bool = False
    loops: tuple[str, ...] = ()
    zeroed: tuple[int, ...] = ()
    operators: tuple[str, ...] = ()
    prefix: str | None = field(default=None, repr=False)

    @property
    def method(self) -> Method:
        """What such an edit is usually healed with."""
        if self.zeroed:
            return "new_layers"
        return "retrofit" if self.loops else "full"


def read_edit(source: Path | str) -> Edited:
    """What a checkpoint folder says of its edit; of a GGUF file or a name nothing is known.

    Raises:
        ValueError: a folder that is no checkpoint, or a damaged file in it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return Edited()
    found, record = read_source(folder), provenance.earlier_of(folder) or {}
    added = _components(found)
    rows = record.get("layers") or []
    return Edited(
        plan=Plan.parse(found.plan_text) if found.plan_text else None,
        has_offsets=bool(added.get("relaxation")),
        loops=tuple(sorted(name for name, spec in (added.get("loops") or {}).items() if spec)),
        zeroed=tuple(number for number, row in enumerate(rows) if row.get("zero")),
        operators=tuple(record.get("operators") or ()),
        prefix=found.layout(read_checkpoint(folder)).prefix,
    )


def uptrain_config(
    source: Path | str,
    *,
    method: str | None = None,
    text: str = STDLIB,
    teacher: Path | str | None = None,
    distill: float = 0.0,
    new_layers: Sequence[int] | None = None,
    iterations: int = 4,
    rank: int = 16,
    steps: int = 200,
) -> RunConfig:
    """The run that heals a checkpoint.

    Args:
        source: the edited checkpoint: a folder, or anything that `loopwise.load` takes.
        method: "full" trains all parameters; "offsets" those of the visits alone (2410.20672); "new_layers" the layers
            that started as the identity (LLaMA-Pro, 2401.02415); "retrofit" all, with sampled loop counts whose mean
            grows over the first quarter (2511.07384); "lora" low-rank adapters (PEFT) in the layers. None is
            `Edited.method`.
        text: what to train on: a file, a folder, or "stdlib", the source of the Python standard library.
        teacher: the model before the edit; its predictions are learned from where `distill` is above 0.
        distill: weight of the divergence from the teacher.
        new_layers: layers to train under "new_layers"; None are those that the edit made.
        iterations: mean of the loop counts after the ramp, under "retrofit".
        rank: of the adapters, under "lora".
        steps: optimizer steps.

    Raises:
        ValueError: a method that the checkpoint has nothing for, or a value out of range.
    """
    edited = read_edit(source)
    method = method or edited.method
    if method not in METHODS:
        raise ValueError(f"method {method!r} must be one of {', '.join(METHODS)}")
    if distill < 0 or (distill and teacher is None):
        raise ValueError(f"distill {distill:g}: must be at least 0, and above 0 the model to learn from is needed")
    if new_layers is not None and method != "new_layers":
        raise ValueError(f"layers are named for the method 'new_layers', this is {method!r}: leave them out")
    values: dict[str, Any] = {}
    stage = Stage(steps=steps)
    evaluation = Evaluation(every=0, rows=64, samples=2)
    if method in ("new_layers", "offsets"):
        stage = Stage(steps=steps, trainable=_trained(source, edited, method, new_layers))
    elif method == "retrofit":
        stage, values = _curriculum(source, edited, iterations, steps)
        evaluation = Evaluation(rows=64, samples=2, loops=tuple(sorted({1, iterations})))
    elif method == "lora":
        values = {"adapters": LoraConfig(r=rank, alpha=float(rank))}
    terms = (Distillation(teacher=str(teacher), weight=float(distill)),) if distill else ()
    return RunConfig(
        name=f"uptrain-{_name(source)}",
        model=CheckpointModel(source=str(source)),
        data=TextData(source=text, tokenizer=_tokenizer(source), length=256),
        stages=(stage,),
        batch_size=4,
        micro_batch=2,
        optimizer=AdamWConfig(lr=LEARNING_RATES[method], weight_decay=0.0),
        schedule=WsdSchedule(warmup=0.05, decay=0.4),
        terms=terms,
        evaluation=evaluation,
        saving=Saving(every=50, keep=1),
        **values,
    )


def _trained(source: Path | str, edited: Edited, method: str, new_layers: Sequence[int] | None) -> tuple[str, ...]:
    """Patterns of the names of what is trained."""
    if method == "offsets":
        if not edited.has_offsets:
            raise ValueError(
                f"{source} has no offsets per visit to train: edit with a rank, such as recursive(2, rank=8)"
            )
        return (OFFSETS,)
    layers = edited.zeroed if new_layers is None else tuple(new_layers)
    if not layers:
        raise ValueError(f"{source} has no layers that start as the identity: edit with llama_pro, or name the layers")
    if edited.prefix is None:
        raise ValueError(f"{source} is no folder: write it as one with loopwise edit, then name its layers")
    return tuple(f"{edited.prefix}.{layer}.*" for layer in layers)


def _curriculum(source: Path | str, edited: Edited, mean: int, steps: int) -> tuple[Stage, dict[str, Any]]:
    """The plan at the mean loop count, and the sampler that gets there."""
    if mean < 2:
        raise ValueError(f"iterations {mean}: a mean loop count is at least 2 here")
    plan = edited.plan
    if plan is None:
        raise ValueError(f"{source} has no loop: edit with retrofit(prelude, core, coda)")
    sampler = PoissonLogNormalDepth(mean=mean, sigma=0.5, max_grad=WINDOW)
    depth = CurriculumDepth(sampler=sampler, steps=max(1, round(RAMP * steps)))
    return Stage(steps=steps, plan=str(plan.with_loops(mean))), {"depth": depth}


def _components(found: Source) -> Mapping[str, Any]:
    """What a folder has beside its layers: "relaxation" and "loops"."""
    if found.is_own:
        return found.values
    return found.values.get("components") or {} if found.is_wrapper else {}


def _tokenizer(source: Path | str) -> str:
    """Where the tokenizer is: with the model, or bytes for a decoder of our own that has none."""
    folder = Path(source)
    has_none = folder.is_dir() and not any(folder.glob("tokenizer*")) and read_source(folder).is_own
    return BYTES if has_none else str(source)


def _name(source: Path | str) -> str:
    return Path(source).stem if Path(source).suffix == ".gguf" else Path(source).name
