"""Checkpoints of a training run: a flat dict of named tensors plus JSON, in one folder per step.

A folder `step-00000100` holds what `torch.distributed.checkpoint` (DCP) writes, that is one `__<rank>_0.distcp` per
rank and `.metadata` (which tensor lies where), and our `run.json`: what a caller wants to know before anything is
built, versions, and size and CRC-32 of every other file. All of it is written and flushed to the disk under a
temporary name; renaming the folder is the commit. A process killed at any moment therefore leaves a complete folder
or none, and a complete folder is never written again.

torch pickles `.metadata` and would unpickle it without limits. Here it is read by an unpickler that knows only the
handful of classes it consists of. Each tensor is an archive inside its `.distcp` file, read by
`torch.load(weights_only=True)`. Nothing else is pickled: JSON holds the rest.

Without an initialised process group every function works in one process. With one, `save`, `load`, `prune` and
`drop_after` are collective: every rank calls them with the same names, tensors may be DTensors, and a failure on one
rank is raised on all. The folder is on a file system that all ranks share. A checkpoint written by any number of ranks
loads in any other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import loopwise
from loopwise.io.folders import TRASH, checksum, discard, flush_folder, write_flushed
from loopwise.train.checkpoint_format import INDEX, CheckpointError, Reader, Writer, cause_of, read_index

SCHEMA = 1
_RUN = "run.json"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"step-(\d{8,})")
_OURS = ("schema", "loopwise", "torch", "files", "checksum")

T = TypeVar("T")


def save(
    folder: Path | str,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    *,
    keep_last: int | None = None,
    keep_every: int | None = None,
) -> Path:
    """Write a checkpoint of a step and return its folder; a complete one of the same step is left as it is.

    Args:
        folder: where step folders live; made if absent.
        step: number of optimizer steps done, at least 0.
        tensors: name -> tensor of any shape and dtype, plain or DTensor. Under a process group plain tensors are taken
            to be equal on all ranks and are written once.
        meta: JSON values by name, read back by `read_meta`; the names schema, loopwise, torch, files and checksum are
            taken.
        keep_last: handed to `prune` once the new checkpoint is complete; None deletes nothing.
        keep_every: handed to `prune`.

    Raises:
        ValueError: a negative step, an entry of `meta` that is reserved or no JSON, a bad retention rule.
        CheckpointError: the disk is full or refuses the write. Nothing is left of the attempt, earlier checkpoints are
            untouched, and training may go on.
    """
    folder, run = Path(folder), _run_of(step, meta)
    _check_retention(keep_last, keep_every)
    path = folder / f"step-{step:08d}"
    if not _together(lambda: is_complete(path), first_only=True):
        _write(path, dict(tensors), run)
    if keep_last is not None:
        prune(folder, keep_last=keep_last, keep_every=keep_every)
    return path


def load(path: Path | str, tensors: Mapping[str, torch.Tensor], *, partial: bool = False) -> dict[str, Any]:
    """Read a checkpoint into given tensors, in place, and return what `read_meta` does.

    Checked before the first tensor changes: sizes and checksums of all files, then names, shapes and dtypes. The
    tensors may be sharded otherwise than the saved ones and live on any device.

    Args:
        path: a step folder.
        tensors: name -> tensor to fill, plain or DTensor.
        partial: allow the checkpoint to hold names that `tensors` lacks, for example to read weights without moments.

    Raises:
        ValueError: the first tensor, by name, that is missing, extra or of another shape or dtype.
        CheckpointError: the folder is incomplete or damaged; the message names the file.
    """
    path = Path(path)
    run, index = _together(lambda: _open(path))
    _together(lambda: _verify(path, run["files"], _share(run["files"])))
    _together(lambda: _compare(path, index, tensors, partial))
    try:
        _quietly(lambda: dcp_load(dict(tensors), storage_reader=Reader(path, index), no_dist=_alone()))
    except Exception as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {_first_line(error)}") from error
    return run


def read_meta(path: Path | str) -> dict[str, Any]:
    """The JSON of a step folder: entries of `meta`, step, schema, versions (loopwise, torch), files (bytes, CRC-32).

    Raises:
        ValueError: the checkpoint was written by a newer loopwise.
        CheckpointError: no complete checkpoint is there, or its JSON was damaged.
    """
    path = Path(path)
    if not is_complete(path):
        raise CheckpointError(f"{path} is no complete checkpoint: it needs a name like step-00000100, {INDEX}, {_RUN}")
    try:
        run = json.loads((path / _RUN).read_text(encoding="utf-8"))
        schema, intact = run["schema"], run.pop("checksum") == _checksum_of(run)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / _RUN} is damaged: {_first_line(error)}") from error
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(f"{path} has checkpoint schema {schema}, known is up to {SCHEMA}: use a newer loopwise")
    if not intact:
        raise CheckpointError(f"{path / _RUN} is damaged: it does not match its checksum")
    return run


def shapes(path: Path | str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Unsharded shape and dtype of every tensor of a checkpoint, by name, sorted.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    return _described(_open(Path(path))[1])


def is_complete(path: Path | str) -> bool:
    """Whether a path is a step folder that was committed."""
    path = Path(path)
    return _NAME.fullmatch(path.name) is not None and (path / INDEX).is_file() and (path / _RUN).is_file()


def steps(folder: Path | str) -> dict[int, Path]:
    """Complete checkpoints of a folder by step, ascending; none where the folder is absent. Changes nothing."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if is_complete(path)] if folder.is_dir() else []
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in found))


def latest(folder: Path | str) -> Path | None:
    """The complete checkpoint of the most steps, None where there is none. Changes nothing, so any process may ask."""
    return next(reversed(steps(folder).values()), None)


def clean(folder: Path | str) -> None:
    """Remove what killed processes left: for the start of a run, on one rank, while nothing saves into the folder."""
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((_TEMPORARY, TRASH)):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path | str, *, keep_last: int, keep_every: int | None = None) -> None:
    """Delete complete checkpoints, oldest first; kept are the last `keep_last` and steps divisible by `keep_every`.

    Raises:
        ValueError: `keep_last` or `keep_every` below 1.
        CheckpointError: a checkpoint cannot be moved away.
    """
    _check_retention(keep_last, keep_every)
    folder = Path(folder)
    _delete(folder, lambda found: [at for at in found[:-keep_last] if keep_every is None or at % keep_every])


def drop_after(folder: Path | str, step: int) -> None:
    """Delete complete checkpoints of more than `step` steps, newest first, for a run that goes on from that step.

    Otherwise the run would reach their steps again, and `save` would leave the old ones in place.

    Raises:
        CheckpointError: a checkpoint cannot be moved away.
    """
    _delete(Path(folder), lambda found: [at for at in reversed(found) if at > step])


def _write(path: Path, tensors: dict[str, torch.Tensor], run: dict[str, Any]) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")

    def prepare() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():  # no complete one: somebody has taken a file away
            discard(path)

    def commit() -> None:
        whole = run | {"files": dict(sorted(writer.files.items()))}
        text = json.dumps({"checksum": _checksum_of(whole)} | whole, indent=1, allow_nan=False)
        write_flushed(temporary / _RUN, text.encode())
        flush_folder(temporary)
        os.rename(temporary, path)
        flush_folder(path.parent)

    writer = Writer(temporary)
    try:
        _together(prepare, first_only=True)
        _quietly(lambda: dcp_save(tensors, storage_writer=writer, no_dist=_alone()))
        _together(commit, first_only=True)
    except BaseException as error:
        # Every rank has stopped writing: DCP raises after all have answered.
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or _first_line(error)
            raise CheckpointError(f"cannot write checkpoint {path}: {reason}; free space or choose another") from error
        raise


def _open(path: Path) -> tuple[dict[str, Any], Metadata]:
    run = read_meta(path)
    _verify(path, run["files"], [INDEX])
    index = read_index(path)
    for item in (index.storage_data or {}).values():
        if item.relative_path not in run["files"]:
            raise CheckpointError(f"{path / INDEX} is damaged: it names {item.relative_path!r}, which {_RUN} does not")
    return run, index


def _verify(path: Path, files: Mapping[str, list[int]], names: Collection[str]) -> None:
    for name in names:
        try:
            size, crc = checksum(path / name)
        except OSError as error:
            raise CheckpointError(f"{path} is damaged: {name}: {error.strerror}") from error
        if [size, crc] != files[name]:
            what = (
                f"has {size} bytes, not {files[name][0]}" if size != files[name][0] else "does not match its checksum"
            )
            raise CheckpointError(f"{path} is damaged: {name} {what}")


def _compare(path: Path, index: Metadata, tensors: Mapping[str, torch.Tensor], partial: bool) -> None:
    stored = _described(index)
    for name in sorted({*stored, *tensors}):
        if name not in stored:
            raise ValueError(f"{path} lacks the tensor {name!r}; it holds {len(stored)} tensors")
        if name not in tensors:
            if partial:
                continue
            raise ValueError(f"{path} holds the tensor {name!r}, which this run does not have")
        given = (tensors[name].shape, tensors[name].dtype)
        for what, saved, asked in zip(("shape", "dtype"), stored[name], given, strict=True):
            if saved != asked:
                shown = [tuple(value) if isinstance(value, torch.Size) else value for value in (saved, asked)]
                raise ValueError(f"{path}: tensor {name!r} has {what} {shown[0]}, this run needs {shown[1]}")


def _described(index: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    stored: dict[str, Any] = index.state_dict_metadata
    return {name: (stored[name].size, stored[name].properties.dtype) for name in sorted(stored)}


def _delete(folder: Path, choose: Callable[[list[int]], list[int]]) -> None:
    def act() -> None:
        found = steps(folder)
        for step in choose(list(found)):
            try:
                discard(found[step])
            except OSError as error:
                raise CheckpointError(f"cannot delete checkpoint {found[step]}: {error.strerror}") from error

    _together(act, first_only=True)


def _check_retention(keep_last: int | None, keep_every: int | None) -> None:
    for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None")


def _run_of(step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the JSON, except the files."""
    if step < 0:
        raise ValueError(f"step={step} must be at least 0")
    for name in meta:
        if name in _OURS or (name == "step" and meta[name] != step):
            raise ValueError(f"meta: {name}={meta[name]!r} is taken by the checkpoint itself; use another name")
    try:
        plain = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta must hold JSON values only: {error}") from error
    return {"schema": SCHEMA, "step": step, "loopwise": loopwise.__version__, "torch": torch.__version__} | plain


def _checksum_of(run: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(run, sort_keys=True).encode())


def _quietly(act: Callable[[], Any]) -> None:
    """Call DCP: without its remark that no process group exists, and with the error that a rank met, not a bundle."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            act()
    except CheckpointException as error:
        errors = [cause_of(failure[0]) for _, failure in sorted(error.failures.items())]
        # An interrupt on any rank outweighs what it broke on the others.
        raise next((each for each in errors if not isinstance(each, Exception)), errors[0]) from error


def _together(act: Callable[[], T], *, first_only: bool = False) -> T:
    """Result of `act`, called by every rank (or by the first for all); what one rank raises, all raise."""
    result, error = None, None
    if _rank() == 0 or not first_only:
        try:
            result = act()
        except (OSError, ValueError) as raised:
            error = raised
    if not _alone():
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (error, result if first_only else None))
        error = error or next((other for other, _ in outcomes if other is not None), None)
        result = outcomes[0][1] if first_only else result
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _share(names: Collection[str]) -> list[str]:
    """The files that this rank checks."""
    return sorted(names)[_rank() :: 1 if _alone() else dist.get_world_size()]


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _rank() -> int:
    return 0 if _alone() else dist.get_rank()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
