"""`loopwise export`: write a model under a plan as a folder that loads by itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import loopwise
from loopwise.cli import common

Format = Literal["loopwise", "auto_map", "unroll", "foreign"]


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
    without loopwise. unroll: a plain model of its own architecture, layers copied, loads in plain transformers.
    foreign: the checkpoint that the source was imported from, same names and same tensors"""
    tokenizer: bool = True
    """write the tokenizer as well"""

    def run(self) -> None:
        """Load, write, and print what was written."""
        if self.format == "foreign" and (self.plan is not None or self.loops is not None):
            raise ValueError("--format foreign writes no plan: leave --plan and --loops out")
        plan = common.planned(self.plan, self.loops)
        common.check_destination(self.dst)
        model = common.load_model(self, plan)
        if plan is None:
            common.set_own_loops(model, self.loops)
        tokenizer, note = _tokenizer(self.source) if self.tokenizer else (None, None)
        export(model, self.dst, format=self.format, tokenizer=tokenizer)
        if note:
            print(note, file=sys.stderr)
        print(f"wrote {self.dst} ({self.format}, {common.size_of(self.dst)})")


def export(model: Any, dst: Path | str, *, format: Format = "loopwise", tokenizer: Any = None) -> Path:
    """Write a model as folder `dst`, whole or not at all: a neighbouring folder is filled, then renamed.

    Args:
        model: an attached model.
        dst: the folder; new or empty.
        format: see `loopwise.save`; or "foreign", for a model that was imported.
        tokenizer: a transformers tokenizer to put beside the weights.

    Raises:
        ValueError: `dst` is taken, the model has no plan, or it cannot be written in this format.
    """
    from loopwise.checkpoints.loading import export_checkpoint

    dst = Path(dst)
    common.check_destination(dst)
    if format != "foreign" and loopwise.plan_of(model) is None:
        raise ValueError("the model has no plan to export: give one with --plan")
    with common.whole_folder(dst) as folder:
        if format == "foreign":
            export_checkpoint(model, folder)
        else:
            loopwise.save(model, folder, format=format)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return dst


def _tokenizer(source: str) -> tuple[Any, str | None]:
    """The tokenizer that comes with a source, or None and why there is none."""
    try:
        return loopwise.load_tokenizer(source), None
    except (ValueError, OSError) as error:
        return None, f"note: no tokenizer written: {str(error).splitlines()[0]}"
