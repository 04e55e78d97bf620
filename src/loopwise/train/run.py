"""A training run in a folder: the loop over steps, and everything that lets it stop and go on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loopwise.io.atomic import write_text
from loopwise.loop import config as components
from loopwise.plots.curves import draw_run
from loopwise.train import checkpoints
from loopwise.train.config import RunConfig, read_config, write_config
from loopwise.train.data.source import Source, check_fingerprint
from loopwise.train.evaluate import evaluate
from loopwise.train.growth import edits_of
from loopwise.train.learner import Carry, Learner, TrainingError
from loopwise.train.metrics import Metrics, read_metrics
from loopwise.train.output import sample, write_model
from loopwise.train.stages import plan_text
from loopwise.train.world import World

__all__ = ["Carry", "Run", "TrainingError"]

CONFIG, METRICS, CHECKPOINTS, SAMPLES, PLOTS, MODEL = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "plots",
    "model",
)


class Run(Learner):
    """A run.

    Args:
        config: what to do.
        folder: the run folder, created if absent; None keeps everything in memory (no files, nothing to resume).
        world: this process among those of the run; None joins those of torchrun.

    Raises:
        ValueError: a config that does not fit together, a folder with another run, or data other than before.
    """

    def __init__(self, config: RunConfig, folder: Path | str | None, *, world: World | None = None):
        self.folder = None if folder is None else Path(folder)
        world = world or World.join()
        for stage in config.all_stages:
            world.share(stage.batch_size or config.batch_size)
        source = config.data.open(seed=config.seed)
        found = _last_checkpoint(self.folder, config, source, world)
        super().__init__(config, source, world, _stage_of(found, config))
        self.last_good = found
        if found:
            self._restore(found)
        self._claim_folder()
        self.metrics = Metrics(self.folder / METRICS) if self.folder and self.world.is_first else None
        if self.metrics is not None:
            self.metrics.rewind(self.carry.step)
        about = {"name": config.name, "config": components.to_dict(config), "step": self.carry.step}
        trackers = config.trackers if self.metrics else ()
        self.trackers = [item.open(folder=self._inside(""), **about) for item in trackers]
        self._stop = False

    @classmethod
    def open(cls, folder: Path | str, *, world: World | None = None) -> Run:
        """The run in a folder, where its last checkpoint left it.

        Raises:
            ValueError: no run there, or the data is not what it was.
        """
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise ValueError(f"{folder} is no run folder: it has no {CONFIG}")
        return cls(read_config(path), folder, world=world)

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.carry.step >= self.config.num_steps

    def stop(self) -> None:
        """Let `train` end after the step that runs, with a checkpoint."""
        self._stop = True

    def close(self) -> None:
        """Close files and trackers."""
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.trackers:
            tracker.close()

    def train(self, num_steps: int | None = None) -> Iterator[dict[str, Any]]:
        """Train on, and yield the values of every step after it is done.

        Args:
            num_steps: stop after so many steps of this call, with a checkpoint; None goes on to the end.

        Yields:
            What the metrics hold of a step: "step" (done so far), "loss" and more.

        Raises:
            TrainingError: the loss or the gradient is not finite.
            CheckpointError: a checkpoint could not be written.
        """
        end, saving = self.config.num_steps, self.config.saving
        limit = end if num_steps is None else min(end, self.carry.step + num_steps)
        while self.carry.step < limit and not self._stop:
            index = self.config.stage_at(self.carry.step)[0]
            growth = {}
            while self.stage < index:
                growth = self.begin_stage(self.stage + 1) or growth
            values = self.step() | growth
            step = self.carry.step
            if growth or step in (1, end) or step % self.config.log_every == 0:
                self._record(values)
            if step == end or is_due(step, self.config.evaluation.every):
                values |= self.evaluate()
            if step == end or is_due(step, saving.every):
                self.save()
            yield values
        self.save()
        if self.is_done:
            self._finish()

    def evaluate(self, rows: int | None = None, split: str = "valid") -> dict[str, float]:
        """Score held-out rows, write the scores to the metrics, and return them with "eval/" before their names.

        Scores at other loop counts than the plan's end in "@" and the count.
        """
        settings = self.config.evaluation
        values: dict[str, float] = {}
        with self.averaged():
            for loops in (None, *settings.loops):
                batches = self.held_out(rows or settings.rows, split)
                found, _ = evaluate(self.model, batches, loops, precision=self.config.precision)
                suffix = "" if loops is None else f"@{loops}"
                values |= {f"eval/{name}{suffix}": value for name, value in found.items()}
            if self.folder is not None and settings.samples:
                text = sample(self.model, self.source, settings.samples)  # every rank: sharded weights are gathered
            if self.folder is not None and settings.samples and self.world.is_first:
                write_text(self._inside(SAMPLES) / f"step-{self.carry.step:08d}.txt", text)
        self._record({"step": self.carry.step, **values})
        return values

    def save(self) -> Path | None:
        """Write a checkpoint of this step, unless there is one or the run has no folder."""
        if self.folder is None:
            return None
        saving = self.config.saving
        edits = [edits_of(stage) for stage in self.config.all_stages[: self.stage + 1]]
        about = {"stage": self.stage, "edits": edits, "plan": plan_text(self.model)}
        meta = vars(self.carry) | about | {"fingerprint": self.source.fingerprint}
        self.last_good = checkpoints.save(
            self.folder / CHECKPOINTS,
            self.carry.step,
            self.tensors(),
            meta,
            keep_last=saving.keep,
            keep_every=saving.keep_every or None,
        )
        return self.last_good

    def _claim_folder(self) -> None:
        """Make the folder this run's, once everything that may be refused has been built."""
        if self.folder is not None and self.world.is_first and not (self.folder / CONFIG).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, self.folder / CONFIG)
        self.world.barrier()

    def _restore(self, path: Path) -> None:
        meta = checkpoints.load(path, self.tensors())
        meta.setdefault("flops_full", meta["flops"])  # checkpoints of earlier versions
        self.carry = Carry(**{field.name: meta[field.name] for field in fields(Carry)})

    def _record(self, values: Mapping[str, Any]) -> None:
        if self.metrics is None:
            return
        self.metrics.append(**values)
        for tracker in self.trackers:
            tracker.log(values["step"], values)

    def _finish(self) -> None:
        """Write the trained model and the pictures."""
        if self.folder is None:
            return
        with self.averaged():
            write_model(self.model, self.source, self.folder / MODEL, is_first=self.world.is_first)
        if self.world.is_first:
            draw_run(read_metrics(self.folder / METRICS), self._inside(PLOTS), title=self.config.name)

    def _inside(self, name: str) -> Path:
        assert self.folder is not None
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def _last_checkpoint(folder: Path | None, config: RunConfig, source: Source, world: World) -> Path | None:
    """Check that a folder is free or this run's, and return its last complete checkpoint."""
    if folder is None:
        return None
    path = folder / CONFIG
    if path.is_file() and read_config(path) != config:
        raise ValueError(f"{folder} holds another run: choose a new folder, or open that run")
    world.barrier()
    if world.is_first:
        checkpoints.clean(folder / CHECKPOINTS)
    found = checkpoints.latest(folder / CHECKPOINTS)
    if found is not None:
        check_fingerprint(source, checkpoints.read_meta(found)["fingerprint"])
    world.barrier()
    return found


def _stage_of(path: Path | None, config: RunConfig) -> int:
    """The stage whose model a checkpoint holds; at the start -1 where the first stage begins with an edit."""
    if path is None:
        return -1 if config.all_stages[0].edit else 0
    meta = checkpoints.read_meta(path)
    return meta.get("stage", config.stage_at(meta["step"])[0])
