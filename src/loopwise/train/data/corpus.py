"""Corpora that are tokenised on first use and kept: the Python standard library, and a person's own files."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loopwise.train.data.build import build, write
from loopwise.train.data.documents import Documents, Piece, Reading
from loopwise.train.data.encoding import BYTES, encoder
from loopwise.train.data.shards import INDEX_FILE, VERSION, Shards
from loopwise.train.data.source import digest

CACHE_VARIABLE = "LOOPWISE_CACHE"
STDLIB = "stdlib"
# Foreign packages; tests, which are as much text again and much of it generated; compiled files.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when Python was built, with paths of that machine.
_LEFT_OUT_PREFIX = "_sysconfigdata"


def cache_folder() -> Path:
    """Where tokenised corpora are kept: $LOOPWISE_CACHE, else `~/.cache/loopwise`."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "loopwise"


def stdlib_files(folder: Path | None = None) -> list[Path]:
    """The source files of the standard library of this Python, sorted by path, without tests.

    Raises:
        ValueError: there are none, as where Python comes as one archive.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found = []
    for root, folders, names in os.walk(folder):
        # Foreign packages are most of what lies below; they are not even walked.
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(root, name) for name in names if _is_wanted(name)]
    if not found:
        raise ValueError(f"{folder} has no source of the standard library: name a text with data.source=FILE")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def stdlib_corpus(folder: Path | None = None, *, tokenizer: str = BYTES) -> Shards:
    """The source text of the Python standard library, about 12 M bytes, one document a file.

    It is the same on machines with the same Python release; another release has another fingerprint.

    Args:
        folder: the library; None is that of this Python.
        tokenizer: see `encoding.encoder`.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files, encoding = stdlib_files(folder), encoder(tokenizer)
    said: list[Any] = [VERSION, [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]]
    if tokenizer != BYTES:
        said.append(encoding.sha256)
    name = f"{STDLIB}-{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}-{digest(said)[:16]}"
    return kept(name, lambda dst: write(dst, _sources(files), encoding, where=str(folder)))


def text_corpus(source: str, *, tokenizer: str = BYTES, reading: Reading | None = None) -> Shards:
    """A file or folder tokenised into the cache, again when a name, size or time of change differs.

    Args:
        source: see `Documents`.
        tokenizer: see `encoding.encoder`.
        reading: how files become documents.

    Raises:
        ValueError: see `build`; or the source is a dataset, whose changes cannot be seen.
    """
    reading = reading or Reading()
    documents = Documents([source], reading)
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in documents.files]
    if not stats:
        raise ValueError(f"{source} is a dataset: tokenise it with `loopwise data build` and use data=shards")
    said = [VERSION, stats, encoder(tokenizer).sha256, reading.field, reading.per, reading.pattern]
    return kept(f"text-{digest(said)[:32]}", lambda dst: build([source], dst, tokenizer=tokenizer, reading=reading))


def kept(name: str, make: Callable[[Path], object]) -> Shards:
    """The shards of that name in the cache, made if they are not there.

    Processes that start together may all make them: the first that is ready puts its folder in place.

    Raises:
        ValueError: the cache cannot be written, or what is there is damaged.
    """
    folder = cache_folder() / name
    if not (folder / INDEX_FILE).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            make(folder)
        except OSError as error:
            raise ValueError(
                f"cannot write {folder}: {error.strerror}; set {CACHE_VARIABLE} to a folder with room that can be "
                "written"
            ) from None
        except ValueError:
            if not (folder / INDEX_FILE).is_file():
                raise
    return Shards.open(folder)


def _is_wanted(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(_LEFT_OUT_PREFIX)


def _sources(files: list[Path]) -> Iterator[Piece]:
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            # A few sources are in other encodings on purpose.
            continue
        if text:
            yield Piece(text=text, ends=True)
