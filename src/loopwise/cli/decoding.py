"""The decoders behind `loopwise generate`: which one the flags name, and how it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import loopwise
from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.cli.decoded import Run

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

        from loopwise.cli.decoded import Run
        from loopwise.cli.serve import stop_ids
        from loopwise.decode.ladder import Ladder

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
            own = " (leave out --decoder and --halt)" if "own generate" in str(error) else ""
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


def _plan(model: Any) -> Any:
    from loopwise.models.hub import layer_list
    from loopwise.plan import Plan

    return loopwise.plan_of(model) or Plan.identity(len(layer_list(model).layers))


def room(model: Any, num_prompt: int, wanted: int | None, default: int) -> int:
    """How many new tokens are to be made.

    Args:
        model: whose context is the limit.
        num_prompt: tokens of the prompt.
        wanted: what was asked for; None takes the default, or fewer where the context ends.
        default: see there.

    Raises:
        ValueError: more than the context has room for.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return default if wanted is None else wanted
    left = context - num_prompt
    if left < 1:
        raise ValueError(f"the prompt has {num_prompt} tokens, this model reads at most {context}, the answer included")
    if wanted is not None and wanted > left:
        raise ValueError(
            f"--max-new-tokens {wanted}: with the {num_prompt} tokens of the prompt this model, which reads {context}, "
            f"can add at most {left}"
        )
    return min(default, left) if wanted is None else wanted


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
