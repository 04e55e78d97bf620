"""`loopwise score`: perplexity of a text file under several plans, side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

import loopwise
from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Score(common.Source):
    """Arguments of `loopwise score`."""

    text: Positional[Path]
    """UTF-8 text file to score"""
    plan: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PLAN")] = ()
    """a plan to score beside the source as it is"""
    loops: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="COUNTS")] = ()
    """score every plan at these loop counts: 4, or core=4"""
    window: int = 512
    """tokens that the model sees at once"""
    stride: int = 256
    """tokens by which the window moves; the rest of it is context"""
    max_tokens: Annotated[int | None, arg(metavar="INT")] = None
    """score only the beginning of the text"""
    json: common.FilePath = None
    """write the rows here"""
    png: common.FilePath = None
    """draw the rows here"""

    def run(self) -> None:
        """Score, print a table, and write the files asked for."""
        for path in (self.json, self.png):
            common.check_writable(path)
        check_windows(self.window, self.stride, self.max_tokens)
        text = common.read_text(self.text)
        plans = expand_plans(self.plan, self.loops)
        common.quiet_libraries()
        model = common.load_model(self)
        input_ids = encode_text(loopwise.load_tokenizer(self.source), text, self.max_tokens)
        rows = score_plans(model, input_ids, plans, window=self.window, stride=self.stride, on_row=_progress())
        _print_table(rows)
        if self.json:
            result = {"source": self.source, "text": str(self.text), "window": self.window, "stride": self.stride}
            common.write_json(self.json, {**result, "rows": rows, "versions": common.versions()})
        if self.png:
            from loopwise.plots import score_bars

            common.write_whole(self.png, lambda temporary: score_bars(rows, temporary))


def check_windows(window: int, stride: int, max_tokens: int | None) -> None:
    """ValueError when the windows make no sense."""
    if window < 2:
        raise ValueError(f"--window {window}: at least 2")
    if not 1 <= stride <= window:
        raise ValueError(f"--stride {stride}: from 1 to the window ({window})")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max-tokens {max_tokens}: at least 2")


def expand_plans(plans: Iterable[str | Plan], loops: Iterable[str] = ()) -> list[Plan]:
    """Every plan at every loop count, in order; the plans as they are when no count is given.

    Raises:
        ValueError: a plan or a count cannot be read, a plan has no such loop, or there are counts but no plan.
    """
    loops = list(loops)
    expanded = [common.planned(plan, counts) for plan in plans for counts in (loops or [None])]
    if loops and not expanded:
        raise ValueError("--loops needs at least one --plan")
    return [plan for plan in expanded if plan is not None]


def encode_text(tokenizer: Any, text: str, max_tokens: int | None = None) -> Any:
    """Token ids of a text as int64 `[1, T]`; ValueError when there are fewer than two."""
    input_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :max_tokens]
    if input_ids.shape[1] < 2:
        raise ValueError("the text has fewer than two tokens, so none can be predicted")
    return input_ids


def score_plans(
    model: Any,
    input_ids: Any,
    plans: Sequence[str | Plan],
    *,
    window: int = 512,
    stride: int = 256,
    on_row: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of `input_ids` under the model as it is and under each plan; its own plan is restored.

    Args:
        model: a transformers causal language model, attached or not.
        input_ids: int64 `[1, T]`.
        plans: plans to attach one after the other.
        window: tokens that the model sees at once.
        stride: tokens by which the window moves.
        on_row: called before each row with its index, the number of rows, and its label.

    Returns:
        One dict per row, the model as it is first: `label`, `plan` (text), `perplexity`, `nll` (nats per token),
        `tokens` (scored), `num_slots`, `unique_layers` (their number), `flops_per_token` (forward, at `window` tokens
        of context), `seconds`.

    Raises:
        ValueError: a plan does not fit the model, before anything is scored.
    """
    from loopwise.models.hub import layer_list
    from loopwise.plan import Plan

    num_layers = len(layer_list(model).layers)
    own = loopwise.plan_of(model)
    parsed = [Plan.parse(plan).validate(num_layers) for plan in plans]
    total = 1 + len(parsed)

    def row(index: int, label: str, plan: Plan) -> dict[str, Any]:
        if on_row:
            on_row(index, total, label)
        return {"label": label, "plan": str(plan), **_score_one(model, input_ids, plan, window, stride)}

    rows = [row(0, "as it is" if own else "plain", own or Plan.identity(num_layers))]
    try:
        for index, plan in enumerate(parsed, start=1):
            if loopwise.plan_of(model) is not None:
                loopwise.detach(model)
            loopwise.attach(model, plan)
            rows.append(row(index, str(plan), plan))
    finally:
        if parsed:
            if loopwise.plan_of(model) is not None:
                loopwise.detach(model)
            if own is not None:
                loopwise.attach(model, own)
    return rows


def _score_one(model: Any, input_ids: Any, plan: Plan, window: int, stride: int) -> dict[str, Any]:
    from loopwise.measure.cost import cost_of
    from loopwise.measure.score import perplexity

    start = time.perf_counter()
    score = perplexity(model, input_ids, window=window, stride=stride)
    return {
        "perplexity": score.perplexity,
        "nll": score.nll,
        "tokens": score.tokens,
        "num_slots": plan.num_slots,
        "unique_layers": len(plan.unique_layers),
        "flops_per_token": cost_of(model, plan, context=window).forward_flops_per_token,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _progress() -> Callable[[int, int, str], None]:
    """Says on standard error which row is being scored and, from the second on, how long the rest may take."""
    start = time.perf_counter()

    def on_row(index: int, total: int, label: str) -> None:
        spent = time.perf_counter() - start
        left = f", about {spent / index * (total - index):.0f} s left" if index else ""
        print(f"scoring {index + 1}/{total}: {label}{left}", file=sys.stderr, flush=True)

    return on_row


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plan")
    for name in ("slots", "perplexity", "against first", "cost against first", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    first = rows[0]
    for row in rows:
        table.add_row(
            Text(row["plan"] if row["label"] == row["plan"] else f"{row['plan']} ({row['label']})"),
            str(row["num_slots"]),
            f"{row['perplexity']:.4g}",
            f"x{row['perplexity'] / first['perplexity']:.3g}",
            f"x{row['flops_per_token'] / first['flops_per_token']:.3g}",
            f"{row['seconds']:.1f}",
        )
    out = common.console()
    out.print(table)
    out.print(
        f"\n{first['tokens']} tokens scored; plans change the depth, not the weights: nothing was trained for them"
    )
