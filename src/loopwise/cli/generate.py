"""`loopwise generate`: continue or answer a prompt, token by token as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

import loopwise
from loopwise.cli import common

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
    cache: Annotated[str | None, arg(metavar="POLICY")] = None
    """own, last, first, ring(k), or a pair prefill/decode such as own/last; without it own, which is exact"""
    max_new_tokens: Annotated[int, arg(aliases=["-n"])] = 128
    """stop after this many tokens"""
    temperature: float = 0.0
    """0 always takes the likeliest token; above 0 samples"""
    seed: int = 0
    """seed of the sampling"""
    chat: bool = True
    """use the tokenizer's chat template when it has one"""
    system: Annotated[str | None, arg(metavar="TEXT")] = None
    """system message of the chat"""

    def run(self) -> None:
        """Load, stream the new text to standard output, and report the speed on standard error."""
        plan = common.planned(self.plan, self.loops)
        check_sampling(self.max_new_tokens, self.temperature)
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        common.quiet_libraries()
        tokenizer = loopwise.load_tokenizer(self.source)
        input_ids = encode_prompt(tokenizer, prompt, chat=self.chat, system=self.system)
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)
        start = time.perf_counter()
        text_ids = generate(
            model,
            tokenizer,
            input_ids,
            cache=self.cache,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            on_text=lambda text: print(text, end="", flush=True),
        )
        seconds = time.perf_counter() - start
        print()
        count = len(text_ids)
        print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):.1f} tokens/s", file=sys.stderr)
        _report_cache_error(model, input_ids, text_ids, self.cache)


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


def check_sampling(max_new_tokens: int, temperature: float) -> None:
    """ValueError when a sampling setting makes no sense."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature {temperature}: 0 (greedy) or a positive number")


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
        seed: seed of torch's generator when sampling, and of first states that a loop draws at random.
        on_text: called with each piece of text as soon as it is final.

    Raises:
        ValueError: a setting makes no sense, or a cache policy for a model without a plan.
    """
    import torch

    from loopwise.models.loop_parts import needs_generator

    check_sampling(max_new_tokens, temperature)
    if cache is not None:
        if loopwise.plan_of(model) is None:
            raise ValueError(f"--cache {cache}: the model has no plan, give one with --plan")
        loopwise.set_cache(model, cache)
    input_ids = input_ids.to(model.device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling["temperature"] = temperature
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


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Hands text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
