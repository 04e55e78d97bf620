"""A process that trains and scores runs, one after the other: `python -m loopwise.study.worker [NICE]`.

It reads a run per line from standard input and writes what happens as lines of JSON to standard output. `pool` starts
it with one thread. An end of the process that asked for runs, or a polite signal, lets the running step finish and
writes a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopwise.study.scoring import about, read_scores, score_run, write_scores
from loopwise.train.config import RunConfig, parse
from loopwise.train.run import CONFIG, Run, TrainingError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two batches must not share a folder at the same time
    fcntl = None

Report = Callable[[dict[str, Any]], None]
_REPORT_SECONDS = 1.0
_LOCK = ".lock"


class StoppedError(Exception):
    """The run was asked to stop and has a checkpoint."""


def perform(
    config: RunConfig, folder: Path, *, rows: int, loops: Sequence[int] = (), report: Report | None = None
) -> dict[str, Any]:
    """Train a run in its folder to the end, or go on with it, and score it; return what `scores.json` then holds.

    A run that diverges is over: its scores say where it did.

    Raises:
        StoppedError: `report` raised an OSError, or the process was asked to end.
        ValueError: the config does not fit together, or the data is not what the run began with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        known = read_scores(folder, rows, loops)
        if known is not None:
            return known
        run = Run.open(folder) if (folder / CONFIG).is_file() else Run(config, folder)
        try:
            diverged, seconds = _train(run, report or (lambda _: None))
            scores = diverged or score_run(run, rows=rows, loops=loops)
        finally:
            run.close()
        scores |= {"core_seconds": round(seconds, 1)}
        write_scores(folder, scores)
        return scores


def _train(run: Run, report: Report) -> tuple[dict[str, Any] | None, float]:
    """Train to the end.

    Returns:
        The scores of a run that has diverged, None otherwise; and seconds of processor time of the whole training,
        where the steps of this call stand for all of them.
    """
    config, began = run.config, time.process_time()
    start, last, seconds = run.carry.step, 0.0, 0.0
    with _ending(run):
        try:
            for values in run.train():
                seconds = (time.process_time() - began) / (values["step"] - start)
                if time.monotonic() - last >= _REPORT_SECONDS:
                    last = time.monotonic()
                    try:
                        report({"step": values["step"], "loss": values["loss"]})
                    except OSError:
                        run.stop()
        except TrainingError as error:
            return about(run) | {"diverged": str(error), "loops": {}}, seconds * run.carry.step
    if not run.is_done:
        raise StoppedError(f"stopped at step {run.carry.step} of {config.num_steps}")
    return None, seconds * config.num_steps


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """Within the block a request to end the process lets the running step finish."""
    before = signal.signal(signal.SIGTERM, lambda *_: run.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process works in a folder; others wait."""
    with open(folder / _LOCK, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Work until standard input ends."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool answers Ctrl-C for all
    if len(sys.argv) > 1 and hasattr(os, "nice"):
        os.nice(int(sys.argv[1]))
    torch.set_num_threads(1)
    # Libraries that print must not be taken for answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    for line in sys.stdin:
        job = json.loads(line)
        try:
            perform(parse(job["config"]), Path(job["folder"]), rows=job["rows"], loops=job["loops"], report=report)
            report({"ended": True})
        except StoppedError:
            return
        except Exception as error:  # whatever it was, the other runs go on
            report({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


if __name__ == "__main__":
    main()
