"""`python -m loopwise.study claims/NAME`: carry out a claim, time it, or check and describe its results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from loopwise.io.amounts import amount
from loopwise.study.claims import SCALE, read_results
from loopwise.study.experiment import RUNS, Experiment, carry_out, pilot
from loopwise.study.page import write_index, write_page


@dataclass(frozen=True, kw_only=True)
class Study:
    """Carry out a claim: tune, train all arms under all seeds, decide, and write results, picture and page.

    An interrupted study goes on where it was.
    """

    folder: Annotated[Positional[Path], arg(metavar="claims/NAME")]
    """the folder with claim.toml and experiment.py"""
    jobs: int = 2
    """how many runs at a time, one thread each"""
    scale: str = SCALE
    """size of the experiment, cpu or another one that claim.toml declares"""
    runs: Path = RUNS
    """where run folders go; studies that share it share equal runs"""
    nice: int = 10
    """added to the niceness of the processes"""
    docs: Path = Path("docs") / "claims"
    """where the page goes"""
    pilot: FlagCreatePairsOff[bool] = False
    """only time a few steps of each arm, and print what everything will take"""
    check: FlagCreatePairsOff[bool] = False
    """only check the results that there are against the declaration, and write the page anew"""

    def run(self) -> None:
        """Do what the flags say."""
        if self.pilot:
            return self._time()
        if not self.check:
            experiment = Experiment.read(self.folder, self.scale)
            carry_out(experiment, runs=self.runs, num_workers=self.jobs, nice=self.nice)
        results = read_results(self.folder, self.scale)
        page = write_page(self.folder, self.docs, self.scale)
        write_index(self.folder.resolve().parent, self.docs)
        low, high = ("unbounded" if limit is None else f"{limit:.4g}" for limit in results["interval"])
        held = "held" if results["control"]["held"] else "failed"
        print(f"{results['verdict']}: effect {results['effect']:.4g} [{low}, {high}], margin {results['margin']:g}")
        print(f"control {held}: {results['control'].get('seen', results['control']['name'])}")
        for arm in results["arms"]:
            scores = ", ".join("-" if score is None else f"{score:.4g}" for score in arm["scores"])
            print(f"  {arm['name']}: {amount(arm['params'])} parameters, {amount(arm['flops'])}FLOPs: {scores}")
        print(f"{results.get('core_minutes', 0):g} core-minutes; {page}")

    def _time(self) -> None:
        experiment = Experiment.read(self.folder, self.scale)
        found = pilot(experiment)
        total = sum(item.core_minutes for item in found)
        width = max(len(item.name) for item in found)
        for item in found:
            tuning = f" + {item.num_tuning_runs:g} for tuning" if item.num_tuning_runs else ""
            each = f"{item.train_seconds / 60:6.2f} min a run, {item.score_seconds:5.1f} s to score"
            runs = f"{item.num_runs} runs{tuning}"
            print(f"{item.name:<{width}}  {each}, {runs}: {item.core_minutes:.1f} core-minutes")
        budget = experiment.claim.budget_core_minutes
        over = "" if total <= budget else ": OVER the budget, make it smaller or declare more before it is run"
        wall = f"{total / self.jobs:.1f} minutes with {self.jobs} jobs"
        print(f"all: {total:.1f} core-minutes of {budget:g} declared, {wall}{over}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for bad input, 130 for an interrupt."""
    try:
        tyro.cli(Study, prog="python -m loopwise.study", args=argv).run()
    except SystemExit as stop:  # tyro has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
