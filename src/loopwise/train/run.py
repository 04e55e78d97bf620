"""A training run in a folder: the loop over steps, and everything that lets it stop and go on bit for bit.

All that a step reads is a function of the config, of the step's number and of what checkpoints hold: parameters,
moments, averaged weights and the `Carry` (step and data cursor). Random states and dropout are seeded by (seed, step,
first row), so nothing of torch's global generators is part of the state.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopwise.io.atomic import write_text
from loopwise.loop import config as components
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.measure import cost_of
from loopwise.models.attach import plan_of
from loopwise.plots.curves import draw_run
from loopwise.train import checkpoints
from loopwise.train.batch import Batch
from loopwise.train.config import RunConfig, Stage, read_config, write_config
from loopwise.train.data.source import Source, check_fingerprint
from loopwise.train.evaluate import evaluate
from loopwise.train.metrics import Metrics, read_metrics
from loopwise.train.objectives import build_terms, compute_loss
from loopwise.train.optim import Ema, clip_gradients, trainable
from loopwise.train.output import sample, write_model
from loopwise.train.parallel import (
    checkpoint_loops,
    compile_blocks,
    finish_backward,
    replicate,
    reshard,
    shard,
    without_sync,
)
from loopwise.train.stages import check_stages, enter, plan_text
from loopwise.train.world import World

CONFIG, METRICS, CHECKPOINTS, SAMPLES, PLOTS, MODEL = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "plots",
    "model",
)


class TrainingError(ValueError):
    """A run that cannot go on, such as one whose loss is no number."""


@dataclass(kw_only=True)
class Carry:
    """Where a run stands, besides its tensors.

    Attributes:
        step: optimizer steps done.
        cursor: rows of the data consumed.
        tokens: tokens read so far, over all ranks.
        flops: FLOPs spent so far.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    flops: float = 0.0


class Run:
    """A run.

    Args:
        config: what to do.
        folder: the run folder, created if absent; None keeps everything in memory (no files, nothing to resume).
        world: this process among those of the run; None joins those of torchrun.

    Raises:
        ValueError: a config that does not fit together, a folder with another run, or data other than before.
    """

    def __init__(self, config: RunConfig, folder: Path | str | None, *, world: World | None = None):
        self.config = config
        self.folder = None if folder is None else Path(folder)
        self.world = world or World.join()
        self.carry = Carry()
        for stage in config.all_stages:
            self.world.share(stage.batch_size or config.batch_size)
        self.source: Source = config.data.open(seed=config.seed)
        found = self._last_checkpoint()
        self._build(config.stage_at(checkpoints.read_meta(found)["step"] if found else 0)[0])
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
        self._flops_of: dict[tuple[str, int | None, int], float] = {}
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
            if index != self.stage:
                self._enter(index)
            values = self._step()
            step = self.carry.step
            if step in (1, end) or step % self.config.log_every == 0:
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

    def held_out(self, rows: int, split: str = "valid") -> Iterator[Batch]:
        """Held-out rows in pieces of the size of a step's."""
        size = self.config.micro_batch or self.config.batch_size
        for first in range(0, rows, size):
            yield self.source.held_out(first, min(size, rows - first), split)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its averaged weights inside, where there are any."""
        with nullcontext() if self.ema is None else self.ema.swapped():
            try:
                yield
            finally:
                reshard(self.model)  # what was gathered inside are the averages

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint holds, by name; the tensors themselves."""
        state = {f"model/{name}": tensor for name, tensor in weights(self.model).items()}
        state |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state().items()}
        averages = {} if self.ema is None else self.ema.state()
        return state | {f"ema/{name}": tensor for name, tensor in averages.items()}

    def save(self) -> Path | None:
        """Write a checkpoint of this step, unless there is one or the run has no folder."""
        if self.folder is None:
            return None
        saving = self.config.saving
        meta = vars(self.carry) | {"plan": plan_text(self.model), "fingerprint": self.source.fingerprint}
        self.last_good = checkpoints.save(
            self.folder / CHECKPOINTS,
            self.carry.step,
            self.tensors(),
            meta,
            keep_last=saving.keep,
            keep_every=saving.keep_every or None,
        )
        return self.last_good

    def _last_checkpoint(self) -> Path | None:
        """Check that the folder is free or this run's, and return its last complete checkpoint."""
        if self.folder is None:
            return None
        path = self.folder / CONFIG
        if path.is_file() and read_config(path) != self.config:
            raise ValueError(f"{self.folder} holds another run: choose a new folder, or open that run")
        self.world.barrier()
        if self.world.is_first:
            checkpoints.clean(self.folder / CHECKPOINTS)
        found = checkpoints.latest(self.folder / CHECKPOINTS)
        if found is not None:
            check_fingerprint(self.source, checkpoints.read_meta(found)["fingerprint"])
        self.world.barrier()
        return found

    def _claim_folder(self) -> None:
        """Make the folder this run's, once everything that may be refused has been built."""
        if self.folder is not None and self.world.is_first and not (self.folder / CONFIG).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, self.folder / CONFIG)
        self.world.barrier()

    def _build(self, stage: int) -> None:
        """The model and its optimizer, as they are at the beginning of a stage."""
        config = self.config
        model, rules = config.model.build(
            self.source.vocab_size, seed=config.seed, parametrisation=config.parametrisation
        )
        if config.adapters is not None:
            model = config.adapters.build(model, seed=config.seed)
        self.model: Any = model.to(self.world.device)
        if config.checkpoint_loops:
            checkpoint_loops(self.model)
        if config.compile:
            compile_blocks(self.model)
        if self.world.size > 1:
            (shard if config.parallel == "fsdp" else replicate)(self.model)
        self.terms = build_terms(self.model, config.terms)
        self.parameters = trainable(self.model)
        check_stages(self.model, config.all_stages, self.parameters)
        self.optimizer = config.optimizer.build(
            self.parameters, {name: rule for name, rule in rules.items() if name in self.parameters}
        )
        self.ema = None if config.ema is None else Ema(self.parameters, decay=config.ema)
        for index in range(stage + 1):
            self._enter(index)
        plan = plan_of(self.model)
        assert plan is not None
        for count in config.evaluation.loops:
            plan.with_loops(count)  # refused now, not at the first evaluation

    def _enter(self, index: int) -> None:
        self.stage = index
        enter(self.model, self.config.all_stages[index], self.parameters)

    def _restore(self, path: Path) -> None:
        meta = checkpoints.load(path, self.tensors())
        self.carry = Carry(**{field.name: meta[field.name] for field in fields(Carry)})

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its values."""
        config, carry, began = self.config, self.carry, time.perf_counter()
        stage = config.all_stages[self.stage]
        num_rows = stage.batch_size or config.batch_size
        first, size = self.world.share(num_rows)
        batch = self.source.batch(carry.cursor + first, size)
        count = self._count(stage, num_rows)
        (num_items,) = self.world.sum(batch.num_items)
        self.optimizer.zero_grad()
        totals = self._gradients(batch, count, first, num_items)
        norm = float(clip_gradients(self.parameters.values(), math.inf if config.clip is None else config.clip))
        if not math.isfinite(totals["loss"]) or not math.isfinite(norm):
            raise TrainingError(self._diverged(batch, totals["loss"], norm))
        factor = self._factor(stage)
        self.optimizer.step(factor)
        if self.ema is not None:
            self.ema.update(carry.step)
        tokens, iterations = batch.num_tokens * self.world.size, mean_iterations(count, self.model)
        flops = self._flops_per_token(count, batch) * tokens
        carry.step, carry.cursor = carry.step + 1, carry.cursor + num_rows
        carry.tokens, carry.flops = carry.tokens + tokens, carry.flops + flops
        seconds = time.perf_counter() - began
        return (
            {"step": carry.step, "stage": self.stage, "iterations": iterations}
            | totals
            | {
                "lr": config.optimizer.lr * factor,
                "grad_norm": norm,
                "tokens": carry.tokens,
                "flops": carry.flops,
                "time": {"step": seconds, "tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds},
            }
        )

    def _gradients(
        self, batch: Batch, count: LoopCount | LoopCounts | None, first: int, num_items: float
    ) -> dict[str, float]:
        """Accumulate the gradient of the whole step, and return the sums of its losses over micro-batches and ranks.

        Args:
            batch: the rows of this rank.
            count: loop counts of the step, for all rows of all ranks.
            first: the first of this rank's rows within the step.
            num_items: predictions that are scored in the step, over all ranks.
        """
        config, stage = self.config, self.config.all_stages[self.stage]
        pieces = list(batch.micro(config.micro_batch or batch.num_rows))
        found: list[tuple[str, torch.Tensor | float]] = []
        for number, micro in enumerate(pieces):
            # Dropout is that of the step and the rows, whichever rank or micro-batch they are in.
            seed_dropout(key(config.seed, self.carry.step, first), self.world.device)
            is_last = number + 1 == len(pieces)
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss, stats = compute_loss(
                    self.model,
                    micro.to(self.world.device),
                    objective=stage.objective or config.objective,
                    terms=self.terms,
                    count=of_rows(count, first, micro.num_rows),
                    num_items=num_items,
                    seed=config.seed,
                    step=self.carry.step,
                    first_row=first,
                )
            with nullcontext() if is_last or self.world.size == 1 else without_sync(self.model):
                loss.backward()
            first += micro.num_rows
            found += stats.items()
        if self.world.size > 1:
            finish_backward(self.model)
        totals: dict[str, float] = {}
        for name, value in found:  # read when all is under way: reading waits for the device
            totals[name] = totals.get(name, 0.0) + float(value)
        return dict(zip(totals, self.world.sum(*totals.values()), strict=True))

    def _count(self, stage: Stage, num_rows: int) -> LoopCount | LoopCounts | None:
        depth = stage.depth or self.config.depth
        return None if depth is None else depth.sample(self.carry.step, seed=self.config.seed, batch=num_rows)

    def _factor(self, stage: Stage) -> float:
        """Factor on the learning rate of the next step."""
        if stage.schedule is None:
            return self.config.schedule.factor(self.carry.step, self.config.num_steps)
        first = self.config.stage_at(self.carry.step)[1]
        return stage.schedule.factor(self.carry.step - first, stage.steps)

    def _flops_per_token(self, count: LoopCount | LoopCounts | None, batch: Batch) -> float:
        if isinstance(count, LoopCounts):
            pairs = list(zip(count.total_B.tolist(), count.grad_B.tolist(), strict=True))
            return sum(self._flops(total, grad, batch) for total, grad in pairs) / len(pairs)
        return self._flops(None, None, batch) if count is None else self._flops(count.total, count.grad, batch)

    def _flops(self, total: int | None, grad: int | None, batch: Batch) -> float:
        plan = plan_of(self.model)
        assert plan is not None
        plan = plan if total is None else plan.with_loops(total)
        context = batch.num_tokens // batch.num_rows
        known = (str(plan), grad, context)
        if known not in self._flops_of:
            recompute = "loop" if self.config.checkpoint_loops and plan.loops else False
            grad = None if total is None or grad == total else grad
            cost = cost_of(self.model, plan, context=context, grad_iterations=grad, recompute=recompute)
            self._flops_of[known] = cost.training_flops_per_token
        return self._flops_of[known]

    def _record(self, values: Mapping[str, Any]) -> None:
        if self.metrics is None:
            return
        self.metrics.append(**values)
        for tracker in self.trackers:
            tracker.log(values["step"], values)

    def _diverged(self, batch: Batch, loss: float, norm: float) -> str:
        good = (
            "there is no checkpoint yet" if self.last_good is None else f"the last good checkpoint is {self.last_good}"
        )
        return (
            f"step {self.carry.step + 1}: loss {loss:g}, gradient norm {norm:g} on batch {fingerprint(batch)} "
            f"(rows from {self.carry.cursor}); {good}; lower optimizer.lr or clip"
        )

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


def key(*parts: int) -> int:
    """A seed that is a hash of some numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generators that layers on this device draw from.

    `torch.manual_seed` seeds all devices, and formats the stack for each that is not in use: a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def fingerprint(batch: Batch) -> str:
    """16 hexadecimal digits that stand for the contents of a batch."""
    tensors = (batch.tokens_BT, batch.targets_BT) if batch.points is None else (batch.points.xs_BNI, batch.points.ys_BN)
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        assert tensor is not None
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def of_rows(count: LoopCount | LoopCounts | None, first: int, size: int) -> LoopCount | LoopCounts | None:
    """The loop counts of some rows of a step."""
    if not isinstance(count, LoopCounts):
        return count
    return LoopCounts(no_grad_B=count.no_grad_B[first : first + size], grad_B=count.grad_B[first : first + size])


def mean_iterations(count: LoopCount | LoopCounts | None, model: nn.Module) -> float:
    """Mean number of iterations of the main loop in a step; 1 where the plan has no loop."""
    if isinstance(count, LoopCounts):
        return float(count.total_B.double().mean())
    if count is not None:
        return float(count.total)
    plan = plan_of(model)
    assert plan is not None
    return float(plan.counts.get("core") or next(iter(plan.counts.values()), 1))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found
