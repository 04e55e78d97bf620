"""Edits of folders that need the model in memory: low-rank offsets, components of loops, width, GGUF files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopwise.edit import provenance
from loopwise.edit.maps import DepthEdit
from loopwise.edit.operators import DepthOperator, Operator
from loopwise.edit.workplace import commit, copy_other_files, refuse_target, work_folder
from loopwise.io.atomic import write_text

_NO_SHARDS = 1 << 60


@dataclass(frozen=True, kw_only=True)
class LoadedEdit:
    """A model that was loaded and edited, and is to be written.

    Attributes:
        source: what was loaded.
        model: the edited model.
        operators: texts of the operators.
        edit: as data, None where the operators are not of depth alone or cannot be one edit.
        mode: what was asked for, "own" for every operator's own.
        keeps_function: whether all operators are of width, which keep the function.
    """

    source: Path
    model: Any
    operators: tuple[str, ...]
    edit: DepthEdit | None
    mode: str
    keeps_function: bool = False


def edit_loaded(source: Path | str, operators: Sequence[Operator], *, mode: str | None = None) -> LoadedEdit:
    """Load a model and edit it in memory.

    Raises:
        ValueError: the source is no model, or what `apply` refuses.
    """
    from loopwise.checkpoints.loading import load
    from loopwise.edit.apply import apply, plan_edit
    from loopwise.edit.width import WidthOperator

    model = load(source)
    edit = None
    if all(isinstance(operator, DepthOperator) for operator in operators):
        try:
            edit = plan_edit(model, operators)
        except ValueError:  # several that cannot be one edit; what a single one refuses, `apply` does too
            edit = None
    wanted: Any = mode
    model = apply(model, operators, mode=wanted)
    texts = tuple(one.text() if isinstance(one, DepthOperator) else str(one) for one in operators)
    keeps = all(isinstance(operator, WidthOperator) for operator in operators)
    return LoadedEdit(
        source=Path(source), model=model, operators=texts, edit=edit, mode=mode or "own", keeps_function=keeps
    )


def write_loaded(
    edited: LoadedEdit, target: Path, *, shard_size: int | None = None, check: Callable[[Path], object] | None = None
) -> None:
    """Write the folder, whole or not at all; arguments and errors as of `disk.carry_out`, without going on later."""
    from loopwise.models.attach import plan_of
    from loopwise.models.hub import base_model
    from loopwise.models.saving import save

    refuse_target(edited.source, target)
    work = work_folder(target)
    if work.exists():
        raise ValueError(f"an interrupted edit is in {work}: finish it, or remove that folder")
    model = work / "model"
    try:
        model.mkdir(parents=True)
        if edited.source.is_dir():
            copy_other_files(edited.source, model)
        if plan_of(edited.model) is not None:
            save(edited.model, work / "saved")
        else:
            base_model(edited.model).save_pretrained(work / "saved", max_shard_size=shard_size or _NO_SHARDS)
        for path in (work / "saved").iterdir():
            os.replace(path, model / path.name)
        if not edited.source.is_dir():
            _add_tokenizer(edited.source, model)
        record = provenance.provenance(
            provenance.source_of(edited.source, None),
            edited.operators,
            edited.edit,
            path="in memory",
            mode=edited.mode,
            earlier=provenance.earlier_of(edited.source),
        )
        write_text(model / provenance.FILE, provenance.text_of(record))
        mask = os.umask(0)
        os.umask(mask)
        for path in model.iterdir():
            _finish(path, mask)
        if check is not None:
            check(model)
        commit(model, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _add_tokenizer(source: Path, model: Path) -> None:
    """The tokenizer inside a GGUF file, where transformers can read it."""
    from loopwise.models.saving import load_tokenizer

    try:
        load_tokenizer(source).save_pretrained(model)
    except ValueError:
        return


def _finish(path: Path, mask: int) -> None:
    """Make a file readable as other new files are (the safetensors library makes its own private), and flush it."""
    if path.is_file():
        path.chmod(0o666 & ~mask)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
