"""What `loopwise generate` says of what a decoder made: speed, depth, memory, errors, and the depth map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.cli.decoding import Decoding
    from loopwise.decode.ladder import Ladder
    from loopwise.decode.result import Decoded

_MEASURED_TOKENS = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a decoder made, and what there is to say about it.

    Attributes:
        decoding: the settings.
        model: the model.
        prompt: token ids.
        decoded: the result.
        options: of the runner.
        ladder: how deep tokens can go.
        is_greedy: whether every token was the likeliest.
    """

    decoding: Decoding
    model: Any
    prompt: list[int]
    decoded: Decoded
    options: dict[str, Any]
    ladder: Ladder
    is_greedy: bool

    @property
    def unit(self) -> str:
        """What depths count."""
        return "iterations" if self.ladder.is_shared else "exits"

    def lines(self) -> Iterator[str]:
        """Speed, depth, passes and memory; what the decoder counted; how far it was from full depth."""
        done = self.decoded
        count = done.num_tokens
        yield f"{count} tokens in {done.seconds:.1f} s, {done.tokens_per_second:.1f} tokens/s"
        yield (
            f"mean depth {done.mean_depth:.2f} of {self.ladder.num_rungs} {self.unit}, "
            f"{done.passes_per_token:.2f} core passes and {done.visits / max(1, count):.1f} visits per token, "
            f"{common.amount(done.cache_bytes, 'B')} of cache per token"
        )
        notes = {name: f"{value:g}" for name, value in done.notes.items()}
        if self.decoding.decoder == "speculative":
            yield f"{notes['accepted']} of {notes['drafted']} drafts accepted in {notes['full_passes']} full passes"
        elif self.decoding.decoder in ("wavefront", "jacobi"):
            yield (
                f"{notes['outer_passes']} outer passes; of {notes['drafted']} guessed tokens "
                f"{notes['drafted_right']} were right at once, {notes['tokens_revised']} were revised"
            )
        yield from self._errors()

    def print_map(self, tokenizer: Any) -> None:
        """The depth map on standard output: coloured on a terminal, with numbers elsewhere."""
        from loopwise.plots.depth_map import depth_map_plain, depth_map_text

        out, (depths,) = common.console(), self.decoded.depths
        pieces = token_pieces(tokenizer, self.decoded.tokens[0], before=self.prompt)
        print()
        if out.is_terminal:
            out.print(depth_map_text(pieces, depths, most=self.ladder.num_rungs, unit=self.unit))
        else:
            print(depth_map_plain(pieces, depths))

    def draw_map(self, tokenizer: Any, path: Any) -> None:
        """The depth map as a PNG."""
        from loopwise.plots.depth_map import depth_map

        decoding, (depths,) = self.decoding, self.decoded.depths
        pieces = token_pieces(tokenizer, self.decoded.tokens[0], before=self.prompt)
        how = f"--halt {decoding.halt}" if decoding.halt else f"--decoder {decoding.decoder}"
        title = f"Depth map: {self.unit} of every token, {how}"
        depth_map(pieces, depths, path, most=self.ladder.num_rungs, unit=self.unit, title=title)

    def _errors(self) -> Iterator[str]:
        """What is approximate says how far it was off on this very text."""
        from loopwise.decode.adaptive import policy_error
        from loopwise.decode.rules import StorePolicy

        decoder, policy = self.decoding.decoder, StorePolicy.parse(self.decoding.policy)
        cut = self._cut()
        options = {name: value for name, value in self.options.items() if name != "cache"}
        if decoder == "adaptive":
            approximate = not policy.is_exact
        else:  # all tokens have full depth, or the wave has stores of its own
            approximate = decoder != "wavefront" and policy.decode.kind != "own"
        if approximate:
            rule = self.decoding.halt or "fixed"
            yield str(policy_error(self.model, [self.prompt], cut, cache=policy, halting=rule, **options))
        if self.is_greedy and decoder in ("adaptive", "wavefront"):
            same = agreement(self.model, self.prompt, cut.tokens[0], **options)
            yield f"full depth, given the same text before, takes the same token for {same:.1%} of {cut.num_tokens}"

    def _cut(self) -> Decoded:
        """The beginning, long enough to measure on."""
        tokens, depths = (
            [row[:_MEASURED_TOKENS] for row in rows] for rows in (self.decoded.tokens, self.decoded.depths)
        )
        return replace(self.decoded, tokens=tokens, depths=depths)


def token_pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """What each token adds to the text; a character of several tokens belongs to the last of them.

    Args:
        tokenizer: of transformers.
        ids: the tokens.
        before: tokens in front of them.
    """
    window = 8  # enough for the bytes of a character, and for tokenizers that look at the neighbour

    def text(tokens: Sequence[int]) -> str:
        found = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found.rstrip("\N{REPLACEMENT CHARACTER}")

    whole = [*before, *ids]
    pieces = []
    for place in range(len(before), len(whole)):
        start = max(0, place - window)
        pieces.append(text(whole[start : place + 1])[len(text(whole[start:place])) :])
    return pieces


def agreement(model: Any, prompt: Sequence[int], tokens: Sequence[int], **options: Any) -> float:
    """Share of new tokens that are the likeliest at full depth after the same text, in one parallel pass.

    Args:
        model: see `decode.runner.Runner`.
        prompt: token ids.
        tokens: the new ones.
        **options: of the runner, without a cache policy.
    """
    import torch

    from loopwise.decode.result import prompt_span
    from loopwise.decode.runner import Runner

    whole = [*prompt, *tokens][:-1]
    runner = Runner(model, num_rows=1, capacity=len(whole), **options)
    span = prompt_span([whole], runner.device)
    with torch.no_grad():
        carry = runner.enter(span)
        for rung in range(runner.ladder.num_rungs):
            carry = runner.climb(span, carry, rung)
        best = runner.leave(span, carry)[0, len(prompt) - 1 :].argmax(-1)
    return (best.cpu() == torch.tensor(list(tokens))).float().mean().item()
