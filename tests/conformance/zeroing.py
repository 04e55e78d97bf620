"""Try on every causal model type whether layers with zeroed outputs are the identity, and write the committed table.

`python tests/conformance/zeroing.py [type ...]` prints; with `--write` the table in `src/loopwise/edit` is replaced.
Three things are tried: that the function of an expanded model is that of the old one, bit for bit; that the zeroed
tensors get a gradient; and that the same rule finds the tensors in a saved folder, where they have other names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parents[2] / "src" / "loopwise" / "edit" / "zeroing.json"
# Every layer twice shows most; the others are for types whose first layers are of a kind of their own.
OPERATORS = ("llama_pro(every=1)", "llama_pro(every=2)", "llama_pro(every=3)")
# Why layers are not the identity, by what the types' code does; said only of types that fail the trial.
REASONS = {
    "its norms stand on the stream itself (post-norm), so that a layer changes it whatever its branches add": (
        "bart bert bert-generation big_bird blenderbot-small camembert data2vec-text electra ernie git marian mvp"
        " openai-gpt plbart prophetnet rembert roberta roc_bert roformer trocr xlm-roberta xlnet xmod"
    ),
    "it mixes several streams between its branches (hyper-connections)": "deepseek_v4 hy_v4",
    "it multiplies the stream by learned factors": "doge zaya",
    "some of its experts give back what they read": "longcat_flash",
}


def examine(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    import tiny
    import torch

    row: dict[str, Any] = {"model_type": model_type, "reason": ""}
    if model_type in tiny.UNAVAILABLE:
        return row | {"reason": tiny.UNAVAILABLE[model_type]}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    reasons = []
    for operator in OPERATORS:
        try:
            in_memory(tiny.tiny_model(model_type), operator)
            on_disk(tiny.tiny_model(model_type))
        except ValueError as error:
            reasons.append(str(error).splitlines()[0])
        else:
            return row
    known = next((reason for reason, names in REASONS.items() if model_type in names.split()), None)
    return row | {"reason": known or reasons[0]}


def in_memory(model: Any, operator: str) -> None:
    """Expand a model; ValueError where its function changes, or where a new layer cannot learn."""
    import torch
    from tiny import tiny_inputs

    from loopwise.edit.apply import apply, plan_edit, tensor_sources

    ids_BT = tiny_inputs(model)
    new = apply(model, operator)
    with torch.no_grad():
        error = (model(ids_BT, use_cache=False).logits - new(ids_BT, use_cache=False).logits).abs().max().item()
    if error:
        raise ValueError(f"with zeroed outputs the logits change by {error:.2g}")
    new.train()
    logits = new(ids_BT, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    sources = tensor_sources(model, new, plan_edit(model, operator))
    zeroed = [parameter.grad for name, parameter in new.named_parameters() if sources[name].zero]
    if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in zeroed):
        raise ValueError("gradients of zeroed outputs are not finite")
    if not any(gradient is not None and bool(gradient.any()) for gradient in zeroed):
        raise ValueError("no gradient reaches the zeroed outputs")


def on_disk(model: Any) -> None:
    """Zero the outputs of all layers in a saved folder; ValueError where a layer of what is loaded is no identity."""
    import torch
    from safetensors.torch import load_file, save_file

    from loopwise.edit.outputs import output_tensors
    from loopwise.edit.probe import refuse_unless_identity
    from loopwise.models.hub import layer_list, text_config

    found = layer_list(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        for number in range(len(found.layers)):
            mark = f"{found.name}.{number}."
            inside = {name.partition(mark)[2]: name for name in tensors if f".{mark}" in f".{name}"}
            for rest in output_tensors(inside, text_config(model).model_type):
                tensors[inside[rest]] = torch.zeros_like(tensors[inside[rest]])
        save_file(tensors, path, {"format": "pt"})
        again = type(model).from_pretrained(folder).eval()
    try:
        refuse_unless_identity(again, range(len(found.layers)))
    except ValueError as error:
        raise ValueError(f"on disk: {error}") from error


def _inner_type(model_type: str) -> str | None:
    """The type of the decoder inside a type with other parts, where no row has it yet."""
    import tiny

    if model_type in tiny.UNAVAILABLE:
        return None
    inner = tiny.tiny_config(model_type).get_text_config(decoder=True).model_type
    return None if inner in tiny.MODEL_TYPES else inner


def main() -> None:
    """Command line."""
    import tiny

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types, default all")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    options = parser.parse_args()
    rows = []
    for model_type in options.types or tiny.MODEL_TYPES:
        try:
            rows.append(examine(model_type))
        except Exception as error:  # any other failure is a finding about this type
            rows.append({"model_type": model_type, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        print(f"{model_type:28} {rows[-1]['reason'] or 'identity'}", flush=True)
    print(f"layers of {sum(not row['reason'] for row in rows)} of {len(rows)} model types can be the identity")
    rows += [row | {"model_type": inner} for row in rows for inner in [_inner_type(row["model_type"])] if inner]
    if options.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
