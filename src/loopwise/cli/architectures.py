"""`loopwise architectures`: the model types of transformers that run under a plan, and why others do not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from loopwise.cli import common


@dataclass(frozen=True, kw_only=True)
class Architectures:
    """Arguments of `loopwise architectures`."""

    status: Literal["all", "pass", "refused"] = "all"
    """list only these"""
    as_json: Annotated[FlagCreatePairsOff[bool], arg(name="json")] = False
    """print a JSON list"""

    def run(self) -> None:
        """Print the committed table."""
        rows = [row for row in architectures() if self.status in ("all", row["status"])]
        if self.as_json:
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            _print_table(rows)


def architectures() -> list[dict[str, Any]]:
    """The committed results of the conformance suite, one dict per model type, sorted by name.

    Each has `model_type`, `status` ("pass" or "refused"), `materializes` (bool) and `reason`.

    Raises:
        ValueError: this installation carries no results.
    """
    path = files("loopwise").joinpath("models", "architectures.json")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("this installation carries no conformance results; run make conformance") from None
    return sorted(rows, key=lambda row: row["model_type"])


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model type", no_wrap=True)
    table.add_column("loops", no_wrap=True)
    table.add_column("materialises", no_wrap=True)
    table.add_column("reason")
    for row in rows:
        loops, plain = row["status"] == "pass", row["materializes"]
        cells = (row["model_type"], "yes" if loops else "refused", "yes" if plain else "no", row.get("reason") or "")
        table.add_row(*(Text(cell) for cell in cells), style=None if loops else "dim")
    out = common.console()
    out.print(table)
    passing = sum(row["status"] == "pass" for row in rows)
    exporting = sum(bool(row["materializes"]) for row in rows)
    out.print(
        f"\n{len(rows)} model types: {passing} loop, {exporting} of them materialise, {len(rows) - passing} refused"
    )
