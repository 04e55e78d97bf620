"""Token shards: written whole or not at all, read back exactly, damage found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopwise.train.data.build import Progress, build, write
from loopwise.train.data.documents import Piece, Reading
from loopwise.train.data.encoding import ByteEncoder
from loopwise.train.data.shards import Shards, token_dtype
from tests.train.data.corpora import NumberEncoder, law, numbered, of_bytes

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@law
@given(texts=st.lists(TEXT, min_size=1, max_size=8), shard_tokens=st.integers(1, 30), data=st.data())
def test_what_is_written_is_read(
    texts: list[str], shard_tokens: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "out"
    shards = of_bytes(folder, texts, shard_tokens=shard_tokens)
    stream = [token for text in texts for token in (*text.encode(), 257)]
    assert shards.read(0, shards.num_tokens).tolist() == stream
    assert [shards.document(number).tolist() for number in range(len(texts))] == [[*t.encode(), 257] for t in texts]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert shards.read(start, stop).tolist() == stream[start:stop]
    assert len(shards.index["shards"]) == -(-len(stream) // shard_tokens)
    shards.verify()


def test_many_short_pieces_are_one_stream(tmp_path: Path) -> None:
    """Encoding in batches changes nothing, wherever documents end."""
    pieces = [Piece(text=f"{number} " * 1000, ends=number % 3 == 2) for number in range(999)]
    shards = write(tmp_path / "out", pieces, ByteEncoder(), bos=True)
    documents = ["".join(piece.text for piece in pieces[number : number + 3]) for number in range(0, 999, 3)]
    assert shards.num_documents == len(documents)
    for number in (0, 1, 200, 332):
        assert shards.document(number).tolist() == [256, *documents[number].encode(), 257]


def test_the_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(1 << 16) == np.dtype("<u2")
    assert token_dtype((1 << 16) + 1) == np.dtype("<u4")
    with pytest.raises(ValueError, match="at most 32 bits"):
        token_dtype((1 << 32) + 1)
    wide = write(tmp_path / "wide", [Piece(text="65536 65535", ends=True)], NumberEncoder(65537))
    assert wide.dtype == np.dtype("<u4") and wide.document(0).tolist() == [65536, 65535, 0]


def test_files_and_a_transformers_tokenizer(tmp_path: Path) -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_text("a b\nb b c\n", encoding="utf-8")
    seen: list[Progress] = []
    shards = build(
        [tmp_path / "texts"],
        tmp_path / "out",
        tokenizer=tokenizer,
        reading=Reading(per="line"),
        on_progress=seen.append,
    )
    assert [shards.document(number).tolist() for number in range(2)] == [[2, 3, 1], [3, 3, 0, 1]]
    assert shards.tokenizer("b a")["input_ids"] == [3, 2], "the tokenizer lies beside the tokens"
    assert (seen[-1].documents, seen[-1].tokens, seen[-1].done) == (2, 7, 1.0)
    with pytest.raises(ValueError, match="no token that ends a text"):
        build([tmp_path / "texts"], tmp_path / "x", tokenizer=PreTrainedTokenizerFast(tokenizer_object=raw))
    with pytest.raises(ValueError, match="no token that begins a text"):
        build([tmp_path / "texts"], tmp_path / "x", tokenizer=tokenizer, bos=True)


def test_equal_content_has_one_fingerprint(tmp_path: Path) -> None:
    first, second = of_bytes(tmp_path / "a", ["one", "two"]), of_bytes(tmp_path / "b", ["one", "two"])
    assert first.fingerprint == second.fingerprint
    others = [
        of_bytes(tmp_path / str(n), texts) for n, texts in enumerate((["one", "twp"], ["two", "one"], ["onetwo"]))
    ]
    others.append(write(tmp_path / "n", [Piece(text="1", ends=True)], NumberEncoder(259)))
    assert len({shards.fingerprint for shards in (first, *others)}) == 5


def test_a_taken_destination_is_refused(tmp_path: Path) -> None:
    of_bytes(tmp_path / "out", ["one"])
    before = (tmp_path / "out" / "index.json").read_bytes()
    with pytest.raises(ValueError, match="out exists and is not empty"):
        of_bytes(tmp_path / "out", ["two"])
    assert (tmp_path / "out" / "index.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not a folder"):
        of_bytes(tmp_path / "file", ["two"])
    with pytest.raises(ValueError, match="missing is not a folder: create it first"):
        of_bytes(tmp_path / "missing" / "out", ["two"])
    (tmp_path / "empty").mkdir()
    assert of_bytes(tmp_path / "empty", ["two"]).num_documents == 1


def test_a_destination_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece(text="mine", ends=True)
        of_bytes(tmp_path / "out", ["theirs"])

    with pytest.raises(ValueError, match="out exists and is not empty"):
        write(tmp_path / "out", pieces(), ByteEncoder())
    assert bytes(Shards.open(tmp_path / "out").document(0)[:-1].tolist()) == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece(text="x" * 100, ends=True)
        raise error("stop")

    with pytest.raises(error):
        write(tmp_path / "out", pieces(), ByteEncoder(), shard_tokens=10)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from loopwise.train.data.build import write
from loopwise.train.data.documents import Piece
from loopwise.train.data.encoding import ByteEncoder

def pieces():
    number = 0
    while True:
        yield Piece(text="x" * 5000, ends=True)
        number += 1
        if number == 500:
            print("going", flush=True)

write(Path(sys.argv[1]) / "out", pieces(), ByteEncoder(), shard_tokens=1 << 20)
"""


def test_a_killed_build_leaves_nothing_that_loads(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    remains = list(tmp_path.iterdir())
    assert remains and all(path.name.startswith(".out-") for path in remains), "killed while it wrote"
    for path in remains:
        with pytest.raises(ValueError, match="holds no token shards"):
            Shards.open(path)
    assert of_bytes(tmp_path / "out", ["again"]).num_documents == 1


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="a.txt has no text in it"):
        build([tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(ValueError, match="shard_tokens=0"):
        build([tmp_path / "a.txt"], tmp_path / "out", shard_tokens=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    shards = numbered(tmp_path / "out", [20, 30, 25])
    names = sorted(path.name for path in shards.folder.iterdir() if path.suffix == ".bin")
    assert names == ["documents.bin", "tokens-00000.bin", "tokens-00001.bin"]
    rng = np.random.default_rng(0)
    for name in names:
        path = shards.folder / name
        whole = path.read_bytes()
        for place in rng.integers(len(whole), size=10):
            broken = bytearray(whole)
            broken[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=f"{name} was changed after it was built"):
                Shards.open(shards.folder).verify()
        path.write_bytes(whole)
    Shards.open(shards.folder).verify()


def changed(folder: Path, **values: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_damage_that_opening_finds(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "out", [20, 30, 25]).folder
    index = (folder / "index.json").read_text()
    for values, message in (
        ({"num_tokens": 74}, "was changed: its fingerprint is not that of its content"),
        ({"fingerprint": "0" * 64}, "was changed"),
        ({"version": 2}, "has version 2, this loopwise reads 1"),
        ({"format": "other"}, "does not describe token shards"),
    ):
        changed(folder, **values)
        with pytest.raises(ValueError, match=message):
            Shards.open(folder)
        (folder / "index.json").write_text(index)
    (folder / "index.json").write_text(index[:-20])
    with pytest.raises(ValueError, match="index.json is not JSON"):
        Shards.open(folder)
    (folder / "index.json").write_text(index)
    os.truncate(folder / "tokens-00001.bin", 10)
    with pytest.raises(ValueError, match="tokens-00001.bin has 10 bytes, the index says 50"):
        Shards.open(folder)
    (folder / "documents.bin").unlink()
    (folder / "tokens-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"\.bin is missing"):
        Shards.open(folder)
    with pytest.raises(ValueError, match="nowhere holds no token shards"):
        Shards.open(tmp_path / "nowhere")


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    size = 40 << 20
    path.write_bytes((b"forty bytes of text, end of line included\n" * (size // 42 + 1))[:size])
    tracemalloc.start()
    shards = build([path], tmp_path / "out", shard_tokens=1 << 23)
    for start in range(0, size, 1 << 22):
        shards.read(start, start + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shards.num_tokens == size + 1
    assert peak < size / 2, f"{peak / 1e6:.0f} MB for a corpus of {size / 1e6:.0f} MB"
