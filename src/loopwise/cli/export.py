"""`loopwise export`: write a model under a plan as a folder that loads by itself."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import loopwise
from loopwise.cli import common

Format = Literal["loopwise", "auto_map", "unroll"]


@dataclass(frozen=True, kw_only=True)
class Export(common.Source):
    """Arguments of `loopwise export`."""

    dst: Positional[Path]
    """folder to write; must not exist yet, or be empty"""
    plan: common.PlanText = None
    """order of visits; without it the source's own"""
    loops: common.LoopsText = None
    """loop counts to write into the plan: 4, or core=4"""
    format: Annotated[Format, arg(aliases=["-f"])] = "loopwise"
    """loopwise: shared weights and the plan, loads with loopwise. auto_map: the same with one file of code, loads
    without loopwise. unroll: a plain model of its own architecture, layers copied, loads in plain transformers"""
    tokenizer: bool = True
    """write the tokenizer as well"""

    def run(self) -> None:
        """Load, write, and print what was written."""
        plan = common.planned(self.plan, self.loops)
        check_destination(self.dst)
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)
        tokenizer = _tokenizer(self.source) if self.tokenizer else None
        export(model, self.dst, format=self.format, tokenizer=tokenizer)
        size = sum(path.stat().st_size for path in self.dst.rglob("*") if path.is_file())
        print(f"wrote {self.dst} ({self.format}, {common.amount(size, 'B')})")


def check_destination(dst: Path) -> None:
    """ValueError when `dst` is taken, or its parent is missing or not writable."""
    if dst.is_dir():
        if any(dst.iterdir()):
            raise ValueError(f"{dst} is not empty, name a new folder")
    elif dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst} exists and is not a folder, name a new folder")
    common.check_writable(dst.absolute().parent / f"{dst.name}.probe")


def export(model: Any, dst: Path | str, *, format: Format = "loopwise", tokenizer: Any = None) -> Path:
    """Write a model as folder `dst`, whole or not at all: a neighbouring folder is filled, then renamed.

    Args:
        model: an attached model.
        dst: the folder; new or empty.
        format: see `loopwise.save`.
        tokenizer: a transformers tokenizer to put beside the weights.

    Raises:
        ValueError: `dst` is taken, the model has no plan, or it cannot be written in this format.
    """
    dst = Path(dst)
    check_destination(dst)
    if loopwise.plan_of(model) is None:
        raise ValueError("the model has no plan to export: give one with --plan")
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.absolute().parent))
    try:
        folder = temporary / "model"
        folder.mkdir()
        loopwise.save(model, folder, format=format)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if dst.exists():
            dst.rmdir()
        folder.rename(dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dst


def _tokenizer(source: str) -> Any:
    try:
        return loopwise.load_tokenizer(source)
    except (ValueError, OSError) as error:
        print(f"note: no tokenizer written: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
