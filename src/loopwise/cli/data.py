"""`loopwise data`: token shards from texts, and what is in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from loopwise.cli import common

if TYPE_CHECKING:
    from loopwise.train.data.build import Progress
    from loopwise.train.data.shards import Shards

_SAMPLE_TOKENS = 200
_SAMPLE_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Build:
    """Arguments of `loopwise data build`."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="SRC... DST", help_behavior_hint="")]
    """texts, JSON lines, parquet, folders of them, a folder that datasets saved, or hf:NAME; last, the new folder"""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a model folder or name whose tokenizer is used"""
    field: str = "text"
    """the text in a JSON line, a parquet table or a dataset"""
    per: Literal["file", "line", "paragraph"] = "file"
    """what one document of a text file is"""
    pattern: str | None = None
    """names of the files to take from folders, such as "*.c"; default every known kind"""
    split: str = "train"
    """split of a dataset that has several"""
    bos: FlagCreatePairsOff[bool] = False
    """begin every document with the tokenizer's begin token"""
    eos: str | None = None
    """token that ends every document, for a tokenizer that does not say it"""
    shard_tokens: int = 1 << 27
    """tokens in one file"""

    def run(self) -> None:
        """Tokenise, and print what was written."""
        if len(self.paths) < 2:
            raise ValueError("data build needs sources and, last, the new folder: loopwise data build SRC... DST")
        common.quiet_libraries()
        from loopwise.train.data.build import build
        from loopwise.train.data.documents import Reading

        *sources, dst = self.paths
        reading = Reading(field=self.field, per=self.per, pattern=self.pattern, split=self.split)
        with _progress() as on_progress:
            shards = build(
                sources,
                dst,
                tokenizer=self.tokenizer,
                reading=reading,
                bos=self.bos,
                eos=self.eos,
                shard_tokens=self.shard_tokens,
                on_progress=on_progress,
            )
        plural = "s" * (shards.num_documents != 1)
        print(
            f"wrote {dst} ({shards.num_documents:,} document{plural}, {shards.num_tokens:,} tokens, "
            f"{common.size_of(Path(dst))}, fingerprint {shards.fingerprint[:16]})"
        )


@dataclass(frozen=True, kw_only=True)
class Show:
    """Arguments of `loopwise data show`."""

    folder: Positional[Path]
    """what `loopwise data build` wrote"""
    verify: FlagCreatePairsOff[bool] = False
    """read every byte and compare it with the index"""
    as_json: Annotated[FlagCreatePairsOff[bool], arg(name="json")] = False
    """print JSON"""

    def run(self) -> None:
        """Print what the folder holds and how it begins."""
        common.quiet_libraries()
        from loopwise.train.data.shards import Shards

        shards = Shards.open(self.folder)
        if self.verify:
            shards.verify()
        facts = summary(shards) | ({"verified": True} if self.verify else {})
        if self.as_json:
            print(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            _print_facts(facts, sample(shards))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Arguments of `loopwise data`."""

    command: (
        Annotated[Build, subcommand("build", description="Tokenise texts into a folder of token shards.")]
        | Annotated[Show, subcommand("show", description="Show what a folder of token shards holds.")]
    )

    def run(self) -> None:
        """Run the command below."""
        self.command.run()


def summary(shards: Shards) -> dict[str, Any]:
    """What a folder of shards holds, in plain values; lengths of documents count the end token."""
    import numpy as np

    lengths = np.diff(shards.documents)
    return {
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "document_tokens": {
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "dtype": shards.dtype.name,
        "files": len(shards.index["shards"]),
        "tokenizer": shards.index["tokenizer"]["kind"],
        "vocab_size": shards.vocab_size,
        "tokenizer_sha256": shards.index["tokenizer"]["sha256"],
        "fingerprint": shards.fingerprint,
    }


def sample(shards: Shards) -> str:
    """How the first document begins, as text."""
    stop = min(_SAMPLE_TOKENS, int(shards.documents[1]))
    return shards.tokenizer.decode(shards.read(0, stop), skip_special_tokens=False)[:_SAMPLE_CHARACTERS]


def _print_facts(facts: dict[str, Any], begins: str) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    lengths = facts["document_tokens"]
    rows = {
        "documents": f"{facts['documents']:,}",
        "tokens": f"{facts['tokens']:,} in {facts['files']} file{'s' * (facts['files'] > 1)} of {facts['dtype']}",
        "document length": f"{lengths['shortest']:,} to {lengths['longest']:,}, median {lengths['median']:,.10g}",
        "tokenizer": f"{facts['tokenizer']}, {facts['vocab_size']:,} ids",
        "fingerprint": facts["fingerprint"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out = common.console()
    out.print(table)
    if facts.get("verified"):
        out.print("every file is as it was written")
    out.print(f"\n{begins}", markup=False)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A bar with an estimate on a terminal; nothing elsewhere, where the last line says it all."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=common.console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)

        def show(progress: Any) -> None:
            text = f"{progress.documents:,} documents, {progress.tokens:,} tokens"
            bar.update(task, completed=progress.done or 0.0, description=text)

        yield show
