"""`loopwise compose`: which capabilities run together, which pairs are refused, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from loopwise.cli import common


@dataclass(frozen=True, kw_only=True)
class Compose:
    """Arguments of `loopwise compose`."""

    as_json: Annotated[FlagCreatePairsOff[bool], arg(name="json")] = False
    """print a JSON list"""

    def run(self) -> None:
        """Print the matrix and the reasons."""
        rows = composition()
        if self.as_json:
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            _print_matrix(rows)


def composition() -> list[dict[str, str]]:
    """One dict per unordered pair of capabilities: `first`, `second`, `status`, `reason`."""
    from loopwise.loop.compose import matrix

    rows = []
    seen = set()
    for (first, second), cell in matrix().items():
        if frozenset((first, second)) not in seen:
            seen.add(frozenset((first, second)))
            rows.append({"first": first, "second": second, "status": cell.status, "reason": cell.reason or ""})
    return rows


def _print_matrix(rows: list[dict[str, str]]) -> None:
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in (row["first"], row["second"])))
    status = {frozenset((row["first"], row["second"])): row["status"] for row in rows}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for number in range(1, len(names) + 1):
        table.add_column(str(number), no_wrap=True)
    for number, first in enumerate(names):
        # Pairs have no order, so the lower triangle would say everything twice.
        cells = (status.get(frozenset((first, second)), "") for second in names[number:])
        table.add_row(f"{number + 1:>2} {first}", *[""] * number, *cells)
    out = common.console()
    out.print(table)
    absent = [row for row in rows if row["status"] == "absent"]
    reasons = [row for row in rows if row["reason"] and row["status"] != "absent"]
    if absent:
        missing = dict.fromkeys(
            name for row in absent for name in row["reason"].removesuffix(" not built yet").split(" and ")
        )
        out.print(f"\nnot built yet: {', '.join(missing)}", markup=False)
    for row in reasons:
        out.print(f"{row['first']} + {row['second']}: {row['status']}: {row['reason']}", markup=False)
