"""`loopwise propose`: which layers of a model to loop, tie or prune, and what that costs on a text."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

import loopwise
from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.measure.propose import Progress, Proposal, Proposals
    from loopwise.measure.similarity import Cosines
    from loopwise.plots.heatmap import Heatmap, LayerBars

Counts = Annotated[str | None, arg(metavar="COUNTS")]
# A token has at least one byte, and few have more than this many characters: what need not be tokenised.
LETTERS_PER_TOKEN = 64
HEADS = {
    "prune": "leave {count} out",
    "loop": "run a block {count} times",
    "retrofit": "a core that can run any number of times",
    "tie": "one loop of the stack, {count} layers become one",
    "tie_block": "a loop of {count} neighbouring blocks",
}
NOTHING = "none"
# Standard deviations from chance at which the colours end.
FAR = 10


@dataclass(frozen=True, kw_only=True)
class Propose(common.Source):
    """Say which layers to loop, tie or prune, and why; each proposal is what `loopwise edit --op` takes.

    Hidden states and weights are measured, candidates are chosen by published rules, and each is scored on the text as
    the model is, in another order of its own layers: nothing is trained. One half of the rows chooses, the other half
    gives the loss that is reported.
    """

    text: Positional[Path]
    """UTF-8 text file to measure on"""
    loop: Counts = None
    """how often a middle block runs: 2,3 (default 2), or none"""
    tie: Counts = None
    """how many layers become one: 2,3 (default the smallest that divides), or none"""
    prune: Counts = None
    """how many layers to leave out: 2,4 (default an eighth), or none"""
    window: int = 64
    """tokens of a row"""
    max_tokens: Annotated[int, arg(metavar="INT")] = 1024
    """tokens to measure on, in rows spread over the text"""
    json: common.FilePath = None
    """write all arrays and proposals here"""
    png: common.FilePath = None
    """draw the measures here"""

    def run(self) -> None:
        """Measure, print proposals, and write the files asked for."""
        for path in (self.json, self.png):
            common.check_writable(path)
        counts = {name: read_counts(name, getattr(self, name)) for name in ("prune", "loop", "tie")}
        if self.window < 2:
            raise ValueError(f"--window {self.window}: at least 2")
        if self.max_tokens < 8:
            raise ValueError(f"--max-tokens {self.max_tokens}: at least 8")
        text = common.read_text(self.text)
        common.quiet_libraries()
        model = common.load_model(self)
        tokenizer = loopwise.load_tokenizer(self.source)
        from loopwise.measure.propose import propose

        choose, report = rows_of(tokenizer, text, self.window, self.max_tokens)
        found = propose(model, [choose], [report], **counts, progress=_progress())
        _print(found, choose.shape, report.shape)
        if self.json:
            head = {"source": self.source, "text": str(self.text), "window": choose.shape[1]}
            head |= {"rows": {"choose": len(choose), "report": len(report)}}
            _write(self.json, {**head, **found.to_json(), "versions": common.versions()})
        if self.png:
            common.write_whole(self.png, lambda temporary: _draw(found, temporary, Path(self.source).name))


def read_counts(name: str, text: str | None) -> tuple[int, ...] | None:
    """Read `2,3`; `none` is no count, None the default.

    Raises:
        ValueError: anything but different numbers from 1.
    """
    if text is None:
        return None
    if text == NOTHING:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:9]) and len(part) < 9 for part in parts):
        raise ValueError(f"--{name} {text!r}: write numbers from 1 such as 2 or 2,3, or {NOTHING}")
    return tuple(dict.fromkeys(map(int, parts)))


def rows_of(tokenizer: Any, text: str, window: int, max_tokens: int) -> tuple[Any, Any]:
    """Rows of a text that choose, and rows that report: int64 `[R, window]` each, taken in turn over the text.

    A short text gets shorter rows, so that each side has two.

    Raises:
        ValueError: fewer than 8 tokens.
    """
    import torch

    encoded = tokenizer(text[: max_tokens * LETTERS_PER_TOKEN], return_tensors="pt", verbose=False)
    ids_T = encoded["input_ids"][0]
    if len(ids_T) < 8:
        raise ValueError(f"the text has {len(ids_T)} tokens: at least 8 are needed, for rows that choose and others")
    window = min(window, min(len(ids_T), max_tokens) // 4)
    num_rows = min(len(ids_T), max_tokens) // window
    starts = torch.linspace(0, len(ids_T) - window, num_rows).long()
    rows = ids_T[starts[:, None] + torch.arange(window)]
    return rows[::2], rows[1::2]


def _write(path: Path, data: Any) -> None:
    """Indented JSON with every row of a matrix on one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[[-\d.,\seEnul+]+\]", lambda match: " ".join(match[0].split()), text)
    common.write_whole(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def _progress() -> Progress:
    """Says on standard error what is measured, from the second plan on with how long the rest may take."""
    start = 0.0

    def progress(index: int, total: int, label: str) -> None:
        nonlocal start
        if not total:
            line = f"measuring {label}"
        else:
            start = start or time.perf_counter()
            left = (time.perf_counter() - start) / index * (total - index) if index else 0.0
            line = f"scoring {index + 1}/{total}: {label}" + (f", about {left:.0f} s left" if index else "")
        print(line, file=sys.stderr, flush=True)

    return progress


def _print(found: Proposals, choose: Any, report: Any) -> None:
    from rich.text import Text

    from loopwise.measure.candidates import described

    out = common.console()
    split = found.influence.split()
    out.print(
        f"{len(found.influence.layers)} layers, {choose[0]} rows of {choose[1]} tokens chose, {report[0]} others scored"
    )
    if split is None:
        out.print("angular distance has no two knees: the middle is taken as all layers but the ends")
    else:
        out.print(f"{described(split)} (knees of the angular distance)")
    for proposal in found.proposals:
        out.print()
        for line in _lines(proposal):
            out.print(Text(line))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    out.print("\nnothing was trained: each loss is that of the edit before any healing")


def _lines(proposal: Proposal) -> list[str]:
    item = proposal.candidate
    plan = item.alias
    chosen = "" if proposal.tried == 1 else f", best of {proposal.tried}"
    return [
        item.text,
        f"  what  {HEADS[item.kind].format(count=item.count)}: {plan.num_slots} visits of "
        f"{len(plan.unique_layers)} layers{chosen}",
        *(f"  why   {reason}" for reason in item.reason.split("; ")),
        f"  loss  {proposal.loss}{'' if proposal.loss.is_above_noise else ', not above noise'}",
    ]


def _draw(found: Proposals, path: Path, title: str) -> None:
    from loopwise.plots.heatmap import draw_heatmaps

    draw_heatmaps([*_state_panels(found), *_weight_panels(found)], path, title=title)


def _state_panels(found: Proposals) -> list[Heatmap | LayerBars]:
    from loopwise.measure.candidates import described, middle
    from loopwise.plots.heatmap import Heatmap, LayerBars

    split, num_layers = found.influence.split(), len(found.influence.layers)
    return [
        Heatmap(
            values=found.influence.grid(),
            title="Angular distance over a block, last tokens",
            x_label="first layer of the block",
            y_label="layers of the block",
            unit="angle / 180 degrees",
            first_y=1,
        ),
        LayerBars(
            values=found.influence.influence,
            title="Block influence: how far a layer turns the state",
            unit="1 - cosine",
            marked=None if split is None else middle(split, num_layers),
            note="" if split is None else f"by the knees: {described(split)}",
        ),
        Heatmap(
            values=found.influence.state_cosine,
            title="States: cosine before layers (the last: after all)",
            x_label="before layer",
            y_label="before layer",
        ),
        Heatmap(
            values=found.influence.update_cosine,
            title="Updates: cosine of what two layers add",
            has_diagonal=False,
        ),
    ]


def _weight_panels(found: Proposals) -> list[Heatmap]:
    import numpy as np

    from loopwise.plots.heatmap import Heatmap

    groups = found.weights.groups
    if not groups:
        return []
    cosines = {group.name.removesuffix(".weight"): group.compare() for group in groups}
    # Of the matrices the one whose neighbours are the farthest from chance: a mean over groups hides it.
    matrices = {name: cosines[name] for name, group in zip(cosines, groups, strict=True) if group.is_matrix}
    name, shown = max((matrices or cosines).items(), key=lambda item: np.nan_to_num(abs(_deviations(item[1], 1))))
    lags = range(1, found.weights.num_layers)
    return [
        Heatmap(values=shown.cosine, title=f"Weights: {name}, the farthest from chance", has_diagonal=False),
        Heatmap(
            values=[[_deviations(item, k) for k in lags] for item in cosines.values()],
            title="Weights at distance k: above chance",
            x_label="distance k",
            y_label="",
            unit=f"standard deviations (to {FAR})",
            first_x=1,
            low=-FAR,
            high=FAR,
            rows=tuple(cosines),
        ),
    ]


def _deviations(cosines: Cosines, k: int) -> float:
    """How far R(k) is above chance, in standard deviations; NaN without a pair, 0 for constants."""
    mean, std = cosines.chance_at(k)
    return (cosines.lag(k) - mean) / std if std else 0.0
