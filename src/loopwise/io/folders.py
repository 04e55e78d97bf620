"""Files and folders that survive a crash: flushed to the disk, checked, and taken away in one step."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

TRASH = ".trash-"


def write_flushed(path: Path | str, data: bytes) -> None:
    """Write a file and wait until its bytes are on the disk. Not atomic: for files of a folder not yet committed."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path | str) -> None:
    """Wait until the names in a folder (new, renamed, removed) are on the disk."""
    if os.name == "nt":  # folders cannot be opened there, and renames are flushed with the journal
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path | str) -> tuple[int, int]:
    """(size in bytes, CRC-32) of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return size, crc


def discard(path: Path) -> None:
    """Remove a folder so that no moment shows half of it under its name: renamed beside it first, then deleted.

    What cannot be deleted stays under the new name, which starts with `TRASH`.

    Raises:
        OSError: the folder cannot be renamed.
    """
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)
