"""Carries out a claim: pilot, tuning of learning rates, runs, measurement, results.

`claims/NAME/experiment.py` defines two functions::

    def arms(scale: str) -> dict[str, RunConfig]        # one config per arm; seed and learning rate are set here
    def measure(runs: dict[str, list[RunResult]]) -> Effect    # runs of every arm, one per seed, sorted by seed
"""

from __future__ import annotations

import math
import platform
import runpy
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loopwise import __version__
from loopwise.plots.curves import Panel, draw_panels
from loopwise.study.claims import EXPERIMENT, SCALE, Claim, Tuning, declared, read_claim, verdict, write_results
from loopwise.study.pool import Job, by_arm, run_all
from loopwise.study.scoring import RunResult, score_run
from loopwise.study.stats import Interval
from loopwise.train.config import RunConfig
from loopwise.train.estimate import estimate_run
from loopwise.train.run import Run

RUNS = Path("runs") / "study"
_TUNING_ROWS = 64  # test rows score a tuning run too, but nothing reads them


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an experiment found.

    Attributes:
        interval: the effect with its limits, as the claim's statistic says.
        control_held: whether the positive control was seen.
        control: what was seen of it, in words with numbers.
        scores: arm -> a score per seed, those that the effect is made of.
        metric: what these scores are.
        panels: the picture.
        details: further numbers for readers, JSON values.
    """

    interval: Interval
    control_held: bool
    control: str
    scores: Mapping[str, Sequence[float]]
    metric: str = "exact accuracy"
    panels: Sequence[Panel] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim with the functions of its experiment."""

    folder: Path
    scale: str
    claim: Claim
    arms: dict[str, RunConfig]
    measure: Callable[[dict[str, list[RunResult]]], Effect]

    @classmethod
    def read(cls, folder: Path | str, scale: str = SCALE) -> Experiment:
        """The experiment in a folder, at one of its sizes.

        Raises:
            ValueError: the declaration or the experiment is wrong, or they do not have the same arms.
        """
        folder = Path(folder)
        claim = read_claim(folder).at(scale)
        path = folder / EXPERIMENT
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        try:
            module = runpy.run_path(str(path))
            arms = module["arms"](scale)
            measure = module["measure"]
        except KeyError as error:
            raise ValueError(f"{path} must define the functions arms(scale) and measure(runs), not {error}") from None
        except Exception as error:  # whatever the file raises
            raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        if list(arms) != list(claim.arms):
            raise ValueError(f"{path} has the arms {list(arms)}, the declaration {list(claim.arms)}")
        for name, config in arms.items():
            if not isinstance(config, RunConfig):
                raise ValueError(f"{path}: arm {name!r} is {type(config).__name__}, not a RunConfig")
        return cls(folder=folder, scale=scale, claim=claim, arms=arms, measure=measure)

    def jobs(self, lrs: Mapping[str, float]) -> list[Job]:
        """All runs that decide, seed by seed so that an early look compares like with like."""
        rows = self.claim.rows
        return [
            Job(name=name, config=_with(config, seed, lrs.get(name)), rows=rows)
            for seed in self.claim.seeds
            for name, config in self.arms.items()
        ]


def carry_out(experiment: Experiment, *, runs: Path = RUNS, num_workers: int = 1, nice: int = 0) -> dict[str, Any]:
    """Run everything, and write the results and the picture beside the declaration; return the results.

    Raises:
        ValueError: a run failed, or the declaration or the experiment was changed while it ran.
    """
    claim, before = experiment.claim, declared(experiment.folder)
    options: dict[str, Any] = {"num_workers": num_workers, "nice": nice}
    lrs, tuning, spent = tune(experiment.arms, claim.tuning, runs, **options)
    found = run_all(experiment.jobs(lrs), runs, **options)
    grouped = by_arm(found)
    effect = experiment.measure(grouped)
    if declared(experiment.folder) != before:
        raise ValueError(f"{experiment.folder}: the declaration or the experiment changed while it ran: run it again")
    seconds = {result.folder: result.scores["core_seconds"] for result in (*found, *spent)}
    results = {
        "claim": claim.claim,
        "verdict": verdict(claim, effect.interval, effect.control_held),
        "effect": effect.interval.estimate,
        "interval": [effect.interval.low, effect.interval.high],
        "margin": claim.margin,
        "seeds": list(claim.seeds),
        "metric": effect.metric,
        "arms": [_arm(name, results, effect.scores[name]) for name, results in grouped.items()],
        "control": {"name": claim.control, "held": effect.control_held, "seen": effect.control},
        "published": vars(claim.published),
        "tuning": tuning,
        "details": dict(effect.details),
        "scale": experiment.scale,
        "core_minutes": round(sum(seconds.values()) / 60, 1),
        "command": command(experiment, num_workers),
        "versions": versions(),
        "declared": before,
    }
    write_results(experiment.folder, results, experiment.scale)
    if effect.panels:
        draw_panels(effect.panels, picture_path(experiment.folder, experiment.scale), title=claim.name)
    return results


def tune(
    arms: Mapping[str, RunConfig], tuning: Tuning | None, runs: Path, **options: Any
) -> tuple[dict[str, float], list[dict[str, Any]], list[RunResult]]:
    """Choose the learning rate of every arm by its validation score, averaged over the tuning seeds.

    Args:
        arms: their configs.
        tuning: what is tried; None tries nothing.
        runs: folder of run folders.
        options: for `run_all`.

    Returns:
        Chosen rate per arm; a record per arm: name, what was tried, the score of each, what was chosen; and the runs.
    """
    if tuning is None:
        return {}, [], []
    own = {name: config for name, config in arms.items() if name not in tuning.share}
    keys = [(name, lr, seed) for name in own for lr in tuning.lrs for seed in tuning.seeds]
    jobs = [
        Job(name=f"{name}, lr {lr:g}", config=_with(_short(own[name], tuning.steps), seed, lr), rows=_TUNING_ROWS)
        for name, lr, seed in keys
    ]
    found = dict(zip(keys, run_all(jobs, runs, **options), strict=True))
    chosen, records = {}, []
    for name in own:
        scores = [
            sum(_validation(found[name, lr, seed], tuning.metric) for seed in tuning.seeds) / len(tuning.seeds)
            for lr in tuning.lrs
        ]
        losses = [score if tuning.metric == "loss" else -score for score in scores]
        best = min(range(len(losses)), key=lambda index: losses[index])
        chosen[name] = tuning.lrs[best]
        # The best of a range that ends there may lie outside it.
        at_end = len(losses) > 1 and tuning.lrs[best] in (min(tuning.lrs), max(tuning.lrs))
        tried = {"lrs": list(tuning.lrs), "scores": scores, "chosen": chosen[name], "at_end": at_end}
        records.append({"arm": name, "metric": tuning.metric, "seeds": list(tuning.seeds)} | tried)
    for name, giver in tuning.share.items():
        chosen[name] = chosen[giver]
        records.append({"arm": name, "shares": giver, "chosen": chosen[name]})
    return chosen, records, list(found.values())


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """Processor seconds of one arm: of a training run, of scoring it, and how many runs there will be."""

    name: str
    train_seconds: float
    score_seconds: float
    num_runs: int
    num_tuning_runs: float

    @property
    def core_minutes(self) -> float:
        """Of all runs of the arm; a shorter tuning run counts as the part of a run that it is."""
        runs = self.train_seconds * (self.num_runs + self.num_tuning_runs) + self.score_seconds * self.num_runs
        return runs / 60


def pilot(experiment: Experiment, steps: int = 4) -> list[Pilot]:
    """Train a few steps of every arm and extend their time by FLOPs to all runs."""
    import torch

    torch.set_num_threads(1)
    claim, tuning = experiment.claim, experiment.claim.tuning
    found = []
    for name, config in experiment.arms.items():
        run = Run(_with(config, claim.seeds[0], None), None)
        taken = iter(run.train(min(steps + 1, config.num_steps)))
        next(taken)  # the first step warms up
        flops, began = run.carry.flops, time.process_time()
        for _ in taken:
            pass
        per_flop = (time.process_time() - began) / max(run.carry.flops - flops, 1.0)
        rows = min(claim.rows, config.micro_batch or config.batch_size)
        began = time.process_time()
        score_run(run, rows=rows, loops=config.evaluation.loops)
        scoring = (time.process_time() - began) / rows
        every = config.evaluation.every
        evaluations = 1 + (config.num_steps // every if every else 0)
        tuned = 0.0
        if tuning is not None and name not in tuning.share:
            share = 1.0 if tuning.steps is None else tuning.steps / config.num_steps
            tuned = len(tuning.lrs) * len(tuning.seeds) * share
        total = estimate_run(config, flops_per_second=1.0).flops
        found.append(
            Pilot(
                name=name,
                train_seconds=per_flop * total + scoring * evaluations * config.evaluation.rows,
                score_seconds=scoring * claim.rows,
                num_runs=len(claim.seeds),
                num_tuning_runs=tuned,
            )
        )
    return found


def picture_path(folder: Path, scale: str = SCALE) -> Path:
    """Where the picture of the results is."""
    return folder / ("results.png" if scale == SCALE else f"results.{scale}.png")


def command(experiment: Experiment, num_workers: int) -> str:
    """What to type to get the results again."""
    words = ["python", "-m", "loopwise.study", f"claims/{experiment.claim.name}", "--jobs", str(num_workers)]
    return shlex.join(words + ([] if experiment.scale == SCALE else ["--scale", experiment.scale]))


def versions() -> dict[str, str]:
    """What results depend on."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"loopwise": __version__, "python": platform.python_version()} | packages


def _with(config: RunConfig, seed: int, lr: float | None) -> RunConfig:
    optimizer = config.optimizer if lr is None else replace(config.optimizer, lr=lr)
    return replace(config, seed=seed, optimizer=optimizer)


def _short(config: RunConfig, steps: int | None) -> RunConfig:
    if steps is None:
        return config
    if config.stages:
        raise ValueError("tuning.steps cannot shorten a run of several stages: leave it out")
    return replace(config, steps=steps)


def _validation(result: RunResult, metric: str) -> float:
    """Score on validation rows after the last step; the worst there is where the run has diverged."""
    if result.has_diverged:
        return math.inf if metric == "loss" else -math.inf
    return result.curve(f"eval/{metric}")[-1][2]


def _arm(name: str, results: Sequence[RunResult], scores: Sequence[float]) -> dict[str, Any]:
    """How an arm stands in the results; FLOPs are the mean over its seeds."""
    first = results[0]
    return {
        "name": name,
        "params": first.params,
        "params_unrolled": first.scores["parameters"]["unrolled"],
        "flops": sum(result.flops for result in results) / len(results),
        "steps": first.config.num_steps,
        "lr": first.config.optimizer.lr,
        "scores": [float(score) for score in scores],
        "diverged": [result.seed for result in results if result.has_diverged],
    }
