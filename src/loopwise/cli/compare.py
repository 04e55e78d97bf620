"""The verb `loopwise compare`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from loopwise.cli.common import amount, quiet_libraries

if TYPE_CHECKING:
    from loopwise.study.equal import Method
    from loopwise.train.config import RunConfig

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train methods under several seeds at equal steps, FLOPs or parameters: one table, one picture.

    Examples: `loopwise compare shallow looped deep --seeds 0,1,2 --equal flops`,
    `loopwise compare plain_text my_recipes.py:mine data.length=128 --equal parameters --dry-run`. The first method
    stays as it is, the others are brought to it. An interrupted comparison goes on when the same is asked again.
    """

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="TARGET|FIELD=VALUE")]
    """recipes, FILE.py[:FUNCTION], config.json or run folders; words with = replace a value in all of them"""
    seeds: Annotated[str, arg(metavar="SEEDS")] = "0,1,2"
    """seeds of every method"""
    equal: Literal["steps", "flops", "parameters"] = "steps"
    """what the others get as much of as the first"""
    jobs: int = 2
    """runs at a time, one thread each"""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs") / "compare"
    """where table, picture, numbers and run folders go"""
    rows: int = 1024
    """test rows that score a run"""
    nice: int = 0
    """added to the niceness of the processes"""
    dry_run: FlagCreatePairsOff[bool] = False
    """print parameters, FLOPs and steps of every method, and train nothing"""

    def run(self) -> None:
        """Compare, and print the table."""
        seeds = parse_seeds(self.seeds)
        for name in ("jobs", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: use at least 1")
        targets = [word for word in self.words if not _OVERRIDE.match(word)]
        overrides = [word for word in self.words if _OVERRIDE.match(word)]
        if not targets:
            raise ValueError("name at least one recipe, FILE.py:FUNCTION, config.json or run folder")
        twice = next((target for target in targets if targets.count(target) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is named twice: seeds are what repeats a method")
        quiet_libraries()
        from loopwise.study.equal import equalise
        from loopwise.train.config import override

        methods = equalise(_methods({target: override(_config(target), overrides) for target in targets}), self.equal)
        if self.dry_run:
            return _show(methods, len(seeds))
        from loopwise.study.compare import PICTURE, compare, table

        found = compare(
            methods, seeds, equal=self.equal, out=self.out, num_workers=self.jobs, nice=self.nice, rows=self.rows
        )
        print(table(found))
        print(self.out / PICTURE)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0,1,2`.

    Raises:
        ValueError: anything but different numbers from 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"--seeds {text!r}: write different numbers from 0, such as 0,1,2")
    return tuple(map(int, parts))


def _config(target: str) -> RunConfig:
    """The config that a target names."""
    from loopwise.recipes import find
    from loopwise.train.config import read_config
    from loopwise.train.run import CONFIG

    path = Path(target)
    if (path / CONFIG).is_file():
        return read_config(path / CONFIG)
    return read_config(path) if path.suffix == ".json" else find(target)


def _methods(configs: dict[str, RunConfig]) -> list[Method]:
    """Methods under the names of their configs, or under their targets where names repeat."""
    from loopwise.study.equal import Method

    names = [config.name for config in configs.values()]
    return [
        Method(name=config.name if names.count(config.name) == 1 else target, config=config)
        for target, config in configs.items()
    ]


def _show(methods: list[Method], num_seeds: int) -> None:
    """Print what every method will spend."""
    from loopwise.train.estimate import estimate_run

    spent = [estimate_run(method.config) for method in methods]
    counts = [estimate.parameters_unique for estimate in spent]
    width = max(len(method.name) for method in methods)
    for method, estimate, count in zip(methods, spent, counts, strict=True):
        shares = f"{count / counts[0]:.3f} and {estimate.flops / spent[0].flops:.3f} of the first"
        print(
            f"{method.name:<{width}}  {amount(count)} parameters, {amount(estimate.flops)}FLOPs ({shares}), "
            f"{method.config.num_steps} steps, about {estimate.seconds / 60:.1f} min a run, {num_seeds} runs"
        )
