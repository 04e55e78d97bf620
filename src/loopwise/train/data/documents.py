"""Documents from files: text, JSON lines, parquet, and folders of the datasets library, one piece after the other.

Only a piece of a document is ever in memory, so that a corpus may be larger than it.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from loopwise.loop.config import suggest

# Long enough that where a piece is cut hardly matters to a tokenizer, short enough to hold many of.
PIECE_CHARACTERS = 1 << 20
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
GZIP_SUFFIX = ".gz"
HUB_PREFIX = "hf:"
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a document, in order.

    Attributes:
        text: not empty.
        ends: it is the last of its document.
    """

    text: str
    ends: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become documents.

    Attributes:
        field: the text in a JSON object, a parquet table or a dataset.
        per: what one document of a text file is: the file, a line, or a paragraph (blank lines between them).
        pattern: names of the files to take from folders, such as "*.c"; None takes every kind known by its suffix.
        split: split of a dataset that has several.
    """

    field: str = "text"
    per: Literal["file", "line", "paragraph"] = "file"
    pattern: str | None = None
    split: str = "train"


class Documents:
    """The documents of files and folders, in the order of the arguments; inside a folder in the order of paths.

    Iterating gives the pieces of one document after another. Text is UTF-8, a byte order mark is dropped, line ends
    stay as they are; `.gz` files are unpacked. Documents without any text are left out.
    """

    def __init__(self, sources: Sequence[str | Path], reading: Reading | None = None) -> None:
        """List the files.

        Args:
            sources: files, folders, folders that `datasets` saved, or "hf:NAME" for a dataset by name.
            reading: how files become documents.

        Raises:
            ValueError: a source does not exist, or a folder has nothing to read.
        """
        self.reading = reading or Reading()
        if not sources:
            raise ValueError("no source is given: name files or folders")
        self._places = [place for source in sources for place in _places(source, self.reading)]
        self._total = sum(place.stat().st_size for place in self._places if isinstance(place, Path))
        self._finished = 0
        self._open: BinaryIO | None = None

    @property
    def files(self) -> list[Path]:
        """The files that are read, in order; datasets are not among them."""
        return [place for place in self._places if isinstance(place, Path) and place.is_file()]

    @property
    def done(self) -> float:
        """The share of the bytes on disk that has been read, 0 to 1."""
        here = self._open.tell() if self._open is not None and not self._open.closed else 0
        return min((self._finished + here) / self._total, 1.0) if self._total else 0.0

    def __iter__(self) -> Iterator[Piece]:
        """Read everything once.

        Raises:
            ValueError: bytes that are not UTF-8, a line that is not JSON, a missing field, an absent library.
        """
        self._finished = 0
        for place in self._places:
            if isinstance(place, str) or place.is_dir():
                yield from _whole(_dataset_texts(place, self.reading), str(place))
            else:
                yield from self._file(place)
                self._finished += place.stat().st_size
            self._open = None

    def _file(self, path: Path) -> Iterator[Piece]:
        suffix = _suffix(path)
        if suffix == PARQUET_SUFFIX:
            yield from _whole(_parquet_texts(path, self.reading.field), str(path))
            return
        with path.open("rb") as raw:
            self._open = raw
            packed = path.suffix.lower() == GZIP_SUFFIX
            stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            # newline="" keeps line ends, so that the bytes of a corpus are those of its files.
            handle = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            try:
                if suffix in JSON_SUFFIXES:
                    yield from _whole(_json_texts(handle, path, self.reading.field), str(path))
                else:
                    yield from _TEXT_READERS[self.reading.per](handle)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from None
            except (gzip.BadGzipFile, EOFError) as error:
                raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _places(source: str | Path, reading: Reading) -> list[Path | str]:
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return [source]
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{source} does not exist: name a file, a folder, or {HUB_PREFIX}NAME for a dataset by name")
    if any((path / name).is_file() for name in _DATASET_FILES):
        return [path]
    files = sorted(
        (file for file in path.rglob("*") if file.is_file() and _is_wanted(file, path, reading.pattern)),
        key=lambda file: file.relative_to(path).parts,
    )
    if not files:
        wanted = f"matches {reading.pattern}" if reading.pattern else f"ends in {', '.join(_known_suffixes())}"
        raise ValueError(f"{source} has no file that {wanted}: name files or another pattern")
    return list(files)


def _is_wanted(file: Path, folder: Path, pattern: str | None) -> bool:
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return False
    return file.match(pattern) if pattern else _suffix(file) in _known_suffixes()


def _known_suffixes() -> tuple[str, ...]:
    return (*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX)


def _suffix(path: Path) -> str:
    """The suffix that says the kind of a file, that of a packed file inside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [GZIP_SUFFIX]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _per_file(handle: io.TextIOBase) -> Iterator[Piece]:
    text = _chunk(handle)
    while text:
        following = _chunk(handle)
        yield Piece(text=text, ends=not following)
        text = following


def _chunk(handle: io.TextIOBase) -> str:
    """About a piece, to the end of a line where lines are shorter than that."""
    return handle.read(PIECE_CHARACTERS) + handle.readline(PIECE_CHARACTERS)


def _per_line(handle: io.TextIOBase) -> Iterator[Piece]:
    for line in handle:
        text = line.rstrip("\r\n")
        if text.strip():
            yield Piece(text=text, ends=True)


def _per_paragraph(handle: io.TextIOBase) -> Iterator[Piece]:
    lines: list[str] = []
    for line in handle:
        if line.strip():
            lines.append(line)
        elif lines:
            yield Piece(text="".join(lines), ends=True)
            lines = []
    if lines:
        yield Piece(text="".join(lines), ends=True)


_TEXT_READERS: dict[str, Callable[[io.TextIOBase], Iterator[Piece]]] = {
    "file": _per_file,
    "line": _per_line,
    "paragraph": _per_paragraph,
}


def _json_texts(handle: io.TextIOBase, path: Path, field: str) -> Iterator[Any]:
    for number, line in enumerate(handle, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object: the file must hold one on each line")
        _check_field(field, row, f"{path} line {number}")
        yield row[field]


def _parquet_texts(path: Path, field: str) -> Iterator[Any]:
    parquet = _library("pyarrow.parquet", f"reading {path}")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise ValueError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    _check_field(field, file.schema_arrow.names, str(path))
    for rows in file.iter_batches(batch_size=256, columns=[field]):
        yield from rows.column(0).to_pylist()


def _dataset_texts(place: Path | str, reading: Reading) -> Iterator[Any]:
    datasets = _library("datasets", f"reading {place}")
    try:
        if isinstance(place, str):
            found = datasets.load_dataset(place.removeprefix(HUB_PREFIX), split=reading.split)
        else:
            found = datasets.load_from_disk(str(place))
    except Exception as error:  # the library raises errors of many kinds for a missing set, split or network
        raise ValueError(f"cannot load the dataset {place}: {(str(error).splitlines() or ['?'])[0]}") from None
    if isinstance(found, dict):
        if reading.split not in found:
            raise ValueError(f"{place} has no split {reading.split!r}{suggest(reading.split, found)}")
        found = found[reading.split]
    _check_field(reading.field, found.column_names, str(place))
    for row in found.select_columns([reading.field]):
        yield row[reading.field]


def _whole(texts: Iterator[Any], place: str) -> Iterator[Piece]:
    """Documents that come as one text each; a missing text is no document."""
    for number, text in enumerate(texts, 1):
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise ValueError(f"{place}: document {number} is {type(text).__name__}, not a text: name another field")
        starts = range(0, len(text), PIECE_CHARACTERS)
        yield from (Piece(text=text[start : start + PIECE_CHARACTERS], ends=start == starts[-1]) for start in starts)


def _check_field(field: str, known: Any, place: str) -> None:
    if field not in known:
        raise ValueError(f"{place} has no field {field!r}{suggest(field, known)}")


def _library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        root = name.split(".")[0]
        raise ValueError(f"{purpose} needs the package {root}: pip install 'loopwise[data]'") from None
