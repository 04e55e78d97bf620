"""`loopwise generate`: continue or answer a prompt, token by token as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

import loopwise
from loopwise.cli import common
from loopwise.cli.decoding import Decoding, room

_NEW_TOKENS = 128
_MEASURED_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Generate(common.Source):
    """Arguments of `loopwise generate`."""

    prompt: Annotated[str, arg(metavar="TEXT")]
    """what to continue or answer; - reads standard input"""
    plan: common.PlanText = None
    """order of visits, such as "0-9 (10-19)x2 20-29"; without it the source's own"""
    loops: common.LoopsText = None
    """loop counts: 4, or core=4, or outer=2,inner=3"""
    halt: Annotated[str | None, arg(metavar="RULE")] = None
    """let each token stop early: latent, kl(threshold=1e-3), hazard(0.5), confidence(0.9), fixed(2), ..."""
    decoder: Literal["auto", "sequential", "adaptive", "wavefront", "speculative", "jacobi"] = "auto"
    """how tokens are made; auto is the model's own generate, and with --halt adaptive"""
    exits: common.ExitsText = None
    """after how many visits tokens of a model without a loop may stop, such as 10,20; without it after every one"""
    draft_loops: Annotated[int | None, arg(metavar="INT")] = None
    """iterations, or exits, of the drafts of --decoder speculative; without it a half of all"""
    lookahead: Annotated[int | None, arg(metavar="INT")] = None
    """tokens that speculative drafts, or jacobi guesses, at a time; without it 4, or 8"""
    wave: Annotated[str | None, arg(metavar="FIELDS")] = None
    """how --decoder wavefront goes, such as "inner=4, freeze=latent, width=32" """
    cache: Annotated[str | None, arg(metavar="POLICY")] = None
    """own, last, first, ring(k), or a pair such as own/last; with --halt or --decoder also copy, latest, propagate,
    absent, monotone, catch_up for depth that is skipped; without it what is exact"""
    max_new_tokens: Annotated[int | None, arg(aliases=["-n"], metavar="INT")] = None
    """stop after this many tokens; without it 128, or where --halt and --decoder come to the end of the context"""
    temperature: float = 0.0
    """0 always takes the likeliest token; above 0 samples"""
    top_k: int = 0
    """sample from the likeliest tokens only; 0 from all"""
    top_p: float = 1.0
    """sample from the likeliest tokens that together have this probability"""
    min_p: float = 0.0
    """sample from tokens with at least this share of the largest probability"""
    seed: int = 0
    """seed of the sampling"""
    chat: bool = True
    """use the tokenizer's chat template when it has one"""
    system: Annotated[str | None, arg(metavar="TEXT")] = None
    """system message of the chat"""
    depth_map: FlagCreatePairsOff[bool] = False
    """print the new text once more, coloured by the iterations of each token"""
    png: common.FilePath = None
    """draw that here"""

    def run(self) -> None:
        """Load, stream the new text to standard output, and report what it took on standard error."""
        common.check_writable(self.png)
        plan = common.planned(self.plan, self.loops)
        check_sampling(
            _NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens,
            self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )
        decoding = self._decoding()
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        common.quiet_libraries()
        tokenizer = loopwise.load_tokenizer(self.source)
        input_ids = encode_prompt(tokenizer, prompt, chat=self.chat, system=self.system)
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)
        if decoding is None:
            self._by_model(model, tokenizer, input_ids)
        else:
            self._by_decoder(decoding, model, tokenizer, input_ids[0].tolist())

    def _decoding(self) -> Decoding | None:
        """The decoder that the flags name; None for the model's own generate. Read before anything is loaded."""
        decoding = Decoding.of(
            decoder=None if self.decoder == "auto" else self.decoder,
            halt=self.halt,
            cache=self.cache,
            exits=common.parse_exits(self.exits),
            draft_loops=self.draft_loops,
            lookahead=self.lookahead,
            wave=self.wave,
        )
        for flag, value in (("--depth-map", self.depth_map), ("--png", self.png)):
            if value and decoding is None:
                raise ValueError(f"{flag} shows how deep tokens went: give --halt or --decoder")
        return decoding

    def _by_model(self, model: Any, tokenizer: Any, input_ids: Any) -> None:
        start = time.perf_counter()
        text_ids = generate(
            model,
            tokenizer,
            input_ids,
            cache=self.cache,
            max_new_tokens=self.max_new_tokens or _NEW_TOKENS,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            on_text=_print_piece,
        )
        seconds = time.perf_counter() - start
        print()
        count = len(text_ids)
        print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):.1f} tokens/s", file=sys.stderr)
        _report_cache_error(model, input_ids, text_ids, self.cache)

    def _by_decoder(self, decoding: Decoding, model: Any, tokenizer: Any, prompt: list[int]) -> None:
        from loopwise.decode.sampling import Sampling

        sampling = Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed
        )
        streamer = _streamer(tokenizer, _print_piece, skip_prompt=False)
        num_new = room(model, len(prompt), self.max_new_tokens, _NEW_TOKENS)
        run = decoding.run(model, tokenizer, prompt, num_new, sampling, streamer)
        print()
        for line in run.lines():
            print(line, file=sys.stderr)
        if self.depth_map:
            run.print_map(tokenizer)
        if self.png:
            common.write_whole(self.png, lambda temporary: run.draw_map(tokenizer, temporary))


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _report_cache_error(model: Any, input_ids: Any, text_ids: list[int], policy: str | None) -> None:
    """An approximate cache policy says how far it was off on this very text."""
    import torch

    from loopwise.cache.policy import CachePolicy
    from loopwise.measure.cache import cache_error

    if policy is None or CachePolicy.parse(policy).is_exact:
        return
    all_ids = torch.cat([input_ids, torch.tensor([text_ids], dtype=torch.long)], dim=1)[:, :_MEASURED_TOKENS]
    split = min(input_ids.shape[1], all_ids.shape[1] - 1)
    print(cache_error(model, all_ids.to(model.device), policy, prefill=split), file=sys.stderr)


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> None:
    """ValueError when a sampling setting makes no sense."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"--top-k {top_k}: at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p}: above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"--min-p {min_p}: from 0 to 1")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed {seed}: a number of 64 bits")
    for flag, value, default in (("--top-k", top_k, 0), ("--top-p", top_p, 1.0), ("--min-p", min_p, 0.0)):
        if value != default and temperature == 0:
            raise ValueError(f"{flag} {value}: sampling needs a --temperature above 0")


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = True, system: str | None = None) -> Any:
    """Token ids of a prompt as int64 `[1, T]`.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text; in a chat the user's message.
        chat: use the chat template if the tokenizer has one.
        system: system message, only with a chat template.

    Raises:
        ValueError: the prompt has no tokens, or a system message without a chat template.
    """
    templated = chat and bool(getattr(tokenizer, "chat_template", None))
    if system is not None and not templated:
        raise ValueError("--system needs a chat template" + ("" if chat else ", drop --no-chat"))
    if not prompt:
        raise ValueError("the prompt is empty")
    if templated:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template has written the special tokens itself.
        input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if input_ids.shape[-1] == 0:
        raise ValueError("the prompt has no tokens")
    return input_ids


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: Any,
    *,
    cache: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[int]:
    """Generate after one prompt and return the new token ids.

    Args:
        model: a transformers causal language model, attached or not.
        tokenizer: its tokenizer.
        input_ids: int64 `[1, T]`, as `encode_prompt` gives.
        cache: cache policy for an attached model, as `loopwise.set_cache` reads it.
        max_new_tokens: upper limit.
        temperature: 0 for greedy decoding.
        top_k: sample from the likeliest tokens only; 0 leaves it to the model's generation config, as do the defaults
            of the next two.
        top_p: sample from the likeliest tokens that together have this probability.
        min_p: sample from tokens with at least this share of the largest probability.
        seed: seed of torch's generator when sampling, and of first states that a loop draws at random.
        on_text: called with each piece of text as soon as it is final.

    Raises:
        ValueError: a setting makes no sense, or a cache policy for a model without a plan.
    """
    import torch

    from loopwise.models.loop_parts import needs_generator

    check_sampling(max_new_tokens, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    if cache is not None:
        if loopwise.plan_of(model) is None:
            raise ValueError(f"--cache {cache}: the model has no plan, give one with --plan")
        loopwise.set_cache(model, cache)
    input_ids = input_ids.to(model.device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling["temperature"] = temperature
        given = (("top_k", top_k, 0), ("top_p", top_p, 1.0), ("min_p", min_p, 0.0))
        sampling |= {name: value for name, value, default in given if value != default}
    if needs_generator(model):
        sampling["generator"] = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad_id(model, tokenizer),
            streamer=_streamer(tokenizer, on_text) if on_text else None,
            **sampling,
        )
    return output[0, input_ids.shape[-1] :].tolist()


def _pad_id(model: Any, tokenizer: Any) -> int | None:
    # One row is never padded; without a value generate() prints advice about it.
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if isinstance(value, int):
            return value
    return None


def _streamer(tokenizer: Any, on_text: Callable[[str], None], *, skip_prompt: bool = True) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Hands text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
