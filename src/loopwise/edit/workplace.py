"""Where an edited folder lies until it is whole: beside the target, locked, with what it is an edit of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopwise.edit import provenance
from loopwise.io.atomic import write_text
from loopwise.io.folders import flush_folder
from loopwise.io.tensors import INDEX

_JOB = "job.json"
_MODEL = "model"
# Weights, in whatever form, and what belongs to them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
_REPLACED = ("config.json", INDEX, "pytorch_model.bin.index.json", provenance.FILE)


def refuse_target(source: Path, target: Path) -> None:
    """ValueError when a target is taken, is the source or lies in it, links followed; or has no place to be."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{parent} is not a folder, create it first")
    real, own = (parent.resolve() / target.name).resolve(), source.resolve()
    if real == own:
        raise ValueError(f"{target} is the source itself: name a new folder")
    if own in real.parents:
        raise ValueError(f"{target} lies inside the source: name a folder outside of it")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(f"{target} exists: name a new folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} cannot be written to")


def work_folder(target: Path) -> Path:
    """Where an edit is written before it is whole: beside the target."""
    return target.absolute().parent / f".{target.name}.edit"


def commit(model: Path, target: Path) -> None:
    """Give a whole folder its name, so that a crash leaves it or nothing under it."""
    flush_folder(model)
    if target.is_dir():
        target.rmdir()
    os.rename(model, target)
    flush_folder(target.absolute().parent)


@contextmanager
def locked(work: Path, wanted: dict[str, Any]) -> Iterator[Path]:
    """The folder to fill, held by this process alone; what an interrupted edit has left is there, if it is the same."""
    model = work / _MODEL
    fresh = not work.exists()
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks there
            pass
        except OSError:
            raise ValueError(f"{work} is being written by another process: wait for it") from None
        if fresh or not (work / _JOB).exists():
            if model.exists():
                raise ValueError(f"{work} is in the way and no interrupted edit: remove it")
            write_text(work / _JOB, json.dumps(wanted))
        _refuse_other_job(work, json.loads((work / _JOB).read_text(encoding="utf-8")), wanted)
        model.mkdir(exist_ok=True)
        keep_whole_files(model)
        yield model


def keep_whole_files(model: Path) -> None:
    """Remove what an edit has left beside files of tensors that are whole: it is written again."""
    for path in model.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".safetensors":
            path.unlink()


def _refuse_other_job(work: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found == wanted:
        return
    if found["asked"] != wanted["asked"] or found["source"]["name"] != wanted["source"]["name"]:
        texts = ", ".join(found["asked"]["operators"])
        what = f"of {found['source']['name']} with {texts} in mode {found['asked']['mode']}"
        raise ValueError(f"an interrupted edit {what} is in {work}: finish it, or remove that folder")
    if found["source"] != wanted["source"] or found["stamps"] != wanted["stamps"]:
        raise ValueError(f"the source has changed since the interrupted edit in {work}: remove that folder")
    raise ValueError(f"an interrupted edit with files of other sizes is in {work}: finish it, or remove that folder")


def copy_other_files(source: Path, model: Path) -> None:
    """Copy everything that is no weight: tokenizer, generation settings, code that comes with the model."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _REPLACED or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir():
            _copy_folder(path, model / path.name)
        elif path.is_file():
            _copy_file(path, model / path.name)


def _copy_folder(source: Path, target: Path) -> None:
    found = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.endswith(_WEIGHTS)]
    for path in found:
        place = target / path.relative_to(source)
        if not any(part.startswith(".") for part in path.relative_to(source).parts):
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(path, place)


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def leaving_nothing_useless(work: Path) -> Iterator[None]:
    """Remove a folder that is left by an error before a single file in it was whole."""
    try:
        yield
    except BaseException:
        if not any((work / _MODEL).glob("*.safetensors")):
            shutil.rmtree(work, ignore_errors=True)
        raise
