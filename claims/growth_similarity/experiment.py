"""How alike the blocks of grown models are, after training and on the way, against how long ago they were one.

The measure is ours: cosine of all weights of a group of two blocks. Runs are those of the claim `growth`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from loopwise.edit.operators import GradStack, Lidas, Midas
from loopwise.measure.similarity import WeightSimilarity, weight_similarity
from loopwise.plan import Plan
from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.one_budget import BLOCK, LAYERS, TENTHS, grown, plain
from loopwise.study.experiment import Effect
from loopwise.study.probe import weights_at
from loopwise.study.scoring import RunResult
from loopwise.study.stats import mean_interval
from loopwise.train.config import RunConfig

BLOCKS = LAYERS // BLOCK
OPERATORS = {"midas": Midas(b=BLOCK), "grad_stack": GradStack(b=BLOCK)}


def arms(scale: str) -> dict[str, RunConfig]:
    """Full depth and three ways to grow, as in the claim `growth`."""
    return {
        "full depth": plain(),
        "grad_stack": grown(OPERATORS["grad_stack"]),
        "midas": grown(OPERATORS["midas"]),
        "lidas": grown(Lidas(b=BLOCK)),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Cosines by the age of the fork, along depth, and along training."""
    last = {name: [_similarity(run, run.config.num_steps) for run in found] for name, found in runs.items()}
    cosines = {name: [item.mean(BLOCK).cosine for item in found] for name, found in last.items()}
    by_age = {name: [_by_age(name, cosine) for cosine in cosines[name]] for name in OPERATORS}
    drops = {
        name: [[ages[stage] - ages[stage - 1] for stage in (4, 3)] for ages in found] for name, found in by_age.items()
    }
    least = [min(itertools.chain(*pair)) for pair in zip(*drops.values(), strict=True)]
    apart = ~np.eye(BLOCKS, dtype=bool)
    chance = max(float(np.abs(cosine[apart]).max()) for cosine in cosines["full depth"])
    profiles = {name: [np.diagonal(cosine, 1).tolist() for cosine in found] for name, found in cosines.items()}
    ways = {name: [_since(name, run) for run in runs[name]] for name in OPERATORS}
    stages = {
        name: {
            stage: [_similarity(run, _ends(run)[stage - 1]) for run in found]
            for stage in range(2, len(_ends(found[0])) + 1)
        }
        for name, found in runs.items()
        if name != "full depth"
    }
    return Effect(
        interval=mean_interval(least),
        control_held=chance < 0.05,
        control=f"the largest cosine of two blocks under full depth is {chance:.3f} in size",
        scores={name: [float(np.mean(profile)) for profile in found] for name, found in profiles.items()},
        metric="mean cosine of neighbouring blocks",
        panels=[_along_depth(profiles), _along_training(ways)],
        details={
            "cosine by the stage at which a pair parted": {
                name: {str(stage): [ages[stage] for ages in found] for stage in (4, 3, 2)}
                for name, found in by_age.items()
            },
            "drops from one age to the next older": drops,
            "cosine of neighbours along depth": profiles,
            "chance level and its standard deviation": list(last["midas"][0].mean(BLOCK).chance_at(1)),
            "block x block after every stage, mean over seeds": {
                name: {str(stage): _mean_of([item.mean(BLOCK).cosine for item in found]) for stage, found in by.items()}
                for name, by in stages.items()
            },
            "neighbours by weight group after every stage, mean over seeds": {
                name: {str(stage): _by_group(found) for stage, found in by.items()} for name, by in stages.items()
            },
            "steps since the fork: cosine": {
                name: {str(stage): _mean_way([way[stage] for way in found]) for stage in (2, 3, 4)}
                for name, found in ways.items()
            },
        },
    )


def _similarity(run: RunResult, step: int) -> WeightSimilarity:
    return weight_similarity(weights_at(run, step))


def parted(name: str, blocks: int) -> dict[tuple[int, int], int]:
    """For each pair of blocks, the stage at whose beginning they were last the same."""
    found = {}
    for pair in itertools.combinations(range(blocks), 2):
        first, second = pair
        for stage in range(blocks, 1, -1):
            sources = _sources(name, stage)
            first, second = sources[first], sources[second]
            if first == second:
                found[pair] = stage
                break
    return found


def _sources(name: str, stage: int) -> list[int]:
    """The block of the stage before that each block of a stage starts as."""
    num_layers = (stage - 1) * BLOCK
    visits = OPERATORS[name].edit(Plan.identity(num_layers), num_layers).plan.layers
    return [layer // BLOCK for layer in visits[::BLOCK]]


def _by_age(name: str, cosine: np.ndarray) -> dict[int, float]:
    """Mean cosine of the pairs that parted at each stage."""
    stages = parted(name, len(cosine))
    return {
        age: float(np.mean([cosine[pair] for pair, stage in stages.items() if stage == age]))
        for age in sorted(set(stages.values()))
    }


def _ends(run: RunResult) -> list[int]:
    return list(itertools.accumulate(stage.steps for stage in run.config.all_stages))


def _mean_of(cosines: Sequence[np.ndarray]) -> list[list[float]]:
    return np.mean(cosines, axis=0).tolist()


def _since(name: str, run: RunResult) -> dict[int, list[tuple[int, float]]]:
    """For pairs that parted at each stage, (steps since then, mean cosine) along the run."""
    ends = _ends(run)
    tenth = run.config.num_steps // TENTHS
    found: dict[int, list[tuple[int, float]]] = {stage: [(0, 1.0)] for stage in range(2, BLOCKS + 1)}
    for step in range(ends[0] + tenth, run.config.num_steps + 1, tenth):
        cosine = _similarity(run, step).mean(BLOCK).cosine
        for stage, value in _by_age(name, cosine).items():
            found[stage].append((step - ends[stage - 2], value))
    return found


def _mean_way(ways: Sequence[Sequence[tuple[int, float]]]) -> dict[str, float]:
    return {str(points[0][0]): float(np.mean([value for _, value in points])) for points in zip(*ways, strict=True)}


def _by_group(found: Sequence[WeightSimilarity]) -> dict[str, list[float]]:
    names = [group.name for group in found[0].groups if group.is_matrix]
    return {
        name: np.mean([np.diagonal(item[name].compare(BLOCK).cosine, 1) for item in found], axis=0).tolist()
        for name in names
    }


def _along_depth(profiles: Mapping[str, Sequence[Sequence[float]]]) -> Panel:
    pairs = list(range(1, BLOCKS))
    curves = []
    for name, found in profiles.items():
        means = [mean_interval([profile[pair - 1] for profile in found]) for pair in pairs]
        curves.append(
            Curve(
                label=name,
                x=pairs,
                y=[item.estimate for item in means],
                low=[item.low for item in means],
                high=[item.high for item in means],
                dashed=name == "full depth",
            )
        )
    return Panel(
        curves=curves,
        x_label="pair of neighbouring blocks (1: first and second)",
        y_label="cosine of weights",
        title="after training",
        level=(0.0, "chance"),
    )


def _along_training(ways: Mapping[str, Sequence[Mapping[int, Sequence[tuple[int, float]]]]]) -> Panel:
    curves = []
    for kind, (name, found) in enumerate(ways.items()):
        for stage in (2, 3, 4):
            way = _mean_way([item[stage] for item in found])
            curves.append(
                Curve(
                    label=f"{name}, parted at stage {stage}",
                    x=[int(steps) for steps in way],
                    y=list(way.values()),
                    colour=stage,
                    dashed=kind == 1,
                )
            )
    return Panel(curves=curves, x_label="steps since they were one", y_label="cosine of weights", title="on the way")
