"""A claim as it is declared before it is run, the rule that decides it, and the form of its results.

`claims/NAME/claim.toml` declares, `experiment.py` beside it trains and measures, `results.json` holds what came out and
the hashes of both files: results of a declaration that has changed since are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from loopwise.io.atomic import write_text
from loopwise.loop.config import suggest
from loopwise.study.stats import Interval

CLAIM, EXPERIMENT = "claim.toml", "experiment.py"
SCALE = "cpu"
"""The scale whose results are the claim's `results.json`."""
EXPECTS = ("above", "below", "within")
VERDICTS = ("reproduced", "not reproduced", "inconclusive")
_KEYS = (
    "claim", "verdict", "effect", "interval", "margin", "seeds", "arms", "control", "published", "command", "versions",
    "declared",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others have reported.

    Attributes:
        figure: the number or finding that ours stands beside.
        source: where it is printed: arXiv id with table, figure or section.
        confidence: how sure the reading is, such as "table read" or "read off a plot".
    """

    figure: str
    source: str
    confidence: str


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the learning rate of every arm is chosen, on seeds that decide nothing else.

    Attributes:
        lrs: the values that are tried.
        seeds: of the tuning runs.
        metric: "loss" (the least is best), "accuracy" or "token_accuracy", on validation rows after the last step.
        steps: optimizer steps of a tuning run; None is those of the arm.
        share: arm -> arm whose choice it takes over.
    """

    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    metric: str = "loss"
    steps: int | None = None
    share: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The content of `claim.toml`.

    Attributes:
        name: of its folder.
        claim: what is said to hold, in one sentence.
        source: arXiv id of who said it.
        published: their figure.
        effect: definition of the number that decides.
        expects: which effects bear the claim out: "above" the margin, "below" it, or "within" it on both sides of 0.
        margin: in the unit of the effect.
        statistic: how the interval of the effect is made.
        arms: names of the arms of the experiment, in order.
        seeds: of every arm.
        control: what must be seen for the experiment to be able to decide at all.
        floor: what a model that has learned nothing scores.
        budget_core_minutes: of all runs, tuning included, from a timed pilot.
        tuned: how the learning rates were chosen, in words.
        tuning: the search for them; None takes those of the arms.
        rows: test rows that score a run.
        scale: name of another size -> fields that it replaces: seeds, rows, budget_core_minutes.
    """

    name: str
    claim: str
    source: str
    published: Published
    effect: str
    expects: Literal["above", "below", "within"]
    margin: float
    statistic: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    control: str
    floor: str
    budget_core_minutes: float
    tuned: str
    tuning: Tuning | None = None
    rows: int = 1024
    scale: dict[str, dict[str, Any]] = field(default_factory=dict)

    def at(self, scale: str) -> Claim:
        """The claim at another size.

        Raises:
            ValueError: a scale that is not declared.
        """
        if scale == SCALE:
            return self
        if scale not in self.scale:
            raise ValueError(f"{self.name}: no scale {scale!r} in {CLAIM}{suggest(scale, [SCALE, *self.scale])}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in self.scale[scale].items()}
        return replace(self, scale={}, **values)


def read_claim(folder: Path | str) -> Claim:
    """The declaration in a folder.

    Raises:
        ValueError: one line that names the file, the field and what is wrong with it.
    """
    path = Path(folder) / CLAIM
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    published = _made(Published, data.pop("published", {}), f"{path}: published")
    tuning = data.pop("tuning", None)
    tuning = None if tuning is None else _made(Tuning, tuning, f"{path}: tuning")
    values = data | {"name": path.parent.resolve().name, "published": published, "tuning": tuning}
    claim = _made(Claim, values, str(path))
    _check(claim, path)
    return claim


def _made(kind: type, values: Mapping[str, Any], where: str) -> Any:
    declared = {item.name: item for item in fields(kind)}
    for name in values:
        if name not in declared:
            raise ValueError(f"{where}: unknown field {name!r}{suggest(name, declared)}")
    for name, item in declared.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where}: field {name!r} is missing")
    for name, value in values.items():
        if declared[name].type == "str" and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{where}: {name} must be a text, got {value!r}")
        if str(declared[name].type).startswith("tuple") and not (isinstance(value, list) and value):
            raise ValueError(f"{where}: {name} must be a list with something in it, got {value!r}")
        if declared[name].type == "float" and not isinstance(value, int | float):
            raise ValueError(f"{where}: {name} must be a number, got {value!r}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _check(claim: Claim, path: Path) -> None:
    """ValueError unless the parts of a claim fit together."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {what}")

    require(claim.expects in EXPECTS, f"expects={claim.expects!r} must be one of {', '.join(EXPECTS)}")
    require(claim.expects != "within" or claim.margin > 0, f"margin={claim.margin} must be above 0 for 'within'")
    require(claim.budget_core_minutes > 0, f"budget_core_minutes={claim.budget_core_minutes} must be above 0")
    require(len(set(claim.seeds)) == len(claim.seeds), f"seeds={list(claim.seeds)} must be different")
    require(len(set(claim.arms)) == len(claim.arms), f"arms={list(claim.arms)} must be different")
    require(bool(re.search(r"\d{4}\.\d{4,5}", claim.source)), f"source={claim.source!r} must hold an arXiv id")
    for scale in claim.scale:
        unknown = set(claim.scale[scale]) - {"seeds", "rows", "budget_core_minutes"}
        require(not unknown, f"scale.{scale} may replace seeds, rows and budget_core_minutes, not {sorted(unknown)}")
    if claim.tuning is None:
        return
    both = sorted(set(claim.tuning.seeds) & set(claim.seeds))
    require(not both, f"tuning.seeds={list(claim.tuning.seeds)} must not decide too: {both} are among seeds")
    metrics = ("loss", "accuracy", "token_accuracy")
    require(
        claim.tuning.metric in metrics, f"tuning.metric={claim.tuning.metric!r} must be one of {', '.join(metrics)}"
    )
    require(all(lr > 0 for lr in claim.tuning.lrs), f"tuning.lrs={list(claim.tuning.lrs)} must be above 0")
    for arm, giver in claim.tuning.share.items():
        ends = {arm, giver} <= set(claim.arms) and giver not in claim.tuning.share
        require(ends, f"tuning.share: {arm!r} = {giver!r} must name arms, the second with a choice of its own")


def verdict(claim: Claim, effect: Interval, control_held: bool) -> str:
    """What follows from the interval of the effect.

    The claim is reproduced when the whole interval is on the side of the margin that it names, and not reproduced when
    the whole interval is on the other side. It is inconclusive when the interval holds the margin (too wide to tell),
    when it has no finite end on the side that matters, and whenever the positive control has failed.
    """
    if not control_held:
        return VERDICTS[2]
    low, high, margin = effect.low, effect.high, claim.margin
    if claim.expects == "within":
        yes, no = -margin <= low and high <= margin, low > margin or high < -margin
    elif claim.expects == "above":
        yes, no = low > margin, high < margin
    else:
        yes, no = high < margin, low > margin
    return VERDICTS[0] if yes else VERDICTS[1] if no else VERDICTS[2]


def declared(folder: Path | str) -> dict[str, str]:
    """sha256 in hexadecimal of the declaration and of the experiment."""
    return {name: hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest() for name in (CLAIM, EXPERIMENT)}


def results_path(folder: Path | str, scale: str = SCALE) -> Path:
    """Where the results of a claim are: `results.json`, or `results.SCALE.json` of another size."""
    return Path(folder) / ("results.json" if scale == SCALE else f"results.{scale}.json")


def write_results(folder: Path | str, results: Mapping[str, Any], scale: str = SCALE) -> Path:
    """Write results, whole or not at all; an infinite limit and a score that is no number become null."""
    path = results_path(folder, scale)
    write_text(path, json.dumps(_finite(dict(results)), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(folder: Path | str, scale: str = SCALE) -> dict[str, Any]:
    """Read results and check them against the declaration beside them.

    Raises:
        ValueError: one line: what is missing or wrong, or that a file has changed since it was run.
    """
    path = results_path(folder, scale)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object")
    missing = [name for name in _KEYS if name not in data]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    for name, sha in declared(folder).items():
        if data["declared"].get(name) != sha:
            raise ValueError(f"{path}: {name} has changed since this was run: run it again, or take the change back")
    _check_results(data, read_claim(folder).at(scale), path)
    return data


def interval_of(results: Mapping[str, Any]) -> Interval:
    """The effect of results with its limits; null is infinite."""
    low, high = results["interval"]
    return Interval(
        estimate=results["effect"], low=-math.inf if low is None else low, high=math.inf if high is None else high
    )


def _check_results(data: Mapping[str, Any], claim: Claim, path: Path) -> None:
    """ValueError unless results are what the declaration asks for and say what follows from their numbers."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {what}")

    for name, expected in (("claim", claim.claim), ("margin", claim.margin), ("seeds", list(claim.seeds))):
        require(data[name] == expected, f"{name}={data[name]!r} is not what {CLAIM} declares: {expected!r}")
    require(isinstance(data["effect"], int | float), f"effect={data['effect']!r} must be a number")
    limits = data["interval"]
    pair = isinstance(limits, list) and len(limits) == 2
    require(pair and all(item is None or isinstance(item, int | float) for item in limits), "interval must be [lo, hi]")
    names = [arm.get("name") for arm in data["arms"]]
    require(names == list(claim.arms), f"arms {names} are not those of {CLAIM}: {list(claim.arms)}")
    for arm in data["arms"]:
        for name in ("params", "flops"):
            require(isinstance(arm.get(name), int | float), f"arm {arm['name']!r}: {name} must be a number")
        scores = arm.get("scores")
        right = isinstance(scores, list) and len(scores) == len(claim.seeds)
        require(right, f"arm {arm['name']!r}: scores must hold a number for each of {len(claim.seeds)} seeds")
    control = data["control"]
    require(isinstance(control.get("held"), bool) and bool(control.get("name")), "control needs a name and held")
    published = {"figure": claim.published.figure, "source": claim.published.source}
    require(published.items() <= data["published"].items(), f"published is not what {CLAIM} declares")
    found = verdict(claim, interval_of(data), control["held"])
    require(data["verdict"] == found, f"verdict={data['verdict']!r}, but {found!r} follows from its interval")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
