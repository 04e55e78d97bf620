"""`loopwise edit`: grow, prune, reorder or tie the layers of a checkpoint, as a new folder."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.edit.disk import DiskEdit
    from loopwise.edit.maps import DepthEdit
    from loopwise.edit.operators import Operator

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Write an edited checkpoint as a new folder.

    Tensors are copied as bytes, without loading the model, wherever the edit allows that. What is written lies in a
    hidden folder beside DST until it is whole; an interrupted edit goes on when the same command is run again.
    """

    source: Positional[Path]
    """a transformers folder with safetensors, a looped model, a decoder of our own, or a GGUF file"""
    dst: Positional[Path]
    """folder to write; must not exist yet, or be empty"""
    op: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="OPERATOR")] = ()
    """what to do, such as "llama_pro(every=4)"; mergekit:FILE.yml, rys:SPEC and stacking:FILE.json read the recipes of
    other tools; repeated, one after the other"""
    mode: Literal["tie", "materialize"] | None = None
    """tie: shared layers and a plan, loads with loopwise. materialize: a layer of its own for every visit. Without it
    the operator's own"""
    shard_size: Annotated[str | None, arg(metavar="SIZE")] = None
    """largest file, such as 5GB or 200M, or single; without it as the source has it"""
    verify: FlagCreatePairsOff[bool] = False
    """load both folders and check what the edit promises, before DST gets its name"""
    dry_run: FlagCreatePairsOff[bool] = False
    """print what would happen and write nothing"""
    png: Annotated[Path | None, arg(metavar="FILE")] = None
    """draw which old layers the new ones come from"""

    def run(self) -> None:
        """Plan, then print or write."""
        from loopwise.edit.importers import operator_from
        from loopwise.edit.workplace import refuse_target

        if not self.op:
            raise ValueError("--op is missing: name at least one operator, such as --op 'stack(2)'")
        if not self.source.exists():
            raise ValueError(f"{self.source} does not exist")
        operators = [operator_from(text, dtype=dtype_of(self.source)) for text in self.op]
        size = parse_size(self.shard_size)
        refuse_target(self.source, self.dst)
        if self.png is not None:
            common.check_writable(self.png)
        why = why_loaded(self.source, operators)
        if why is None:
            self._stream(operators, size)
        else:
            self._load(operators, size, why)

    def _stream(self, operators: list[Any], size: int | None) -> None:
        from loopwise.edit.disk import carry_out, plan_disk_edit

        planned = plan_disk_edit(self.source, operators, mode=self.mode, shard_size=size)
        if planned.filled:
            print(f"note: config.json leaves {', '.join(planned.filled)} to its class: now written", file=sys.stderr)
        self._draw(planned.edit)
        if self.dry_run:
            print(dry_run_text(planned))
            return
        if planned.doubts and not self.verify:
            raise ValueError(f"this edit has to be tried before it is trusted, add --verify: {planned.doubts}")
        lines: list[str] = []
        check = self._check(planned.edit, lines) if self.verify else None
        with _Progress(planned.bytes_out) as progress:
            kept = carry_out(planned, self.dst, progress=progress.add, check=check)
        if kept:
            print(f"note: went on with {len(kept)} of {len(planned.shards)} files", file=sys.stderr)
        before, after = planned.edit.num_layers, len(planned.edit.layers)
        plan = f", plan {planned.edit.plan}" if after != planned.edit.plan.num_slots else ""
        print(f"wrote {self.dst} ({before} -> {after} layers{plan}, {common.size_of(self.dst)}, streamed)")
        print("\n".join(lines or [promise_text(planned.edit.promise)]))

    def _load(self, operators: list[Any], size: int | None, why: str) -> None:
        from loopwise.edit.explain import explain
        from loopwise.edit.loaded import edit_loaded, write_loaded

        common.quiet_libraries()
        with common.notes():
            edited = edit_loaded(self.source, operators, mode=self.mode)
        self._draw(edited.edit)
        if self.dry_run:
            print(f"in memory: {why}")
            if edited.edit is not None:
                print(explain(edited.edit, title=", ".join(edited.operators), mode=self.mode))
            return
        lines: list[str] = []
        if self.verify and edited.edit is None and not edited.keeps_function:
            raise ValueError("--verify knows no law for these operators together: run them one by one")
        check = self._check(edited.edit, lines) if self.verify else None
        write_loaded(edited, self.dst, shard_size=size, check=check)
        promise = edited.edit.promise if edited.edit else "tolerance" if edited.keeps_function else "none"
        print(f"wrote {self.dst} ({common.size_of(self.dst)}, edited in memory: {why})")
        print("\n".join(lines or [promise_text(promise)]))

    def _draw(self, edit: DepthEdit | None) -> None:
        if self.png is None:
            return
        if edit is None:
            raise ValueError("--png draws layers, and these operators change more than those: leave it out")
        from loopwise.edit.explain import edit_picture

        edit_picture(edit, self.png, title=", ".join(self.op), mode=self.mode)

    def _check(self, edit: Any, lines: list[str]) -> Callable[[Path], None]:
        def check(folder: Path) -> None:
            from loopwise.edit.verify import verify

            common.quiet_libraries()
            result = verify(self.source, folder, edit)
            if not result.holds:
                raise ValueError(f"{result}; nothing was written")
            lines.append(f"verified: {result}" if result.bound is not None else f"measured: {result}")

        return check


def dtype_of(source: Path) -> str | None:
    """The number type that the configuration of a folder names, if any."""
    try:
        values = json.loads((source / "config.json").read_text(encoding="utf-8"))
        found = values.get("dtype") or values.get("torch_dtype")
    except (OSError, ValueError, AttributeError):  # said where the source is read
        return None
    return found if isinstance(found, str) else None


def why_loaded(source: Path, operators: list[Operator]) -> str | None:
    """Why a source is edited in memory, None where its bytes can be copied."""
    from loopwise.edit.layout import read_source
    from loopwise.edit.operators import DepthOperator

    if not source.is_dir():
        return "weights of a single file are unpacked"
    other = next((operator for operator in operators if not isinstance(operator, DepthOperator)), None)
    if other is not None:
        return f"{(other.kind or '').removeprefix('edit.')} changes shapes"
    return read_source(source).why_loaded(operators)


def parse_size(text: str | None) -> int | None:
    """Bytes of `200M`, `5GB` or `single` (0); None stays None.

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    if text == "single":
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise ValueError(f"--shard-size {text!r}: write a size such as 5GB or 200M, or single")
    return size


def dry_run_text(planned: DiskEdit) -> str:
    """What would be written, in words."""
    from loopwise.edit.explain import explain

    layers = planned.layer_params()
    title = ", ".join(planned.operators)
    text = explain(
        planned.edit,
        title=title,
        mode=planned.mode,
        layer_params=layers,
        other_params=planned.num_params() - sum(layers),
    )
    files = f"{len(planned.shards)} file{'s' if len(planned.shards) > 1 else ''}"
    sizes = f"{common.amount(planned.bytes_in, 'B')} -> {common.amount(planned.bytes_out, 'B')} in {files}"
    kind = planned.config["model_type"]
    lines = [text, "", f"bytes       {sizes}", f"config      {kind}, layers at {planned.layout.prefix}"]
    if planned.doubts:
        lines.append(f"doubts      {planned.doubts}: needs --verify")
    return "\n".join([*lines, "", "nothing was written"])


def promise_text(promise: str) -> str:
    """What is promised of the function, for people."""
    return {
        "exact": "function: the source's, exactly; --verify checks that",
        "tolerance": "function: the source's up to rounding; --verify checks that",
    }.get(promise, "function: another one; --verify checks the copies and measures the jump")


class _Progress:
    """A line on a terminal that says how much is written and when it will be done."""

    def __init__(self, total: int):
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), 0.0
        self.visible = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        """So many bytes more; called from several threads, so that a count may be off for a moment."""
        self.done += count
        now = time.monotonic()
        if not self.visible or now - self.shown < 0.2:
            return
        self.shown = now
        left = (now - self.start) * (self.total - self.done) / max(self.done, 1)
        done, total = common.amount(self.done, "B"), common.amount(self.total, "B")
        print(f"\r\x1b[K{done} of {total}, {left:.0f} s left", end="", file=sys.stderr, flush=True)
