"""The positions of a wavefront and one outer pass over them; what it does and what is exact is in `wavefront`.

Shapes: B rows, S capacity, n positions of all waves, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loopwise.decode.cache import Span
from loopwise.decode.drafts import Drafts
from loopwise.decode.freezing import WaveConfig, acceleration, frontier, latent_change, mix_noise
from loopwise.decode.result import Output, next_span
from loopwise.decode.runner import Carry, Runner
from loopwise.decode.sampling import Samplers
from loopwise.loop.state import RowSeeds, make

Place = tuple[int, int]  # (row, absolute position)


@dataclass(kw_only=True)
class Row:
    """One row's wave: positions from `start` to before `front`, all else by absolute position.

    Attributes:
        text: tokens from position 0; final up to `start`, and one prediction beyond `front`.
        prompt: how many tokens the prompt has.
        end: the first position that is never needed.
        stale: first position that must be embedded anew.
        spent: iterations that a position has run; positions not in it have not begun.
        passes: outer passes that it has run.
        same: outer passes for which its prediction has been the same.
        predicted: its last prediction.
        draws: state of the row's generator before the draw of its prediction.
    """

    text: list[int]
    prompt: int
    end: int
    start: int = 0
    front: int = 0
    stale: int = 0
    spent: dict[int, int] = field(default_factory=dict)
    passes: dict[int, int] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)
    draws: dict[int, torch.Tensor] = field(default_factory=dict)

    def put(self, position: int, token: int) -> None:
        """Set a token of the text, at most one beyond its end."""
        self.text[position : position + 1] = [token]


class Wave:
    """The waves of all rows.

    Args:
        runner: of the model.
        config: how they go.
        samplers: of the rows.
        out: where final tokens go.
        prompts: of the rows.
        injects: whether something re-enters the loop.
    """

    def __init__(
        self,
        runner: Runner,
        config: WaveConfig,
        samplers: Samplers,
        out: Output,
        prompts: Sequence[Sequence[int]],
        injects: bool,
    ):
        if config.restart is False and not injects:
            raise ValueError(
                "restart=False needs a loop with injection: without it a new token never reaches the state"
            )
        self.runner, self.config, self.samplers, self.out = runner, config, samplers, out
        self.restart = not injects if config.restart is None else config.restart
        self.max_passes = config.max_passes
        self.rows = [
            Row(text=list(prompt), prompt=len(prompt), end=len(prompt) + out.max_new_tokens - 1) for prompt in prompts
        ]
        self.drafts = Drafts(len(prompts))
        self.notes: dict[str, float] = {"outer_passes": 0, "iterations": 0, "restarts": 0, "injects": float(injects)}
        self.depth = runner.ladder.num_rungs
        self.vocabulary = 0
        self.tables: dict[str, torch.Tensor] = {}  # by name, floating [B, S, D]

    def begin(self, logits_BV: torch.Tensor) -> None:
        """Take the token after every prompt, and let the waves begin with it."""
        self.vocabulary = logits_BV.shape[-1]
        for r, token in enumerate(self.samplers.pick(logits_BV).tolist()):
            row = self.rows[r]
            row.text.append(token)
            row.start = row.front = row.stale = row.prompt
            row.draws[row.start] = self.samplers.generators[r].get_state()
            if self.out.add(r, token, self.depth):
                self.grow(r)

    def run(self) -> None:
        """One outer pass over the waves of all running rows."""
        places = [(r, p) for r in self.out.running for p in range(self.rows[r].start, self.rows[r].front)]
        self._embed()
        span = self._span(places)
        carry = self._refine(span, self._mix(span, places), places)
        predicted = self.predict(self.runner.leave(span, carry)[:, 0], places)
        self._count(places, predicted)
        settled = self.settled(carry.state_btD[:, 0], span, places)
        self._keep(carry.state_btD[:, 0], span)
        self.notes["outer_passes"] += 1
        frozen, begin = [], 0
        for r in self.out.running:
            end = begin + self.rows[r].front - self.rows[r].start
            num_frozen = self.advance(r, predicted[begin:end], settled[begin:end])
            frozen += range(begin, begin + num_frozen)
            begin = end
        self._leave_behind(span, carry, places, frozen)
        for r in self.out.running:
            if self.notes["outer_passes"] == self.max_passes:
                self.out.finish[r] = "passes"

    # What a pass decides; the published code differs here.

    def first_scale(self, place: Place) -> float:
        """Share of its embedding that a position is injected with at first."""
        return 1.0

    def is_done(self, place: Place) -> bool:
        """True when a position runs no further iteration."""
        return self.rows[place[0]].spent[place[1]] >= self.depth

    def predict(self, logits_nV: torch.Tensor, places: Sequence[Place]) -> list[int]:
        """The next token of every position, drawn with the same randomness every time."""
        best = logits_nV.argmax(-1).tolist()
        for index, (r, position) in enumerate(places):
            settings, generator = self.samplers.rows[r], self.samplers.generators[r]
            if not settings.is_greedy:
                generator.set_state(self.rows[r].draws[position])
                best[index] = self.samplers.draw(r, settings.probabilities(logits_nV[index]))
                self.rows[r].draws[position + 1] = generator.get_state()
        return best

    def settled(self, state_nD: torch.Tensor, span: Span, places: Sequence[Place]) -> list[bool]:
        """Which positions have settled; states `[n, D]` after the pass."""
        config, done = self.config, [self.is_done(place) for place in places]
        if config.freeze == "fixed":
            return done
        if config.freeze == "stable":
            found = [self.rows[r].same[position] >= config.patience for r, position in places]
        elif config.freeze == "latent":
            found = (latent_change(state_nD, self._of("state", span)) < config.threshold).tolist()
        else:
            change_n = acceleration(state_nD, self._of("state", span), self._of("earlier", span))
            small = (change_n < config.threshold).tolist()
            found = [small[index] and self.rows[r].passes[p] >= 2 for index, (r, p) in enumerate(places)]
        return [one or other for one, other in zip(found, done, strict=True)]

    def advance(self, r: int, predicted: Sequence[int], settled: Sequence[bool]) -> int:
        """Freeze what has settled, revise the rest, let new positions in; returns how many froze."""
        row = self.rows[r]
        width = len(predicted)
        revised = next((i for i in range(1, width) if predicted[i - 1] != row.text[row.start + i]), width)
        num_frozen = min(frontier(self.config.rule, settled), revised)
        for i in range(num_frozen):
            row.draws.pop(row.start + i, None)
            if not self.out.add(r, predicted[i], row.spent[row.start + i]):
                return i + 1
        for i in range(num_frozen, width):
            self.drafts.guess(r, row.start + i + 1 - row.prompt, predicted[i])
        for i, token in enumerate(predicted):
            row.put(row.start + i + 1, token)
        if revised < width:
            self._revise(row, row.start + revised)
        row.start += num_frozen
        self.grow(r)
        return num_frozen

    def grow(self, r: int) -> None:
        """Let new positions in: the first with the token that was predicted for it, others with random ones."""
        row, config = self.rows[r], self.config
        new_front = min(row.front + config.headway, row.start + config.width, row.end)
        for position in range(row.front + 1, new_front):
            row.put(position, self.random_token(r, position))
        row.front = max(row.front, new_front)

    def random_token(self, r: int, position: int) -> int:
        """A function of the row's seed and the position alone."""
        seeds = RowSeeds(seed=self.runner.seeds[r], step=position, rows=(0,), place="headway")
        return int(torch.randint(self.vocabulary, (), generator=seeds.common()))

    # The parts of a pass.

    def _revise(self, row: Row, position: int) -> None:
        """The input token at a position is another one: start over from there on, or go on for another pass."""
        row.stale = min(row.stale, position)
        for p in range(position, row.front):
            if self.restart:
                self.notes["restarts"] += row.spent.pop(p) > 0
            else:
                # Keys of shallow iterations stay those of the old token; the last iterations run again.
                row.spent[p] = min(row.spent[p], max(0, self.depth - self.config.inner))

    def _span(self, places: Sequence[Place]) -> Span:
        tokens = [self.rows[r].text[position] for r, position in places]
        return next_span([r for r, _ in places], tokens, [position for _, position in places], self.runner.device)

    def _of(self, name: str, span: Span) -> torch.Tensor:
        return self.tables[name][span.rows_b, span.positions_bt[:, 0]]

    def _put(self, name: str, span: Span, value_nD: torch.Tensor) -> None:
        if name not in self.tables:
            shape = self.runner.num_rows, self.runner.capacity, value_nD.shape[-1]
            self.tables[name] = value_nD.new_zeros(shape)
        self.tables[name][span.rows_b, span.positions_bt[:, 0]] = value_nD

    def _embed(self) -> None:
        """Run the prelude where tokens are new, and begin the positions that have not begun."""
        running = self.out.running
        places = [
            (r, p) for r in running for p in range(max(self.rows[r].stale, self.rows[r].start), self.rows[r].front)
        ]
        if not places:
            return
        span = self._span(places)
        carry = self.runner.enter(span)
        if carry.injected_btD is not None:
            self._put("entry", span, carry.injected_btD[:, 0])
        new = [index for index, (r, p) in enumerate(places) if p not in self.rows[r].spent]
        if new:
            index = torch.tensor(new, device=self.runner.device)
            part, state_nD = span.take(index), carry.state_btD[index, 0]
            if self.config.continue_state:
                state_nD = self._continued([places[i] for i in new], state_nD)
            self._put("state", part, state_nD)
            if self.config.freeze == "acceleration":
                self._put("earlier", part, state_nD)
            if carry.injected_btD is not None:
                scale = [self.first_scale(places[i]) for i in new]
                entry_nD = carry.injected_btD[index, 0]
                self._put("injected", part, entry_nD * entry_nD.new_tensor(scale)[:, None])
        for r, p in (places[i] for i in new):
            self.rows[r].spent[p] = self.rows[r].passes[p] = self.rows[r].same[p] = 0
        for r in running:
            self.rows[r].stale = self.rows[r].front

    def _continued(self, places: Sequence[Place], fresh_nD: torch.Tensor) -> torch.Tensor:
        """For positions that are new to the wave, the state of the one a headway before."""
        result_nD = fresh_nD.clone()
        for index, (r, position) in enumerate(places):
            source = position - self.config.headway
            if position not in self.rows[r].passes and self.rows[r].spent.get(source, 0):
                result_nD[index] = self.tables["state"][r, source]
        return result_nD

    def _mix(self, span: Span, places: Sequence[Place]) -> Carry:
        """States and injected tensors with which a pass begins."""
        config, state_nD = self.config, self._of("state", span)
        injected_nD = None
        if "entry" in self.tables:
            entry_nD, injected_nD = self._of("entry", span), self._of("injected", span)
            known = [self.rows[r].passes[position] > 0 for r, position in places]
            known_n1 = torch.tensor(known, device=state_nD.device)[:, None]
            # In this form an embedding that has not changed stays what it is, to the last bit.
            mixed_nD = entry_nD + config.embed_ema * (injected_nD - entry_nD)
            injected_nD = torch.where(known_n1, mixed_nD, injected_nD)
            self._put("injected", span, injected_nD)
        if config.state_noise:
            spent = [self.rows[r].spent[position] for r, position in places]
            state_nD = mix_noise(config, state_nD, self._noise(places, state_nD), spent)
        return Carry(state_btD=state_nD[:, None], injected_btD=None if injected_nD is None else injected_nD[:, None])

    def _noise(self, places: Sequence[Place], like_nD: torch.Tensor) -> torch.Tensor:
        """Fresh first states, a function of the row's seed, the position and the number of its pass."""
        assert self.runner.module is not None
        drawn = []
        for index, (r, position) in enumerate(places):
            place = f"noise {self.rows[r].passes[position]}"
            seeds = RowSeeds(seed=self.runner.seeds[r], step=position, rows=(0,), place=place)
            drawn.append(make(self.runner.module.state, like_nD[index][None, None], generator=seeds)[0, 0])
        return torch.stack(drawn)

    def _refine(self, span: Span, carry: Carry, places: Sequence[Place]) -> Carry:
        """The inner iterations, each of all positions that are not done."""
        device = self.runner.device
        for _ in range(self.config.inner):
            active = [index for index, place in enumerate(places) if not self.is_done(place)]
            if not active:
                break
            rungs = [min(self.rows[r].spent[p], self.depth - 1) for r, p in (places[i] for i in active)]
            index = torch.tensor(active, device=device)
            part = self.runner.climb(span.take(index), carry.take(index), torch.tensor(rungs, device=device))
            carry = carry.put(index, part)
            for r, position in (places[i] for i in active):
                self.rows[r].spent[position] += 1
            self.notes["iterations"] += len(active)
        return carry

    def _count(self, places: Sequence[Place], predicted: Sequence[int]) -> None:
        for (r, position), token in zip(places, predicted, strict=True):
            row = self.rows[r]
            row.passes[position] += 1
            row.same[position] = row.same[position] + 1 if row.predicted.get(position) == token else 0
            row.predicted[position] = token

    def _keep(self, state_nD: torch.Tensor, span: Span) -> None:
        if self.config.freeze == "acceleration":
            self._put("earlier", span, self._of("state", span))
        self._put("state", span, state_nD)

    def _leave_behind(self, span: Span, carry: Carry, places: Sequence[Place], frozen: Sequence[int]) -> None:
        """Fill the stores of iterations that frozen positions did not run."""
        depths = [min(self.rows[r].spent[position], self.depth) for r, position in (places[i] for i in frozen)]
        early = [(i, depth) for i, depth in zip(frozen, depths, strict=True) if depth < self.depth]
        if early:
            index, depth_b = torch.tensor(early, device=self.runner.device).unbind(1)
            self.runner.left(span.take(index), carry.take(index), depth_b)
