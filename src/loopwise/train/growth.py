"""Edits of the model between two stages of a run: the model, what the optimizer knows of it, and its averages.

An edit happens on a plain model. Whatever the run has made of its own (compiled layers, shards on several ranks), the
plain model of the stage is built again from the config, given the weights, gathered, and edited; the result is wrapped
like any other. So an edited run is bit for bit the same on any number of ranks, and a run that resumes inside a later
stage walks the same edits, values aside, before it loads its tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loopwise.edit.apply import plan_edit, realise, tensor_sources
from loopwise.edit.maps import DepthEdit
from loopwise.edit.operators import DepthOperator, Operator
from loopwise.edit.schedule import GrowthSchedule
from loopwise.models.attach import attach, plan_of
from loopwise.models.hub import layer_list
from loopwise.models.playing import looping_of
from loopwise.models.realise import LayerNames
from loopwise.plan import Plan
from loopwise.train.config import RunConfig
from loopwise.train.models import DecoderSizes
from loopwise.train.moments import Origin, Origins
from loopwise.train.objectives import Distillation, Term, build_terms, check_objective
from loopwise.train.optim import trainable
from loopwise.train.optim.roles import Multipliers
from loopwise.train.stage import Mode, Stage
from loopwise.train.stages import check_patterns, set_plan
from loopwise.train.tensors import weights

Rules = Mapping[str, Multipliers]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A plain model of a run, as a stage begins with it.

    Attributes:
        model: with a plan.
        rules: multipliers for the optimizer by parameter name.
        moves: what the parameters of each edit of the last stage were made from, in order.
    """

    model: Any
    rules: Rules
    moves: tuple[Origins, ...] = ()


def last_edit(config: RunConfig, stage: int) -> int:
    """The last stage up to this one that edits the model; -1 where the model is still the one of the config."""
    edited = [index for index in range(stage + 1) if config.all_stages[index].edit]
    return edited[-1] if edited else -1


def build(config: RunConfig, vocab_size: int, stage: int) -> Built:
    """The model of the config with the edits and plans of all stages up to `stage`; -1 is as it comes.

    Raises:
        ValueError: as `enter`.
    """
    model, rules = config.model.build(vocab_size, seed=config.seed, parametrisation=config.parametrisation)
    built = Built(model=model, rules=rules)
    for index in range(stage + 1):
        built = enter(built, config, index)
    return built


def enter(built: Built, config: RunConfig, index: int) -> Built:
    """What a stage makes of the model before it: its edits one after the other, then its plan.

    New values that are drawn are a function of the seed of the run, the stage and the number of the edit.

    Raises:
        ValueError: an edit or a plan that does not fit the model.
    """
    stage, model, rules = config.all_stages[index], built.model, built.rules
    plan = None if stage.plan is None else Plan.parse(stage.plan)
    moves = []
    for number, operator in enumerate(stage.edit):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(config.seed, index, number))
            is_last = number + 1 == len(stage.edit)
            edited, origins = edit(model, operator, stage.mode, plan if is_last else None)
        rules = _rules(config, model, edited, rules, origins)
        model = edited
        moves.append(origins)
    if plan is not None:
        set_plan(model, plan)
    return Built(model=model, rules=rules, moves=tuple(moves))


def grown(config: RunConfig, vocab_size: int, index: int, values: Mapping[str, torch.Tensor]) -> Built:
    """The plain model with which a stage begins, made from the one before it.

    Args:
        config: the run.
        vocab_size: of the data.
        index: of a stage with an edit.
        values: weights of the model before, whole, by name.
    """
    return enter(_filled(config, vocab_size, index - 1, values), config, index)


def grown_averages(
    config: RunConfig,
    vocab_size: int,
    index: int,
    values: Mapping[str, torch.Tensor],
    averages: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Averaged weights of the edited model: the model with averages in the place of its weights, edited alike.

    Args:
        config: the run.
        vocab_size: of the data.
        index: of a stage with an edit.
        values: weights of the model before, whole, by name.
        averages: as `Ema.state` gives them, whole.
    """
    named = {name.removesuffix("/average"): tensor for name, tensor in averages.items()}
    built = _filled(config, vocab_size, index - 1, {**values, **named}, wide=True)
    edited = enter(built, config, index).model
    return {f"{name}/average": tensor for name, tensor in weights(edited).items()}


def _filled(
    config: RunConfig, vocab_size: int, stage: int, values: Mapping[str, torch.Tensor], *, wide: bool = False
) -> Built:
    """The plain model of a stage with these weights; `wide` in float32, as averages are."""
    built = build(config, vocab_size, stage)
    if wide:
        built.model.float()
    for name, tensor in weights(built.model).items():
        tensor.copy_(values[name])
    return built


def edits_of(stage: Stage) -> list[str]:
    """The operators of a stage as text."""
    return [item.text() if isinstance(item, DepthOperator) else str(item.kind) for item in stage.edit]


def edit(model: Any, operator: Operator, mode: Mode | None = None, plan: Plan | None = None) -> tuple[Any, Origins]:
    """A model that an operator makes of another one, with a plan, in training mode; and what its parameters come from.

    Args:
        model: plain, with a plan; the alias of an edit changes it in place.
        operator: what to do.
        mode: how it is realised; None is the operator's own.
        plan: that the new layers get in the place of the operator's; an alias, and offsets per visit, keep theirs.

    Raises:
        ValueError: the operator does not fit the model.
    """
    if not isinstance(operator, DepthOperator):
        name = operator.kind or type(operator).__name__
        raise ValueError(f"{name}: stages edit the depth of a model; edit its width before the run")
    planned = plan_edit(model, operator)
    mode = mode or planned.default
    if mode == "materialize" and planned.relaxation is None:
        planned, mode = planned.unrolled(), "tie"
    if mode == "tie" and planned.relaxation is None and plan is not None:
        planned = replace(planned, plan=plan, origins=())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    edited = realise(model, planned, mode=mode)
    sources = tensor_sources(model, edited, planned)
    if plan_of(edited) is None:
        attach(edited, Plan.identity(planned.plan.num_slots))
    zeroed = _zeroed(edited, planned)
    origins = {}
    for name, parameter in edited.named_parameters():
        known = sources[name].names
        origins[name] = Origin(known, zero=name in zeroed)
        parameter.requires_grad_(not known or not frozen.issuperset(known))
    return edited.train(), origins


def _zeroed(edited: Any, planned: DepthEdit) -> set[str]:
    """The parameters of layers whose outputs start at zero."""
    names = LayerNames(edited)
    of_layer: dict[str, int] = {}
    for name, _ in edited.named_parameters():
        part = names.split(name)
        if part is not None:
            of_layer[name] = part[1]
    num_layers = len(layer_list(edited).layers)
    layers = planned.layers if num_layers == len(planned.layers) else planned.unrolled().layers
    return {name for name, number in of_layer.items() if layers[number].zero}


def _rules(config: RunConfig, model: Any, edited: Any, rules: Rules, origins: Origins) -> Rules:
    """Multipliers of the edited model: those of the first source, and for new parameters those of the same sizes."""
    found = {
        name: rules[origin.sources[0]]
        for name, origin in origins.items()
        if origin.sources and origin.sources[0] in rules
    }
    new = {name: value for name, value in edited.named_parameters() if not origins[name].sources}
    if new and isinstance(config.model, DecoderSizes):
        found |= config.parametrisation.multipliers(new, model.config.to_dict())
    return found


def check_stages(config: RunConfig, model: Any, rules: Rules) -> Any:
    """Walk a plain model through all stages, and refuse the first that it cannot enter.

    Args:
        config: the run.
        model: as it comes; it keeps its plan unless the run edits it, which may change it in place.
        rules: multipliers by parameter name.

    Returns:
        The model of the last stage.

    Raises:
        ValueError: naming the stage: an edit or a plan that does not fit, a pattern of no parameter, loop counts to
            evaluate or to draw where the plan has no loop, an objective or a term that the model has nothing for.
    """
    built, looping = Built(model=model, rules=rules), looping_of(model)
    plan = plan_of(model)
    for index, stage in enumerate(config.all_stages):
        try:
            built = enter(built, config, index)
            _check(config, built.model, stage)
        except ValueError as error:
            where = f"stages.{index}: " if config.stages else ""
            raise ValueError(f"{where}{error}") from None
    if not config.grows and looping is not None and plan is not None:
        looping.plan = plan
    return built.model


def _check(config: RunConfig, model: Any, stage: Stage) -> None:
    check_patterns(trainable(model), stage.trainable)
    plan = plan_of(model)
    assert plan is not None
    depth = stage.depth or config.depth
    asks = [f"evaluation.loops has {count}" for count in config.evaluation.loops[:1]]
    asks += [] if depth is None else [f"{depth.kind} draws loop counts"]
    for ask in asks:
        try:
            plan.with_loops(1)
        except ValueError as error:
            raise ValueError(f"{ask}, under {plan} {error}") from None
    check_objective(model, stage.objective or config.objective)
    if stage.edit:
        build_terms(model, [term for term in config.terms if not isinstance(term, Distillation)])


def rebuild_terms(model: Any, config: RunConfig, built: Sequence[Term]) -> list[Term]:
    """The terms of a run for an edited model; teachers, which know nothing of the model, are not loaded again."""
    return [
        old if isinstance(term, Distillation) else build_terms(model, [term])[0]
        for term, old in zip(config.terms, built, strict=True)
    ]


def grow(operator: Operator | Sequence[Operator], schedule: GrowthSchedule, **values: Any) -> tuple[Stage, ...]:
    """The stages of a run that grows by a schedule: `RunConfig(stages=grow(Midas(b=2), prop_alpha(1000, 4, 1)), ...)`.

    Args:
        operator: applied at the beginning of every stage but the first; or one for each of these.
        schedule: how long the stages are.
        **values: further fields of the stages; those that say how edits are made (`mode`, `moments`, `lr`, `warmup`)
            are left out of the first stage.

    Raises:
        ValueError: another number of operators than of edits.
    """
    first, *others = schedule.steps
    given = [operator] * len(others) if isinstance(operator, Operator) else list(operator)
    if len(given) != len(others):
        raise ValueError(f"grow: {len(given)} operators for {len(others)} edits between {len(others) + 1} stages")
    plain = {name: value for name, value in values.items() if name not in ("mode", "moments", "lr", "warmup")}
    edited = [Stage(steps=steps, edit=(each,), **values) for steps, each in zip(others, given, strict=True)]
    return (Stage(steps=first, **plain), *edited)


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(("edit", *parts)).encode(), digest_size=7).digest())
