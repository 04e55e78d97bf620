"""The wave as the published code runs it, quirks included (2510.14961; `generate_diffusion_style`, batch 1).

Repeated, and named so in `WaveConfig(compat="reference")`:

1. A position enters with only `1 - embed_ema` of its embedding; only the first position of the wave has all of it.
2. After a pass that froze j positions, a state is compared with the previous state j positions *later*.
3. A settled position freezes the text up to its own token, not the one that it predicts, and stays in the wave.
4. The last settled position freezes all before it (`rule` is "last" whatever the config says), also positions whose
   token was revised in the same pass: their keys stay those of the old token.
5. A stop token is only looked for after more outer passes than the loop has iterations, and only among the tokens that
   froze in that pass: one that froze before is never noticed.
6. A wave that would be wider than `width` is clipped before it freezes, so that width 1 never advances.
7. Nothing ends refinement but freezing; iterations beyond the loop's count write to its last store.
8. "fixed" freezes `headway` tokens per pass after `count // inner + 1` passes, and none from a clipped wave.
9. "stable" counts all passes in which a token was confirmed, also after it has changed, and takes `count // inner`
   for its patience.
10. Sampled tokens are drawn anew in every pass.
11. Where the cache is not named it is one store per layer of the core (own/last).

Not repeated: one token more than max_new_tokens, a prompt counted as one pass, bfloat16 states in a float32 model,
random tokens of a fixed range, and the misalignment of both acceleration rules, which are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from loopwise.decode.cache import Span
from loopwise.decode.freezing import WaveConfig, latent_change
from loopwise.decode.result import Output
from loopwise.decode.runner import Runner
from loopwise.decode.sampling import Samplers
from loopwise.decode.wave import Place, Wave

MAX_PASSES = 4098


class PublishedWave(Wave):
    """One row's wave after the published code.

    Args:
        runner: of the model.
        config: how it goes.
        samplers: of the row.
        out: where final tokens go; it must not look for stop tokens.
        prompts: one.
        injects: whether something re-enters the loop.
        stop_ids: tokens that end the row, where they are noticed.

    Raises:
        ValueError: more than one prompt.
    """

    def __init__(
        self,
        runner: Runner,
        config: WaveConfig,
        samplers: Samplers,
        out: Output,
        prompts: Sequence[Sequence[int]],
        injects: bool,
        stop_ids: Sequence[int],
    ):
        if len(prompts) != 1:
            raise ValueError(f"compat='reference' decodes one prompt at a time, here are {len(prompts)}")
        super().__init__(runner, config, samplers, out, prompts, injects)
        self.restart = False
        self.stop_ids = frozenset(stop_ids)
        self.max_passes = config.max_passes or MAX_PASSES
        self._advanced = self.rows[0].prompt  # of the wave in the last pass: the code counts from position 0
        self._confirmed: Counter[int] = Counter()

    def first_scale(self, place: Place) -> float:
        """Quirk 1."""
        return 1.0 if place[1] == self.rows[0].prompt else 1 - self.config.embed_ema

    def is_done(self, place: Place) -> bool:
        """Quirk 7."""
        return False

    def predict(self, logits_nV: torch.Tensor, places: Sequence[Place]) -> list[int]:
        """Quirk 10."""
        return self.samplers.pick(logits_nV, [0] * len(places)).tolist()

    def settled(self, state_nD: torch.Tensor, span: Span, places: Sequence[Place]) -> list[bool]:
        """Quirk 2; the other rules are counted in `advance`."""
        if self.config.freeze != "latent":
            return [False] * len(places)
        compared = max(0, len(places) - self._advanced)
        before_nD = self._of("state", span)[self._advanced :]
        small = (latent_change(state_nD[:compared], before_nD) < self.config.threshold).tolist()
        return small + [False] * (len(places) - compared)

    def advance(self, r: int, predicted: Sequence[int], settled: Sequence[bool]) -> int:
        """Quirks 3 to 9."""
        row, config = self.rows[r], self.config
        start, front, rungs = row.start, row.front, self.depth // config.inner
        outer = int(self.notes["outer_passes"]) - 1
        confirmed = [start, *(start + i for i in range(1, front - start) if predicted[i - 1] == row.text[start + i])]
        self._confirmed.update(confirmed)
        revised = [p for p in range(start + 1, front) if p not in confirmed]
        for i, token in enumerate(predicted):
            row.put(start + i + 1, token)
        headway = min(front + config.headway, start + config.width) - front
        upto = start  # the last position whose token is final
        if config.freeze == "latent":
            upto = max((start + i for i, one in enumerate(settled) if one), default=start)
        elif config.freeze == "stable":
            upto = max((p for p in range(start, front) if self._confirmed[p] > rungs), default=start)
        elif outer > rungs:
            upto = start + headway
        for p in range(start + 1, upto + 1):
            if not self.out.add(r, row.text[p], row.spent[p - 1]):
                return 0
        for p in range(upto + 1, front + 1):
            self.drafts.guess(r, p - row.prompt, row.text[p])
        newest = (
            row.text[start + 1 : upto + 1] if config.freeze == "latent" else row.text[: upto + 1][-config.headway :]
        )
        if outer > self.depth and self.stop_ids.intersection(newest):
            self.out.finish[r] = "stop"
            return 0
        row.stale = min([row.stale, *revised])
        self._advanced = upto - start
        row.start = upto
        self.grow_after(r, start)
        return upto - start

    def grow(self, r: int) -> None:
        """The first position, whatever the headway."""
        self.rows[r].front += 1

    def grow_after(self, r: int, start: int) -> None:
        """Let new positions in, as many as fit into a wave that begins at `start`: quirk 6."""
        row, config = self.rows[r], self.config
        new_front = min(row.front + config.headway, start + config.width, self.runner.capacity)
        for position in range(row.front + 1, new_front):
            row.put(position, self.random_token(r, position))
        row.front = max(row.front, new_front)
