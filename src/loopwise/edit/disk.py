"""Edits of checkpoint folders, streamed: bytes of tensors are copied, no model is loaded.

    read headers and config.json -> plan every tensor and file -> write beside the target -> rename

What is written lies in a hidden folder beside the target until it is whole, and has no config.json until then, so that
nothing half done can be loaded. A file gets its name when its bytes are on the disk; an edit that was interrupted goes
on with the files that are missing. Loads neither torch nor transformers for copies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loopwise.edit import provenance
from loopwise.edit.layout import Layout, Source, read_source
from loopwise.edit.maps import DepthEdit
from loopwise.edit.operators import DepthOperator
from loopwise.edit.outputs import table, why_not_zero
from loopwise.edit.pieces import Piece, odd_layers, pieces_of
from loopwise.edit.shards import Shard, index_of, shards_of, write_shards
from loopwise.edit.workplace import (
    commit,
    copy_other_files,
    keep_whole_files,
    leaving_nothing_useless,
    locked,
    refuse_target,
    work_folder,
)
from loopwise.io.amounts import amount
from loopwise.io.atomic import write_text
from loopwise.io.tensors import INDEX, Checkpoint, Tensor, read_checkpoint

Mode = Literal["tie", "materialize"]


@dataclass(frozen=True, kw_only=True)
class DiskEdit:
    """An edit of a folder, planned to the last byte and not yet carried out.

    Attributes:
        source: the source's configuration.
        checkpoint: its weights.
        layout: where its layers are.
        edit: what becomes of them, as it will be written.
        operators: texts of the operators.
        mode: "tie" or "materialize".
        shards: files to write.
        config: the new config.json.
        doubts: why the result should be tried before it is trusted, None for nothing.
        filled: fields about single layers that transformers was asked for.
    """

    source: Source
    checkpoint: Checkpoint
    layout: Layout
    edit: DepthEdit
    operators: tuple[str, ...]
    mode: str
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    doubts: str | None
    filled: tuple[str, ...] = ()

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of the source's tensors."""
        return sum(tensor.num_bytes for tensor in self.checkpoint.tensors.values())

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of the files to write."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def pieces(self) -> list[Piece]:
        """All tensors to write."""
        return [piece for shard in self.shards for piece in shard.pieces]

    def num_params(self) -> int:
        """Numbers in all tensors of the source."""
        return sum(_numbers(tensor) for tensor in self.checkpoint.tensors.values())

    def layer_params(self) -> list[int]:
        """Numbers in each layer of the source."""
        counts = [0] * self.layout.num_layers
        for name, tensor in self.checkpoint.tensors.items():
            parts = self.layout.split(name)
            if parts is not None and parts[1] < len(counts):
                counts[parts[1]] += _numbers(tensor)
        return counts

    def fingerprint(self) -> dict[str, Any]:
        """What has to be the same for an interrupted edit to go on."""
        source = provenance.source_of(self.checkpoint.folder, self.checkpoint)
        stamps = {name: list(file.stamp) for name, file in self.checkpoint.files.items()}
        asked = {"operators": list(self.operators), "mode": self.mode}
        files = {shard.name: shard.num_bytes for shard in self.shards}
        return {"source": source, "stamps": stamps, "asked": asked, "files": files}


def plan_disk_edit(
    folder: Path | str, operators: Sequence[DepthOperator], *, mode: str | None = None, shard_size: int | None = None
) -> DiskEdit:
    """Plan the edit of a folder; nothing is written.

    Args:
        folder: a transformers folder with safetensors, a looped model, or a decoder of our own.
        operators: what to do, one after the other.
        mode: "tie" or "materialize"; None is the last operator's own.
        shard_size: bytes of tensors per file; 0 for a single file, None as the source has it.

    Raises:
        ValueError: the folder is damaged or no decoder, an operator refuses it, the configuration cannot express the
            new layers, or packed weights would have to be changed.
    """
    folder = Path(folder)
    source = read_source(folder)
    why = source.why_loaded(operators)
    if why is not None:
        raise ValueError(f"{folder} cannot be edited as a stream: {why}")
    checkpoint = read_checkpoint(folder)
    layout = source.layout(checkpoint)
    edit, mode = composed(operators, source.plan(layout.num_layers), layout.num_layers, mode)
    sources = [layer.sources[0] for layer in edit.layers]
    moves = sources != list(range(layout.num_layers))
    if source.quantization is not None and not edit.is_copy:
        raise ValueError(f"{folder} is quantised: its layers can be copied, left out and shared, and nothing else")
    _refuse_foreign_code(source, edit)
    filled = source.completed() if moves else []
    kinds = source.kinds(layout)
    _refuse_different_kinds(edit, kinds)
    if source.is_own:
        _refuse_zero_of_streams(source, edit)
    doubts = source.doubts(moves=moves)
    if doubts is None and moves and source.quantization is None:
        doubts = odd_layers(checkpoint, layout, kinds)
    if any(layer.zero for layer in edit.layers) and not source.is_own:
        why = why_not_zero(source.model_type, source.text)
        if why is not None and source.model_type in table():
            raise ValueError(f"{source.model_type}: a layer cannot start as the identity: {why}")
        doubts = doubts or why
    pieces = pieces_of(checkpoint, layout, edit, source.model_type)
    return DiskEdit(
        source=source,
        checkpoint=checkpoint,
        layout=layout,
        edit=edit,
        operators=tuple(operator.text() for operator in operators),
        mode=mode,
        shards=tuple(shards_of(pieces, checkpoint, shard_size)),
        config=source.edited(layout, sources, edit.plan),
        doubts=doubts,
        filled=tuple(filled),
    )


def _refuse_different_kinds(edit: DepthEdit, kinds: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where a new layer is a mean of, or stands at its visits for, layers of different kinds."""
    groups = [set(layer.sources) for layer in edit.layers]
    for visited, origin in zip(edit.plan.layers, edit.origins, strict=True):
        groups[visited].add(origin)
    for layer, group in zip(edit.layers, groups, strict=True):
        first = layer.sources[0]
        for other in sorted(group):
            key = next((key for key, value in kinds[first].items() if kinds[other].get(key) != value), None)
            if key is not None:
                raise ValueError(
                    f"layers {first} and {other} cannot become one, they are of different kinds: {key} is "
                    f"{kinds[first][key]} in one and {kinds[other].get(key)} in the other"
                )


def _refuse_zero_of_streams(source: Source, edit: DepthEdit) -> None:
    blocks = source.text.get("blocks") or [{}]
    for layer in edit.layers:
        placement = blocks[layer.sources[0] if len(blocks) > 1 else 0].get("placement", "pre")
        if layer.zero and placement in ("post", "stream"):
            raise ValueError(
                f"layer {layer.sources[0]} cannot start as the identity: placement {placement!r} norms the state itself"
            )


def _numbers(tensor: Tensor) -> int:
    return tensor.num_bytes * 8 // tensor.bits


def composed(operators: Sequence[DepthOperator], plan: Any, num_layers: int, mode: str | None) -> tuple[DepthEdit, str]:
    """Several operators as one edit, and its mode; all but the last are realised in their own."""
    edit: DepthEdit | None = None
    for operator in operators:
        later = operator.edit(plan, num_layers)
        wanted = mode if operator is operators[-1] and mode else later.default
        if wanted == "materialize":
            later = later.unrolled()
        edit = later if edit is None else edit.then(later)
        plan, num_layers = edit.plan, len(edit.layers)
        chosen = "materialize" if wanted == "materialize" else "tie"
    if edit is None:
        raise ValueError("no operator is given: name at least one, such as stack(2)")
    return edit, chosen


def _refuse_foreign_code(source: Source, edit: DepthEdit) -> None:
    own_code = isinstance(source.base.get("auto_map"), dict) and not source.is_wrapper
    if own_code and edit.plan.num_slots != len(edit.layers):
        raise ValueError(
            f"{source.folder} comes with code of its own, which knows no plan: use mode 'materialize' for it"
        )


def carry_out(
    planned: DiskEdit,
    target: Path,
    *,
    progress: Callable[[int], object] = lambda count: None,
    check: Callable[[Path], object] | None = None,
) -> list[str]:
    """Write the folder, whole or not at all.

    Args:
        planned: what to write.
        target: the folder; must not exist, or be empty.
        progress: told the number of bytes after every part.
        check: called with the written folder before it gets its name; what it raises keeps it from getting it.

    Returns:
        Names of files that an interrupted edit had left, which were kept.

    Raises:
        ValueError: the target is taken, lies in the source or is the source; an interrupted edit of something else is
            in the way, or the source has changed since; not enough room.
        OSError: what the system says, such as a full disk.
    """
    refuse_target(planned.checkpoint.folder, target)
    work = work_folder(target)
    with locked(work, planned.fingerprint()) as model, leaving_nothing_useless(work):
        try:
            _refuse_no_room(planned, model)
            kept = write_shards(planned.shards, planned.checkpoint, model, progress)
            changed = planned.checkpoint.changed()
            if changed is not None:
                raise ValueError(
                    f"{changed} of the source has changed while it was read: remove {work} and start again"
                )
            index = index_of(planned.shards, planned.checkpoint)
            if index is not None:
                write_text(model / INDEX, json.dumps(index, indent=2) + "\n")
            copy_other_files(planned.checkpoint.folder, model)
            record = provenance.provenance(
                provenance.source_of(planned.checkpoint.folder, planned.checkpoint),
                planned.operators,
                planned.edit,
                path="streamed",
                mode=planned.mode,
                earlier=provenance.earlier_of(planned.checkpoint.folder),
            )
            write_text(model / provenance.FILE, provenance.text_of(record))
            write_text(model / "config.json", json.dumps(planned.config, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            keep_whole_files(model)
            what = f"{error.strerror or error}: {target} is not written"
            if any(model.glob("*.safetensors")):
                what += f"; the same command goes on with what is in {work}"
            raise OSError(error.errno, what) from error
        if check is not None:
            try:
                check(model)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        commit(model, target)
        shutil.rmtree(work)
    return kept


def _refuse_no_room(planned: DiskEdit, model: Path) -> None:
    there = {path.name: path.stat().st_size for path in model.iterdir() if path.is_file()}
    needed = sum(shard.num_bytes for shard in planned.shards if shard.name not in there)
    if not hasattr(os, "statvfs"):
        return
    disk = os.statvfs(model)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise ValueError(f"{amount(needed, 'B')} are needed beside {model.parent.parent}, {amount(free, 'B')} are free")
