"""Run the laws over every causal model type and write the table that `loopwise architectures` prints.

`python tests/conformance/run.py [type ...]` prints; with `--write` the committed table is replaced. Two processes, one
thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parents[2] / "src" / "loopwise" / "models" / "architectures.json"


def examine(model_type: str) -> dict[str, Any]:
    """One row of the table: which laws hold for the tiny model of a type, and if none can run, why."""
    import laws
    import tiny
    import torch

    import loopwise
    from loopwise.models.hub import layer_list

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model_type": model_type, "status": "refused", "materializes": False, "reason": ""}
    if model_type in tiny.UNAVAILABLE:
        return row | {"reason": tiny.UNAVAILABLE[model_type]}
    started = time.perf_counter()
    model = tiny.tiny_model(model_type)
    ids = tiny.tiny_inputs(model)
    try:
        loopwise.detach(loopwise.attach(model, "0"))
        num_layers = len(layer_list(model).layers)
        plan = laws.looping_plan(num_layers)
        loopwise.detach(loopwise.attach(model, plan))
    except ValueError as error:
        return row | {"reason": str(error)}
    shown: dict[str, str] = {}

    def run(name: str, law: Any, *args: Any) -> None:
        try:
            shown[name] = law(*args) or "holds"
        except Exception as error:  # any failure is a finding about this type
            line = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
            shown[name] = f"FAILS {type(error).__name__}: {line}"
            if os.environ.get("LOOPWISE_TRACEBACK"):
                traceback.print_exc()

    try:
        laws.identity_reference(model, ids)
    except Exception as error:  # whatever stops plain transformers
        return row | {"reason": f"plain transformers does not train and generate this tiny model: {error}"[:200]}
    run("identity", laws.identity, model, ids)
    plain = None
    row["materialize_reason"] = ""
    with laws.attached(model, plan):
        try:
            plain = loopwise.materialize(model)
        except ValueError as error:
            row["materialize_reason"] = str(error)
        bare = tiny.tiny_model(model_type)
        if plain is None:
            run("unrolling", laws.unrolling_by_oracle, model, bare, ids)
        else:
            run("unrolling", laws.unrolling, model, plain, loopwise.plan_of(model).layers, ids)
        run("caching", laws.caching, model, plain, bare, ids)
        run("chunked_prefill", laws.chunked_prefill, model, plain, bare, ids)
        run("left_padding", laws.left_padding, model, plain, bare, ids)
        run("loop_counts", laws.loop_counts, model, bare, ids)
        run("round_trip", laws.round_trip, model, ids)
        run("causality", laws.causality, model, bare, ids)
        run("batch_independence", laws.batch_independence, model, bare, ids)
        run("deep_copy", laws.deep_copy, model, ids)
    try:
        with laws.attached(model, laws.odd_plan(num_layers)):
            try:
                plain = loopwise.materialize(model)
            except ValueError:
                plain = None
            run("caching_odd_plan", laws.caching, model, plain, bare, ids)
    except ValueError as error:
        shown["caching_odd_plan"] = f"refused: {error}"
    failures = [f"{name}: {text}" for name, text in shown.items() if text.startswith("FAILS")]
    return row | {
        "status": "refused" if failures else "pass",
        "materializes": not failures and not row["materialize_reason"],
        "reason": "; ".join(failures) or row.pop("materialize_reason"),
        "num_layers": num_layers,
        "plan": plan,
        "laws": shown,
        "seconds": round(time.perf_counter() - started, 1),
    }


def guarded(model_type: str) -> dict[str, Any]:
    """`examine`, with a row for anything unexpected."""
    try:
        return examine(model_type)
    except Exception as error:
        if os.environ.get("LOOPWISE_TRACEBACK"):
            traceback.print_exc()
        line = str(error).strip().splitlines()[:1]
        return {
            "model_type": model_type,
            "status": "refused",
            "materializes": False,
            "reason": f"CRASH {type(error).__name__}: {''.join(line)[:200]}",
        }


def main() -> None:
    """Command line of the suite."""
    import tiny

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types, default all")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.workers) as pool:
        for row in pool.map(guarded, options.types or tiny.MODEL_TYPES):
            rows.append(row)
            unrolls = "unrolls" if row["materializes"] else "-"
            line = (
                f"{row['model_type']:28} {row['status']:8} {unrolls:8} {row.get('seconds', 0):5} {row['reason'][:300]}"
            )
            print(line, flush=True)
    passing = [row for row in rows if row["status"] == "pass"]
    unrolling = sum(row["materializes"] for row in passing)
    print(f"{len(passing)} of {len(rows)} model types pass, {unrolling} of them also materialise")
    if options.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
