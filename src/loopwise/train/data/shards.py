"""Token shards: a tokenised corpus as memory-mapped files.

A folder holds

* `tokens-00000.bin`, ...: the token stream cut into files of equal length, uint16 or uint32, little endian;
* `documents.bin`: int64 little endian, where each document starts in the stream, and the end of the last;
* `tokenizer/`: the tokenizer, unless it is the byte tokenizer;
* `index.json`: everything else, with the sha256 of each file. It is written last: a folder without it is not read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.train.data.encoding import BYTES, byte_tokenizer, load_tokenizer
from loopwise.train.data.source import digest

FORMAT = "loopwise tokens"
VERSION = 1
INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.bin"
TOKENIZER_FOLDER = "tokenizer"
DOCUMENTS_DTYPE = np.dtype("<i8")
# What the fingerprint covers: everything that decides the tokens and what they mean.
CONTENT = ("dtype", "num_tokens", "num_documents", "shard_tokens", "shards", "documents", "tokenizer")
_READ_BYTES = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id, little endian; ValueError beyond."""
    if vocab_size > 1 << 32:
        raise ValueError(f"vocab_size={vocab_size}: token ids have at most 32 bits")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """A tokenised corpus on disk; nothing is read before it is asked for.

    Attributes:
        folder: where it lies.
        index: what `index.json` says.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> Shards:
        """Read the index and check that every file is there and has its size.

        Raises:
            ValueError: no such folder, no index, a newer format, a missing or cut file, or an index that was changed.
        """
        folder = Path(folder)
        index = _read_index(folder)
        if index["fingerprint"] != digest({name: index[name] for name in CONTENT}):
            raise ValueError(f"{folder / INDEX_FILE} was changed: its fingerprint is not that of its content")
        shards = cls(folder=folder, index=index)
        sizes = {shard["file"]: shard["tokens"] * shards.dtype.itemsize for shard in index["shards"]}
        sizes[DOCUMENTS_FILE] = (shards.num_documents + 1) * DOCUMENTS_DTYPE.itemsize
        for name, size in sizes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                has = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(f"{path} {has}, the index says {size}: build the folder again")
        return shards

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return self.index["num_tokens"]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.index["num_documents"]

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.index["tokenizer"]["vocab_size"]

    @property
    def pad(self) -> int:
        """The token for positions that nobody reads."""
        return self.index["tokenizer"]["pad"]

    @property
    def fingerprint(self) -> str:
        """The sha256 of the content: tokens, documents and tokenizer."""
        return self.index["fingerprint"]

    @property
    def dtype(self) -> np.dtype:
        """Of the token files."""
        return np.dtype(self.index["dtype"])

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Where documents start in the stream, and where the last one ends: int64 `[num_documents + 1]`, mapped."""
        return np.memmap(self.folder / DOCUMENTS_FILE, DOCUMENTS_DTYPE, mode="r")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that the corpus was made with; ValueError when its files are damaged."""
        if self.index["tokenizer"]["kind"] == BYTES:
            return byte_tokenizer()
        return load_tokenizer(self.folder / TOKENIZER_FOLDER)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 of the stream, int64; across shards where need be."""
        assert 0 <= start <= stop <= self.num_tokens, "outside the token stream"
        parts = []
        size = self.index["shard_tokens"]
        while start < stop:
            number, offset = divmod(start, size)
            part = self._files[number][offset : offset + stop - start]
            parts.append(np.asarray(part, np.int64))
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, its end token included, int64."""
        return self.read(int(self.documents[number]), int(self.documents[number + 1]))

    def verify(self) -> None:
        """Read every byte and compare it with the index.

        Raises:
            ValueError: the first file whose content has changed.
        """
        for name, sha256 in _hashes(self.index):
            if file_sha256(self.folder / name) != sha256:
                raise ValueError(f"{self.folder / name} was changed after it was built: build the folder again")
        starts = self.documents
        if int(starts[0]) != 0 or int(starts[-1]) != self.num_tokens or bool((np.diff(starts) < 0).any()):
            raise ValueError(f"{self.folder / DOCUMENTS_FILE} does not cover the tokens: build the folder again")

    @functools.cached_property
    def _files(self) -> list[np.ndarray]:
        return [np.memmap(self.folder / shard["file"], self.dtype, mode="r") for shard in self.index["shards"]]


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            sha256.update(piece)
    return sha256.hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no token shards (no {INDEX_FILE}): build them with `loopwise data build`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe token shards: build them with `loopwise data build`")
    if index.get("version") != VERSION:
        raise ValueError(f"{path} has version {index.get('version')!r}, this loopwise reads {VERSION}: build it again")
    missing = [name for name in (*CONTENT, "fingerprint") if name not in index]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}: build the folder again")
    return index


def _hashes(index: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield DOCUMENTS_FILE, index["documents"]["sha256"]
    yield from ((shard["file"], shard["sha256"]) for shard in index["shards"])
