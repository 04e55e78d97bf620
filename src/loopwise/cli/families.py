"""`loopwise families`: the public looped models that load, and how close to their reference they compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from loopwise.cli import common


@dataclass(frozen=True, kw_only=True)
class Families:
    """Arguments of `loopwise families`."""

    as_json: Annotated[FlagCreatePairsOff[bool], arg(name="json")] = False
    """print a JSON list"""

    def run(self) -> None:
        """Print the committed table."""
        rows = families()
        if self.as_json:
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            _print_table(rows)


def families() -> list[dict[str, Any]]:
    """The committed results of the parity tests, one dict per reference checkpoint, sorted by family.

    Each has `family`, `checkpoint` (its reference outputs), `plan` (text), `components` (kinds), `max_abs_diff` (over
    all reference outputs), `atol` (what is allowed), `cached_equals_uncached` (None where there is no cache), `source`
    and `differs` (between its paper and its code).

    Raises:
        ValueError: this installation carries no results.
    """
    path = files("loopwise").joinpath("checkpoints", "families.json")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            "this installation carries no parity results; run tests/checkpoints/parity.py --write"
        ) from None
    return sorted(rows, key=lambda row: (row["family"], row["checkpoint"]))


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("family", "plan", "components", "max difference", "cached = uncached"):
        table.add_column(title, no_wrap=title in ("family", "plan"))
    for row in rows:
        cached = {True: "yes", False: "no", None: "no cache"}[row["cached_equals_uncached"]]
        cells = (row["family"], row["plan"], ", ".join(row["components"]), f"{row['max_abs_diff']:.1e}", cached)
        table.add_row(*(Text(cell) for cell in cells))
    out = common.console()
    out.print(table)
    out.print("\nmax difference: over all outputs of tiny checkpoints that the reference code ran, in float32")
    for row in {row["family"]: row for row in rows}.values():
        out.print(Text(f"{row['family']}: {row['source']}" + (f". {row['differs']}" if row["differs"] else "")))
