"""Writing token shards: documents are encoded batch by batch, and the folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loopwise.train.data import shards as layout
from loopwise.train.data.documents import PIECE_CHARACTERS, Documents, Piece, Reading
from loopwise.train.data.encoding import BYTES, Encoder, encoder
from loopwise.train.data.shards import Shards
from loopwise.train.data.source import digest

SHARD_TOKENS = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is.

    Attributes:
        documents: documents written.
        tokens: tokens written.
        done: share of the sources that has been read, 0 to 1, or None when it is not known.
    """

    documents: int
    tokens: int
    done: float | None


OnProgress = Callable[[Progress], None]


def build(
    sources: Sequence[str | Path],
    dst: Path | str,
    *,
    tokenizer: Any = BYTES,
    reading: Reading | None = None,
    bos: bool = False,
    eos: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    on_progress: OnProgress | None = None,
) -> Shards:
    """Tokenise files into a new folder of shards.

    Args:
        sources: files, folders, folders that `datasets` saved, or "hf:NAME"; see `Documents`.
        dst: the new folder; must not exist, or be empty.
        tokenizer: see `encoding.encoder`.
        reading: how files become documents.
        bos: begin every document with the tokenizer's begin token.
        eos: token that ends every document, for a tokenizer that does not say it.
        shard_tokens: tokens in one file, at least 1.
        on_progress: called now and then.

    Raises:
        ValueError: `dst` is taken, a source cannot be read or has no text, or the tokenizer does not fit.
    """
    _check_free(Path(dst))
    documents = Documents(sources, reading)
    encoding = encoder(tokenizer, eos=eos)

    def report(count: int, tokens: int) -> None:
        if on_progress is not None:
            on_progress(Progress(documents=count, tokens=tokens, done=documents.done))

    where = ", ".join(map(str, sources[:3])) + (", ..." if len(sources) > 3 else "")
    return write(dst, documents, encoding, bos=bos, shard_tokens=shard_tokens, where=where, report=report)


def write(
    dst: Path | str,
    pieces: Iterable[Piece],
    encoding: Encoder,
    *,
    bos: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    where: str = "the source",
    report: Callable[[int, int], None] | None = None,
) -> Shards:
    """Tokenise pieces of documents into a new folder of shards; see `build`.

    Args:
        dst: the new folder.
        pieces: documents piece by piece.
        encoding: makes the ids.
        bos: begin every document with the begin token.
        shard_tokens: tokens in one file.
        where: what messages call the source.
        report: called with the documents and tokens written so far.
    """
    dst = Path(dst)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}: a shard holds at least 1 token")
    if encoding.eos is None:
        raise ValueError("the tokenizer has no token that ends a text: name one with eos, such as eos='</s>'")
    if bos and encoding.bos is None:
        raise ValueError("bos: the tokenizer has no token that begins a text, leave it out")
    with _new_folder(dst) as folder:
        with _Writer(folder, layout.token_dtype(encoding.vocab_size), shard_tokens) as writer:
            for tokens, begins, ends in _encoded(pieces, encoding):
                if begins and bos:
                    writer.append(np.array([encoding.bos]))
                writer.append(tokens)
                if ends:
                    writer.append(np.array([encoding.eos]))
                    writer.end_document()
                if report is not None:
                    report(writer.num_documents, writer.num_tokens)
        if not writer.num_documents:
            raise ValueError(f"{where} has no text in it")
        (folder / layout.TOKENIZER_FOLDER).mkdir()
        encoding.save(folder / layout.TOKENIZER_FOLDER)
        if not any((folder / layout.TOKENIZER_FOLDER).iterdir()):
            (folder / layout.TOKENIZER_FOLDER).rmdir()
        _write_index(folder, writer, encoding)
    return Shards.open(dst)


class _Writer:
    """Appends tokens to shards of equal length and document starts to their file."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.num_tokens = self.num_documents = 0
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self._documents = (folder / layout.DOCUMENTS_FILE).open("wb")
        self._documents_sha256 = hashlib.sha256()
        self._start_document()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_shard()
        _close(self._documents)

    @property
    def documents_sha256(self) -> str:
        return self._documents_sha256.hexdigest()

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._file is None:
                name = f"tokens-{len(self.shards):05d}.bin"
                self._file, self._sha256 = (self.folder / name).open("wb"), hashlib.sha256()
                self.shards.append({"file": name, "tokens": 0})
            shard = self.shards[-1]
            part = tokens[: self.shard_tokens - shard["tokens"]]
            data = part.astype(self.dtype).tobytes()
            self._file.write(data)
            self._sha256.update(data)
            shard["tokens"] += len(part)
            self.num_tokens += len(part)
            tokens = tokens[len(part) :]
            if shard["tokens"] == self.shard_tokens:
                self._end_shard()

    def end_document(self) -> None:
        self.num_documents += 1
        self._start_document()

    def _start_document(self) -> None:
        data = np.array([self.num_tokens], layout.DOCUMENTS_DTYPE).tobytes()
        self._documents.write(data)
        self._documents_sha256.update(data)

    def _end_shard(self) -> None:
        if self._file is not None:
            _close(self._file)
            self.shards[-1]["sha256"] = self._sha256.hexdigest()
            self._file = None


def _encoded(pieces: Iterable[Piece], encoding: Encoder) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """(tokens, begins a document, ends it); many short pieces are encoded in one call, which is much faster."""
    begins = True
    waiting: list[Piece] = []
    characters = 0
    for piece in pieces:
        waiting.append(piece)
        characters += len(piece.text)
        if characters >= PIECE_CHARACTERS:
            for done, tokens in zip(waiting, encoding.encode([one.text for one in waiting]), strict=True):
                yield tokens, begins, done.ends
                begins = done.ends
            waiting, characters = [], 0
    for done, tokens in zip(waiting, encoding.encode([one.text for one in waiting]) if waiting else [], strict=True):
        yield tokens, begins, done.ends
        begins = done.ends


def _write_index(folder: Path, writer: _Writer, encoding: Encoder) -> None:
    content = {
        "dtype": writer.dtype.str,
        "num_tokens": writer.num_tokens,
        "num_documents": writer.num_documents,
        "shard_tokens": writer.shard_tokens,
        "shards": writer.shards,
        "documents": {"file": layout.DOCUMENTS_FILE, "sha256": writer.documents_sha256},
        "tokenizer": {
            "kind": encoding.kind,
            "sha256": encoding.sha256,
            "vocab_size": encoding.vocab_size,
            "bos": encoding.bos,
            "eos": encoding.eos,
            "pad": encoding.pad,
        },
    }
    assert set(content) == set(layout.CONTENT)
    index = {"format": layout.FORMAT, "version": layout.VERSION, **content, "fingerprint": digest(content)}
    with (folder / layout.INDEX_FILE).open("wb") as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())
        _close(file)


@contextmanager
def _new_folder(dst: Path) -> Iterator[Path]:
    """A neighbouring folder to fill, which becomes `dst` at the end; on an error nothing is left."""
    _check_free(dst)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            # Replaces an empty folder; one that was filled meanwhile stays.
            os.rename(temporary, dst)
        except OSError:
            _check_free(dst)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(dst: Path) -> None:
    if dst.is_dir():
        if any(dst.iterdir()):
            raise ValueError(f"{dst} exists and is not empty: name a new folder")
    elif dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst} exists and is not a folder: name a new folder")
    if not dst.absolute().parent.is_dir():
        raise ValueError(f"{dst.absolute().parent} is not a folder: create it first")


def _close(file: BinaryIO) -> None:
    """Close a file once its content is on disk, since the index that follows vouches for it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
