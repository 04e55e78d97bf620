"""Text as training data: `data.text` from files, `data.shards` from a folder that `loopwise data build` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from loopwise.train.data.corpus import STDLIB, stdlib_corpus, text_corpus
from loopwise.train.data.documents import Reading
from loopwise.train.data.encoding import BYTES
from loopwise.train.data.shards import Shards
from loopwise.train.data.source import DataConfig
from loopwise.train.data.windows import WindowSource


@dataclass(frozen=True, kw_only=True)
class WindowsConfig(DataConfig):
    """Base of the kinds of data that are cut into rows of tokens.

    Attributes:
        length: T, tokens in a row.
        mode: "joined" (windows of all documents laid end to end) or "packed" (documents kept apart).
        held_out: share of the documents in each of the splits "valid" and "test"; 0 holds nothing out.
    """

    length: int = 256
    mode: Literal["joined", "packed"] = "joined"
    held_out: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.length >= 1, "length", "must be at least 1")
        self.require(0 <= self.held_out < 0.5, "held_out", "must be at least 0 and below 0.5")

    def open(self, *, seed: int) -> WindowSource:
        """The rows in the order of this seed."""
        shards = self.shards()
        try:
            return WindowSource(shards, seed=seed, length=self.length, mode=self.mode, held_out=self.held_out)
        except ValueError as error:
            raise ValueError(f"{self.kind}: {error}") from None

    def shards(self) -> Shards:
        """The tokenised corpus."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TextData(WindowsConfig):
    """Text files, tokenised on first use and kept in the cache folder.

    Attributes:
        source: a file or a folder; "stdlib" is the source of the Python standard library.
        tokenizer: "bytes", a `tokenizer.json`, or any source of `loopwise.load_tokenizer`.
        field: the text in JSON lines or parquet.
        per: what one document of a text file is.
    """

    kind: ClassVar[str | None] = "data.text"
    source: str = STDLIB
    tokenizer: str = BYTES
    field: str = "text"
    per: Literal["file", "line", "paragraph"] = "file"

    def shards(self) -> Shards:
        """The tokenised corpus, made if this is the first use."""
        if self.source == STDLIB:
            return stdlib_corpus(tokenizer=self.tokenizer)
        return text_corpus(self.source, tokenizer=self.tokenizer, reading=Reading(field=self.field, per=self.per))


@dataclass(frozen=True, kw_only=True)
class ShardsData(WindowsConfig):
    """Token shards on disk.

    Attributes:
        folder: what `loopwise data build` wrote.
    """

    kind: ClassVar[str | None] = "data.shards"
    folder: str

    def shards(self) -> Shards:
        """The shards as they lie."""
        return Shards.open(self.folder)
