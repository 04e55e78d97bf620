"""What learns in a run, without files: the model with its optimizer and averages, its edits, and one step.

All that a step reads is a function of the config, of the step's number and of what checkpoints hold: parameters,
moments, averaged weights and the `Carry` (step and data cursor). Random states and dropout are seeded by (seed, step,
first row), so nothing of torch's global generators is part of the state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.plan import Plan
from loopwise.train.batch import Batch
from loopwise.train.config import RunConfig
from loopwise.train.data.source import Source
from loopwise.train.evaluate import evaluate
from loopwise.train.growth import Built, build, check_stages, edits_of, grown, grown_averages, last_edit, rebuild_terms
from loopwise.train.ledger import Ledger
from loopwise.train.moments import begin_with, move_moments
from loopwise.train.objectives import build_terms, compute_loss
from loopwise.train.optim import Ema, clip_gradients, trainable
from loopwise.train.parallel import (
    checkpoint_loops,
    compile_blocks,
    finish_backward,
    replicate,
    reshard,
    shard,
    without_sync,
)
from loopwise.train.stages import lr_factor, plan_text, set_plan, set_trainable
from loopwise.train.steps import fingerprint, key, mean_iterations, of_rows, seed_dropout
from loopwise.train.tensors import like, weights, whole
from loopwise.train.world import World


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
        flops_full: what the final model would have spent on the same tokens.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    flops: float = 0.0
    flops_full: float = 0.0


class Learner:
    """The model of a run and everything that a step changes.

    Args:
        config: what to do.
        source: its data.
        world: this process among those of the run.
        stage: as whose beginning to build the model; -1 is the model as it comes, before an edit of the first stage.

    Raises:
        ValueError: a config that does not fit together.
    """

    def __init__(self, config: RunConfig, source: Source, world: World, stage: int):
        self.config = config
        self.source = source
        self.world = world
        self.carry = Carry()
        self.last_good: Path | None = None
        self._build(stage)

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

    def _build(self, stage: int) -> None:
        """The model and its optimizer, as they are at the beginning of a stage."""
        config, edited = self.config, last_edit(self.config, stage)
        built, final = build(config, self.source.vocab_size, -1), None
        if config.grows:  # tried on a model of its own, since the run's may begin at a later stage
            final = check_stages(config, built.model, built.rules).to("meta")
            built = build(config, self.source.vocab_size, edited)
        self._adopt(built)
        if not config.grows:
            check_stages(config, self.model, built.rules)
        self.ledger = Ledger(config, final)
        self.terms = build_terms(self.model, config.terms)
        self.stage = edited
        for index in range(edited, stage + 1):
            if index >= 0:
                self._enter(index)

    def _adopt(self, built: Built) -> None:
        """Make a plain model that of the run: on its device, compiled, shared among the ranks, with an optimizer."""
        config = self.config
        model = built.model if config.adapters is None else config.adapters.build(built.model, seed=config.seed)
        self.model: Any = model.to(self.world.device)
        if config.checkpoint_loops:
            checkpoint_loops(self.model)
        if config.compile:
            compile_blocks(self.model)
        if self.world.size > 1:
            (shard if config.parallel == "fsdp" else replicate)(self.model)
        self.parameters = trainable(self.model)
        self.optimizer = config.optimizer.build(
            self.parameters, {name: rule for name, rule in built.rules.items() if name in self.parameters}
        )
        self.ema = None if config.ema is None else Ema(self.parameters, decay=config.ema)

    def begin_stage(self, index: int) -> dict[str, Any]:
        """Go on to the next stage; where it edits the model, "growth" says what that did."""
        stage = self.config.all_stages[index]
        if not stage.edit:
            self._enter(index)
            return {}
        before = self._probe()
        self._grow(index)
        self._enter(index)
        after = self._probe()
        return {
            "growth": {
                "edit": edits_of(stage),
                "plan_before": before["plan"],
                "plan": after["plan"],
                "loss_before": before["loss"],
                "loss_after": after["loss"],
                "loss_jump": after["loss"] - before["loss"],
                "parameters_before": before["parameters"],
                "parameters_after": after["parameters"],
            }
        }

    def _probe(self) -> dict[str, Any]:
        """Loss on the first held-out rows, plan and parameters of the model as it is."""
        rows = min(self.config.evaluation.rows, self.config.micro_batch or self.config.batch_size)
        values, _ = evaluate(self.model, iter([self.source.held_out(0, rows)]), precision=self.config.precision)
        reshard(self.model)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"loss": values["loss"], "plan": plan_text(self.model), "parameters": parameters}

    def _grow(self, index: int) -> None:
        """Edit the model at the beginning of a stage; moments and averages go along."""
        config, size = self.config, self.source.vocab_size
        values, state = whole(weights(self.model)), whole(self.optimizer.state())
        averages = None if self.ema is None else whole(self.ema.state())
        del self.model, self.parameters, self.optimizer, self.ema
        if config.compile:
            torch._dynamo.reset()
        built = grown(config, size, index, values)
        averages = None if averages is None else grown_averages(config, size, index, values, averages)
        self._adopt(built)
        self.terms = rebuild_terms(self.model, config, self.terms)
        for origins in built.moves:
            state = move_moments(state, origins, config.all_stages[index].moments)
        own = self.optimizer.state()
        self.optimizer.load_state(like(begin_with(state, own), own))
        if averages is not None:
            self._load_averages(averages)

    def _load_averages(self, averages: dict[str, torch.Tensor]) -> None:
        assert self.ema is not None
        own = self.ema.state()
        self.ema.load_state(like({name: averages[name] for name in own}, own))

    def _enter(self, index: int) -> None:
        """The plan of a stage, and what it trains."""
        stage = self.config.all_stages[index]
        self.stage = index
        if stage.plan is not None:
            set_plan(self.model, Plan.parse(stage.plan))
        set_trainable(self.parameters, stage.trainable)

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its values."""
        config, carry, began = self.config, self.carry, time.perf_counter()
        stage = config.all_stages[self.stage]
        num_rows = stage.batch_size or config.batch_size
        first, size = self.world.share(num_rows)
        batch = self.source.batch(carry.cursor + first, size)
        count = self.ledger.count(self.stage, carry.step, num_rows)
        (num_items,) = self.world.sum(batch.num_items)
        self.optimizer.zero_grad()
        totals = self._gradients(batch, count, first, num_items)
        norm = float(clip_gradients(self.parameters.values(), math.inf if config.clip is None else config.clip))
        if not math.isfinite(totals["loss"]) or not math.isfinite(norm):
            raise TrainingError(self._diverged(batch, totals["loss"], norm))
        factor = lr_factor(config, carry.step)
        self.optimizer.step(factor)
        if self.ema is not None:
            self.ema.update(carry.step)
        tokens, iterations = batch.num_tokens * self.world.size, mean_iterations(count, self.model)
        context = batch.num_tokens // batch.num_rows
        flops, full = (
            tokens * each for each in self.ledger.per_token(self.model, self.stage, carry.step, num_rows, context)
        )
        carry.step, carry.cursor = carry.step + 1, carry.cursor + num_rows
        carry.tokens, carry.flops, carry.flops_full = (
            carry.tokens + tokens,
            carry.flops + flops,
            carry.flops_full + full,
        )
        seconds = time.perf_counter() - began
        return (
            {"step": carry.step, "stage": self.stage, "iterations": iterations}
            | totals
            | {
                "lr": config.optimizer.lr * factor,
                "grad_norm": norm,
                "tokens": carry.tokens,
                "flops": carry.flops,
                "flops_full": carry.flops_full,
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

    def _diverged(self, batch: Batch, loss: float, norm: float) -> str:
        good = (
            "there is no checkpoint yet" if self.last_good is None else f"the last good checkpoint is {self.last_good}"
        )
        return (
            f"step {self.carry.step + 1}: loss {loss:g}, gradient norm {norm:g} on batch {fingerprint(batch)} "
            f"(rows from {self.carry.cursor}); {good}; lower optimizer.lr or clip"
        )
