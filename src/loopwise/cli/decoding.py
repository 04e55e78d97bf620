"""The decoders behind `loopwise generate`: which one the flags name, and what is said of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import loopwise
from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.decode.ladder import Ladder
    from loopwise.decode.result import Decoded

_MEASURED_TOKENS = 512
# Which decoder a flag belongs to.
_FLAGS = {
    "halt": ("adaptive",),
    "draft_loops": ("speculative",),
    "lookahead": ("speculative", "jacobi"),
    "wave": ("wavefront",),
}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A decoder and its settings, as the flags give them.

    Attributes:
        decoder: its name.
        halt: a halting rule, for adaptive.
        cache: a cache policy; None for one that is exact.
        exits: after how many visits tokens may stop, where the rungs are not the iterations of a loop.
        draft_loops: rungs of a draft, for speculative.
        lookahead: tokens of a draft, or of a block of jacobi.
        wave: a `WaveConfig`, for wavefront.
    """

    decoder: str
    halt: str | None = None
    cache: str | None = None
    exits: list[int] | None = None
    draft_loops: int | None = None
    lookahead: int | None = None
    wave: Any = None

    @classmethod
    def of(cls, *, decoder: str | None, wave: str | None, **given: Any) -> Decoding | None:
        """What the flags say; None where they name no decoder. Rules and policies are read here, before any model.

        Raises:
            ValueError: flags that do not go together, or a text that cannot be read.
        """
        given["wave"] = wave
        if decoder is None and given["halt"] is not None:
            decoder = "adaptive"
        for name, of in _FLAGS.items():
            if given[name] is not None and decoder not in of:
                flag = f"--{name.replace('_', '-')} {given[name]}"
                raise ValueError(f"{flag}: goes with --decoder {' or '.join(of)}")
        if decoder is None:
            if given["exits"] is not None:
                raise ValueError("--exits: tokens stop early with --halt or --decoder only")
            return None
        if decoder == "adaptive" and given["halt"] is None:
            raise ValueError("--decoder adaptive needs --halt RULE, such as --halt latent")
        common.quiet_libraries()
        from loopwise.decode.halting import parse_halting
        from loopwise.decode.rules import StorePolicy

        if given["halt"] is not None:
            parse_halting(given["halt"])
        if given["cache"] is not None:
            StorePolicy.parse(given["cache"])
        if wave is not None:
            given["wave"] = parse_wave(wave)
        return cls(decoder=decoder, **given)

    def run(
        self, model: Any, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, sampling: Any, streamer: Any
    ) -> Run:
        """Decode after one prompt.

        Args:
            model: see `decode.runner.Runner`.
            tokenizer: its tokenizer.
            prompt: token ids.
            max_new_tokens: upper limit.
            sampling: a `Sampling`.
            streamer: of transformers; gets every token that is final.

        Raises:
            ValueError: the decoder cannot have this model or these settings, with the reason.
        """
        import torch

        from loopwise.cli.serve import stop_ids
        from loopwise.decode.ladder import Ladder

        _refuse_long(model, len(prompt), max_new_tokens)
        options = self._options(model, sampling.seed)
        try:
            decoded = self._decoder()(
                model,
                [list(prompt)],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_ids=stop_ids(model, tokenizer),
                on_token=lambda row, token: streamer.put(torch.tensor([token])),
                **options,
                **self._own_options(model),
            )
        except ValueError as error:
            own = " or leave out --decoder and --halt" if "generate" in str(error) else ""
            raise ValueError(f"{error}{own}") from None
        streamer.end()
        ladder = Ladder.of(_plan(model), self.exits)
        return Run(
            decoding=self,
            model=model,
            prompt=list(prompt),
            decoded=decoded,
            options=options,
            ladder=ladder,
            is_greedy=sampling.is_greedy,
        )

    @property
    def policy(self) -> str:
        """The cache policy; without one given the exact one."""
        return self.cache or ("catch_up" if self.decoder == "adaptive" else "own")

    def _decoder(self) -> Any:
        from loopwise.decode.adaptive import decode_adaptive
        from loopwise.decode.jacobi import decode_jacobi
        from loopwise.decode.sequential import decode_sequential
        from loopwise.decode.speculative import decode_speculative
        from loopwise.decode.wavefront import decode_wavefront

        return {
            "adaptive": decode_adaptive,
            "jacobi": decode_jacobi,
            "sequential": decode_sequential,
            "speculative": decode_speculative,
            "wavefront": decode_wavefront,
        }[self.decoder]

    def _options(self, model: Any, seed: int) -> dict[str, Any]:
        """Options of the runner."""
        from loopwise.models.loop_parts import needs_generator

        options: dict[str, Any] = {"seeds": [seed]} if needs_generator(model) else {}
        if self.exits is not None:
            options["exits"] = self.exits
        if self.cache is not None or self.decoder == "adaptive":  # a wave chooses for itself
            options["cache"] = self.policy
        return options

    def _own_options(self, model: Any) -> dict[str, Any]:
        from loopwise.decode.ladder import Ladder

        if self.decoder == "adaptive":
            return {"halting": self.halt}
        if self.decoder == "wavefront":
            return {"wave": self.wave}
        lookahead = {} if self.lookahead is None else {"lookahead": self.lookahead}
        if self.decoder == "speculative":
            half = max(1, Ladder.of(_plan(model), self.exits).num_rungs // 2)
            return {"draft_rungs": half if self.draft_loops is None else self.draft_loops} | lookahead
        return {"block": self.lookahead} if self.decoder == "jacobi" and lookahead else {}


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


def parse_wave(text: str) -> Any:
    """A `WaveConfig` from text such as `inner=4, freeze=latent, width=32`.

    Raises:
        ValueError: not such a text, an unknown field, or a value that the config refuses.
    """
    from loopwise.decode.freezing import WaveConfig
    from loopwise.loop.config import suggest

    known = [field.name for field in fields(WaveConfig)]
    given: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else []:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f'--wave {text!r}: write fields such as "inner=4, freeze=latent"')
        if name not in known:
            raise ValueError(f"--wave has no field {name!r}{suggest(name, known)}")
        if name in given:
            raise ValueError(f"--wave {text!r}: {name} is given twice")
        given[name] = _value(value)
    return WaveConfig(**given)


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


def _plan(model: Any) -> Any:
    from loopwise.models.hub import layer_list
    from loopwise.plan import Plan

    return loopwise.plan_of(model) or Plan.identity(len(layer_list(model).layers))


def _refuse_long(model: Any, num_prompt: int, max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < num_prompt + max_new_tokens:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: with the {num_prompt} tokens of the prompt this model, which reads "
            f"{context}, can add at most {max(0, context - num_prompt)}"
        )


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
