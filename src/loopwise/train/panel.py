"""What a run shows while it works: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loopwise.io.amounts import amount, duration
from loopwise.train.memory import peak_bytes
from loopwise.train.trackers import numbers

_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"
_SPARK = 40
# Weight of the newest step in the mean time of a step: about the last twenty steps count.
_RECENT = 0.05
_REDRAW = 0.1  # seconds


class Progress:
    """A context manager that shows the steps of a run; `progress` chooses which kind.

    An exception or Ctrl-C inside the block leaves the terminal as it was, with what was shown last still readable.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._last: tuple[int, float] | None = None
        self._step_seconds: float | None = None

    def __enter__(self) -> Progress:
        self._last = None
        return self

    def __exit__(self, *exception: object) -> None:
        """End the display."""

    def update(self, step: int, num_steps: int, values: Mapping[str, Any], *, log: bool = True) -> None:
        """Show a step.

        Args:
            step: optimizer steps done.
            num_steps: steps of the whole run.
            values: what is known of the step. Shown are loss, lr, iterations, of "time" tokens_per_second and
                flops_per_second, and of a run whose model changes flops as a part of flops_full, where present; names
                that begin with "eval/" stay visible until the next ones.
            log: whether a plain line is due; the panel shows every step.
        """
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            took = (now - self._last[1]) / (step - self._last[0])
            before = self._step_seconds
            self._step_seconds = took if before is None else before + _RECENT * (took - before)
        self._last = (step, now)
        self._show(step, num_steps, values, log)

    def _show(self, step: int, num_steps: int, values: Mapping[str, Any], log: bool) -> None:
        """Nothing is shown by this class itself."""

    def _facts(self, step: int, num_steps: int, values: Mapping[str, Any]) -> dict[str, str]:
        """What is said about a step, as texts by name."""
        found = dict(numbers(values))
        facts = {name: f"{found[name]:.4g}" for name in ("loss", "lr", "iterations") if name in found}
        speeds = (
            ("tokens/s", "time/tokens_per_second", ""),
            ("FLOP/s", "time/flops_per_second", "FLOP/s"),
        )
        for label, name, unit in speeds:
            if math.isfinite(found.get(name, math.nan)):
                facts[label] = amount(found[name], unit)
        share = full_depth_share(found.get("flops", 0.0), found.get("flops_full", 0.0))
        if share is not None:
            facts["FLOPs"] = share
        memory = peak_bytes(_device())
        if memory is not None:
            facts["memory"] = amount(memory, "B")
        if self._step_seconds is not None and step < num_steps:
            facts["left"] = duration(self._step_seconds * (num_steps - step))
        return facts


class PlainProgress(Progress):
    """One line per logged step, without control characters."""

    def __init__(self, name: str, console: Console) -> None:
        super().__init__(name)
        self._console = console

    def _show(self, step: int, num_steps: int, values: Mapping[str, Any], log: bool) -> None:
        scores = _scores(values)
        if not log and not scores and step != num_steps:
            return
        facts = self._facts(step, num_steps, values) | scores
        labels = {"tokens/s": "{} tokens/s", "FLOP/s": "{}", "FLOPs": "{}"}
        parts = [labels.get(name, f"{name} {{}}").format(text) for name, text in facts.items()]
        # A log is read while it grows, also through a pipe.
        print(", ".join([f"step {step}/{num_steps}", *parts]), file=self._console.file, flush=True)


class LiveProgress(Progress):
    """A panel that is redrawn in place, ten times a second at most."""

    def __init__(self, name: str, console: Console) -> None:
        super().__init__(name)
        self._losses: list[float] = []
        self._scores: dict[str, str] = {}
        self._blocks = _BLOCKS if "utf" in (console.encoding or "").lower() else _PLAIN_BLOCKS
        self._newest: tuple[int, int, Mapping[str, Any]] | None = None
        self._drawn = -math.inf
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Progress:
        self._live.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        """Leave the last panel on the screen and give the terminal back."""
        self._redraw()
        self._live.stop()

    def _show(self, step: int, num_steps: int, values: Mapping[str, Any], log: bool) -> None:
        loss = values.get("loss")
        if loss is not None:
            self._losses.append(float(loss))
        self._scores |= _scores(values)
        self._newest = (step, num_steps, values)
        if time.monotonic() - self._drawn >= _REDRAW:
            self._redraw()

    def _redraw(self) -> None:
        if self._newest is not None:
            self._live.update(self._draw(*self._newest), refresh=True)
            self._drawn = time.monotonic()

    def _draw(self, step: int, num_steps: int, values: Mapping[str, Any]) -> RenderableType:
        facts = self._facts(step, num_steps, values)
        table = Table.grid(padding=(0, 2))
        pairs = [*facts.items(), *self._scores.items()]
        for first in range(0, len(pairs), 3):
            cells = [(Text(name, style="dim"), Text(text, style="bold")) for name, text in pairs[first : first + 3]]
            table.add_row(*[cell for pair in cells for cell in pair])
        bar = Table.grid()  # a bar by itself does not end its line
        bar.add_row(ProgressBar(total=num_steps, completed=step, width=_SPARK))
        rows: list[RenderableType] = [bar, table]
        if len(self._losses) > 1:
            rows.append(Text.assemble(("loss  ", "dim"), sparkline(self._losses, _SPARK, self._blocks)))
        title = Text(f"{self._name}: step {step} of {num_steps}")
        return Panel(Group(*rows), title=title, title_align="left", expand=False)


def progress(name: str, *, enabled: bool = True, console: Console | None = None) -> Progress:
    """The display that suits the console: live on a terminal, else plain lines; nothing when not enabled.

    Args:
        name: of the run.
        enabled: whether this process shows anything (the first rank does).
        console: where to; None is standard output as it is now.
    """
    if not enabled:
        return Progress(name)
    console = console or Console()
    is_live = console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(name, console) if is_live else PlainProgress(name, console)


def sparkline(values: list[float], width: int, blocks: str = _BLOCKS) -> str:
    """A curve in one line: the values in at most `width` means, from the lowest block to the highest.

    Means with numbers that are not finite are shown as "!".
    """
    columns = min(width, len(values))
    edges = [round(column * len(values) / columns) for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] if math.isfinite(mean) else "!" for mean in means)


def full_depth_share(flops: float, flops_full: float) -> str | None:
    """FLOPs spent, beside what the final model would have spent on the same tokens; None where that is the same."""
    if not flops_full or math.isclose(flops, flops_full):
        return None
    return f"{amount(flops, 'FLOP')}, {flops / flops_full:.0%} of the {amount(flops_full, 'FLOP')} at full depth"


def _scores(values: Mapping[str, Any]) -> dict[str, str]:
    return {name.removeprefix("eval/"): f"{value:.4g}" for name, value in numbers(values) if name.startswith("eval/")}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
