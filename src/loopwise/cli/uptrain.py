"""`loopwise uptrain`: heal an edited checkpoint, and say how much of what the edit cost came back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from loopwise.cli import common
from loopwise.cli.train import RunFlags, Words, check_folder, is_run, show

if TYPE_CHECKING:
    from loopwise.train.config import RunConfig
    from loopwise.train.run import Run

LOSS = "eval/loss"


@dataclass(frozen=True, kw_only=True)
class Uptrain(RunFlags):
    """Train an edited checkpoint until it is good again, and print held-out loss before and after.

    Examples: `loopwise uptrain recursive --source SmolLM2.gguf --distill 1 --steps 400`,
    `loopwise uptrain grown --text my-texts --out runs/grown`, `loopwise uptrain runs/grown` goes on. The healed model
    is the folder `model` in the run folder. Words such as optimizer.lr=1e-3 replace values of the run, as in train.
    """

    target: Annotated[Positional[str], arg(metavar="FOLDER|RUN")]
    """what `loopwise edit` wrote, any other model, or a run folder to go on with"""
    overrides: Positional[Words] = ()
    """values that replace the run's, such as batch_size=8, data.length=512 or precision=bfloat16"""
    method: Literal["auto", "full", "offsets", "new_layers", "retrofit", "lora"] = "auto"
    """what is trained: everything, the offsets of visits, the layers that start as the identity, everything under
    sampled loop counts, or adapters (PEFT); auto goes by the edit"""
    text: str = "stdlib"
    """file or folder to train on; stdlib is the source of the Python standard library"""
    source: Annotated[str | None, arg(metavar="MODEL")] = None
    """the model before the edit; it is scored too, and the share of the gap that was closed is printed"""
    distill: float = 0.0
    """weight of learning the predictions of --source"""
    layers: Annotated[str | None, arg(metavar="LIST")] = None
    """with new_layers: which, such as 4,9,14, where the folder does not say"""
    iterations: int = 4
    """with retrofit: mean loop count in the end"""
    rank: int = 16
    """with lora: rank of the adapters"""
    steps: int = 200
    """optimizer steps"""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """run folder; without it runs/uptrain-NAME"""

    def run(self) -> None:
        """Train, printing what happens."""
        self.check()
        if self.distill and self.source is None:
            raise ValueError(f"--distill {self.distill:g} needs --source, the model to learn from")
        common.quiet_libraries()
        config, folder = self._resolve()
        if self.dry_run:
            print("\n".join(_described(config, self.device)))
            return
        from loopwise.train.run import Run
        from loopwise.train.world import World

        with common.notes():
            run = Run(config, folder, world=World.join(self.device))
        try:
            before = _before(run)
            if before is not None and run.world.is_first:
                print(f"held-out loss before: {before:.4f}", flush=True)
            show(run, self.stop_after, again="loopwise uptrain")
            if run.is_done:
                self._report(run, before)
        finally:
            run.close()

    def _resolve(self) -> tuple[RunConfig, Path]:
        from loopwise.recipes.uptrain import uptrain_config
        from loopwise.train.config import override, read_config
        from loopwise.train.run import CONFIG

        folder = Path(self.target)
        if is_run(folder):
            if self.overrides or (self.out is not None and self.out.resolve() != folder.resolve()):
                raise ValueError(
                    f"{folder} is a run that has begun, it goes on as it is: give neither values nor --out"
                )
            return read_config(folder / CONFIG), folder
        config = uptrain_config(
            self.target,
            method=None if self.method == "auto" else self.method,
            text=self.text,
            teacher=self.source,
            distill=self.distill,
            new_layers=parse_layers(self.layers),
            iterations=self.iterations,
            rank=self.rank,
            steps=self.steps,
        )
        config = override(config, self.overrides)
        out = self.out or Path("runs") / config.name
        if not self.dry_run:
            check_folder(out, config)
        return config, out

    def _report(self, run: Run, before: float | None) -> None:
        """Print what came of it, with the model before the edit where it is known."""
        after = _last(run, run.config.num_steps)
        source = _score(run, self.source) if self.source is not None else None
        if not run.world.is_first:
            return
        print(summary(before, math.nan if after is None else after, source))
        if run.folder is not None:
            print(f"healed model: {run.folder / 'model'}")


def summary(before: float | None, after: float, source: float | None) -> str:
    """One line: held-out loss before and after, and the share of the gap to the source that is closed."""
    text = "held-out loss " + (f"{before:.4f} -> " if before is not None else "") + f"{after:.4f}"
    if source is None:
        return text
    text += f", source {source:.4f}"
    if before is None or before <= source:
        return text
    return f"{text}: {(before - after) / (before - source):.1%} of the gap closed"


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Read `4,9,14`.

    Raises:
        ValueError: anything but different numbers from 0.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"--layers {text!r}: write different layers from 0, such as 4,9,14")
    return tuple(map(int, parts))


def _described(config: RunConfig, device: str) -> list[str]:
    from loopwise.train.estimate import estimate_run

    trained = config.all_stages[0].trainable
    what = ", ".join(trained) if trained else "adapters" if config.adapters else "everything"
    return [f"trains      {what}", *estimate_run(config, device=device).lines()]


def _before(run: Run) -> float | None:
    """Held-out loss before the first step: found in the metrics, or measured now where no step was done."""
    known = _last(run, 0)
    if known is not None or run.carry.step:
        return known
    return run.evaluate()[LOSS]


def _last(run: Run, step: int) -> float | None:
    """The held-out loss that the metrics have of a step."""
    from loopwise.train.metrics import read_metrics
    from loopwise.train.run import METRICS

    if run.folder is None or not (run.folder / METRICS).is_file():
        return None
    found = [line[LOSS] for line in read_metrics(run.folder / METRICS) if line["step"] == step and LOSS in line]
    return found[-1] if found else None


def _score(run: Run, source: str) -> float:
    """Held-out loss of another model on the rows of a run."""
    import loopwise
    from loopwise.models.attach import attach, plan_of
    from loopwise.models.hub import layer_list
    from loopwise.plan import Plan
    from loopwise.train.evaluate import evaluate

    model: Any = loopwise.load(source, dtype="float32").to(run.world.device)
    if plan_of(model) is None:
        attach(model, Plan.identity(len(layer_list(model).layers)))
    values, _ = evaluate(model, run.held_out(run.config.evaluation.rows), precision=run.config.precision)
    return values["loss"]
