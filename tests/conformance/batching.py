"""Try on every causal model type and every family of checkpoints how the engine batches it, and write the tables.

`python tests/conformance/batching.py [name ...]` prints; with `--write` the committed table beside this file and that
of `docs/batching.md` are replaced. A model is attached to a looping plan where it takes one, given to an `Engine`, and
three requests that run together must get what each gets alone. One process, one thread, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("batching.json")
PAGE = ROOT / "docs" / "batching.md"
GOLDENS = ROOT / "tests" / "goldens"
BEGIN, END = "<!-- table: tests/conformance/batching.py -->\n", "<!-- end of table -->\n"
MODES = {
    "depth-wise": "depth-wise",
    "plain": "plain",
    "generate": "one by one",
    "none": "not served",
}
PROMPTS = ([1, 5, 9, 2], [3, 8], [7, 6, 4, 2, 11, 12])
NEW_TOKENS = 4


def names() -> list[str]:
    """Types of the library, then families of checkpoints."""
    import tiny

    return [*tiny.MODEL_TYPES, *(f"loopwise.load:{folder.name}" for folder in sorted(GOLDENS.iterdir()))]


def examine(name: str) -> dict[str, Any]:
    """One row of the table."""
    import tiny
    import torch

    import loopwise
    from loopwise.decode.engine import Engine

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"name": name, "mode": "none", "loops": False, "reason": "", "shown": ""}
    if name in tiny.UNAVAILABLE:
        return row | {"reason": tiny.UNAVAILABLE[name]}
    family = name.removeprefix("loopwise.load:") if ":" in name else None
    try:
        model = looped(tiny.tiny_model(name)) if family is None else loopwise.load(GOLDENS / family)
        engine = Engine(model, max_requests=3, capacity=16, prefill_chunk=4)
    except ValueError as error:
        return row | {"reason": first_line(error)}
    row |= {"mode": engine.mode, "loops": engine.max_loops > 0, "reason": first_line(engine.reason)}
    try:
        shown = compare(model, engine)
    except Exception as error:  # whatever stops plain transformers too
        return row | {"mode": "none", "shown": "", "reason": f"generate fails: {type(error).__name__}: {error}"[:160]}
    return row | {"shown": shown}


def looped(model: Any) -> Any:
    """A model under a looping plan; as it is where it takes none."""
    import laws

    import loopwise
    from loopwise.models.hub import layer_list

    try:
        return loopwise.attach(model, laws.looping_plan(len(layer_list(model).layers)))
    except ValueError:
        return model


def compare(model: Any, engine: Any) -> str:
    """Run requests together and alone: how far they agree."""
    from loopwise.decode.request import Request
    from loopwise.decode.sequential import decode_sequential

    ids = [engine.submit(Request(prompt, NEW_TOKENS)) for prompt in PROMPTS]
    found: dict[int, list[int]] = {number: [] for number in ids}
    finishes = {}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += [] if event.token is None else [event.token]
            if event.finish:
                finishes[event.request_id] = event.finish
    if set(finishes.values()) != {"length"}:
        raise RuntimeError("a request ended with an error")
    if engine.mode == "generate":
        return "runs"
    exits = {} if engine.max_loops else {"exits": []}
    alone = [
        decode_sequential(model, [prompt], max_new_tokens=NEW_TOKENS, **exits).tokens[0]  # pyright: ignore
        for prompt in PROMPTS
    ]
    if list(found.values()) != alone:
        return f"FAILS: together {list(found.values())}, alone {alone}"
    return "as alone"


def first_line(text: object) -> str:
    """A reason without the plan that it may quote."""
    line = (str(text).splitlines() or [""])[0].partition("\n")[0][:200]
    if line.startswith("the plan ") and " loops and none is named core" in line:
        return "its plan has several loops and none is the core"
    if line.startswith("taken apart it gives other logits"):
        return "taken apart it gives other logits"
    if line.startswith("loop ") and "carries streams or has routers" in line:
        return "its loop carries streams or has routers"
    if line.startswith("taken apart it fails"):
        return "its layers want more of their cache or of a call than one visit gives them"
    if " cannot be looped: " in line:
        return "cannot be looped: " + line.partition(" cannot be looped: ")[2]
    if "does not write text" in line:
        return "it does not write text token by token"
    return line.partition(": use the model's own generate")[0]


def page_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: by kind of batching and reason, the types in one cell."""
    lines = ["| batching | why | models |", "|---|---|---|"]
    for mode, shown in MODES.items():
        groups: dict[str, list[str]] = {}
        for row in rows:
            if row["mode"] == mode:
                _, is_family, family = row["name"].partition(":")
                groups.setdefault(row["reason"], []).append(f"**{family}**" if is_family else row["name"])
        for reason, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            why = reason.replace("|", "\\|") or "iterations share weights and arguments"
            lines.append(f"| {shown} | {why} | {len(members)}: {', '.join(members)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, rows: Sequence[dict[str, Any]]) -> str:
    """A page with its table replaced."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no place for the table: {BEGIN.strip()} ... {END.strip()}")
    return f"{head}{begin}\n{page_table(rows)}\n{end}{tail}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, or loopwise.load:FAMILY; default all")
    parser.add_argument("--write", action="store_true", help="replace the committed tables")
    options = parser.parse_args()
    rows = []
    for name in options.names or names():
        try:
            rows.append(examine(name))
        except Exception as error:  # any other failure is a finding about this type
            reason = f"CRASH {type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append({"name": name, "mode": "none", "loops": False, "reason": reason, "shown": ""})
        row = rows[-1]
        print(f"{row['name']:32} {row['mode']:10} {row['shown'][:200]:9} {row['reason']}", flush=True)
    for mode in MODES:
        print(f"{mode}: {sum(row['mode'] == mode for row in rows)} of {len(rows)}")
    if options.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
