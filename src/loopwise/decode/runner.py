"""One model, taken apart: run the parts of its ladder on any tokens of any rows, at any depth.

Decoders need to stop between the visits of a plan, to go on with some tokens and not with others, and to put rows at
different iterations of a loop into one call. A `Runner` does that for every model that `attach` takes and for our own
decoder: each call is a forward of the model itself, in which a player runs only the visits that are asked for, on a
state that is handed in (see `models.playing`). Embeddings, rotary tables and the head stay the model's own.

    runner = Runner(model, num_rows=2, capacity=64)
    carry = runner.enter(span)
    for rung in range(runner.ladder.num_rungs):
        carry = runner.climb(span, carry, rung)
    logits_btV = runner.leave(span, carry)

Shapes: B rows of the cache, b rows and t tokens of a call, D width, V vocabulary, S capacity, R rungs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicLayer

import loopwise
from loopwise.cache.policy import CachePolicy
from loopwise.decode.cache import SlotCache, Span
from loopwise.decode.ladder import Ladder
from loopwise.decode.rules import SKIPPED, StorePolicy
from loopwise.loop.halting import FixedHalting
from loopwise.loop.passes import LoopModule
from loopwise.loop.state import NormalState, RowSeeds, make
from loopwise.models.hub import layer_list, new_cache, probe_inputs
from loopwise.models.loop_parts import NAME as LOOPS
from loopwise.models.playing import Frame, Looping, looping_of, owner_of
from loopwise.models.rerun import parameter_names
from loopwise.plan.nodes import Slot
from loopwise.plan.plans import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Carry:
    """What tokens have between two rungs.

    Attributes:
        state_btD: their state, floating `[b, t, D]`.
        injected_btD: what re-enters the loop, the same shape; None where nothing does.
    """

    state_btD: torch.Tensor
    injected_btD: torch.Tensor | None = None

    def take(self, index: torch.Tensor) -> Carry:
        """Some of the rows, by their place, int64 `[n]`."""
        injected = self.injected_btD
        return Carry(state_btD=self.state_btD[index], injected_btD=None if injected is None else injected[index])

    def put(self, index: torch.Tensor, part: Carry) -> Carry:
        """A copy in which some of the rows are those of `part`."""
        injected = self.injected_btD
        if injected is not None and part.injected_btD is not None:
            injected = injected.index_copy(0, index, part.injected_btD)
        return Carry(state_btD=self.state_btD.index_copy(0, index, part.state_btD), injected_btD=injected)


class Runner:
    """The parts of a model and the stores of its visits.

    Args:
        model: a causal language model of transformers, attached or not, or our own. It is put into evaluation mode.
        num_rows: B.
        capacity: S, how many tokens a row may have.
        loops: iteration counts that replace those of its plan.
        exits: see `Ladder.of`.
        cache: a `StorePolicy` or its text.
        seeds: one number per row, from which random first states are drawn, token by token; 0 for all if None.
        initial_state: first state of the loop in the place of its own, broadcastable to `[1, 1, D]`.

    Attributes:
        ladder: the parts.
        cache: the stores.
        depth_BS: how many rungs of each token are in the stores, int64 `[B, S + 1]`; kept for policies that read it.
        passes: sequential runs of rungs so far, whatever their width: the calls of the core that had to wait for each
            other.
        visits: visits of layers so far, summed over tokens.

    Raises:
        ValueError: the model cannot be taken apart, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_rows: int,
        capacity: int,
        loops: int | Mapping[str, int] | None = None,
        exits: Sequence[int] | None = None,
        cache: StorePolicy | str = "own",
        seeds: Sequence[int] | None = None,
        initial_state: torch.Tensor | None = None,
    ):
        if num_rows < 1 or capacity < 1:
            raise ValueError(f"num_rows {num_rows} and capacity {capacity} must be at least 1")
        self.model: Any = model
        looping = looping_of(model)
        if looping is None:
            loopwise.attach(model, Plan.identity(len(layer_list(model).layers)))
            looping = cast(Looping, looping_of(model))
        self.looping = looping
        self.owner: Any = owner_of(model, looping)
        plan = looping.plan if loops is None else looping.plan.with_loops(loops)
        self.ladder = Ladder.of(plan, exits)
        self.policy = StorePolicy.parse(cache) if isinstance(cache, str) else cache
        if not self.ladder.is_shared and self.policy.decode.kind != "own":
            raise ValueError(
                f"cache policy {self.policy} shares stores between iterations of a loop, the rungs of this model have "
                f"weights of their own: use {', '.join(SKIPPED)}"
            )
        self.module = self._loop_module(plan)
        model.eval()
        self.device = next(model.parameters()).device
        self.windows = self._windows()
        self._no_cache = new_cache(model)  # layers see views of the stores in its place, it stays empty
        refuse_unfit(model, looping)
        self.seeds = list(seeds) if seeds is not None else [0] * num_rows
        self.initial_state = initial_state
        self.capacity, self.num_rows = capacity, num_rows
        self.cache = SlotCache(num_rows, capacity, self.device)
        self.depth_BS = torch.zeros(num_rows, capacity + 1, dtype=torch.int64, device=self.device)
        self.passes = self.visits = 0
        self._sharing = self.policy.prefill
        name = getattr(self.model.config.get_text_config(decoder=True), "_attn_implementation", None)
        if name not in ("sdpa", "eager", None):
            raise ValueError(f"decoding by parts needs attention 'sdpa' or 'eager', this model has {name!r}")
        self._additive = name != "sdpa"
        if not looping.is_taken_apart:
            try_out(model)

    @property
    def mixes(self) -> bool:
        """True when rows at different rungs may run in one call: the rungs share their weights and arguments."""
        has_time = self.module is not None and self.module.conditioner is not None
        return self.ladder.is_shared and not has_time and not self.looping.relaxed

    @cached_property
    def num_places(self) -> int:
        """How many stores a visit of a rung has."""
        last = self.ladder.num_rungs - 1
        halves = (self.policy.prefill, self.policy.decode)
        return 1 + max(half.place(rung) for half in halves for rung in range(last + 1))

    def enter(self, span: Span) -> Carry:
        """Run the head for new tokens, and start their loop."""

        def script(frame: Frame) -> torch.Tensor:
            return self._visits(frame, span, self.ladder.head, frame.hidden)

        state_btD = self._call(span, script)
        if self.module is None:
            return Carry(state_btD=state_btD)
        entered_btD = self.module.entry(state_btD)
        return Carry(state_btD=self._first_state(span, entered_btD), injected_btD=entered_btD)

    def climb(self, span: Span, carry: Carry, rung: int | torch.Tensor, counts: int | torch.Tensor = 0) -> Carry:
        """Run one rung.

        Args:
            span: the tokens.
            carry: what they have.
            rung: its number, or one per row of the span, int64 `[b]`, where `mixes`.
            counts: how many rungs each row has in all, where that is not the number of the ladder's.

        Raises:
            ValueError: rows at different rungs of a model whose rungs differ.
        """
        total = counts if isinstance(counts, torch.Tensor) else (counts or self.ladder.num_rungs)
        if isinstance(rung, torch.Tensor):
            if len(rung) and bool((rung == rung[0]).all()):
                rung = int(rung[0])
            elif not self.mixes:
                raise ValueError("rows at different rungs in one call need rungs that share weights and arguments")
        self._note_depth(span, rung)
        begun_btD = self._begin(span, carry, rung, total)
        more = self._arguments(begun_btD, rung, total)
        slots = self.ladder.rungs[rung if isinstance(rung, int) else 0]

        def script(frame: Frame) -> torch.Tensor:
            return self._visits(frame, span, slots, begun_btD, rung, **more)

        state_btD = self._call(span, script)
        self.passes += 1
        return replace(carry, state_btD=self._end(carry, state_btD, rung, total))

    def leave(self, span: Span, carry: Carry) -> torch.Tensor:
        """Run the tail and the head of the model: logits `[b, t, V]`. The carry may go on afterwards."""

        def script(frame: Frame) -> torch.Tensor:
            state_btD = carry.state_btD if self.module is None else self.module.exit(carry.state_btD)
            return self._visits(frame, span, self.ladder.tail, state_btD)

        return self._call(span, script, with_head=True)

    def entering(
        self, span: Span, carry: Carry, rung: int | torch.Tensor, counts: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """What the first layer of a rung is about to read, `[b, t, D]`; arguments as those of `climb`."""
        total = counts if isinstance(counts, torch.Tensor) else (counts or self.ladder.num_rungs)
        return self._begin(span, carry, rung, total)

    def gate(self, carry: Carry) -> torch.Tensor:
        """Probability to leave of the loop's gate, `[b, t]`.

        Raises:
            ValueError: the loop has none.
        """
        if self.module is None or self.module.gate is None:
            raise ValueError("this rule is driven by an exit gate, which the main loop of this model lacks")
        return self.module.gate(carry.state_btD).sigmoid()

    def prefill(self, span: Span, rungs: int | None = None) -> tuple[Carry, torch.Tensor]:
        """Run prompts through all rungs.

        Args:
            span: the tokens.
            rungs: how many rungs; all if None.

        Returns:
            The carry of all tokens, and the logits of every row's last one, `[b, V]`.
        """
        count = self.ladder.num_rungs if rungs is None else rungs
        if self.policy.prefill.is_sequential:
            return self._prefill_by_token(span, count)
        self._sharing = self.policy.prefill
        carry = self.enter(span)
        for rung in range(count):
            carry = self.climb(span, carry, rung)
        logits_bV = self._last_logits(span, carry)
        self._begin_decoding(span.rows_b)
        return carry, logits_bV

    def left(self, span: Span, carry: Carry, depth: int | torch.Tensor) -> None:
        """Tokens have left after so many rungs: fill what the policy wants for the deeper ones.

        What it computes are keys and values alone, no whole visits: `visits` does not count them. `monotone` and
        `catch_up` want nothing here, see `skipped.SkippedDepth`.

        Args:
            span: the tokens.
            carry: the state with which they left the last rung.
            depth: rungs that they ran, one number or `[b]`.
        """
        if self._sharing.kind == "first":
            return
        depth_b = torch.as_tensor(depth, device=self.device).expand(len(span.rows_b))
        if bool((depth_b >= self.ladder.num_rungs).all()):
            return
        if self.policy.skipped == "copy" or (self.policy.skipped == "latest" and not self.ladder.is_shared):
            self._copy(span, depth_b)
        elif self.policy.skipped == "propagate":
            self._propagate(span, carry, depth_b)

    # The parts of a call.

    def _call(self, span: Span, script: Callable[[Frame], torch.Tensor], *, with_head: bool = False) -> torch.Tensor:
        """One forward of the model in which `script` makes the last state; returns that, or the logits."""
        played = []

        def player(frame: Frame) -> torch.Tensor:
            played.append(script(frame))
            return played[0]

        # What owns the layers may be an encoder inside that takes no tokens.
        module = self.model if with_head or "input_ids" not in parameter_names(type(self.owner)) else self.owner
        arguments = {
            "input_ids": span.tokens_bt,
            "position_ids": span.positions_bt.clamp(min=0),
            "past_key_values": self._no_cache,
            "use_cache": True,
        }
        with self.looping.played_by(player):
            output = module(**arguments)
        return output.logits if with_head else played[0]

    def _visits(
        self,
        frame: Frame,
        span: Span,
        slots: Sequence[Slot],
        state_btD: torch.Tensor,
        rung: int | torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        length = int(span.positions_bt.max()) + 1
        self.visits += int(span.valid_bt.sum()) * len(slots)
        masks: dict[int | None, torch.Tensor] = {}
        for slot in slots:
            window = self.windows[slot.layer]
            if window not in masks:
                masks[window] = self._mask(span, length, window, rung)
            view = self._view(span, slot, length, rung)
            state_btD = frame.run_alone(slot, state_btD, cache=view, mask=masks[window], **more)
        return state_btD

    def _view(self, span: Span, slot: Slot, length: int, rung: int | torch.Tensor | None, **options: Any) -> Any:
        if rung is None:  # before or after the rungs: a store of its own
            return self.cache.view(slot.key, 1, 0, span, length)
        if not self.ladder.is_shared:  # other weights: a store of its own for every visit of a rung
            return self.cache.view(self._rung_key(slot), 1, 0, span, length, **options)
        reads = None
        if self.policy.skipped == "latest" and self._sharing.kind == "own":
            last_bS = self.depth_BS[span.rows_b, :length] - 1
            reads = torch.minimum(torch.as_tensor(rung, device=self.device).view(-1, 1), last_bS).clamp(min=0)
        places: Any = rung
        if self._sharing.kind != "own":
            if isinstance(rung, int):
                places = self._sharing.place(rung)
            else:
                places = torch.tensor([self._sharing.place(r) for r in rung.tolist()], device=self.device)
        writes = options.pop("writes", True)
        if self._sharing.kind == "first":
            writes = rung == 0
        return self.cache.view(
            self._rung_key(slot), self.num_places, places, span, length, writes=writes, reads=reads, **options
        )

    def _rung_key(self, slot: Slot) -> Any:
        """Names the stores of a visit: in a loop, the same for all iterations."""
        return (slot.position, slot.iterations[1:]) if self.ladder.is_shared else slot.key

    def _mask(self, span: Span, length: int, window: int | None, rung: int | torch.Tensor | None) -> torch.Tensor:
        """Which positions each token sees, `[b, 1, t, length]`, boolean or additive as attention wants it."""
        keys_S = torch.arange(length, device=self.device)
        queries_bt1 = span.positions_bt.clamp(min=0)[..., None]
        seen_btS = keys_S <= queries_bt1
        if window is not None:
            seen_btS = seen_btS & (queries_bt1 - keys_S < window)
        if rung is not None and self.policy.skipped == "absent":
            there_bS = self.depth_BS[span.rows_b, :length] > torch.as_tensor(rung, device=self.device).view(-1, 1)
            seen_btS = seen_btS & (there_bS[:, None] | (keys_S == queries_bt1))
        mask = seen_btS[:, None]
        if not self._additive:
            return mask
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(~mask, torch.finfo(dtype).min)

    # What a loop adds to its layers.

    def _begin(self, span: Span, carry: Carry, rung: int | torch.Tensor, counts: int | torch.Tensor) -> torch.Tensor:
        if self.module is None:
            return carry.state_btD
        module, injected = self.module, cast(torch.Tensor, carry.injected_btD)

        def one(index: torch.Tensor | slice, iteration: int, count: int) -> torch.Tensor:
            where = {"iteration": iteration, "num_iterations": count}
            state_btD = module.update(carry.state_btD[index], injected[index], **where)
            if module.signal is not None:
                positions = span.positions_bt[index].clamp(min=0)
                state_btD = state_btD + module.signal(state_btD, iteration, positions)
            return state_btD

        if module.signal is None and not module.update.reads_iteration:
            return one(slice(None), 0, self.ladder.num_rungs)
        return self._by_rung(one, carry.state_btD, rung, counts)

    def _end(
        self, carry: Carry, state_btD: torch.Tensor, rung: int | torch.Tensor, counts: int | torch.Tensor
    ) -> torch.Tensor:
        if self.module is None:
            return state_btD
        module, injected = self.module, cast(torch.Tensor, carry.injected_btD)

        def one(index: torch.Tensor | slice, iteration: int, count: int) -> torch.Tensor:
            where = {"iteration": iteration, "num_iterations": count}
            return module.update.leave(carry.state_btD[index], state_btD[index], injected[index], **where)

        if not module.update.reads_iteration:
            return module.turn(one(slice(None), 0, self.ladder.num_rungs))
        return module.turn(self._by_rung(one, state_btD, rung, counts))

    @staticmethod
    def _by_rung(
        one: Callable[[Any, int, int], torch.Tensor],
        like_btD: torch.Tensor,
        rung: int | torch.Tensor,
        counts: int | torch.Tensor,
    ) -> torch.Tensor:
        """Apply a function of (rows, iteration, count) to rows at the same iteration together."""
        if isinstance(rung, int) and isinstance(counts, int):
            return one(slice(None), rung, counts)
        rung_b, count_b = (
            torch.as_tensor(value, device=like_btD.device).expand(len(like_btD)) for value in (rung, counts)
        )
        result_btD = torch.empty_like(like_btD)
        for iteration, count in {*zip(rung_b.tolist(), count_b.tolist(), strict=True)}:
            index = ((rung_b == iteration) & (count_b == count)).nonzero()[:, 0]
            result_btD[index] = one(index, iteration, count).to(result_btD.dtype)
        return result_btD

    def _arguments(self, like: torch.Tensor, rung: int | torch.Tensor, counts: int | torch.Tensor) -> dict[str, Any]:
        if self.module is None or self.module.conditioner is None:
            return {}
        if not isinstance(rung, int) or not isinstance(counts, int):
            raise ValueError("a loop that is told the time runs all rows at the same iteration and count")
        step = like.new_tensor(1.0 / counts)
        return {"conditioning": self.module.conditioner(step * rung, step)}

    def _first_state(self, span: Span, entered_btD: torch.Tensor) -> torch.Tensor:
        """The state before the first iteration; a random one is a function of the row's seed and the position alone."""
        module = cast(LoopModule, self.module)
        if self.initial_state is not None:
            return make(module.state, entered_btD, initial_state=self.initial_state)
        if not _is_random(module):
            return make(module.state, entered_btD)
        state_btD = torch.zeros_like(entered_btD)
        for b, (row, positions) in enumerate(zip(span.rows_b.tolist(), span.positions_bt.tolist(), strict=True)):
            for t, position in enumerate(positions):
                if position >= 0:
                    seeds = RowSeeds(seed=self.seeds[row], step=position, rows=(0,))
                    state_btD[b, t] = make(module.state, entered_btD[b : b + 1, t : t + 1], generator=seeds)[0, 0]
        return state_btD

    # Prompts and what is left behind.

    def _begin_decoding(self, rows_b: torch.Tensor) -> None:
        """Let shared stores hold, of what a prompt left apart, what their own order would have left."""
        decode = self.policy.decode
        if decode != self.policy.prefill:
            for rung in range(self.ladder.num_rungs):
                if decode.place(rung) != rung and decode.kind != "first":
                    for slot in self.ladder.rungs[rung]:
                        self.cache.move(self._rung_key(slot), rows_b, rung, decode.place(rung))
        self._sharing = decode

    def _prefill_by_token(self, span: Span, count: int) -> tuple[Carry, torch.Tensor]:
        parts = []
        for t in range(span.positions_bt.shape[1]):
            one = Span(
                rows_b=span.rows_b, tokens_bt=span.tokens_bt[:, t : t + 1], positions_bt=span.positions_bt[:, t : t + 1]
            )
            carry = self.enter(one)
            for rung in range(count):
                carry = self.climb(one, carry, rung)
            if self.ladder.tail and t + 1 < span.positions_bt.shape[1]:
                self.leave(one, carry)
            parts.append(carry)
        injected = None
        if parts[0].injected_btD is not None:
            injected = torch.cat([cast(torch.Tensor, part.injected_btD) for part in parts], dim=1)
        carry = Carry(state_btD=torch.cat([part.state_btD for part in parts], dim=1), injected_btD=injected)
        return carry, self._last_logits(span, carry)

    def _last_logits(self, span: Span, carry: Carry) -> torch.Tensor:
        last_b = span.valid_bt.sum(1) - 1
        rows = torch.arange(len(last_b), device=self.device)
        return self.leave(span, carry)[rows, last_b]

    def _note_depth(self, span: Span, rung: int | torch.Tensor) -> None:
        if not self.policy.has_depths:
            return
        where = torch.where(span.valid_bt, span.positions_bt, self.capacity)
        depth = torch.as_tensor(rung, device=self.device).view(-1, 1) + 1
        self.depth_BS[span.rows_b[:, None], where] = depth.expand(where.shape).clone()

    def _copy(self, span: Span, depth_b: torch.Tensor) -> None:
        index = ((depth_b < self.ladder.num_rungs)[:, None] & span.valid_bt).nonzero()
        if not len(index):
            return
        b, t = index.unbind(1)
        rows, positions, depth_n = span.rows_b[b], span.positions_bt[b, t], depth_b[b]
        if self.ladder.is_shared:
            places = [self._sharing.place(rung) for rung in range(self.ladder.num_rungs)]
            written = [1 + max(places[: rung + 1]) for rung in range(self.ladder.num_rungs)]
            source_n, written_n = (torch.tensor(table, device=self.device)[depth_n - 1] for table in (places, written))
            lacks = written_n < written[-1]
            for slot in self.ladder.rungs[0] if bool(lacks.any()) else ():
                self.cache.copy(self._rung_key(slot), rows[lacks], positions[lacks], source_n[lacks], written_n[lacks])
            return
        for depth in set(depth_n.tolist()):
            chosen = depth_n == depth
            source = self._rung_key(self.ladder.rungs[depth - 1][-1])
            for slot in (slot for rung in self.ladder.rungs[depth:] for slot in rung):
                self.cache.copy_visit(source, self._rung_key(slot), rows[chosen], positions[chosen])

    def _propagate(self, span: Span, carry: Carry, depth_b: torch.Tensor) -> None:
        """Keys and values of the deeper rungs, from the state with which tokens left."""
        length, total = int(span.positions_bt.max()) + 1, self.ladder.num_rungs

        def script(frame: Frame) -> torch.Tensor:
            for rung in range(int(depth_b.min()), total):
                begun_btD = self._begin(span, carry, rung, total)
                more = self._arguments(begun_btD, rung, total)
                for slot in self.ladder.rungs[rung]:
                    mask = self._mask(span, length, self.windows[slot.layer], rung)
                    view = self._view(span, slot, length, rung, writes=depth_b <= rung)
                    view.only_writes = True
                    try:
                        frame.run_alone(slot, begun_btD, cache=view, mask=mask, **more)
                    except view.WrittenError:
                        continue
            return carry.state_btD

        self._call(span, script)

    # What fits.

    def _loop_module(self, plan: Plan) -> LoopModule | None:
        found = self.owner._modules.get(LOOPS)
        modules = dict(found.items()) if isinstance(found, nn.ModuleDict) else {}
        main = self.ladder.loop.name if self.ladder.loop is not None else None
        for name, module in modules.items():
            if not isinstance(module, LoopModule) or module.stream is not None or module.route is not None:
                raise ValueError(f"loop {name!r} carries streams or has routers: decode with the model's own generate")
            if name != main and name in plan.loops:
                raise ValueError(f"loop {name!r} has components and is not the main loop: use the model's own generate")
        return cast("LoopModule | None", modules.get(main or ""))

    def _windows(self) -> list[int | None]:
        entries = list(new_cache(self.model).layers)
        windows: list[int | None] = []
        for index, layer in zip(self.looping.indices, self.owner._modules[self.looping.name], strict=True):
            mixer = getattr(getattr(layer, "block_config", None), "mixer", None)
            entry = entries[index[0]] if index[0] < len(entries) else None
            window = getattr(entry, "sliding_window", None) if mixer is None else mixer.sliding_window
            windows.append(window if isinstance(window, int) else None)
        return windows


def refuse_unfit(model: nn.Module, looping: Looping) -> None:
    """Raise ValueError for models whose layers keep something that a `SlotCache` does not hold."""
    if any(names for names in looping.state_names):
        raise ValueError("its layers keep a recurrent state, which has no position: use the model's own generate")
    for entry in new_cache(model).layers:
        if not isinstance(entry, DynamicLayer):
            raise ValueError(
                f"its layers use {type(entry).__name__}, which holds no keys and values by position: use the model's "
                "own generate"
            )


def try_out(model: nn.Module) -> None:
    """Compare a model taken apart with its own forward on a few tokens; the first `Runner` of a model does.

    Raises:
        ValueError: it cannot be taken apart, or gives other logits.
    """
    looping = looping_of(model)
    if looping is None:
        looping = looping_of(loopwise.attach(model, Plan.identity(len(layer_list(model).layers))))
    looping = cast(Looping, looping)
    policy, looping.policy, looping.is_taken_apart = looping.policy, CachePolicy(), True
    try:
        _try_out(model)
    except BaseException:
        looping.is_taken_apart = False
        raise
    finally:
        looping.policy = policy


def _try_out(model: nn.Module) -> None:
    try:
        _compare(model)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        # Layers that want more of their cache, or of a call, than a visit gives them.
        told = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"taken apart it fails ({type(error).__name__}: {told[:80]})") from error


def _compare(model: nn.Module) -> None:
    ids_BT = probe_inputs(model)["input_ids"]
    zero = torch.zeros((), device=ids_BT.device)
    runner = Runner(model, num_rows=len(ids_BT), capacity=ids_BT.shape[1])
    random = runner.module is not None and _is_random(runner.module)
    runner.initial_state = zero if random else None
    rows_b = torch.arange(len(ids_BT), device=ids_BT.device)
    with torch.no_grad():
        told: dict[str, Any] = {"initial_state": zero} if random else {}
        if runner.module is not None and runner.module.halting is not None:
            told["halting"] = FixedHalting()
        expected_BTV = cast(Any, model)(ids_BT, **told).logits.float()
        largest = expected_BTV.abs().max().clamp(min=1e-30)
        limit = 1e-4 if expected_BTV.dtype == next(model.parameters()).dtype else 5e-2
        end = ids_BT.shape[1] - 2
        # All rows at the same place, then apart: what goes by the number of keys instead of positions shows.
        for rows, begins in ((rows_b, 0), (rows_b[1:], end), (rows_b, end), (rows_b[:1], end + 1)):
            first_b = torch.full_like(rows, begins)
            length = 1 if begins else end
            if len(rows) == len(rows_b) and begins:
                first_b[1:] += 1
            where_bt = first_b[:, None] + torch.arange(length, device=ids_BT.device)
            tokens_bt = ids_BT[rows[:, None], where_bt]
            _, logits_bV = runner.prefill(Span(rows_b=rows, tokens_bt=tokens_bt, positions_bt=where_bt))
            error = (logits_bV.float() - expected_BTV[rows, where_bt[:, -1]]).abs().max() / largest
            if not error <= limit:
                raise ValueError(
                    f"taken apart it gives other logits ({float(error):.1e} of the largest): use its own generate"
                )


def _is_random(module: LoopModule) -> bool:
    return isinstance(module.state, NormalState) and module.state.scale > 0
