"""Experiment trackers that a run reports to besides its own JSON lines; each is an extra, imported when a run opens it.

A tracker gets numbers only: nested objects are flattened with "/", texts and lists are left to the metrics file.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from loopwise.io.atomic import write_text
from loopwise.loop.config import Component


class Tracking(ABC):
    """An open connection to a tracker, made by `Tracker.open`."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the numbers among the values of a step; steps never decrease."""

    @abstractmethod
    def close(self) -> None:
        """Flush and end; a second time does nothing."""


@dataclass(frozen=True, kw_only=True)
class Tracker(Component):
    """Base of the trackers."""

    def open(self, *, folder: Path, name: str, config: Mapping[str, Any], step: int = 0) -> Tracking:
        """Begin to report.

        Args:
            folder: the run folder.
            name: of the run.
            config: the run's config as JSON, shown beside its curves.
            step: where a resumed run goes on; later steps reported before are dropped where the tracker can.

        Raises:
            ValueError: the package is not installed; the extra to install is named.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TensorboardTracker(Tracker):
    """Event files for TensorBoard.

    Attributes:
        folder: where they go; None is `tensorboard` in the run folder.
    """

    kind: ClassVar[str | None] = "tracker.tensorboard"
    folder: str | None = None

    def open(self, *, folder: Path, name: str, config: Mapping[str, Any], step: int = 0) -> Tracking:
        """See `Tracker.open`. Later steps are hidden by a purge mark in the event file."""
        _import("tensorboard", self)
        from torch.utils.tensorboard.writer import SummaryWriter

        writer = SummaryWriter(self.folder or str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _leaves(config)))
        return _Tensorboard(writer)


@dataclass(frozen=True, kw_only=True)
class TrackioTracker(Tracker):
    """Trackio: a local database that `trackio show` displays.

    Attributes:
        project: runs of one project are shown together.
    """

    kind: ClassVar[str | None] = "tracker.trackio"
    project: str = "loopwise"

    def open(self, *, folder: Path, name: str, config: Mapping[str, Any], step: int = 0) -> Tracking:
        """See `Tracker.open`. Steps that a resumed run repeats appear twice."""
        trackio = _import("trackio", self)
        resume = "allow" if step else "never"
        return _Logger(trackio.init(project=self.project, name=name, config=dict(config), resume=resume))


@dataclass(frozen=True, kw_only=True)
class WandbTracker(Tracker):
    """Weights & Biases.

    Attributes:
        project: runs of one project are shown together.
        entity: user or team; None is the one configured.
        mode: "offline" writes files into the run folder that `wandb sync` uploads; "auto" is that too, unless the
            environment has WANDB_MODE or WANDB_API_KEY, which wandb then follows.
    """

    kind: ClassVar[str | None] = "tracker.wandb"
    project: str = "loopwise"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"

    def open(self, *, folder: Path, name: str, config: Mapping[str, Any], step: int = 0) -> Tracking:
        """See `Tracker.open`. A resumed run keeps its id; wandb ignores steps that it repeats."""
        wandb = _import("wandb", self)
        mode: str | None = self.mode
        if mode == "auto":
            configured = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY")
            mode = None if configured else "offline"
        remembered = folder / "wandb" / "run-id"
        known = remembered.read_text(encoding="utf-8") if step and remembered.is_file() else None
        online = {"resume": "allow"} if known and mode != "offline" else {}
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=name,
            id=known,
            dir=folder,
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(console="off"),  # or it records every redrawing of the panel
            **online,
        )
        remembered.parent.mkdir(exist_ok=True)
        write_text(remembered, run.id)
        return _Logger(run)


class _Tensorboard(Tracking):
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(values):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Logger(Tracking):
    """A run of trackio or wandb: both have `log` and `finish`."""

    def __init__(self, run: Any) -> None:
        self._run: Any = run

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        assert self._run is not None, "the tracker was closed"
        self._run.log(dict(numbers(values)), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of the numbers in nested objects, names joined by "/", without the step."""
    for name, value in _leaves(values):
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, float(value)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _import(package: str, tracker: Tracker) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{tracker.kind} needs the package {package} ({error}): pip install 'loopwise[{package}]', or leave the "
            "tracker out"
        ) from error
