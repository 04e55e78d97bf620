"""The verbs `loopwise train` and `loopwise recipes`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from loopwise.cli.common import amount, check_writable, quiet_libraries

if TYPE_CHECKING:
    from loopwise.train.config import RunConfig
    from loopwise.train.run import Run

Words = Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")]


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What verbs that train have in common."""

    device: str = "auto"
    """where to run: auto (a GPU when there is one), cpu, cuda"""
    stop_after: Annotated[int | None, arg(metavar="STEPS")] = None
    """stop after so many steps, with a checkpoint"""
    dry_run: FlagCreatePairsOff[bool] = False
    """print parameters, FLOPs, memory and an estimate of the time, and train nothing"""

    def check(self) -> None:
        """ValueError for a number of steps that means nothing."""
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(f"--stop-after {self.stop_after}: use at least 1")


@dataclass(frozen=True, kw_only=True)
class Train(RunFlags):
    """Train a recipe, a config in a file, or go on with a run folder.

    Examples: `loopwise train quickstart`, `loopwise train quickstart steps=500 optimizer.lr=1e-3 --out runs/a`,
    `loopwise train runs/a`, `loopwise train my_recipe.py`. Under torchrun, ranks share every batch. Ctrl-C ends the
    run after the step that runs, with a checkpoint.
    """

    target: Annotated[Positional[str], arg(metavar="RECIPE|RUN|FILE.py")]
    """a recipe's name (see `loopwise recipes`), a run folder to go on with, FILE.py[:FUNCTION], or a config.json"""
    overrides: Positional[Words] = ()
    """values that replace the recipe's, such as steps=200 or model.width=128"""
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """run folder of a new run; without it runs/NAME"""

    def run(self) -> None:
        """Train, printing what happens."""
        self.check()
        quiet_libraries()
        config, folder = self._resolve()
        if self.dry_run:
            from loopwise.train.estimate import estimate_run

            print("\n".join(estimate_run(config, device=self.device).lines()))
            return
        from loopwise.train.run import Run
        from loopwise.train.world import World

        run = Run(config, folder, world=World.join(self.device))
        try:
            show(run, self.stop_after)
        finally:
            run.close()

    def _resolve(self) -> tuple[RunConfig, Path]:
        from loopwise.recipes import find
        from loopwise.train.config import override, read_config
        from loopwise.train.run import CONFIG

        folder = Path(self.target)
        if is_run(folder):
            if self.overrides:
                raise ValueError(
                    f"{folder} is a run that has begun, its config stays: leave {self.overrides[0]!r} out, or start "
                    f"another run from {folder / CONFIG} with --out"
                )
            if self.out is not None and self.out.resolve() != folder.resolve():
                raise ValueError(f"--out {self.out}: {folder} is a run that has begun, it goes on in its own folder")
            return read_config(folder / CONFIG), folder
        if folder.suffix == ".json":
            config = read_config(folder)
        else:
            config = find(self.target)
        config = override(config, self.overrides)
        out = self.out or Path("runs") / config.name
        if not self.dry_run:
            check_folder(out, config)
        return config, out


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes that `loopwise train` knows."""

    def run(self) -> None:
        """Print a line for each."""
        from loopwise.recipes import described

        lines = described()
        width = max(map(len, lines))
        for name, line in lines.items():
            print(f"{name:<{width}}  {line}")


def check_folder(out: Path, config: RunConfig) -> None:
    """ValueError when a folder is neither free nor that of a run with this config, or cannot be written."""
    from loopwise.train.config import read_config
    from loopwise.train.run import CONFIG

    if is_run(out):
        if read_config(out / CONFIG) != config:
            raise ValueError(f"{out} holds another run: name a new folder with --out, or go on with that run")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not a run folder and not empty: name a new folder with --out")
    else:
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
        check_writable(parent / "probe")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's; a model's folder has a config.json too."""
    from loopwise.train.run import CHECKPOINTS, CONFIG, METRICS

    if not (folder / CONFIG).is_file():
        return False
    if (folder / METRICS).exists() or (folder / CHECKPOINTS).exists():
        return True
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("kind") == "run"


def show(run: Run, num_steps: int | None = None, *, again: str = "loopwise train") -> None:
    """Train a run on, with a panel on a terminal and plain lines elsewhere; `again` is the command that goes on.

    Raises:
        KeyboardInterrupt: the run was interrupted; its checkpoint has been written.
    """
    from loopwise.train.panel import full_depth_share, progress

    config = run.config
    if run.is_done:
        print(f"{run.folder}: all {config.num_steps} steps are done")
        return
    if run.world.is_first:
        print(f"{config.name}: {describe(run)}", flush=True)
    with interruptible(run) as state, progress(config.name, enabled=run.world.is_first) as panel:
        for values in run.train(num_steps):
            panel.update(values["step"], config.num_steps, values, log=values["step"] % config.log_every == 0)
    share = full_depth_share(run.carry.flops, run.carry.flops_full)
    if run.world.is_first and share is not None:
        print(f"spent {share}")
    if run.world.is_first and run.folder is not None:
        where = "done" if run.is_done else f"stopped at step {run.carry.step} of {config.num_steps}"
        print(f"{where}: {run.folder}" + ("" if run.is_done else f", go on with: {again} {run.folder}"))
    if state["interrupted"]:
        raise KeyboardInterrupt


@contextmanager
def interruptible(run: Any) -> Iterator[dict[str, bool]]:
    """Within the block, Ctrl-C and SIGTERM let the running step finish; a second one does not."""
    state = {"interrupted": False}

    def stop(number: int, frame: Any) -> None:
        if state["interrupted"]:
            raise KeyboardInterrupt
        state["interrupted"] = True
        run.stop()
        print("stopping after this step", file=sys.stderr)

    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def describe(run: Run) -> str:
    """One line on a run."""
    from loopwise.models.attach import plan_of

    parameters = sum(item.numel() for item in run.model.parameters())
    start = f", from step {run.carry.step}" if run.carry.step else ""
    return (
        f"{amount(parameters)} parameters, plan {plan_of(run.model)}, {run.config.num_steps} steps of "
        f"{run.config.batch_size} rows on {run.world.size} x {run.world.device}{start}"
    )
