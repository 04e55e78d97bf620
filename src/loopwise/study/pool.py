"""Many runs at once, each in a process with one thread and in a folder of its own.

A folder is named by a hash of its run's config, so that equal runs of several studies are done once, and a batch that
was interrupted goes on where it was: finished runs are read, begun ones resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

import loopwise
from loopwise.io.amounts import duration
from loopwise.loop.config import to_dict
from loopwise.study.scoring import RunResult, read_scores
from loopwise.train.config import RunConfig
from loopwise.train.data.source import DataConfig

ROWS = 1024
# Neither changes what is computed.
_NOT_HASHED = ("name", "trackers")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_OF_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.2
_LINE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be done.

    Attributes:
        name: of the arm that it belongs to.
        config: what it does.
        rows: how many test rows score it.
        loops: loop counts at which it is scored besides the plan's own; None are those of the config's evaluation.
    """

    name: str
    config: RunConfig
    rows: int = ROWS
    loops: tuple[int, ...] | None = None

    @property
    def scored_loops(self) -> tuple[int, ...]:
        """Loop counts besides the plan's own."""
        return self.config.evaluation.loops if self.loops is None else self.loops

    @property
    def label(self) -> str:
        """What it is called in lines for people."""
        return f"{self.name}, seed {self.config.seed}"


def config_hash(config: RunConfig) -> str:
    """16 hexadecimal digits, the same for configs that train the same."""
    values = {name: value for name, value in to_dict(config).items() if name not in _NOT_HASHED}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def run_all(
    jobs: Iterable[Job],
    folder: Path | str,
    *,
    num_workers: int = 1,
    nice: int = 0,
    out: TextIO | None = None,
) -> list[RunResult]:
    """Do all runs and score them.

    A run that diverges is recorded as such and the others go on; so they do when one fails.

    Args:
        jobs: in the order in which they are begun; equal configs are run once.
        folder: where the run folders are.
        num_workers: processes at a time, one thread each.
        nice: added to the niceness of the processes.
        out: where progress goes, standard error by default.

    Returns:
        A result per job, in order.

    Raises:
        ValueError: no jobs, a bad number of workers, data that has changed since a run was finished, or runs that
            failed; the first is named, after all others were done.
        KeyboardInterrupt: begun runs have a checkpoint and go on the next time.
    """
    jobs, folder = list(jobs), Path(folder)
    if not jobs:
        raise ValueError("there are no runs to do")
    if num_workers < 1:
        raise ValueError(f"jobs={num_workers}: use at least 1 process")
    distinct: dict[Path, Job] = {}
    for job in jobs:
        path = folder / config_hash(job.config)
        distinct[path] = _joined(distinct[path], job) if path in distinct else job
    missing = {path: job for path, job in distinct.items() if not _is_done(path, job)}
    batch = _Batch(missing, len(distinct), out or sys.stderr)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        batch.work(min(num_workers, len(missing)), nice)
    return [_result(job, folder / config_hash(job.config), distinct) for job in jobs]


def _joined(one: Job, other: Job) -> Job:
    loops = tuple(sorted({*one.scored_loops, *other.scored_loops}))
    return Job(name=one.name, config=one.config, rows=max(one.rows, other.rows), loops=loops)


def _result(job: Job, path: Path, distinct: dict[Path, Job]) -> RunResult:
    scored = distinct[path]
    scores = read_scores(path, scored.rows, scored.scored_loops)
    if scores is None:
        raise ValueError(f"{path} was scored anew by another study meanwhile: start this one again")
    return RunResult(name=job.name, config=job.config, folder=path, scores=scores)


def _is_done(path: Path, job: Job) -> bool:
    scores = read_scores(path, job.rows, job.scored_loops)
    if scores is None:
        return False
    now = _fingerprint(job.config.data)
    if scores["fingerprint"] != now:
        raise ValueError(
            f"{path} was finished on data with fingerprint {scores['fingerprint'][:16]}, the same config now gives "
            f"{now[:16]}: delete the folder to run it anew"
        )
    return True


_FINGERPRINTS: dict[str, str] = {}


def _fingerprint(data: DataConfig) -> str:
    key = json.dumps(to_dict(data), sort_keys=True)
    if key not in _FINGERPRINTS:
        _FINGERPRINTS[key] = data.open(seed=0).fingerprint
    return _FINGERPRINTS[key]


@dataclass(kw_only=True)
class _Progress:
    """A run that has begun: where it stands and how fast it is."""

    first: int = -1
    step: int = 0
    began: float = 0.0
    last: float = 0.0
    loss: float = float("nan")

    def update(self, values: dict[str, Any]) -> None:
        self.last = time.monotonic()
        if self.first < 0:
            self.first, self.began = values["step"], self.last
        self.step, self.loss = values["step"], values["loss"]

    @property
    def seconds_per_step(self) -> float | None:
        return (self.last - self.began) / (self.step - self.first) if self.step > self.first >= 0 else None


@dataclass
class _Batch:
    """Runs that are done together.

    Attributes:
        jobs: by folder, those that are not done.
        total: of all runs, those that were done before included.
        out: where progress goes.
    """

    jobs: dict[Path, Job]
    total: int
    out: TextIO
    running: dict[Path, _Progress] = field(default_factory=dict)
    ended: set[Path] = field(default_factory=set)
    failed: dict[Path, str] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    processes: list[subprocess.Popen] = field(default_factory=list)
    errors: dict[int, IO[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_stopping: bool = False

    def work(self, num_workers: int, nice: int) -> None:
        """Do the runs."""
        waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for path in self.jobs:
            waiting.put(path)
        threads = [threading.Thread(target=self._serve, args=(waiting, nice), daemon=True) for _ in range(num_workers)]
        for thread in threads:
            thread.start()
        try:
            shown = time.monotonic()
            while any(thread.is_alive() for thread in threads):
                time.sleep(_POLL_SECONDS)
                pause = 1.0 if self.out.isatty() else _LINE_SECONDS
                if time.monotonic() - shown >= pause:
                    shown = time.monotonic()
                    self._show(num_workers)
        except KeyboardInterrupt:
            self.is_stopping = True
            self._print("stopping; runs that have begun go on from here the next time")
            for process in self.processes:
                process.terminate()
            for thread in threads:
                thread.join()
            raise
        if self.failed:
            path, message = next(iter(self.failed.items()))
            more = f" (and {len(self.failed) - 1} more runs failed)" if len(self.failed) > 1 else ""
            raise ValueError(f"{self.jobs[path].label}: {message}{more}")

    def _serve(self, waiting: queue.SimpleQueue[Path], nice: int) -> None:
        """Let a process do runs until none is left; a new one takes over where it dies."""
        process: subprocess.Popen | None = None
        while not self.is_stopping:
            try:
                path = waiting.get_nowait()
            except queue.Empty:
                break
            if process is None or process.poll() is not None:
                process = self._start(nice)
            self._follow(path, process)
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _start(self, nice: int) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        environment |= dict.fromkeys((*_ONE_THREAD, "TQDM_DISABLE"), "1")
        # The same package, whatever folder this process started in.
        home = str(Path(loopwise.__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (home, environment.get("PYTHONPATH"))))
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-m", "loopwise.study.worker", str(nice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            encoding="utf-8",
            # A Ctrl-C of the terminal is answered here, for all of them.
            start_new_session=True,
        )
        with self.lock:
            self.processes.append(process)
            self.errors[process.pid] = errors
        return process

    def _follow(self, path: Path, process: subprocess.Popen) -> None:
        """Hand a run to a process and read what it says of it."""
        job = self.jobs[path]
        with self.lock:
            self.running[path] = progress = _Progress()
        assert process.stdin is not None and process.stdout is not None
        asked = {"folder": str(path), "config": to_dict(job.config), "rows": job.rows, "loops": job.scored_loops}
        message: str | None = None
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                values = json.loads(line)
                if "ended" in values:
                    message = ""
                    break
                if "failed" in values:
                    message = values["failed"]
                    break
                with self.lock:
                    progress.update(values)
        except BrokenPipeError:
            pass
        if message is None:
            message = self._died(process)
        with self.lock:
            del self.running[path]
            if progress.seconds_per_step is not None:
                self.speed[job.name] = progress.seconds_per_step
            if not message:
                self.ended.add(path)
            elif not self.is_stopping:
                self.failed[path] = message
        if not self.is_stopping:
            self._print_ended(path, message)

    def _died(self, process: subprocess.Popen) -> str:
        """What a process that ended without an answer has left."""
        file = self.errors[process.pid]
        code = process.wait()
        file.seek(0)
        lines = file.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process ended with code {code}" + (f": {last}" if last else "")

    def _print_ended(self, path: Path, message: str) -> None:
        job = self.jobs[path]
        if message:
            return self._print(f"{job.label}: failed, {message}")
        scores = read_scores(path, job.rows, job.scored_loops)
        assert scores is not None
        if scores["diverged"] is not None:
            return self._print(f"{job.label}: diverged at {scores['diverged'].partition(';')[0]}")
        found = scores["loops"][scores["plan_loops"]]
        shown = ", ".join(f"{name} {found[name]:.4g}" for name in ("loss", "accuracy") if name in found)
        self._print(f"{job.label}: {shown}")

    def _show(self, num_workers: int) -> None:
        """Say where the runs are and how long they will take."""
        with self.lock:
            done = self.total - len(self.jobs) + len(self.ended) + len(self.failed)
            at = [
                f"{self.jobs[path].label}: step {item.step} of {self.jobs[path].config.num_steps}, loss {item.loss:.3g}"
                for path, item in self.running.items()
                if item.step
            ]
            left = self._seconds_left()
        parts = [f"{done} of {self.total} runs done", *at]
        if left is not None:
            parts.append(f"about {duration(left / num_workers)} left")
        self._print("; ".join(parts), passing=True)

    def _seconds_left(self) -> float | None:
        """Seconds of one process for what is left; runs of an arm are taken to be alike, unknown arms as the mean."""
        speed = dict(self.speed)
        for path, item in self.running.items():
            if item.seconds_per_step is not None:
                speed[self.jobs[path].name] = item.seconds_per_step
        if not speed:
            return None
        mean, total = sum(speed.values()) / len(speed), 0.0
        for path, job in self.jobs.items():
            if path not in self.ended and path not in self.failed:
                step = self.running[path].step if path in self.running else 0
                total += (job.config.num_steps - step) * speed.get(job.name, mean)
        return total

    def _print(self, line: str, *, passing: bool = False) -> None:
        """Print a line; on a terminal a passing one is overwritten by the next."""
        if not self.out.isatty():
            print(line, file=self.out, flush=True)
            return
        width = os.get_terminal_size(self.out.fileno()).columns - 1
        line = line[:width] if passing else line
        print(f"\r\x1b[2K{line}", end="" if passing else "\n", file=self.out, flush=True)


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Results grouped by the name of their arm, each sorted by seed."""
    found: dict[str, list[RunResult]] = {}
    for result in sorted(results, key=lambda item: item.seed):
        found.setdefault(result.name, []).append(result)
    order = dict.fromkeys(result.name for result in results)
    return {name: found[name] for name in order}
