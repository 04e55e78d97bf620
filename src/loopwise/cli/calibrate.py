"""`loopwise calibrate`: thresholds of halting rules on a text, and what they cost."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

import loopwise
from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.decode.calibrate import Curve

_FEWEST_BLOCKS = 4
_ZOOM = 5  # the second panel shows increases up to so many times the target


@dataclass(frozen=True, kw_only=True)
class Calibrate(common.Source):
    """Arguments of `loopwise calibrate`."""

    text: Annotated[Path, arg(metavar="FILE")]
    """UTF-8 text file to calibrate on"""
    halt: Annotated[str, arg(metavar="RULES")] = "kl,latent,confidence"
    """halting rules, separated by commas, such as "kl,argmax,confidence(measure=gap)" """
    plan: common.PlanText = None
    """order of visits, such as "0-9 (10-19)x4 20-29"; without it the source's own"""
    loops: common.LoopsText = None
    """loop counts: 4, or core=4"""
    exits: common.ExitsText = None
    """after how many visits tokens of a model without a loop may stop, such as 10,20; without it after every one"""
    target: float = 0.01
    """how much the loss may rise over that of full depth, in nats per token"""
    length: int = 128
    """tokens that a row of the text predicts"""
    block: int = 32
    """neighbouring tokens that count as one sample of the loss"""
    max_tokens: Annotated[int | None, arg(metavar="INT")] = None
    """use only the beginning of the text"""
    seed: int = 0
    """seed of first states that a loop draws at random"""
    json: common.FilePath = None
    """write the curves here"""
    png: common.FilePath = None
    """draw the curves here"""

    def run(self) -> None:
        """Record, print a table, and write the files asked for."""
        for path in (self.json, self.png):
            common.check_writable(path)
        plan, exits = common.planned(self.plan, self.loops), common.parse_exits(self.exits)
        self._check()
        text = common.read_text(self.text)
        names = split_rules(self.halt)
        common.quiet_libraries()
        rules = read_rules(names)
        ids = loopwise.load_tokenizer(self.source)(text, verbose=False)["input_ids"][: self.max_tokens]
        self._check_length(len(ids))
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)
        trace, curves = calibrate(
            model, ids, rules, exits=exits, length=self.length, block=self.block, seed=self.seed, on_rows=_progress()
        )
        rows = table_rows(curves, self.target)
        num_blocks = int(trace.block_N.max()) + 1
        _print_table(rows, trace, self.target, num_blocks)
        if self.json:
            told = {
                "source": self.source,
                "text": str(self.text),
                "plan": str(loopwise.plan_of(model)),
                "exits": exits,
                "target": self.target,
                "tokens": trace.num_tokens,
                "blocks": num_blocks,
                "rungs": trace.num_rungs,
                "loss": float(trace.loss_RN[-1].mean(dtype="float64")),
            }
            common.write_json(self.json, told | {"rules": rows, "versions": common.versions()})
        if self.png:
            panels = panels_of(rows, trace.num_rungs, self.target)
            from loopwise.plots.curves import draw_panels

            title = f"Halting rules on {self.text.name}, {trace.num_tokens:,} tokens"
            common.write_whole(self.png, lambda temporary: draw_panels(panels, temporary, title=title))

    def _check(self) -> None:
        if not 0 < self.target < float("inf"):
            raise ValueError(f"--target {self.target}: a loss increase above 0, in nats per token")
        for flag, value in (("--length", self.length), ("--block", self.block)):
            if value < 1:
                raise ValueError(f"{flag} {value}: at least 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"--max-tokens {self.max_tokens}: at least 2")

    def _check_length(self, num_ids: int) -> None:
        if num_ids < 2:
            raise ValueError("the text has fewer than two tokens, so none can be predicted")
        from loopwise.decode.trace import text_rows

        blocks = sum(math.ceil((len(row) - 1) / self.block) for row in text_rows(range(num_ids), self.length))
        if blocks < _FEWEST_BLOCKS:
            raise ValueError(
                f"the text has {num_ids} tokens, {blocks} blocks of {self.block}: at least {_FEWEST_BLOCKS} are needed,"
                " take a longer text or a smaller --block"
            )


def split_rules(text: str) -> list[str]:
    """The rules of a list: commas inside of brackets do not separate; ValueError when one is empty."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise ValueError(f"--halt {text!r}: write rules such as kl,latent")
    return parts


def read_rules(names: Sequence[str]) -> list[Any]:
    """Rules that can be calibrated; ValueError for others. `fixed` is always there to compare with."""
    from loopwise.decode.halting import FixedDepth, parse_halting
    from loopwise.decode.trace import knob

    rules = [parse_halting(name) for name in names]
    for rule in rules:
        knob(rule)
    return [rule for rule in dict.fromkeys(rules) if not isinstance(rule, FixedDepth)]


def calibrate(
    model: Any,
    ids: Sequence[int],
    rules: Sequence[Any],
    *,
    exits: Sequence[int] | None = None,
    length: int = 128,
    block: int = 32,
    seed: int = 0,
    on_rows: Callable[[int, int], object] | None = None,
) -> tuple[Any, list[Curve]]:
    """Record a text and follow every rule over its thresholds.

    Args:
        model: a causal language model, attached or not.
        ids: the text.
        rules: components or texts, see `decode.halting`.
        exits: see `decode.ladder.Ladder`.
        length: tokens that a row predicts.
        block: see `decode.trace.record`.
        seed: of random first states.
        on_rows: see `decode.trace.record`.

    Returns:
        The trace, and a curve for every rule, `fixed` first.

    Raises:
        ValueError: see `decode.trace.record`.
    """
    from loopwise.decode.calibrate import sweep
    from loopwise.decode.trace import record, text_rows

    rows = text_rows(ids, length)
    trace = record(model, rows, rules, block=block, on_rows=on_rows, exits=exits, seed=seed)
    return trace, [sweep(trace, rule) for rule in ("fixed", *rules)]


def table_rows(curves: Sequence[Curve], target: float) -> list[dict[str, Any]]:
    """One dict per rule: "rule", "chosen" (a place in the curve, None if not even the first holds) and "curve"."""
    from loopwise.decode.calibrate import choose, setting_text

    rows = []
    for curve in curves:
        columns = zip(
            curve.depth_G, curve.visits_G, curve.loss_G, curve.increase_G, curve.bound_G, curve.agreement_G, strict=True
        )
        names = ("depth", "visits", "loss", "increase", "bound", "agreement")
        points = [
            {"halt": setting_text(rule), **dict(zip(names, map(float, values), strict=True))}
            for rule, values in zip(curve.rules, columns, strict=True)
        ]
        rows.append({"rule": curve.name, "chosen": choose(curve, target), "curve": points})
    return rows


def panels_of(rows: Sequence[dict[str, Any]], num_rungs: int, target: float) -> list[Any]:
    """Loss, loss near the target, and agreement, each against mean depth; near the target what is chosen has a ring."""
    from loopwise.plots.curves import Curve, Panel

    def panel(field: str, label: str, most: float = float("inf"), **more: Any) -> Panel:
        curves, marks = [], []
        for number, row in enumerate(rows):
            points = [point for point in row["curve"] if point[field] <= most]
            x, y = ([point[name] for point in points] for name in ("depth", field))
            curves.append(Curve(label=_label(row, number), x=x, y=y, dashed=row["rule"] == "fixed", colour=number - 1))
            if row["chosen"] is not None and number and most < float("inf"):
                chosen = row["curve"][row["chosen"]]
                marks.append((chosen["depth"], chosen[field], str(number)))
        return Panel(curves=curves, x_label=f"mean depth, of {num_rungs}", y_label=label, marks=marks, **more)

    level = (target, f"target {target:g}")
    return [
        panel("loss", "loss (nats per token)"),
        panel("increase", "loss above full depth", most=_ZOOM * target, level=level),
        panel("agreement", "same top token as full depth"),
    ]


def _label(row: dict[str, Any], number: int) -> str:
    return f"{number}  {row['rule']}" if number else row["rule"]


def _progress() -> Callable[[int, int], None]:
    """Says on standard error how far it is, about ten times."""
    start, told = time.perf_counter(), [0.0]

    def on_rows(done: int, total: int) -> None:
        if done < total and done / total < told[0] + 0.1:
            return
        told[0] = done / total
        left = (time.perf_counter() - start) / done * (total - done)
        rest = f", about {left:.0f} s left" if done < total else ""
        print(f"row {done}/{total}{rest}", file=sys.stderr, flush=True)

    return on_rows


def _print_table(rows: Sequence[dict[str, Any]], trace: Any, target: float, num_blocks: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("--halt", no_wrap=True)
    for name in ("mean depth", "visits", "loss", "increase", "95 % bound", "same top token"):
        table.add_column(name, justify="right", no_wrap=True)
    full = float(trace.loss_RN[-1].mean(dtype="float64"))
    table.add_row("", "full depth", str(trace.num_rungs), str(trace.visits_R[-1]), f"{full:.4f}", "0", "", "100.0%")
    for number, row in enumerate(rows):
        if row["chosen"] is None:
            table.add_row(str(number or ""), Text(f"{row['rule']}: no threshold"), *[""] * 6)
            continue
        point = row["curve"][row["chosen"]]
        table.add_row(
            str(number or ""),
            Text(point["halt"]),
            f"{point['depth']:.2f}",
            f"{point['visits']:.1f}",
            f"{point['loss']:.4f}",
            f"{point['increase']:+.4f}",
            f"{point['bound']:+.4f}",
            f"{point['agreement']:.1%}",
        )
    out = common.console()
    out.print(table)
    out.print(
        f"\n{trace.num_tokens} tokens in {num_blocks} blocks; each rule at the threshold of least depth whose loss is "
        f"above full depth by at most {target:g} nats per token (one-sided 95 % bound)",
        markup=False,
    )
