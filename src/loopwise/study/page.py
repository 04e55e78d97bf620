"""The page of a claim: the published figure beside ours, every arm with its cost, the verdict, how to run it again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopwise.io.amounts import amount
from loopwise.io.atomic import write_text
from loopwise.study.claims import CLAIM, EXPERIMENT, SCALE, Claim, interval_of, read_claim, read_results, results_path
from loopwise.study.experiment import picture_path
from loopwise.study.stats import mean_interval

NOTES = "notes.md"
_SIDES = {
    "above": "reproduced if the whole interval is above the margin",
    "below": "reproduced if the whole interval is below the margin",
    "within": "reproduced if the whole interval is within the margin on both sides of 0",
}


def write_page(folder: Path | str, docs: Path | str, scale: str = SCALE) -> Path:
    """Write the page of a claim's checked results, `docs/NAME.md`; another scale gets `docs/NAME.SCALE.md`.

    `notes.md` beside the declaration, where there is one, becomes a section of the page.

    Raises:
        ValueError: the results are not what was declared.
    """
    folder, docs = Path(folder), Path(docs)
    claim, results = read_claim(folder).at(scale), read_results(folder, scale)
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / (f"{claim.name}.md" if scale == SCALE else f"{claim.name}.{scale}.md")
    picture = picture_path(folder, scale)
    link = os.path.relpath(picture.resolve(), docs.resolve()) if picture.is_file() else None
    notes = folder / NOTES
    said = notes.read_text(encoding="utf-8").strip() if notes.is_file() else ""
    write_text(path, page_text(claim, results, Path(link).as_posix() if link else None, said))
    return path


def write_index(claims: Path | str, docs: Path | str) -> Path:
    """Write `docs/index.md`, a line for every claim of a folder that has been run at the usual size."""
    rows = []
    for path in sorted(Path(claims).glob(f"*/{CLAIM}")):
        folder = path.parent
        if not results_path(folder).is_file():
            continue
        claim = read_claim(folder)
        published = f"{claim.published.figure} ({claim.published.source})"
        try:
            results = read_results(folder)
        except ValueError:
            ours, found = "", "to be run again"
        else:
            ours, found = str(interval_of(results)), results["verdict"]
        rows.append((f"[{_title(claim)}]({claim.name}.md)", claim.claim, published, ours, found))
    lines = [
        "# Claims",
        "",
        "What the field says, run at the sizes of this repository. Each page has the arms with their",
    ]
    lines += ["parameters and FLOPs, the score of every seed, and the command.", ""]
    lines += [*_table(("", "claim", "published", "effect and interval", "verdict"), rows), ""]
    path = Path(docs) / "index.md"
    write_text(path, "\n".join(lines))
    return path


def page_text(claim: Claim, results: Mapping[str, Any], picture: str | None, notes: str = "") -> str:
    """The page as Markdown; `notes` are what people have to say about the result once it is there."""
    effect = interval_of(results)
    control, versions = results["control"], results["versions"]
    ours = f"{_number(effect.estimate)}, interval [{_number(effect.low)}, {_number(effect.high)}]"
    lines = [
        f"# {_title(claim)}",
        "",
        f"> {claim.claim}",
        "",
        f"**{results['verdict'].capitalize()}** at this size.",
        "",
        *_table(
            ("", "published", "ours"),
            [
                ("figure", claim.published.figure, f"effect {ours}"),
                ("source", f"{claim.published.source} ({claim.published.confidence})", f"`{results['command']}`"),
            ],
        ),
        "",
        f"- Effect: {claim.effect}.",
        f"- Margin: {claim.margin:g}; {_SIDES[claim.expects]}.",
        f"- Statistic: {claim.statistic}.",
        f"- Positive control: {control['name']}. It {'held' if control['held'] else 'failed'}{_seen(control)}.",
        f"- Floor: {claim.floor}.",
        f"- Learning rates: {claim.tuned}.",
        "",
        "## Arms",
        "",
        f"Scores are {results.get('metric', 'exact accuracy')} on {claim.rows} test rows, one per seed "
        f"({', '.join(map(str, results['seeds']))}).",
        "",
        *_table(
            ("arm", "parameters", "unrolled", "training FLOPs", "steps", "learning rate", "scores", "mean and 95 %"),
            [_arm(arm) for arm in results["arms"]],
        ),
        "",
    ]
    if picture:
        lines += [f"![What was measured]({picture})", ""]
    if notes:
        lines += ["## Reading the result", "", notes, ""]
    lines += _tuning(results.get("tuning", []))
    lines += _details(results.get("details", {}))
    lines += [
        "## Running it",
        "",
        f"`{results['command']}` took {results.get('core_minutes', 0):g} core-minutes "
        f"({claim.budget_core_minutes:g} were declared) with "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}. The declaration was made before the "
        f"runs; `results.json` holds its hash and that of `{EXPERIMENT}`, and a test refuses results whose declaration "
        f"has changed.",
        "",
    ]
    return "\n".join(lines)


def _title(claim: Claim) -> str:
    return claim.name.replace("_", " ").capitalize()


def _seen(control: Mapping[str, Any]) -> str:
    return f": {control['seen']}" if control.get("seen") else ""


def _arm(arm: Mapping[str, Any]) -> tuple[str, ...]:
    known = [score for score in arm["scores"] if score is not None]
    interval = mean_interval(known) if known else None
    limits = "" if interval is None else f" ({_number(interval.low)} to {_number(interval.high)})"
    return (
        arm["name"],
        amount(arm["params"]),
        amount(arm["params_unrolled"]) if "params_unrolled" in arm else "",
        amount(arm["flops"]),
        str(arm.get("steps", "")),
        f"{arm['lr']:g}" if "lr" in arm else "",
        ", ".join("diverged" if score is None else _number(score) for score in arm["scores"]),
        "" if interval is None else _number(interval.estimate) + limits,
    )


def _tuning(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table of what was tried."""
    if not records:
        return []
    rows = []
    for record in records:
        if "shares" in record:
            rows.append((record["arm"], f"as {record['shares']}", f"{record['chosen']:g}"))
            continue
        scores = zip(record["lrs"], record["scores"], strict=True)
        tried = ", ".join(f"{lr:g}: {'diverged' if score is None else _number(score)}" for lr, score in scores)
        end = " (end of the range)" if record["at_end"] else ""
        rows.append((record["arm"], tried, f"{record['chosen']:g}{end}"))
    first = next(record for record in records if "shares" not in record)
    about = f"Validation {first['metric']} on seeds {', '.join(map(str, first['seeds']))}, which decide nothing else."
    head = ("arm", "learning rate: score", "chosen")
    return ["## Tuning", "", about, "", *_table(head, rows), ""]


def _details(details: Mapping[str, Any]) -> list[str]:
    if not details:
        return []
    return ["## Further numbers", "", *_table(("what", "value"), [(key, _shown(details[key])) for key in details]), ""]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"({_shown(item)})" if isinstance(item, list | tuple) else _shown(item) for item in value)
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) != float("inf") else "unbounded"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]
