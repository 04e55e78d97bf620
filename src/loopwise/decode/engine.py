"""Continuous batching over depth: requests at different iterations of the shared core run in one batch.

    engine = Engine(model, max_requests=8, capacity=512)
    engine.submit(Request(prompt=[1, 5, 9], max_new_tokens=32))
    while engine.has_work:
        for event in engine.step():
            ...

Because all iterations of a loop have the same weights, rows need not be at the same one: a tick runs one rung for every
row in the core, whichever rung that is for it (Relaxed Recursive Transformers, 2410.20672; MoR, 2507.10524). Rows that
are done leave through the coda and are replaced. What a request gets is what it would get alone: no row sees another,
and each has its own generator, loops and halting rule.

Three modes; `Engine.mode` says which, `Engine.reason` why it is not the first:

| mode | for | a batch is |
|---|---|---|
| depth-wise | loops whose iterations share weights and arguments | rows at any iteration |
| plain | others that can be taken apart: no loop, offsets per visit, loops told the time | rows at the same rung |
| generate | the rest: recurrent layers, routers, streams and others | one request, by the model's own `generate` |

Shapes: B slots, b rows of a call, t tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loopwise.decode.batch import Batch
from loopwise.decode.generated import Generated
from loopwise.decode.request import Event, Request, check_fits
from loopwise.decode.result import next_span
from loopwise.decode.rules import StorePolicy
from loopwise.decode.runner import Runner, try_out
from loopwise.decode.scheduler import DepthWiseExchange, Row, Scheduler, TogetherExchange
from loopwise.loop.config import Component
from loopwise.loop.window import main_loop
from loopwise.models.attach import plan_of
from loopwise.plan.nodes import Loop

MODES = ("depth-wise", "plain", "sequence", "generate")


class Engine:
    """A batching engine: single-threaded, one `step` is one tick.

    Args:
        model: a causal language model of transformers, attached or not, or our own. It is put into evaluation mode.
        max_requests: slots, that is how many requests run at a time; the others wait.
        capacity: tokens of a slot, prompt and answer together.
        cache: how depth is stored, see `StorePolicy`; pairs such as own/last are not for batches.
        halting: the rule of requests that name none, or its text; None for every iteration.
        loops: iterations of requests that name none; None for the plan's.
        max_loops: the most that a request may ask for; None for `loops`.
        prefill_chunk: the most tokens of prompts that one tick computes, so that a long prompt holds nobody up.
        exits: for a model without a loop, numbers of visits after which depth may end; None for every visit where
            `halting` is given and for none where not.
        gather: see `DepthWiseExchange`.
        mode: None for the best that the model allows, or one of MODES. "sequence" is "plain" with halted rows
            computed along until the slowest row of the batch has its token: what sequence-level batching does.

    Attributes:
        mode: how it batches.
        reason: why not depth-wise; empty where it does.
        max_loops: the most iterations of a request; 0 for a model without a loop.

    Raises:
        ValueError: sizes, a rule or a mode that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_requests: int = 8,
        capacity: int = 512,
        cache: StorePolicy | str = "own",
        halting: Component | str | None = None,
        loops: int | None = None,
        max_loops: int | None = None,
        prefill_chunk: int = 64,
        exits: Sequence[int] | None = None,
        gather: float | None = None,
        mode: str | None = None,
    ):
        for name, value in (("max_requests", max_requests), ("capacity", capacity), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name} {value}: at least 1")
        if mode not in (None, *MODES):
            raise ValueError(f"mode {mode!r}: use {', '.join(MODES)}, or none for the best that the model allows")
        self.capacity, self.max_requests = capacity, max_requests
        self.vocabulary: int = _vocabulary(model)
        count = _count_of(model)
        self.loops = loops if loops is not None else count
        self.max_loops = max_loops if max_loops is not None else self.loops
        _check_loops(count, loops, self.loops, self.max_loops)
        self._next_id = 0
        self._events: list[Event] = []
        self.halting = halting
        policy = StorePolicy.parse(cache) if isinstance(cache, str) else cache
        if not count and exits is None and halting is None:
            exits = []
        runner, self.mode, self.reason = self._prepared(model, policy, mode, None if count else exits)
        self._worker: Any
        if runner is None:
            self._worker = Generated(model)
            if halting is not None:
                raise ValueError(f"halting {halting}: {self.reason}")
        else:
            exchange: Any = TogetherExchange()
            if self.mode == "depth-wise":
                ladder = runner.ladder
                cost = (len(ladder.head) + len(ladder.tail) + 3) / (len(ladder.rungs[0]) + 1)
                exchange = DepthWiseExchange(cost, self.loops, gather)
            scheduler = Scheduler(max_requests, exchange)
            self._worker = Batch(
                runner,
                scheduler,
                prefill_chunk=prefill_chunk,
                mixes_rungs=self.mode == "depth-wise",
                runs_halted=self.mode == "sequence",
            )
            self._rule(halting)

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do or to tell."""
        return bool(self._events) or self._worker.has_work

    def submit(self, request: Request) -> int:
        """Take a request in; returns the number that its events carry.

        Raises:
            ValueError: it does not fit the engine; nothing is taken in.
        """
        check_fits(
            request,
            capacity=self.capacity,
            vocabulary=self.vocabulary,
            max_loops=self.max_loops,
            has_loop=self.max_loops > 0,
        )
        rule = self._rule(request.halting if request.halting is not None else self.halting)
        count = request.loops or self.loops or self._worker.num_rungs
        row = Row(id=self._next_id, request=request, count=count, rule=rule)
        self._next_id += 1
        self._worker.submit(row)
        return row.id

    def cancel(self, request_id: int) -> bool:
        """End a request at once and free its slot; the next step tells it. False where it is over or unknown."""
        if not self._worker.cancel(request_id):
            return False
        self._events.append(Event(request_id, None, 0, "cancelled"))
        return True

    def step(self) -> list[Event]:
        """Run one tick; returns what came out, each request's tokens in order."""
        events, self._events = self._events, []
        if self._worker.has_work:
            with torch.no_grad():
                events += self._worker.tick()
        return events

    def stats(self) -> dict[str, Any]:
        """What was done so far.

        `executed_row_iterations` counts rows in runs of the core, `useful_row_iterations` those of them that a live
        request needed; `occupancy` is the mean share of slots that were in the core; `bound` is what depth-wise
        batching can gain at most over token-by-token batching, mean of the deepest row over the mean depth.
        """
        return {
            "mode": self.mode,
            "max_requests": self.max_requests,
            "capacity": self.capacity,
            **self._worker.stats(),
        }

    def _prepared(
        self, model: nn.Module, policy: StorePolicy, mode: str | None, exits: Sequence[int] | None
    ) -> tuple[Runner | None, str, str]:
        """A runner for the model, the mode and why it is not depth-wise."""
        if mode == "generate":
            return None, "generate", "asked for"
        try:
            try_out(model)
        except ValueError as error:
            if mode is not None:
                raise ValueError(f"mode {mode!r} is not for this model: {error}") from None
            return None, "generate", str(error)
        _refuse_cache(policy)
        runner = Runner(
            model,
            num_rows=self.max_requests,
            capacity=self.capacity,
            loops=self.max_loops or None,
            exits=exits,
            cache=policy,
        )
        _try_last_position(runner)
        reason = _why_not_mixed(runner)
        if mode == "depth-wise" and reason:
            raise ValueError(f"mode 'depth-wise' is not for this model: {reason}")
        if mode in ("plain", "sequence"):
            return runner, mode, "asked for"
        return runner, "plain" if reason else "depth-wise", reason

    def _rule(self, halting: Component | str | None) -> Component | None:
        """The halting rule of a request."""
        if halting is None:
            return None
        return self._worker.rule(halting)


class SequenceEngine(Engine):
    """Sequence-level batching with compaction of the same model, to compare with.

    All rows of the batch go through each token in lockstep, as deep as the deepest of them; a row that halted is
    computed along until then, and sequences that ended are replaced between tokens.

    Args:
        model: see `Engine`, as all other arguments.
    """

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__(model, mode="sequence", **options)


def _count_of(model: nn.Module) -> int:
    """Iterations of the main loop; 0 without one."""
    plan = plan_of(model)
    if plan is None or not any(isinstance(node, Loop) for node in plan.nodes):
        return 0
    try:
        return main_loop(plan)[1].count
    except ValueError:
        return 0


def _check_loops(count: int, asked: int | None, loops: int, max_loops: int) -> None:
    if not count and (asked is not None or max_loops):
        raise ValueError("this model has no loop whose iterations could be chosen: leave loops and max_loops out")
    if count and loops < 1:
        raise ValueError(f"loops {loops}: at least 1")
    if count and max_loops < loops:
        raise ValueError(f"max_loops {max_loops} is below loops {loops}")


def _vocabulary(model: Any) -> int:
    """How many token ids there are; ValueError for a model that writes no text."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if weight is None or not hasattr(model, "generate") or not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not write text token by token: an engine needs a causal model")
    return int(weight.shape[0])


def _refuse_cache(policy: StorePolicy) -> None:
    if policy.prefill != policy.decode:
        raise ValueError(
            f"cache policy {policy} changes after the prompt, and rows of a batch end theirs at other times: use own, "
            f"last, first, ring(k) or stride(k)"
        )


def _try_last_position(runner: Runner) -> None:
    """Refuse a capacity over a table of positions; a look-up that fails on an accelerator would end the process."""
    last = runner.capacity - 1
    if runner.device.type != "cpu":
        return
    try:
        with torch.no_grad():
            runner.enter(next_span([0], [0], [last], runner.device))
    except IndexError:
        raise ValueError(f"capacity {runner.capacity}: this model has no position {last}") from None


def _why_not_mixed(runner: Runner) -> str:
    """Why rows at different rungs cannot run in one call; empty where they can."""
    if runner.ladder.loop is None:
        return "it has no loop: every layer has weights of its own"
    if runner.looping.relaxed:
        return "its iterations have offsets of their own"
    if not runner.mixes:
        return "its loop is told the time, so that iterations differ"
    return ""
